"""The rules that the library computes where keys and values lie (struct kvp_rule): which, and with
what parameters. What they compute is defined by the policies that apply them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import BoolArray, FloatArray, TokenIndices
from kvp_edge.binding import structs
from kvp_edge.binding.policy import NativePolicy


class QueryBatch(Protocol):
    """Queries of tokens (kvp_edge.binding.queries.Queries)."""

    @property
    def queries(self) -> FloatArray: ...
    @property
    def indices(self) -> TokenIndices: ...
    @property
    def scale(self) -> FloatArray: ...


#: (n_layer, n_head_kv, n, head_size_k)
KeyShape = tuple[int, int, int, int]


class Rule:
    """A rule; ``kind`` is its number in enum kvp_rule_kind."""

    kind: ClassVar[int]

    def per_head(self, n: int) -> tuple[int, ...]:
        """The shape of what it gives each head for n tokens."""
        return (n,)

    def struct(self, keys: KeyShape) -> structs.Rule:
        """What the library takes.

        Args:
            keys: the shape of the keys that are scored.

        Raises:
            ValueError: an array of another shape.
        """
        return structs.Rule(self.kind)


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

    def struct(self, keys: KeyShape) -> structs.Rule:
        lag = structs.RuleLag(first=self.first, lag=self.lag, n_parts=self.n_parts)
        return structs.Rule(self.kind, lag=lag)


@dataclass(frozen=True)
class Attention(Rule):
    """The attention that queries pay, summed over them, averaged over a KV head's query heads.

    Attributes:
        queries: at most 2^24 tokens into the conversation.
        indices: int32 [n_layer, n_head_kv, n], of the scored tokens.
    """

    kind = 4
    queries: QueryBatch
    indices: TokenIndices

    def struct(self, keys: KeyShape) -> structs.Rule:
        n_layer, n_head_kv, n, size = keys
        _, n_head, n_queries, _ = self.queries.queries.shape
        attention = structs.RuleAttention(
            queries=_array(self.queries.queries, np.float32, (n_layer, n_head, n_queries, size)),
            query_indices=_array(self.queries.indices, np.int32, (n_queries,)),
            scale=_array(self.queries.scale, np.float32, (n_layer,)),
            key_indices=_array(self.indices, np.int32, (n_layer, n_head_kv, n)),
            n_head=n_head,
            n_queries=n_queries,
        )
        return structs.Rule(self.kind, attention=attention)


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

    def struct(self, keys: KeyShape) -> structs.Rule:
        n_layer, n_head_kv, n, size = keys
        n_head = self.means.shape[1]
        expected = structs.RuleExpected(
            means=_array(self.means, np.float32, (n_layer, n_head, size)),
            covariances=_array(self.covariances, np.float32, (n_layer, n_head, size, size)),
            scale=_array(self.scale, np.float32, (n_layer,)),
            left_out=_array(self.left_out, np.bool_, (n_layer, n_head_kv, n)),
            n_head=n_head,
        )
        return structs.Rule(self.kind, expected=expected)


@dataclass(frozen=True)
class Network(Rule):
    """The score of a learned policy.

    Attributes:
        indices: int32 [n], ascending: of the scored tokens.
    """

    kind = 6
    network: NativePolicy
    indices: TokenIndices

    def struct(self, keys: KeyShape) -> structs.Rule:
        indices = _array(self.indices, np.int32, keys[2:3])
        pointer = structs.PolicyPointer(self.network.handle.pointer.value)
        policy = structs.RulePolicy(policy=pointer, indices=indices)
        return structs.Rule(self.kind, policy=policy)


def _array(array: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if array.shape != shape:
        raise ValueError(f"an array {array.shape} where {shape} belongs")
    return np.ascontiguousarray(array, dtype)
