"""The policy file: a learned policy's weights as GGUF. The format is docs/policy-format.md."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvp_edge.errors import PolicyFileError

FloatArray = npt.NDArray[np.float32]
OutType = Literal["f32", "f16", "q8_0"]

FORMAT_VERSION = 1
OBJECTIVES = ("kvp", "foresight", "global")
N_POSITION_FEATURES = 4
N_STATISTICS = 2
#: What a token's score is computed from, in the order of the first layer's inputs.
FEATURES = (
    "key",
    "value",
    "log2(1+p)/16",
    "sin(log2(1+p))",
    "cos(log2(1+p))",
    "1/(1+p)",
)
#: What comes after that in a policy that looks at attention statistics.
STATISTICS = ("log(1e-4+attention)", "log(1e-4+attention of the newer half)")

_AGGREGATE = "kvp_aggregate.weight"
_Q8_0_BLOCK = 32


@dataclass(frozen=True)
class PolicyInfo:
    """What a policy file says of itself. ``n_layer`` counts the layers of the base KV cache;
    ``horizon`` is of gates (objective "global", kvp_edge.retention); ``statistics`` counts the
    newest queries whose attention is looked at, 0: none."""

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
    statistics: int = 0
    base_model: str = ""
    fingerprint: str = ""
    training_data: str = ""
    license: str = ""


@dataclass(frozen=True)
class PolicyWeights:
    """f32 arrays; L layers, H KV heads, h hidden units, w context width, standardisation folded in.

    Attributes:
        key [L, H, h, head_size_k], value [L, H, h, head_size_v], position [L, H, h, 4],
        fc1_bias [L, H, h]: the first layer.
        conv [L, H, w, h]: over tokens; conv[:, :, w // 2] is the token's own. All 1 for w = 1.
        fc2 [L, H, h, h], fc2_bias [L, H, h], out [L, H, h].
        aggregate [L, H]: weights of the heads' scores in the score of a whole token.
        statistics [L, H, h, 2]: of the first layer, too; None: the policy looks at no attention.
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
    statistics: FloatArray | None = None

    def arrays(self) -> dict[str, FloatArray]:
        """Those that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


#: attribute of PolicyWeights -> name of its tensor, one per layer
_TENSORS = {
    "key": "blk.{}.kvp_key.weight",
    "value": "blk.{}.kvp_value.weight",
    "position": "blk.{}.kvp_position.weight",
    "statistics": "blk.{}.kvp_statistics.weight",
    "fc1_bias": "blk.{}.kvp_fc1.bias",
    "conv": "blk.{}.kvp_conv.weight",
    "fc2": "blk.{}.kvp_fc2.weight",
    "fc2_bias": "blk.{}.kvp_fc2.bias",
    "out": "blk.{}.kvp_out.weight",
}
#: The large ones, which are stored as --outtype says; the others stay f32.
_TYPED = ("key", "value", "fc2")


def weight_shapes(info: PolicyInfo) -> dict[str, tuple[int, ...]]:
    """The shape of every array of PolicyWeights for a policy of this kind."""
    heads, h = (info.n_layer, info.n_head_kv), info.hidden
    statistics = {"statistics": (*heads, h, N_STATISTICS)} if info.statistics else {}
    return {
        "key": (*heads, h, info.head_size_k),
        "value": (*heads, h, info.head_size_v),
        "position": (*heads, h, N_POSITION_FEATURES),
        "fc1_bias": (*heads, h),
        "conv": (*heads, info.context, h),
        "fc2": (*heads, h, h),
        "fc2_bias": (*heads, h),
        "out": (*heads, h),
        "aggregate": heads,
        **statistics,
    }


def check_model(
    info: PolicyInfo,
    *,
    architecture: str,
    n_layer: int,
    n_head_kv: int,
    head_size_k: int,
    head_size_v: int,
    fingerprint: str = "",
) -> None:
    """Whether the policy was trained for this model; the sizes are those of its base KV cache.

    Another fingerprint alone is a warning: another quantisation of the same model has one, and the
    policy works for it.

    Raises:
        PolicyFileError: another architecture or shape.
    """
    if info.architecture != architecture:
        raise PolicyFileError(
            f"the policy '{info.name}' is for the architecture '{info.architecture}', and the "
            f"model's is '{architecture}'"
        )
    ours = (info.n_layer, info.n_head_kv, info.head_size_k, info.head_size_v)
    theirs = (n_layer, n_head_kv, head_size_k, head_size_v)
    if ours != theirs:
        raise PolicyFileError(
            f"the policy '{info.name}' is for a cache of {_shape_words(*ours)}, and the model's "
            f"has {_shape_words(*theirs)}"
        )
    if info.fingerprint and fingerprint and info.fingerprint != fingerprint:
        warnings.warn(
            f"the policy '{info.name}' was trained with another file than this model's (of "
            f"'{info.base_model}'). If that is another quantisation of the same model, all is well",
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
    import gguf  # noqa: PLC0415 (chatting with a heuristic does without it)

    _check_weights(info, weights, "the policy")
    # os.replace is atomic within a folder, so a full disk leaves no half of a file behind
    path = Path(path)
    half = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(half, info.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "kvp")
    writer.add_name(info.name)
    file_type = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_type[outtype])
    if info.license:
        writer.add_license(info.license)
    if info.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, info.base_model)
    writer.add_uint32("kvp.format_version", FORMAT_VERSION)
    writer.add_string("kvp.objective", info.objective)
    writer.add_uint32("kvp.block_count", info.n_layer)
    writer.add_uint32("kvp.head_count_kv", info.n_head_kv)
    writer.add_uint32("kvp.key_length", info.head_size_k)
    writer.add_uint32("kvp.value_length", info.head_size_v)
    writer.add_array("kvp.features", list(_features(info.statistics)))
    writer.add_array("kvp.hidden_sizes", [info.hidden, info.hidden])
    writer.add_string("kvp.activation", "silu")
    writer.add_uint32("kvp.context_width", info.context)
    writer.add_uint32("kvp.protected.sinks", info.sinks)
    writer.add_uint32("kvp.protected.recent", info.recent)
    if info.objective == "global":
        writer.add_uint32("kvp.retention.horizon", info.horizon)
    if info.statistics:
        writer.add_uint32("kvp.statistics.window", info.statistics)
    writer.add_string("kvp.training.data", info.training_data)
    writer.add_string("kvp.base_model.fingerprint", info.fingerprint)

    arrays = weights.arrays()
    for attribute in (name for name in _TENSORS if name in arrays):
        name = _TENSORS[attribute]
        for layer, array in enumerate(arrays[attribute]):
            kind = _stored_type(outtype, attribute, array.shape[-1])
            quant = gguf.GGMLQuantizationType[kind.upper()]
            data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), quant)
            # numpy knows the first two types; for blocks the writer has to be told
            raw = quant if kind == "q8_0" else None
            writer.add_tensor(name.format(layer), data, raw_dtype=raw)
    writer.add_tensor(_AGGREGATE, np.ascontiguousarray(weights.aggregate, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(half, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            writer.close()  # a full disk fails here, too
        half.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write '{path}': {error.strerror}") from error
        raise


def _features(statistics: int) -> tuple[str, ...]:
    return FEATURES + (STATISTICS if statistics else ())


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
    path = Path(path)
    reader, values = _open(path)
    info = _read_info(path, values)
    import gguf  # noqa: PLC0415

    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def load(name: str, shape: tuple[int, ...]) -> FloatArray:
        if name not in tensors:
            raise PolicyFileError(f"the policy file '{path}' lacks the tensor {name}")
        tensor = tensors[name]
        found = tuple(int(n) for n in reversed(tensor.shape))
        if found != shape:
            raise PolicyFileError(
                f"the policy file '{path}' holds {name} of shape {list(found)}, and its keys ask "
                f"for {list(shape)}"
            )
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(data, np.float32).reshape(shape)

    shapes = weight_shapes(info)
    layers = range(info.n_layer)
    arrays = {
        attribute: np.stack([load(name.format(il), shapes[attribute][1:]) for il in layers])
        for attribute, name in _TENSORS.items()
        if attribute in shapes
    }
    weights = PolicyWeights(**arrays, aggregate=load(_AGGREGATE, shapes["aggregate"]))
    _check_weights(info, weights, f"the policy file '{path}'")
    return info, weights


def read_info(path: str | os.PathLike[str]) -> PolicyInfo:
    """What a policy file says of itself, without its weights.

    Raises:
        PolicyFileError: as for ``read_policy``, as far as the keys are concerned.
    """
    path = Path(path)
    return _read_info(path, _open(path)[1])


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The GGUF reader and the file's keys with their values."""
    if not path.is_file():
        raise PolicyFileError(f"there is no policy file '{path}'")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise PolicyFileError(f"'{path}' is not a GGUF file")
    try:
        import gguf  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "reading a policy file needs the package gguf: pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader fails in many ways, all of which mean this
        raise PolicyFileError(
            f"the policy file '{path}' is damaged or cut short: copy or export it again"
        ) from error
    return reader, values


def _read_info(path: Path, values: dict[str, Any]) -> PolicyInfo:
    def get(key: str, kind: type | tuple[type, ...] = int) -> Any:
        value = values.get(key)
        if not isinstance(value, kind):
            raise PolicyFileError(f"the policy file '{path}' lacks the key {key}")
        return value

    kind = values.get("general.type"), values.get("adapter.type")
    if kind != ("adapter", "kvp"):
        what = kind[1] if kind[0] == "adapter" else kind[0]
        raise PolicyFileError(
            f"'{path}' is not a policy: it is a GGUF file of type '{what or 'unknown'}', and a "
            "policy's is an adapter of type 'kvp'"
        )
    version = get("kvp.format_version")
    if version != FORMAT_VERSION:
        raise PolicyFileError(
            f"the policy file '{path}' has format version {version}, and this kvp_edge reads "
            f"version {FORMAT_VERSION}" + (": update kvp_edge" if version > FORMAT_VERSION else "")
        )
    features, hidden = get("kvp.features", list), get("kvp.hidden_sizes", list)
    window = "kvp.statistics.window"
    statistics = get(window) if window in values else PolicyInfo.statistics
    if tuple(features) != _features(statistics):
        raise PolicyFileError(
            f"the policy file '{path}' scores by {', '.join(map(str, features))}, which this "
            "kvp_edge does not compute: its kvp.features are another version's"
        )
    if len(hidden) != 2 or hidden[0] != hidden[1]:
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.hidden_sizes {hidden}; two equal ones are known"
        )
    if get("kvp.activation", str) != "silu":
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.activation '{values['kvp.activation']}'; only "
            "silu is known"
        )
    context = get("kvp.context_width")
    if context < 1 or context % 2 == 0:
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.context_width {context}; it must be odd"
        )
    if statistics % 2 or (statistics and context > 1):
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.statistics.window {statistics} and the "
            f"kvp.context_width {context}; the one must be even, and the other 1 with it"
        )
    objective = get("kvp.objective", str)
    if objective not in OBJECTIVES:
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.objective '{objective}', and this kvp_edge "
            f"knows {', '.join(OBJECTIVES)}: update kvp_edge"
        )
    horizon = get("kvp.retention.horizon") if objective == "global" else PolicyInfo.horizon
    if horizon < 1:
        raise PolicyFileError(
            f"the policy file '{path}' has the kvp.retention.horizon {horizon}; it must be at "
            "least 1"
        )
    return PolicyInfo(
        architecture=get("general.architecture", str),
        n_layer=get("kvp.block_count"),
        n_head_kv=get("kvp.head_count_kv"),
        head_size_k=get("kvp.key_length"),
        head_size_v=get("kvp.value_length"),
        hidden=int(hidden[0]),
        context=context,
        name=values.get("general.name", path.stem),
        objective=objective,
        sinks=get("kvp.protected.sinks"),
        recent=get("kvp.protected.recent"),
        horizon=horizon,
        statistics=statistics,
        base_model=values.get("general.base_model.0.name", ""),
        fingerprint=values.get("kvp.base_model.fingerprint", ""),
        training_data=values.get("kvp.training.data", ""),
        license=values.get("general.license", ""),
    )


def _check_weights(info: PolicyInfo, weights: PolicyWeights, whose: str) -> None:
    shapes, arrays = weight_shapes(info), weights.arrays()
    if arrays.keys() != shapes.keys():
        raise PolicyFileError(
            f"{whose} has a statistics window of {info.statistics} queries and "
            f"{'' if weights.statistics is not None else 'no '}statistics weights"
        )
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise PolicyFileError(
                f"{whose} has {name} weights of shape {list(array.shape)}, not {list(shapes[name])}"
            )
        if not np.isfinite(array).all():
            raise PolicyFileError(
                f"{whose} has {name} weights that are not numbers (NaN or infinite)"
            )
