"""What a policy sees of a cache in use: read, scored and attended to where it lies, if possible."""

from __future__ import annotations

from collections.abc import Callable

from kvp_edge.arrays import FloatArray, LlamaPositions, TokenIndices
from kvp_edge.binding.cache import NativeCache, NotInPlace
from kvp_edge.binding.queries import Queries, QueryLog
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.binding.rules import Rule
from kvp_edge.policies.view import NO_QUERIES, CacheView


class LiveView(CacheView):
    """Some rows of a cache, at the moment of an eviction.

    Args:
        llama_positions: int32 [n], of the rows; the cache holds no other between the first and the
            last of them.
        indices, previous: see CacheView.
        log: of the context's queries, if there is one.
    """

    def __init__(
        self,
        cache: NativeCache,
        llama_positions: LlamaPositions,
        indices: TokenIndices,
        previous: FloatArray,
        log: QueryLog | None,
    ) -> None:
        self.indices = indices
        self.previous = previous
        self._cache, self._log = cache, log
        self._rows = int(llama_positions[0]), int(llama_positions[-1]) + 1, len(llama_positions)
        self._keys: FloatArray | None = None
        self._values: FloatArray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._cache.shape.n_layer, self._cache.shape.n_head_kv, self._rows[2]

    def keys(self) -> FloatArray:
        if self._keys is None:
            _, self._keys, _ = self._cache.read(*self._rows, values=False)
        return self._keys

    def values(self) -> FloatArray:
        return self.keys_and_values()[1]

    def keys_and_values(self) -> tuple[FloatArray, FloatArray]:
        if self._keys is None or self._values is None:
            _, self._keys, self._values = self._cache.read(*self._rows)
            assert self._values is not None
        return self._keys, self._values

    def queries(self, newest: int) -> Queries:
        if self._log is None:
            raise ValueError(NO_QUERIES)
        return self._log.read(newest)

    @property
    def frequencies(self) -> KeyFrequencies:
        if self._log is None or self._log.frequencies is None:
            raise ValueError("the model was loaded for a policy without needs_frequencies")
        return self._log.frequencies

    def apply(self, rule: Rule, definition: Callable[[CacheView], FloatArray]) -> FloatArray:
        found = self._cache.score(rule, *self._rows)
        return definition(self) if isinstance(found, NotInPlace) else found
