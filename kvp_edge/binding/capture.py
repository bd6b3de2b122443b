"""Attention as llama.cpp computes it, summed over blocks of queries."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.arrays import FloatArray, HalfArray
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.library import call, lib


class _Plan(ctypes.Structure):
    """struct kvp_capture_plan"""

    _fields_ = [
        ("n_layer", ctypes.c_uint32),
        ("n_head_kv", ctypes.c_uint32),
        ("n_tokens", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("first", ctypes.c_uint32),
        ("base_cells", ctypes.c_uint32),
        ("scale", ctypes.c_float),
    ]


_PTR = ctypes.c_void_p
lib.kvp_capture_create.argtypes = [_PTR, _PTR]
lib.kvp_capture_free.argtypes = [_PTR]
lib.kvp_capture_free.restype = None
lib.kvp_capture_callback.argtypes = []
lib.kvp_capture_callback.restype = _PTR
lib.kvp_capture_begin.argtypes = [_PTR, _PTR, _PTR]
lib.kvp_capture_end.argtypes = [_PTR, ctypes.c_uint32, _PTR, ctypes.c_uint64, _PTR]


class AttentionAsComputed:
    """The sums over blocks of queries of the attention that llama.cpp has in memory when it runs
    without flash attention (kvp_capture in native/kvp_edge.h)."""

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        call("kvp_capture_create", ctypes.byref(self._handle))
        # The finalizer holds the handle alone, so it cannot keep this object alive.
        weakref.finalize(self, lib.kvp_capture_free, self._handle)

    def set_callback(self, params: Any) -> None:
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(lib.kvp_capture_callback())
        params.cb_eval_user_data = self._handle

    def start(self, context: Any, cache: NativeCache, batch: int) -> None:
        self._shape = s = cache.shape
        # the context's own number: llama.cpp may have rounded ours
        self._base_cells = llama_cpp.llama_n_ctx(context) if s.has_window else 0

    def begin(self, blocks: Blocks, n_tokens: int) -> None:
        s, self._blocks = self._shape, blocks
        plan = _Plan(
            s.n_layer,
            s.n_head_kv,
            n_tokens,
            blocks.size,
            blocks.first,
            self._base_cells,
            blocks.scale,
        )
        call("kvp_capture_begin", self._handle, ctypes.byref(plan))

    def make_room(self, n_read: int, n_next: int) -> None:
        """Nothing to do: attention is summed up as it appears."""

    def end(self, keys: FloatArray) -> HalfArray:
        s, n = self._shape, keys.shape[2]
        sums = np.empty((s.n_layer, s.n_head_kv, self._blocks.n_sums(n)), np.float16)
        call("kvp_capture_end", self._handle, n, sums.ctypes.data, sums.size)
        return sums
