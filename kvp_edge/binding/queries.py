"""The newest tokens' queries, logged while llama.cpp computes them (native/observe/queries.cpp).

Policies that need queries ask for them (``Policy.n_queries``) and find them in their view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.arrays import FloatArray, TokenIndices
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.library import call, create, lib
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.binding.structs import QueriesShape
from kvp_edge.errors import UnsupportedModelError

#: Tokens that are read to find a model's queries; no micro-batch has fewer.
_TRIED = 2


@dataclass(frozen=True)
class Queries:
    """Queries of m tokens, as attention multiplies them with cached keys: after norm and RoPE.

    Attributes:
        queries: f32 [n_layer, n_head, m, head_size]; query head h uses KV head
            h // (n_head / n_head_kv). Layers are those of the base cache.
        indices: int32 [m], ascending: the tokens' indices in the conversation.
        scale: f32 [n_layer], what q.k is multiplied by before the softmax.
    """

    queries: FloatArray
    indices: TokenIndices
    scale: FloatArray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, tokens: slice) -> Queries:
        return Queries(self.queries[:, :, tokens], self.indices[tokens], self.scale)


class QueryLog:
    """A ring of the newest tokens' queries of one context.

    Its owner calls ``start`` while the cache is empty, and then tells what it does with the
    conversation: ``append`` after every batch, ``rewind`` when it goes back.

    Args:
        observer: of the context.

    Attributes:
        frequencies: of RoPE, for policies that need them (Policy.needs_frequencies).
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.frequencies: KeyFrequencies | None = None
        self._watching = True
        self._asked_to_watch: bool | None = True  # None: an interrupt came in between
        self._shape = QueriesShape()
        self._scale = np.empty(0, np.float32)
        self._handle = create("kvp_queries", "kvp_queries_create", observer.handle)

    def start(
        self,
        context: Any,
        cache: NativeCache,
        capacity: int,
        instead: str = "Choose a policy that does not need queries",
    ) -> None:
        """Find the model's queries by reading a few tokens, and log from now on.

        Args:
            context: llama_context pointer; its cache is empty, now and afterwards.
            cache: the same context's.
            capacity: tokens whose queries are kept.
            instead: what to do with a model that is refused, a sentence for its user.

        Raises:
            UnsupportedModelError: they cannot be found, or are of no use: attention that is more
                than softmax(scale q.k).
            KVCacheError: llama.cpp could not read the tokens.
            MemoryError: too many numbers.
        """
        s = cache.shape
        self._scale = np.empty(s.n_layer, np.float32)
        call("kvp_queries_try", self._handle, _TRIED)
        try:
            tokens = (llama_cpp.llama_token * _TRIED)(*range(1, _TRIED + 1))
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, _TRIED)) != 0:
                raise UnsupportedModelError(
                    f"llama.cpp could not read {_TRIED} tokens to find the model's queries"
                )
            _, keys, _ = cache.read(0, _TRIED, _TRIED, values=False)
        finally:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        try:
            call("kvp_queries_start", self._handle, s, keys, capacity, self._shape, self._scale)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}. {instead}") from error

    @property
    def watching(self) -> bool:
        """Whether queries of what is decoded next are logged. It costs a little of llama.cpp's
        speed, which computes layer by layer then."""
        return self._watching

    def watch(self, on: bool) -> None:
        """See ``watching``; at first it is True."""
        if on == self._asked_to_watch:
            return
        # an interrupt must not leave a log that believes to see what it is not shown
        self._watching, self._asked_to_watch = False, None
        call("kvp_queries_watch", self._handle, int(on))
        self._watching = self._asked_to_watch = on

    def append(self, first: int, n: int) -> None:
        """The ``n`` tokens decoded last are number ``first``, ... of the conversation.

        Raises:
            KVCacheError: llama.cpp did not show the queries of all of them; none is logged.
        """
        if self._watching:
            call("kvp_queries_append", self._handle, first, n)

    def rewind(self, length: int) -> None:
        """Forget the conversation's tokens from ``length`` on, and all not appended yet."""
        call("kvp_queries_rewind", self._handle, length)

    def clear(self) -> None:
        self.rewind(0)

    def __len__(self) -> int:
        """Tokens whose queries there are."""
        return int(lib.kvp_queries_size(self._handle))

    @property
    def newest(self) -> int:
        """The number of the newest token whose queries there are, -1 if there are none."""
        return int(self.read(1).indices[0]) if len(self) else -1

    def of(self, start: int, end: int) -> Queries | None:
        """The queries of the tokens [start, end), if these are the newest ones; None if not."""
        found = self.read(end - start)
        return found if np.array_equal(found.indices, np.arange(start, end)) else None

    def read(self, newest: int) -> Queries:
        """The queries of the ``newest`` tokens, of fewer if there are not so many."""
        n, s = min(newest, len(self)), self._shape
        queries = np.empty((s.n_layer, s.n_head, n, s.head_size), np.float32)
        indices = np.empty(n, np.int32)
        call("kvp_queries_read", self._handle, n, queries, indices)
        return Queries(queries, indices, self._scale.copy())
