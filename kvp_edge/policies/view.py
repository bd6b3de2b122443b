"""What a policy looks at when it scores: tokens of a cache, of which nothing is read unasked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from kvp_edge.arrays import FloatArray, TokenIndices
from kvp_edge.binding.queries import Queries
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.binding.rules import Attention, Rule
from kvp_edge.errors import PolicyError
from kvp_edge.policies.query_attention import total_attention


class CacheView(ABC):
    """Tokens of a cache that are to be scored: n_layer layers, n_head_kv KV heads, n tokens.

    Attributes:
        indices: int32 [n], the tokens' indices in the conversation, ascending. At head granularity,
            where every head holds its own tokens, [n_layer, n_head_kv, n] for policies of another
            scope than "token".
        previous: f32 [n_layer, n_head_kv, m, *Policy.score_shape], what a policy of scope "history"
            has scored the first m of the tokens when tokens were last dropped; the others came in
            since. Of a row that came back from the KV log, what it had scored when it was logged,
            before any head dropped it; minus infinity where another policy was in charge then. m is
            0 for other policies.
    """

    indices: TokenIndices
    previous: FloatArray

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(n_layer, n_head_kv, n)."""

    @abstractmethod
    def keys(self) -> FloatArray:
        """f32 [n_layer, n_head_kv, n, head_size_k], as cached (RoPE included)."""

    @abstractmethod
    def values(self) -> FloatArray:
        """f32 [n_layer, n_head_kv, n, head_size_v]."""

    def keys_and_values(self) -> tuple[FloatArray, FloatArray]:
        """Both, read at once."""
        return self.keys(), self.values()

    @abstractmethod
    def queries(self, newest: int) -> Queries:
        """The queries of the ``newest`` tokens, of fewer if not so many were logged.

        Raises:
            PolicyError: none are logged here, or not for this policy (``Policy.n_queries``).
        """

    def noted(self, score_shape: tuple[int, ...] = ()) -> FloatArray:
        """f32 [n_layer, n_head_kv, n, *score_shape]: ``previous``, and 0 of tokens of which nothing
        is known."""
        found = np.zeros((*self.shape, *score_shape), np.float32)
        known = self.previous.shape[2]
        if known:
            found[:, :, :known] = np.where(np.isfinite(self.previous), self.previous, 0)
        return found

    @property
    @abstractmethod
    def frequencies(self) -> KeyFrequencies:
        """Of RoPE, for policies with ``needs_frequencies``.

        Raises:
            PolicyError: they were not measured.
        """

    def apply(self, rule: Rule, definition: Callable[[CacheView], FloatArray]) -> FloatArray:
        """What a rule of the library gives, computed where keys and values lie if that is possible;
        else by ``definition``, the same in numpy."""
        return definition(self)

    def attention(self, queries: Queries) -> FloatArray:
        """f32 [n_layer, n_head_kv, n]: the attention that queries pay to the tokens, summed over
        queries and averaged over a KV head's query heads; where the keys lie, if possible."""
        held = np.broadcast_to(self.indices, self.shape)
        return self.apply(
            Attention(queries, held), lambda view: total_attention(queries, view.keys(), held)
        )


class ArrayView(CacheView):
    """A view of arrays that are given: for training, comparisons and tests."""

    def __init__(
        self,
        keys: FloatArray,
        values: FloatArray,
        indices: TokenIndices,
        *,
        queries: Queries | None = None,
        frequencies: KeyFrequencies | None = None,
        previous: FloatArray | None = None,
    ) -> None:
        n_layer, n_head_kv, n = keys.shape[:3]
        self.indices = indices
        self.previous = np.empty((n_layer, n_head_kv, 0), np.float32)
        if previous is not None:
            self.previous = previous
        self._shape = n_layer, n_head_kv, n
        self._keys, self._values = keys, values
        self._queries, self._frequencies = queries, frequencies

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def keys(self) -> FloatArray:
        return self._keys

    def values(self) -> FloatArray:
        return self._values

    def queries(self, newest: int) -> Queries:
        if self._queries is None:
            raise PolicyError(NO_QUERIES)
        return self._queries[max(0, len(self._queries) - newest) :]

    @property
    def frequencies(self) -> KeyFrequencies:
        if self._frequencies is None:
            raise PolicyError("the RoPE frequencies were not measured")
        return self._frequencies


NO_QUERIES = (
    "queries exist only in a bounded cache: load the model with kv_budget and a policy with "
    "n_queries > 0"
)
