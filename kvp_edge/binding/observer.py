"""What llama.cpp computes in a context, shown to all who want to see it."""

from __future__ import annotations

from typing import Any

import llama_cpp

from kvp_edge.binding.library import create, lib


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
        self._next = params.cb_eval  # a function in Python must stay alive
        self.handle = create(
            "kvp_observer", "kvp_observer_create", params.cb_eval, params.cb_eval_user_data
        )
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(lib.kvp_observer_callback())
        params.cb_eval_user_data = self.handle.pointer
