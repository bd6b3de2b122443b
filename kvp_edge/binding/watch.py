"""Where llama.cpp keeps a cache, seen while it computes."""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any

import llama_cpp

if TYPE_CHECKING:
    pass

from kvp_edge.binding.library import call, lib


class Watch:
    """Sees where llama.cpp keeps a context's cache, and which cell each token goes to.

    It must live as long as the context (see kvp_watch_create).
    """

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()

    def set_callback(self, params: Any) -> None:
        """Let a context made with these llama_context_params show its nodes, to whatever callback
        they name already as well."""
        call(
            "kvp_watch_create",
            ctypes.cast(params.cb_eval, ctypes.c_void_p),
            params.cb_eval_user_data,
            ctypes.byref(self.handle),
        )
        # The finalizer holds the handle alone, so it cannot keep this object alive.
        weakref.finalize(self, lib.kvp_watch_free, self.handle)
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(lib.kvp_watch_callback())
        params.cb_eval_user_data = self.handle
