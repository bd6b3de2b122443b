"""The policy file: a learned policy's weights as GGUF. The format is docs/policy-format.md."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.cache.types import KVTypes
from kvp_edge.errors import OptionError, PolicyFileError
from kvp_edge.files import open_regular, replacing
from kvp_edge.files.gguf_file import MAGIC, GGUFFile
from kvp_edge.files.json_values import is_a, require, shortened

OutType = Literal["f32", "f16", "q8_0"]

#: What one network scores: "head": one KV head, by its own keys and values. "layer": all KV heads
#: of a layer, by the keys and values of all of them.
Scope = Literal["head", "layer"]

#: Of the format that a policy of each scope is written in.
FORMAT_VERSIONS: dict[Scope, int] = {"head": 1, "layer": 2}
OBJECTIVES = ("kvp", "foresight", "global", "regression")
N_POSITION_FEATURES = 4
#: What a token's score is computed from, in the order of the first layer's inputs.
FEATURES = (
    "key",
    "value",
    "log2(1+p)/16",
    "sin(log2(1+p))",
    "cos(log2(1+p))",
    "1/(1+p)",
)

#: Numbers of PolicyInfo that must be from 1 to ``_MOST``, and their keys.
_AT_LEAST_1 = {
    "n_layer": "kvp.block_count",
    "n_head_kv": "kvp.head_count_kv",
    "head_size_k": "kvp.key_length",
    "head_size_v": "kvp.value_length",
    "hidden": "kvp.hidden_sizes",
    "context": "kvp.context_width",
    "horizon": "kvp.retention.horizon",
}
_MOST = 2**31 - 1
_MOST_BYTES = 2**32  # those of the largest models have 2^26

_AGGREGATE = "kvp_aggregate.weight"
_SENSITIVITY = "kvp_sensitivity.weight"
_AGEING = "kvp_ageing.weight"
_OFF_MEAN = 1e-3  # that the mean sensitivity may be off from 1
_Q8_0_BLOCK = 32


@dataclass(frozen=True)
class PolicyInfo:
    """What a policy file says of itself. ``n_layer`` counts the layers of the base KV cache;
    ``horizon`` is of gates (objective "global", kvp_edge.policies.retention); ``fingerprint`` and
    ``model_identity`` are of the traced model (kvp_edge.binding.fingerprint), or empty; ``kv_type``
    is what suits that model's cache best if its budget is memory ("q8_0/q4_0"), or empty."""

    architecture: str
    n_layer: int
    n_head_kv: int
    head_size_k: int
    head_size_v: int
    hidden: int
    context: int
    name: str = "policy"
    objective: str = "kvp"
    sinks: int = 4
    recent: int = 32
    horizon: int = 1024
    base_model: str = ""
    fingerprint: str = ""
    model_identity: str = ""
    training_data: str = ""
    license: str = ""
    scope: Scope = "head"
    kv_type: str = ""

    @property
    def n_networks(self) -> int:
        """Of each layer; each scores an equal share of its KV heads."""
        return networks_of_layer(self.scope, self.n_head_kv)


def networks_of_layer(scope: Scope, n_head_kv: int) -> int:
    """How many networks score a layer's KV heads."""
    return 1 if scope == "layer" else n_head_kv


@dataclass(frozen=True)
class PolicyWeights:
    """f32 arrays; L layers, H KV heads, h hidden units, w context width, standardisation folded in.
    G networks score a layer, each H/G heads side by side: H of them (scope "head") or 1 ("layer").

    Attributes:
        key [L, G, h, H/G * head_size_k], value [L, G, h, H/G * head_size_v], position [L, G, h, 4],
        fc1_bias [L, G, h]: the first layer, on the keys and values of the network's heads, head by
            head.
        conv [L, G, w, h]: over tokens; conv[:, :, w // 2] is the token's own. All 1 for w = 1.
        fc2 [L, G, h, h], fc2_bias [L, G, h]; out [L, G, H/G, h], a row for each head.
        aggregate [L, H]: weights of the heads' scores in the score of a whole token.
        sensitivity [L, H]: how much the model's loss rises when that head loses its rows, relative
            to the other heads: not negative, mean 1. None: the file does not say.
        ageing [L, H]: how much of a score fades while a token's age doubles
            (kvp_edge.policies.ageing). None: nothing.
    """

    key: FloatArray
    value: FloatArray
    position: FloatArray
    fc1_bias: FloatArray
    conv: FloatArray
    fc2: FloatArray
    fc2_bias: FloatArray
    out: FloatArray
    aggregate: FloatArray
    sensitivity: FloatArray | None = None
    ageing: FloatArray | None = None

    def arrays(self) -> dict[str, FloatArray]:
        """Those that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


#: attribute of PolicyWeights -> name of its tensor, one per layer
_TENSORS = {
    "key": "blk.{}.kvp_key.weight",
    "value": "blk.{}.kvp_value.weight",
    "position": "blk.{}.kvp_position.weight",
    "fc1_bias": "blk.{}.kvp_fc1.bias",
    "conv": "blk.{}.kvp_conv.weight",
    "fc2": "blk.{}.kvp_fc2.weight",
    "fc2_bias": "blk.{}.kvp_fc2.bias",
    "out": "blk.{}.kvp_out.weight",
}
#: The large ones, which are stored as --outtype says; the others stay f32.
_TYPED = ("key", "value", "fc2")


def weight_shapes(info: PolicyInfo) -> dict[str, tuple[int, ...]]:
    """The shape of every array of PolicyWeights that a policy of this kind must have."""
    nets, h = (info.n_layer, info.n_networks), info.hidden
    each = info.n_head_kv // info.n_networks
    return {
        "key": (*nets, h, each * info.head_size_k),
        "value": (*nets, h, each * info.head_size_v),
        "position": (*nets, h, N_POSITION_FEATURES),
        "fc1_bias": (*nets, h),
        "conv": (*nets, info.context, h),
        "fc2": (*nets, h, h),
        "fc2_bias": (*nets, h),
        "out": (*nets, each, h),
        "aggregate": (info.n_layer, info.n_head_kv),
    }


def _stored_shapes(info: PolicyInfo) -> dict[str, tuple[int, ...]]:
    """The shape of a layer's tensors in the file: without an axis of networks where there is one
    alone for all heads. ``out`` has a row for each of the layer's heads, whoever scores them."""
    shapes = weight_shapes(info)
    first = 2 if info.scope == "layer" else 1
    stored = {attribute: shapes[attribute][first:] for attribute in _TENSORS}
    return {**stored, "out": (info.n_head_kv, info.hidden)}


def check_model(
    info: PolicyInfo,
    *,
    architecture: str,
    n_layer: int,
    n_head_kv: int,
    head_size_k: int,
    head_size_v: int,
    fingerprint: str = "",
    model_identity: str = "",
) -> None:
    """Whether the policy was trained for this model; the sizes are those of its base KV cache.

    Another fingerprint and another identity (kvp_edge.binding.fingerprint), or none, are a warning.

    Raises:
        PolicyFileError: another architecture or shape.
    """
    if info.architecture != architecture:
        raise PolicyFileError(
            f"the policy '{info.name}' is for the architecture '{info.architecture}', but the "
            f"model's is '{architecture}'"
        )
    ours = (info.n_layer, info.n_head_kv, info.head_size_k, info.head_size_v)
    theirs = (n_layer, n_head_kv, head_size_k, head_size_v)
    if ours != theirs:
        raise PolicyFileError(
            f"the policy '{info.name}' is for a cache of {_shape_words(*ours)}, but the "
            f"model's has {_shape_words(*theirs)}"
        )
    same_model = info.model_identity and info.model_identity == model_identity
    if info.fingerprint and fingerprint and info.fingerprint != fingerprint and not same_model:
        warnings.warn(
            f"the policy '{info.name}' was trained with another model file "
            f"('{info.base_model}'). This is fine if that is another quantisation of the same "
            "model",
            stacklevel=2,
        )


def _shape_words(n_layer: int, n_head_kv: int, head_size_k: int, head_size_v: int) -> str:
    return f"{n_layer} layers x {n_head_kv} KV heads x {head_size_k}+{head_size_v}"


def write_policy(
    path: str | os.PathLike[str], info: PolicyInfo, weights: PolicyWeights, outtype: OutType = "f16"
) -> None:
    """Write a policy file, whole or not at all.

    Raises:
        PolicyFileError: weights of another shape than ``info`` says, or not finite.
    """
    _check_weights(info, weights, "the policy")
    try:
        with replacing(path) as file:
            _write(file.name, info, weights, outtype)
    except OSError as error:
        raise OSError(f"cannot write '{os.fspath(path)}': {error.strerror}") from error


def _write(path: str, info: PolicyInfo, weights: PolicyWeights, outtype: OutType) -> None:
    import gguf  # noqa: PLC0415

    writer = gguf.GGUFWriter(path, info.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "kvp")
    writer.add_name(info.name)
    writer.add_file_type(_file_types()[outtype])
    if info.license:
        writer.add_license(info.license)
    if info.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, info.base_model)
    version = FORMAT_VERSIONS[info.scope]
    writer.add_uint32("kvp.format_version", version)
    if version > 1:
        writer.add_string("kvp.scope", info.scope)
    writer.add_string("kvp.objective", info.objective)
    writer.add_uint32("kvp.block_count", info.n_layer)
    writer.add_uint32("kvp.head_count_kv", info.n_head_kv)
    writer.add_uint32("kvp.key_length", info.head_size_k)
    writer.add_uint32("kvp.value_length", info.head_size_v)
    writer.add_array("kvp.features", list(FEATURES))
    writer.add_array("kvp.hidden_sizes", [info.hidden, info.hidden])
    writer.add_string("kvp.activation", "silu")
    writer.add_uint32("kvp.context_width", info.context)
    writer.add_uint32("kvp.protected.sinks", info.sinks)
    writer.add_uint32("kvp.protected.recent", info.recent)
    if info.objective == "global":
        writer.add_uint32("kvp.retention.horizon", info.horizon)
    writer.add_string("kvp.training.data", info.training_data)
    writer.add_string("kvp.base_model.fingerprint", info.fingerprint)
    if info.model_identity:
        writer.add_string("kvp.base_model.identity", info.model_identity)
    if info.kv_type:
        writer.add_string("kvp.kv_type", info.kv_type)

    arrays, shapes = weights.arrays(), _stored_shapes(info)
    for attribute, name in _TENSORS.items():
        for layer, whole in enumerate(arrays[attribute]):
            array = whole.reshape(shapes[attribute])
            kind = _stored_type(outtype, attribute, array.shape[-1])
            quant = gguf.GGMLQuantizationType[kind.upper()]
            data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), quant)
            # numpy knows the first two types; for blocks the writer has to be told
            raw = quant if kind == "q8_0" else None
            writer.add_tensor(name.format(layer), data, raw_dtype=raw)
    writer.add_tensor(_AGGREGATE, np.ascontiguousarray(weights.aggregate, np.float32))
    for name, array in ((_SENSITIVITY, weights.sensitivity), (_AGEING, weights.ageing)):
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close()  # a full disk fails here, too
        raise


def _stored_type(outtype: OutType, attribute: str, row: int) -> OutType:
    if attribute not in _TYPED:
        return "f32"
    if outtype == "q8_0" and row % _Q8_0_BLOCK:
        return "f16"  # rows must be whole blocks
    return outtype


def read_policy(path: str | os.PathLike[str]) -> tuple[PolicyInfo, PolicyWeights]:
    """Read a policy file; weights come back as f32 whatever type they are stored in.

    Raises:
        PolicyFileError: not a policy file, or one that this version cannot use; the message says
            which of its keys or tensors is in the way.
    """
    with _opened(path) as found:
        info = _read_info(path, found.values)
        size = sum(tensor.nbytes for tensor in found.tensors.values())
        if size > _MOST_BYTES:
            raise PolicyFileError(
                f"the policy file '{path}' has {size} bytes of weights; at most {_MOST_BYTES} "
                "are allowed"
            )

        def load(name: str, shape: tuple[int, ...]) -> FloatArray:
            if name not in found.tensors:
                raise PolicyFileError(f"the policy file '{path}' lacks the tensor {name}")
            tensor = found.tensors[name]
            if tensor.shape != shape:
                raise PolicyFileError(
                    f"the policy file '{path}' has {name} of shape {list(tensor.shape)}, but "
                    f"its keys require {list(shape)}"
                )
            return found.data(tensor)

        shapes, stored = weight_shapes(info), _stored_shapes(info)
        arrays = {
            attribute: np.stack(
                [load(name.format(il), stored[attribute]) for il in range(info.n_layer)]
            ).reshape(shapes[attribute])
            for attribute, name in _TENSORS.items()
        }
        arrays["aggregate"] = load(_AGGREGATE, shapes["aggregate"])
        for attribute, name in (("sensitivity", _SENSITIVITY), ("ageing", _AGEING)):
            if name in found.tensors:
                arrays[attribute] = load(name, shapes["aggregate"])
        weights = PolicyWeights(**arrays)
    _check_weights(info, weights, f"the policy file '{path}'")
    return info, weights


def read_info(path: str | os.PathLike[str]) -> PolicyInfo:
    """What a policy file says of itself, without its weights.

    Raises:
        PolicyFileError: as for ``read_policy``, as far as the keys are concerned.
    """
    with _opened(path) as found:
        return _read_info(path, found.values)


def outtype_of(path: str | os.PathLike[str]) -> OutType:
    """The type that a policy file's large weights are stored in.

    Raises:
        PolicyFileError: as for ``read_policy``, or a file that holds none of these types.
    """
    with _opened(path) as found:
        _read_info(path, found.values)
        kind = found.values.get("general.file_type")
    for outtype, number in _file_types().items():
        if kind == number:
            return outtype
    raise PolicyFileError(
        f"the policy file '{path}' has the general.file_type {shortened(kind)}, which is none of "
        + ", ".join(_file_types())
    )


def _file_types() -> dict[OutType, int]:
    """llama.cpp's numbers (``enum llama_ftype``, llama.h)."""
    import gguf  # noqa: PLC0415

    return {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[GGUFFile]:
    """The keys and tensors of a policy file; what is wrong with it becomes a PolicyFileError."""
    try:
        with open_regular(path) as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise PolicyFileError(f"'{path}' is not a GGUF file")
            file.seek(0)
            yield GGUFFile(file)
    except FileNotFoundError as error:
        raise PolicyFileError(f"policy file '{path}' not found") from error
    except OSError as error:
        raise PolicyFileError(
            f"the policy file '{path}' cannot be read: {error.strerror}"
        ) from error
    except PolicyFileError:
        raise
    except ValueError as error:
        raise PolicyFileError(
            f"the policy file '{path}' is damaged or cut short ({error}): copy or export it again"
        ) from error


def _read_info(path: str | os.PathLike[str], values: dict[str, Any]) -> PolicyInfo:
    def get(key: str, hint: Any = int) -> Any:
        if key not in values:
            raise PolicyFileError(f"the policy file '{path}' lacks the key {key}")
        return _typed(values[key], key, hint)

    def optional(key: str, default: Any) -> Any:
        return _typed(values[key], key, type(default)) if key in values else default

    def _typed(value: Any, key: str, hint: Any) -> Any:
        if not is_a(value, hint):
            raise PolicyFileError(
                f"the policy file '{path}' has the {key} {shortened(value)}, which has the "
                "wrong type"
            )
        return value

    kind = values.get("general.type"), values.get("adapter.type")
    if kind != ("adapter", "kvp"):
        what = kind[1] if kind[0] == "adapter" else kind[0]
        raise PolicyFileError(
            f"'{path}' is not a policy: it is a GGUF file of type {shortened(what or 'unknown')}, "
            "and a policy's is an adapter of type 'kvp'"
        )
    version = get("kvp.format_version")
    known = FORMAT_VERSIONS.values()
    if version not in known:
        raise PolicyFileError(
            f"the policy file '{path}' has format version {version}, but this kvp_edge reads "
            f"versions {' and '.join(map(str, known))}"
            + (": update kvp_edge" if version > max(known) else "")
        )
    features = get("kvp.features", list[str])
    if tuple(features) != FEATURES:
        foreign = [feature for feature in features if feature not in FEATURES]
        which = f" ({shortened(foreign[0])} is)" if foreign else ""
        raise PolicyFileError(
            f"the policy file '{path}' scores by {shortened(', '.join(features))[1:-1]}, "
            "which this kvp_edge does not compute: its kvp.features are from another "
            f"version{which}"
        )
    hidden = get("kvp.hidden_sizes", list[int])
    if len(hidden) != 2 or hidden[0] != hidden[1]:
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.hidden_sizes {shortened(hidden)}; two "
            "equal ones are needed"
        )
    if get("kvp.activation", str) != "silu":
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.activation "
            f"{shortened(values['kvp.activation'])}; only silu is supported"
        )
    objective = get("kvp.objective", str)
    info = PolicyInfo(
        architecture=get("general.architecture", str),
        n_layer=get("kvp.block_count"),
        n_head_kv=get("kvp.head_count_kv"),
        head_size_k=get("kvp.key_length"),
        head_size_v=get("kvp.value_length"),
        hidden=hidden[0],
        context=get("kvp.context_width"),
        name=optional("general.name", Path(path).stem),
        objective=objective,
        sinks=get("kvp.protected.sinks"),
        recent=get("kvp.protected.recent"),
        horizon=get("kvp.retention.horizon") if objective == "global" else PolicyInfo.horizon,
        base_model=optional("general.base_model.0.name", ""),
        fingerprint=optional("kvp.base_model.fingerprint", ""),
        model_identity=optional("kvp.base_model.identity", ""),
        training_data=optional("kvp.training.data", ""),
        license=optional("general.license", ""),
        scope=get("kvp.scope", str) if version > 1 else "head",
        kv_type=optional("kvp.kv_type", ""),
    )
    _check_info(info, f"the policy file '{path}'")
    return info


def info_of(values: object) -> PolicyInfo:
    """A PolicyInfo from JSON of its fields; the first files lack some.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of its range.
    """
    hints = get_type_hints(PolicyInfo) | {"scope": str}
    if isinstance(values, dict):  # the first files said nothing of these
        values = {
            "scope": PolicyInfo.scope,
            "model_identity": PolicyInfo.model_identity,
            "kv_type": PolicyInfo.kv_type,
            **values,
        }
    info = PolicyInfo(**{name: require(values, hints)[name] for name in hints})
    _check_info(info, "it")
    return info


def _check_info(info: PolicyInfo, whose: str) -> None:
    """Raises:
    PolicyFileError: a number that is out of its range, an unknown objective or scope.
    """
    for name, key in _AT_LEAST_1.items():
        if not 1 <= getattr(info, name) <= _MOST:
            raise PolicyFileError(
                f"{whose} has the {key} {getattr(info, name)}; it must be at least 1, and no more "
                f"than {_MOST}"
            )
    for name in ("sinks", "recent"):
        if not 0 <= getattr(info, name) <= _MOST:
            raise PolicyFileError(f"{whose} has {getattr(info, name)} {name}, which is impossible")
    if info.context % 2 == 0:
        raise PolicyFileError(f"{whose} has the kvp.context_width {info.context}; it must be odd")
    if info.objective not in OBJECTIVES:
        raise PolicyFileError(
            f"{whose} has the kvp.objective {shortened(info.objective)}, but this kvp_edge "
            f"knows {', '.join(OBJECTIVES)}: update kvp_edge"
        )
    if info.scope not in FORMAT_VERSIONS:
        raise PolicyFileError(
            f"{whose} has the kvp.scope {shortened(info.scope)}, but this kvp_edge knows "
            f"{', '.join(FORMAT_VERSIONS)}: update kvp_edge"
        )
    if info.kv_type:
        try:
            KVTypes.parse("kvp.kv_type", info.kv_type)
        except OptionError as error:
            raise PolicyFileError(
                f"{whose} has the kvp.kv_type {shortened(info.kv_type)}, which names no types of a "
                "cache"
            ) from error


def _check_weights(info: PolicyInfo, weights: PolicyWeights, whose: str) -> None:
    shapes = weight_shapes(info)
    shapes["sensitivity"] = shapes["ageing"] = shapes["aggregate"]
    for name, array in weights.arrays().items():
        if array.shape != shapes[name]:
            raise PolicyFileError(
                f"{whose} has {name} weights of shape {list(array.shape)}, not {list(shapes[name])}"
            )
        if not np.isfinite(array).all():
            raise PolicyFileError(
                f"{whose} has {name} weights that are not finite (NaN or infinite)"
            )
    check_sensitivity(weights.sensitivity, whose)


def check_sensitivity(sensitivity: FloatArray | None, whose: str) -> None:
    """Raises:
    PolicyFileError: sensitivities that are not relative: negative, or of another mean than 1.
    """
    if sensitivity is None:
        return
    mean = float(sensitivity.mean(dtype=np.float64))
    if sensitivity.min() < 0 or abs(mean - 1) > _OFF_MEAN:
        raise PolicyFileError(
            f"{whose} has heads' sensitivities from {sensitivity.min():.3g} on, with the mean "
            f"{mean:.3g}; they must not be negative, and their mean must be 1"
        )
