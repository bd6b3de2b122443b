"""The rules that the library computes where keys and values lie (struct kvp_rule): which, and with
what parameters. What they compute is defined by the policies that apply them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import BoolArray, FloatArray, IntArray
from kvp_edge.binding.policy import NativePolicy


class QueryBatch(Protocol):
    """Queries of tokens (kvp_edge.binding.queries.Queries)."""

    @property
    def queries(self) -> FloatArray: ...
    @property
    def indices(self) -> IntArray: ...
    @property
    def scale(self) -> FloatArray: ...


class _Lag(ctypes.Structure):
    """struct kvp_rule_lag"""

    _fields_ = [(name, ctypes.c_uint32) for name in ("first", "lag", "n_parts")]


class _Attention(ctypes.Structure):
    """struct kvp_rule_attention"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("queries", "indices", "scale", "held")),
        *((name, ctypes.c_uint32) for name in ("n_head", "n_queries")),
    ]


class _Expected(ctypes.Structure):
    """struct kvp_rule_expected"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("means", "covariances", "scale", "left_out")),
        ("n_head", ctypes.c_uint32),
    ]


class _Policy(ctypes.Structure):
    """struct kvp_rule_policy"""

    _fields_ = [("policy", ctypes.c_void_p), ("indices", ctypes.c_void_p)]


class _Parameters(ctypes.Union):
    _fields_ = [
        ("lag", _Lag),
        ("attention", _Attention),
        ("expected", _Expected),
        ("policy", _Policy),
    ]


class RuleStruct(ctypes.Structure):
    """struct kvp_rule"""

    _fields_ = [("kind", ctypes.c_int32), ("of", _Parameters)]


class Rule:
    """A rule; ``kind`` is its number in enum kvp_rule_kind."""

    kind: ClassVar[int]

    def per_head(self, n: int) -> tuple[int, ...]:
        """The shape of what it gives each head for n tokens."""
        return (n,)

    def fill(self, of: _Parameters, keys: tuple[int, int, int, int]) -> tuple[Any, ...]:
        """Set the parameters.

        Args:
            keys: the shape of the keys that are scored: (n_layer, n_head_kv, n, head_size_k).

        Returns:
            The arrays that they point to, to be kept as long as they are used.

        Raises:
            ValueError: an array of another shape.
        """
        return ()


class KNorm(Rule):
    """-||k|| (arXiv:2406.11430)."""

    kind = 0


class KeyDiff(Rule):
    """-cos(k, mean of k_j / ||k_j||) over the tokens scored (arXiv:2504.15364)."""

    kind = 1


class Range(Rule):
    """The largest number of the value minus the smallest (arXiv:2606.03928)."""

    kind = 2


@dataclass(frozen=True)
class Lag(Rule):
    """How far keys and values stand out of the ranges of those that follow (arXiv:2504.04704,
    section 2.2), in ``n_parts`` partitions of ``lag`` tokens from number ``first`` on.

    It gives f32 [n_layer, n_head_kv, n_parts - 1, lag], the mean of the keys' and the values'.
    """

    kind = 3
    first: int
    lag: int
    n_parts: int

    def per_head(self, n: int) -> tuple[int, ...]:
        return (max(0, self.n_parts - 1), self.lag)

    def fill(self, of: _Parameters, keys: tuple[int, int, int, int]) -> tuple[Any, ...]:
        of.lag = _Lag(self.first, self.lag, self.n_parts)
        return ()


@dataclass(frozen=True)
class Attention(Rule):
    """The attention that queries pay, summed over them, averaged over a KV head's query heads.

    Attributes:
        queries: at most 2^24 tokens into the conversation.
        held: int32 [n_layer, n_head_kv, n], the scored tokens' indices in the conversation.
    """

    kind = 4
    queries: QueryBatch
    held: IntArray

    def fill(self, of: _Parameters, keys: tuple[int, int, int, int]) -> tuple[Any, ...]:
        n_layer, n_head_kv, n, size = keys
        _, n_head, n_queries, _ = self.queries.queries.shape
        arrays = (
            _array(self.queries.queries, np.float32, (n_layer, n_head, n_queries, size)),
            _array(self.queries.indices, np.int32, (n_queries,)),
            _array(self.queries.scale, np.float32, (n_layer,)),
            _array(self.held, np.int32, (n_layer, n_head_kv, n)),
        )
        of.attention = _Attention(*(array.ctypes.data for array in arrays), n_head, n_queries)
        return arrays


@dataclass(frozen=True)
class Expected(Rule):
    """The attention expected of queries that are normal, times the values' norms
    (arXiv:2510.00636, section 3); 0 for what is left out.

    Attributes:
        means: f32 [n_layer, n_head, head_size_k].
        covariances: f32 [n_layer, n_head, head_size_k, head_size_k].
        scale: f32 [n_layer], what q.k is multiplied by.
        left_out: bool [n_layer, n_head_kv, n], tokens that the softmax leaves out.
    """

    kind = 5
    means: FloatArray
    covariances: FloatArray
    scale: FloatArray
    left_out: BoolArray

    def fill(self, of: _Parameters, keys: tuple[int, int, int, int]) -> tuple[Any, ...]:
        n_layer, n_head_kv, n, size = keys
        n_head = self.means.shape[1]
        arrays = (
            _array(self.means, np.float32, (n_layer, n_head, size)),
            _array(self.covariances, np.float32, (n_layer, n_head, size, size)),
            _array(self.scale, np.float32, (n_layer,)),
            _array(self.left_out, np.bool_, (n_layer, n_head_kv, n)),
        )
        of.expected = _Expected(*(array.ctypes.data for array in arrays), n_head)
        return arrays


@dataclass(frozen=True)
class Network(Rule):
    """The score of a learned policy.

    Attributes:
        indices: int32 [n], ascending: the tokens' indices in the conversation.
    """

    kind = 6
    network: NativePolicy
    indices: IntArray

    def fill(self, of: _Parameters, keys: tuple[int, int, int, int]) -> tuple[Any, ...]:
        indices = _array(self.indices, np.int32, keys[2:3])
        of.policy = _Policy(self.network.handle, indices.ctypes.data)
        return (indices,)


def _array(array: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if array.shape != shape:
        raise ValueError(f"an array {array.shape} where {shape} belongs")
    return np.ascontiguousarray(array, dtype)
