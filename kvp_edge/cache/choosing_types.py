"""Which types a cache's keys and values get: the option ``kv_type``.

Who names types gets them: by ``kv_type``, or by llama_cpp's ``type_k`` and ``type_v``. Otherwise
``kv_type="auto"`` chooses, if the budget is memory: bytes are what a user has, and lower precision
buys more cells with them ("More Tokens, Lower Precision", arXiv:2412.12706).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llama_cpp

from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.binding.model import ModelShape
from kvp_edge.cache.limits import CELL_UNIT, round_up
from kvp_edge.cache.options import CacheOptions
from kvp_edge.cache.type_table import shipped_table
from kvp_edge.cache.types import F16, KVTypes, bytes_of, type_name
from kvp_edge.errors import OptionError
from kvp_edge.policy_file import PolicyInfo

#: llama.cpp turns flash attention off for these (llama_init_from_model in src/llama-context.cpp).
_NO_FLASH_ATTENTION = ("grok",)

#: Bytes that a device packs at once (WORD_BYTES in native/cache/location_pack.cpp).
_WORD = 4


@dataclass(frozen=True)
class ChosenTypes:
    """
    Attributes:
        types: of keys and values.
        engine: arguments of llama_cpp.Llama that they need.
        by_itself: nobody named them, so that others may be taken where they do not fit.
        instead_of: types that would have been chosen and cannot be, and why; "": none.
    """

    types: KVTypes
    engine: Mapping[str, Any]
    by_itself: bool = False
    instead_of: str = ""

    def plain(self, reason: str) -> ChosenTypes:
        """Those that there are without a choice, f16.

        Args:
            reason: why the chosen ones cannot be.
        """
        said = f"the cache is f16 and not {self.types}, because {reason}"
        return ChosenTypes(F16, {}, instead_of=said)


def asked_types(options: CacheOptions, engine: Mapping[str, Any]) -> KVTypes | None:
    """The types that somebody named; None: nobody did.

    Args:
        engine: arguments of llama_cpp.Llama.

    Raises:
        OptionError: kv_type contradicts type_k or type_v.
    """
    named = engine.get("type_k"), engine.get("type_v")
    if options.kv_type == "auto":
        if named == (None, None):
            return None
        return KVTypes(*(F16.keys if one is None else int(one) for one in named))
    types = KVTypes.parse("kv_type", options.kv_type)
    for name, of_it, one in zip(
        ("type_k", "type_v"), (types.keys, types.values), named, strict=True
    ):
        if one is not None and int(one) != of_it:
            raise OptionError(
                f"kv_type='{options.kv_type}' makes {name} {type_name(of_it)}, but "
                f"{name} asks for {type_name(int(one))}: leave one of them out"
            )
    return types


def choose_types(
    options: CacheOptions,
    engine: Mapping[str, Any],
    shape: ModelShape,
    *,
    budget_bytes: int | None = None,
    n_ctx: int = 0,
    of_policy: str = "",
) -> ChosenTypes:
    """The types of a cache, before the model is loaded.

    Args:
        engine: arguments of llama_cpp.Llama.
        budget_bytes: memory for the cells; None: the budget is no memory.
        n_ctx: logical context in tokens.
        of_policy: ``kvp.kv_type`` of the model's own policy file; "": it says nothing.

    Raises:
        OptionError: what kv_type asks for cannot be, or contradicts type_k or type_v.
    """
    named = asked_types(options, engine)
    if named is not None:
        if options.kv_type == "auto":
            return ChosenTypes(named, {})
        why_not = obstacle(named, options, engine, shape)
        if why_not:
            raise OptionError(f"kv_type='{named}' is not possible: {why_not}")
        return ChosenTypes(named, _engine_for(named))
    if budget_bytes is None:
        return ChosenTypes(F16, {})
    if of_policy:
        types = KVTypes.parse("kvp.kv_type", of_policy)
    else:
        full = full_bytes(shape, n_ctx)
        share = budget_bytes / full if full else 1.0
        types = shipped_table().types_for(share, on_device=on_device(engine))
    if types == F16:
        return ChosenTypes(F16, {})
    chosen = ChosenTypes(types, _engine_for(types), by_itself=True)
    why_not = obstacle(types, options, engine, shape) or _drawback(types, options, engine, shape)
    if why_not:
        return chosen.plain(why_not)
    gains = _units(budget_bytes, types, shape) > _units(budget_bytes, F16, shape)
    return chosen if gains else ChosenTypes(F16, {})


def _units(n_bytes: int, types: KVTypes, shape: ModelShape) -> int:
    """Units of cells of these types in so many bytes."""
    per_cell = shape.bytes_per_cell(types.keys, types.values)
    return n_bytes // per_cell // CELL_UNIT if per_cell else 0


def full_bytes(shape: ModelShape, n_ctx: int) -> int:
    """Bytes of an f16 cache that holds ``n_ctx`` tokens, of which shares are counted."""
    return round_up(n_ctx) * shape.bytes_per_cell(F16.keys, F16.values)


def on_device(engine: Mapping[str, Any]) -> bool:
    """Whether the cache, or some of it, will be on a device: arguments of llama_cpp.Llama."""
    return bool(engine.get("n_gpu_layers", 0)) and bool(llama_cpp.llama_supports_gpu_offload())


def types_of_policy(info: PolicyInfo | None, model_path: str, architecture: str) -> str:
    """What the policy file says of the cache's types, if it is this very model's; else "".

    Args:
        info: of a policy; None: it has no file.
    """
    if info is None or not info.kv_type or info.architecture != architecture:
        return ""
    own = info.fingerprint == model_fingerprint(model_path) or (
        info.model_identity != "" and info.model_identity == model_identity(model_path)
    )
    return info.kv_type if own else ""


def _engine_for(types: KVTypes) -> dict[str, Any]:
    found: dict[str, Any] = {"type_k": types.keys, "type_v": types.values}
    if types.quantised_values:  # llama.cpp has them with it alone
        found["flash_attn"] = True
    return found


def obstacle(
    types: KVTypes, options: CacheOptions, engine: Mapping[str, Any], shape: ModelShape
) -> str:
    """Why a cache of this model cannot have these types; "" if it can."""
    if types.quantised_values:
        if not engine.get("flash_attn", True):
            return "quantised values need flash attention, and flash_attn=False turns it off"
        if shape.architecture in _NO_FLASH_ATTENTION:
            return (
                "quantised values need flash attention, which llama.cpp lacks for the "
                f"architecture {shape.architecture}"
            )
    for what, kind, size in (
        ("keys", types.keys, shape.head_size_k),
        ("values", types.values, shape.head_size_v),
    ):
        if bytes_of(kind, size) is None:
            return (
                f"the model's heads have {what} of {size} numbers, which are no whole blocks of "
                f"{type_name(kind)}"
            )
    moves = options.bounded and options.positions == "compact" and options.granularity == "token"
    if moves and types.quantised_keys:
        return "positions='compact' at token granularity needs keys that are not quantised"
    return ""


def _drawback(
    types: KVTypes, options: CacheOptions, engine: Mapping[str, Any], shape: ModelShape
) -> str:
    """Why these types should not be chosen unasked, though they may be possible."""
    if options.positions == "compact" and options.granularity == "auto" and types.quantised_keys:
        return (
            "granularity='auto' may become token granularity, where positions='compact' needs keys "
            "that are not quantised"
        )
    device = on_device(engine)
    unlike = types.keys != types.values or shape.head_size_k < shape.head_size_v
    if device and types.quantised_values and unlike:
        # ggml_metal_device_supports_op in ggml-metal-device.m; it would be computed on the CPU
        return (
            "not every device has flash attention for values of another type than the keys, or "
            "longer than they are"
        )
    if device and options.pack != "state" and options.granularity != "token":
        rows = bytes_of(types.keys, shape.head_size_k), bytes_of(types.values, shape.head_size_v)
        if any(row is None or row % _WORD for row in rows):
            return (
                f"heads of {shape.head_size_k} and {shape.head_size_v} numbers are then no whole "
                f"words of {_WORD} bytes, which a device packs"
            )
    return ""
