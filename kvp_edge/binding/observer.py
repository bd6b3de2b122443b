"""What llama.cpp computes in a context, shown to all who want to see it."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import llama_cpp

from kvp_edge.binding.library import call, lib


class Observer:
    """Shows the nodes of a context's graphs to those who subscribe: caches that are scored and
    packed where they lie (NativeCache), logs of queries (QueryLog), captures of attention
    (AttentionAsComputed), in any order and any number of each.

    It must live as long as the context (see kvp_observer_create); who subscribes keeps it.

    Args:
        params: llama_context_params of a context that is not made yet. A callback that they name
            already is shown the nodes as well.
    """

    def __init__(self, params: Any) -> None:
        self.handle = ctypes.c_void_p()
        call(
            "kvp_observer_create",
            ctypes.cast(params.cb_eval, ctypes.c_void_p),
            params.cb_eval_user_data,
            ctypes.byref(self.handle),
        )
        self._next = params.cb_eval  # a function in Python must stay alive
        # The finalizer holds the handle alone, so it cannot keep this object alive.
        weakref.finalize(self, lib.kvp_observer_free, self.handle)
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(lib.kvp_observer_callback())
        params.cb_eval_user_data = self.handle
