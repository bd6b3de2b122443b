"""Attention as llama.cpp computes it, summed over blocks of queries."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.arrays import FloatArray, HalfArray
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.library import call, create
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.structs import CapturePlan


class AttentionAsComputed:
    """The sums over blocks of queries of the attention that llama.cpp has in memory when it runs
    without flash attention (kvp_capture in native/kvp_edge.h).

    Args:
        observer: of the context that computes it.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._handle = create("kvp_capture", "kvp_capture_create", observer.handle)

    def start(self, context: Any, cache: NativeCache, batch: int) -> None:
        self._shape = s = cache.shape
        # the context's own number: llama.cpp may have rounded ours
        self._base_cells = llama_cpp.llama_n_ctx(context) if s.has_window else 0

    def begin(self, blocks: Blocks, n_tokens: int) -> None:
        s, self._blocks = self._shape, blocks
        plan = CapturePlan(
            n_layer=s.n_layer,
            n_head_kv=s.n_head_kv,
            n_tokens=n_tokens,
            block=blocks.size,
            first=blocks.first,
            base_cells=self._base_cells,
            scale=blocks.scale,
        )
        call("kvp_capture_begin", self._handle, plan)

    def make_room(self, n_read: int, n_next: int) -> None:
        """Nothing to do: attention is summed up as it appears."""

    def end(self, keys: FloatArray) -> HalfArray:
        s, n = self._shape, keys.shape[2]
        sums = np.empty((s.n_layer, s.n_head_kv, self._blocks.n_sums(n)), np.float16)
        call("kvp_capture_end", self._handle, n, sums.view(np.uint16), sums.size)
        return sums
