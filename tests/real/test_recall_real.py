"""Recall on models that people use: the fact that is asked for comes back, as it was read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import LlamaDiskCache, LlamaRAMCache

from kvp_edge import Llama, Recall

pytestmark = pytest.mark.real

FACT = "My dog is called Rex. Remember that, please."
LONG = "Here is a part of a novel, and you need not answer at length. "
SMALL: dict[str, Any] = {
    "n_ctx": 4000, "kv_budget": 100, "recent": 24, "reserve": 156, "policy": "keydiff",
    "verbose": False, "n_threads": 2, "n_threads_batch": 2,
}  # fmt: skip


def holding(llm: Llama, word: str) -> float:
    """The share of heads that hold the first token of the conversation in which ``word`` ends."""
    text = b""
    for at, token in enumerate(llm.input_ids[: llm.n_tokens].tolist()):
        text += llm.detokenize([token], special=True)
        if word.encode() in text:
            indices = llm.kv_indices
            return float((indices.reshape(-1, indices.shape[-1]) == at).any(axis=1).mean())
    raise AssertionError(f"{word} is not in the conversation")


def test_a_fact_that_was_dropped_comes_back_when_it_is_asked_for(
    real_model: Callable[[str], str], book: str
) -> None:
    held = {}
    for recall in ("off", "reply"):
        events: list[Recall] = []
        more: dict[str, Any] = {"on_recall": events.append} if recall == "reply" else {}
        with closing(Llama(real_model("qwen"), recall=recall, **SMALL, **more)) as llm:
            messages: Any = []
            for said in (LONG + book[:1000], FACT, LONG + book[1000:2500]):
                messages.append({"role": "user", "content": said})
                messages.append({"role": "assistant", "content": "I see."})
            messages.append({"role": "user", "content": "What is my dog called?"})
            llm.create_chat_completion(messages, max_tokens=1, temperature=0.0)
            held[recall] = holding(llm, "Rex")
            assert llm.kv_stats.evictions > 2
            if recall == "reply":
                (event,) = events
                assert event.n_tokens > 20
                assert event.share > 0.02
                assert event.passes == 2
    assert held["off"] < 0.5 < held["reply"]


def test_rows_that_came_back_are_those_that_were_read(
    real_model: Callable[[str], str], book: str
) -> None:
    """Every key in the cells is the logged one: with all positions kept, none is turned."""
    with closing(Llama(real_model("smollm2"), recall="reply", **SMALL)) as llm:
        llm.create_completion(book[:3000], max_tokens=2, temperature=0.0)
        kv = llm.kv
        assert kv is not None
        assert kv.log is not None
        assert llm.kv_stats.recalls == 1
        table, log = kv.snapshot(), kv.log
        n, layout = table.n_packed, log.layout
        positions = table.llama_positions()[:n]
        _, keys, _ = kv.cache.read(int(positions[0]), int(positions[-1]) + 1, n)
        rows = {b.first: b for b in log.blocks}
        logged = np.zeros((layout.n_layer, layout.n_head_kv, log.end, layout.head_size_k), "f4")
        for first, block in rows.items():
            of_layer = block.rows.reshape(layout.n_layer, -1)[:, : block.n * layout.k_row]
            halves = np.ascontiguousarray(of_layer).view(np.float16)
            found = halves.reshape(layout.n_layer, block.n, layout.n_head_kv, -1).swapaxes(1, 2)
            logged[:, :, first : first + block.n] = found
        want = np.take_along_axis(logged, table.packed_indices[..., None], axis=2)
        assert np.array_equal(keys, want)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_prompt_found_in_a_cache_continues_like_one_that_was_read(
    real_model: Callable[[str], str], book: str, kind: str, tmp_path: Path
) -> None:
    """What was dropped from it is found, too: the question recalls the same rows."""
    got: dict[str, Any] = {}
    for how in ("read", "found"):
        events: list[Recall] = []
        more: dict[str, Any] = {**SMALL, "n_threads": 1, "n_threads_batch": 1}
        more |= {"recall": "reply", "on_recall": events.append}
        with closing(Llama(real_model("smollm2"), **more)) as llm:
            if how == "found":
                disk = kind == "disk"
                llm.set_cache(LlamaDiskCache(str(tmp_path)) if disk else LlamaRAMCache())
            prompt = llm.tokenize(book[:1500].encode())
            llm.create_completion(prompt, max_tokens=8, temperature=0.0)
            text = llm.input_ids[: llm.n_tokens].tolist()
            if how == "found":
                llm.reset()
                llm.eval(llm.tokenize(book[5000:5200].encode()))  # and nothing of it is left
            asked = [*text, *llm.tokenize(b" What is it about? It is about", add_bos=False)]
            read: list[int] = []
            llm.on_batch = lambda start, end, read=read: read.append(start)
            result: Any = llm.create_completion(asked, max_tokens=12, temperature=0.0)
            assert llm.kv_stats.evictions > 0
            assert llm.kv_stats.lost == 0
            assert min(read) == len(text), "only the question was read"
            assert events[-1].n_rows > 0
            assert llm.kv is not None
            assert llm.kv.log is not None
            rows = [block.rows.tobytes() for block in llm.kv.log.blocks]
            got[how] = (result["choices"][0]["text"], llm.kv_indices.tolist(), rows)
    assert got["found"] == got["read"]
