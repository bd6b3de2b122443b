"""Any history of a conversation, checked against the numpy reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from hypothesis import strategies as st

from conftest import RandomModel, random_tokens
from kvp_edge import Llama
from kvp_edge.cache.recall import RecallSettings
from makers.gguf_models import ModelShape
from support.closeness import difference
from support.noise import CacheNoise, Noise, NotedNoise
from support.watch import Watch

Maker = Callable[[ModelShape], RandomModel]
F32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
EXACT, EXACT_GELU = 3e-4, 0.02


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    arch: Any = draw(st.sampled_from(["llama", "qwen2", "qwen3", "gemma3", "phi3"]))
    head_dim = draw(st.sampled_from([32, 64]))
    n_head_kv = draw(st.integers(1, 2))
    n_head = n_head_kv * draw(st.integers(1, 2))
    return ModelShape(
        arch,
        n_layer=draw(st.integers(1, 3)) if arch != "gemma3" else 4,
        n_embd=n_head * head_dim if arch in ("qwen2", "phi3") else 64,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=64,
        sliding_window=draw(st.sampled_from([0, 16])) if arch == "gemma3" else 0,
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def any_recall(draw: st.DrawFn) -> RecallSettings:
    return RecallSettings(
        n_queries=draw(st.integers(1, 64)),
        after=draw(st.integers(0, 20)),
        before=draw(st.integers(0, 3)),
        floor=draw(st.sampled_from([0.0, 0.5, 1.0])),
        passes=draw(st.integers(1, 3)),
        threshold=draw(st.sampled_from([0.0, 0.1])),
        shared=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


def any_history(
    random_model: Maker,
    data: st.DataObject,
    way: str,
    shape: ModelShape | None = None,
    most: int = 700,
    recall: bool = False,
    **more: Any,
) -> None:
    """Reads, rewinds, saves and loads in any order; then every logit must be what the reference
    gives when each query sees what its head held at the time.

    Args:
        shape: of the model; None: any.
        most: tokens that are read at most, or a few more.
        recall: also recall at any moment, and go back to any length.
        more: arguments of Llama.
    """
    draw = data.draw
    model = random_model(shape or draw(shapes()))
    budget = draw(st.integers(30, 120))
    options: dict[str, Any] = {
        "n_ctx": 2000,
        "kv_budget": budget,
        "recent": draw(st.integers(1, 20)),
        "sinks": draw(st.integers(0, 6)),
        "reserve": draw(st.integers(100, 200)),
        "policy": draw(st.sampled_from([Noise, CacheNoise, NotedNoise]))(),
        "logits_all": True,
        "recall": "reply" if recall else "off",
        "verbose": False,
        "n_threads": 1,
        "n_threads_batch": 1,
        **F32,
        **more,
    }
    llm = Llama(model.path, **options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "session"
        watch = Watch(llm, model.shape)
        saved: tuple[Any, Any] | None = None
        actions = ["read", "read", "write", "rewind", "save", "load"]
        if recall:
            actions += ["recall", "recall", "go back"]
            llm.eval(random_tokens(330, seed=99)[1:])
        try:
            for step in range(draw(st.integers(2, 7))):
                action = draw(st.sampled_from(actions))
                if recall and llm.kv is not None:
                    llm.kv.recall_settings = draw(any_recall())
                room = most - llm.n_tokens
                if action == "read":
                    n = max(0, min(room, draw(st.integers(1, 250))))
                    llm.eval(random_tokens(n + 1, seed=step)[1:])
                elif action == "write":
                    for token in random_tokens(draw(st.integers(1, 20)), seed=step)[1:]:
                        llm.eval([token])
                elif action == "rewind" and llm.n_tokens:
                    back = draw(st.integers(0, min(llm.n_tokens - 1, 25)))
                    if llm.kv is not None and llm.kv.can_rewind(llm.n_tokens - back):
                        llm.n_tokens -= back
                        llm.eval([11])
                elif action == "recall":
                    llm.recall()
                elif action == "go back" and llm.n_tokens:
                    length = draw(st.integers(1, llm.n_tokens))
                    if llm.kv is not None and llm.kv.can_return(length):
                        llm.n_tokens = length
                        llm.eval([11])
                elif action == "save" and llm.n_tokens:
                    llm.save_session(file)
                    saved = (dict(watch.held), np.array(llm.scores[: llm.n_tokens]))
                elif action == "load" and saved is not None:
                    if draw(st.booleans()):  # in another process, as it were
                        llm.close()
                        llm = Llama(model.path, **options)
                        watch = Watch(llm, model.shape)
                    llm.load_session(file)
                    watch.held = dict(saved[0])
                    llm.keep_logits(0, saved[1])
                stats = llm.kv_stats
                assert stats.kept + stats.dropped == stats.seen == llm.n_tokens
                assert stats.kept <= stats.cells
                if llm.kv is not None and llm.n_tokens:
                    present = llm.kv.snapshot().llama_positions()
                    known = llm.kv.cache.check_cells(present)  # against llama.cpp's own state
                    assert known == (stats.pack == "device") == (way != "state")
            if llm.n_tokens == 0:
                return
            got, want = llm.scores[: llm.n_tokens], watch.expected(model.reference)
            limit = EXACT_GELU if model.shape.arch == "gemma3" else EXACT
            assert difference(got, want) < limit
        finally:
            llm.close()
