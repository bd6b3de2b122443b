"""The structs of native/kvp_edge.h, field by field: tests/binding/test_header.py compares them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

MAX_LAYERS = 512

_I32, _U32, _U64, _F32 = ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_float
_I32S, _F32S = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_float)
_F64S, _U8S = ctypes.POINTER(ctypes.c_double), ctypes.POINTER(ctypes.c_uint8)

#: Numpy's types of what pointers point to. Asked for at each call, numpy would pass over an
#: interrupt that comes meanwhile, and say "object".
_DTYPES = {pointer: np.dtype(pointer._type_) for pointer in (_I32S, _F32S, _F64S, _U8S)}


def address(array: np.ndarray, wanted: np.dtype[Any]) -> int:
    """Where the numbers of an array begin, checked to be what C reads there.

    Raises:
        TypeError: another dtype, or not contiguous.
    """
    same = array.dtype == wanted or (array.dtype == np.bool_ and wanted == np.uint8)
    if not same or not array.flags.c_contiguous:
        raise TypeError(f"expected a contiguous array of {wanted}, not {array.dtype}")
    return array.ctypes.data


class Struct(ctypes.Structure):
    """Fields by name. A pointer is given as an array, which lives as long as the struct."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        if not fields:
            return
        types: dict[str, Any] = dict(self._fields_)  # type: ignore[arg-type]  # none has bits
        self._arrays = []
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                pointer = types[name]
                self._arrays.append(value)
                setattr(self, name, ctypes.cast(address(value, _DTYPES[pointer]), pointer))
            else:
                setattr(self, name, value)


class Error(ctypes.Structure):
    """kvp_error: made for every call"""

    _fields_ = [("code", _I32), ("message", ctypes.c_char * 512)]

    code: int
    message: bytes


class ModelShape(Struct):
    """kvp_model_shape: what a GGUF file says of its model."""

    _fields_ = [
        ("_architecture", ctypes.c_char * 64),
        ("n_ctx_train", _U32),
        ("n_layer", _U32),
        ("head_size_k", _U32),
        ("head_size_v", _U32),
        ("sliding_window", _U32),
        ("_n_head_kv", _U32 * MAX_LAYERS),
    ]

    n_ctx_train: int
    n_layer: int
    head_size_k: int
    head_size_v: int
    sliding_window: int

    @property
    def architecture(self) -> str:
        return bytes(self._architecture).decode()

    @property
    def n_head_kv(self) -> list[int]:
        return list(self._n_head_kv[: self.n_layer])


class CacheShape(Struct):
    """kvp_cache_shape: a base cache's layout, learned from a real state blob."""

    _fields_ = [
        ("n_layer", _U32),
        ("n_head_kv", _U32),
        ("head_size_k", _U32),
        ("head_size_v", _U32),
        ("type_k", _I32),
        ("type_v", _I32),
        ("v_transposed", _U32),
        ("has_window", _U32),
        ("k_hadamard_block", _U32),
        ("v_hadamard_block", _U32),
        ("bytes_per_cell", _U64),
    ]

    n_layer: int
    n_head_kv: int
    head_size_k: int
    head_size_v: int
    type_k: int
    type_v: int
    v_transposed: int
    has_window: int
    k_hadamard_block: int
    v_hadamard_block: int
    bytes_per_cell: int


class CacheLocation(Struct):
    """kvp_cache_location: where a base cache lies."""

    _fields_ = [
        ("_known", _U32),
        ("_on_device", _U32),
        ("_can_pack", _U32),
        ("packed_in_place", _U32),
        ("packed_as_state", _U32),
        ("bytes_transferred", _U64),
        ("_where", ctypes.c_char * 256),
    ]

    packed_in_place: int
    packed_as_state: int
    bytes_transferred: int

    @property
    def known(self) -> bool:
        """Whether it is scored and packed where it lies, and not through llama.cpp's state."""
        return bool(self._known)

    @property
    def on_device(self) -> bool:
        """Whether some of it lies in memory that the host does not see."""
        return bool(self._on_device)

    @property
    def can_pack(self) -> bool:
        """Whether heads can be packed there, too: on a device they must be whole 32-bit words."""
        return bool(self._can_pack)

    def packs(self, granularity: str) -> bool:
        """Whether evictions of this granularity stay where it lies, as long as cells are known."""
        return self.known and (granularity == "token" or self.can_pack)

    @property
    def where(self) -> str:
        """The devices, with commas; or why it is not known."""
        return bytes(self._where).decode(errors="replace")


class PolicyShape(Struct):
    """kvp_policy_shape"""

    _fields_ = [
        ("n_layer", _U32),
        ("n_head_kv", _U32),
        ("head_size_k", _U32),
        ("head_size_v", _U32),
        ("hidden", _U32),
        ("context", _U32),
        ("n_networks", _U32),
    ]


class PolicyWeights(Struct):
    """kvp_policy_weights"""

    _fields_ = [
        ("shape", PolicyShape),
        ("key", _F32S),
        ("value", _F32S),
        ("position", _F32S),
        ("fc1_bias", _F32S),
        ("conv", _F32S),
        ("fc2", _F32S),
        ("fc2_bias", _F32S),
        ("out", _F32S),
    ]


class RopeShift(Struct):
    """kvp_rope_shift"""

    _fields_ = [("frequency", _F64S), ("distance", _I32S), ("n_pairs", _U32), ("neox", _U32)]


class LogLayout(Struct):
    """kvp_log_layout: how the rows of a KV log lie in memory."""

    _fields_ = [
        ("n_layer", _U32),
        ("n_head_kv", _U32),
        ("head_size_k", _U32),
        ("head_size_v", _U32),
        ("type_k", _I32),
        ("type_v", _I32),
        ("k_hadamard_block", _U32),
        ("v_hadamard_block", _U32),
        ("k_row", _U64),
        ("v_row", _U64),
        ("bytes_per_token", _U64),
    ]

    n_layer: int
    n_head_kv: int
    head_size_k: int
    head_size_v: int
    type_k: int
    type_v: int
    k_hadamard_block: int
    v_hadamard_block: int
    k_row: int
    v_row: int
    bytes_per_token: int


class LogBlock(Struct):
    """kvp_log_block: rows of consecutive tokens.

    Args:
        rows: uint8 [n * bytes_per_token], contiguous; a memory map will do. The block keeps it.
        first: the first token's index in the conversation.
        n: tokens.
        rope_first: the RoPE position that the first one's keys carry.
    """

    _fields_ = [("_rows", _U8S), ("first", _I32), ("n", _U32), ("rope_first", _I32)]

    first: int
    n: int
    rope_first: int

    def __init__(self, rows: np.ndarray, first: int, n: int, rope_first: int) -> None:
        super().__init__(_rows=rows, first=first, n=n, rope_first=rope_first)
        self.rows = rows


class LogQueries(Struct):
    """kvp_log_queries"""

    _fields_ = [
        ("queries", _F32S),
        ("indices", _I32S),
        ("scale", _F32S),
        ("n_head", _U32),
        ("n_queries", _U32),
        ("turn", _F64S),
        ("frequency", _F64S),
        ("n_pairs", _U32),
        ("neox", _U32),
    ]


class CapturePlan(Struct):
    """kvp_capture_plan"""

    _fields_ = [
        ("n_layer", _U32),
        ("n_head_kv", _U32),
        ("n_tokens", _U32),
        ("block", _U32),
        ("first", _U32),
        ("base_cells", _U32),
        ("scale", _F32),
    ]


class QueriesShape(Struct):
    """kvp_queries_shape"""

    _fields_ = [
        ("n_layer", _U32),
        ("n_head", _U32),
        ("head_size", _U32),
        ("k_hadamard_block", _U32),
    ]

    n_layer: int
    n_head: int
    head_size: int


class PolicyPointer(ctypes.c_void_p):
    """kvp_policy *"""


class RuleLag(Struct):
    """kvp_rule_lag"""

    _fields_ = [("first", _U32), ("lag", _U32), ("n_parts", _U32)]


class RuleAttention(Struct):
    """kvp_rule_attention"""

    _fields_ = [
        ("queries", _F32S),
        ("query_indices", _I32S),
        ("scale", _F32S),
        ("key_indices", _I32S),
        ("n_head", _U32),
        ("n_queries", _U32),
    ]


class RuleExpected(Struct):
    """kvp_rule_expected"""

    _fields_ = [
        ("means", _F32S),
        ("covariances", _F32S),
        ("scale", _F32S),
        ("left_out", _U8S),
        ("n_head", _U32),
    ]


class RulePolicy(Struct):
    """kvp_rule_policy"""

    _fields_ = [("policy", PolicyPointer), ("indices", _I32S)]


class _RuleParameters(ctypes.Union):
    _fields_ = [
        ("lag", RuleLag),
        ("attention", RuleAttention),
        ("expected", RuleExpected),
        ("policy", RulePolicy),
    ]


class Rule(Struct):
    """kvp_rule

    Args:
        kind: enum kvp_rule_kind.
        parameters: of this kind, by its name in the union; the struct keeps them.
    """

    _fields_ = [("kind", _I32), ("of", _RuleParameters)]

    def __init__(self, kind: int, **parameters: Struct) -> None:
        super().__init__(kind=kind)
        for name, value in parameters.items():
            setattr(self.of, name, value)
        self._parameters = parameters
