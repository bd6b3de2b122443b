"""Where old turns began is forgotten, and nothing that is decided depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.cache.table import Table
from kvp_edge.cache.turns import settled_before
from kvp_edge.text.spans import TURN

Loader = Callable[..., Llama]


def with_every_turn(self: Table, found: Any) -> Table:
    """Table.with_spans that forgets no turn: what it is compared with."""
    new = np.array(found, np.int32).reshape(-1, 3)
    start = min([self.unsure_from, *new[:1, 0].tolist()])
    return replace(
        self, spans=np.concatenate((self.spans[self.spans[:, 1] <= start], new)), marked=self.seen
    )


def talk(llm: Llama, rng: np.random.Generator, turns: int) -> list[Any]:
    """Chats, with replies that are asked for again; what is held and settled after each turn."""
    text, found = "", []
    for turn in range(turns):
        text += f"<|user|>My dog {turn} is Rex.<|end|><|assistant|>Yes, he is old.<|end|>"
        tokens = llm.tokenize(text.encode(), False, True)
        read = llm.input_ids[: llm.n_tokens].tolist()
        pairs = enumerate(zip(read, tokens, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), len(read))
        back = int(rng.integers(0, 30))
        length = max(same - back, 0) if turn % 3 == 2 else same
        if llm.kv.can_rewind(length):
            llm.n_tokens = length
        else:
            llm.reset()
        llm.eval(tokens[llm.n_tokens :])
        table = llm.kv.snapshot()
        found.append((llm.kv_indices.tolist(), settled_before(table), table.newest_turn))
    return found


@pytest.mark.parametrize("isolate_turns", [False, True])
def test_what_is_kept_does_not_depend_on_turns_long_gone(
    bundled_model: str, load: Loader, monkeypatch: pytest.MonkeyPatch, isolate_turns: bool
) -> None:
    how = {"n_ctx": 5000, "kv_budget": 100, "reserve": 156, "isolate_turns": isolate_turns}
    llm = load(bundled_model, **how)
    got = talk(llm, np.random.default_rng(0), 60)
    n_marks = int((llm.kv.snapshot().spans[:, 2] == TURN).sum())
    monkeypatch.setattr(Table, "with_spans", with_every_turn)
    everything = load(bundled_model, **how)
    assert talk(everything, np.random.default_rng(0), 60) == got
    assert everything.kv_stats.evictions > 5
    assert n_marks < 60 < int((everything.kv.snapshot().spans[:, 2] == TURN).sum())


def test_spans_do_not_grow_with_turns(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, n_ctx=50_000, kv_budget=100, reserve=156, positions="compact")
    most = 0
    for _ in range(240):
        llm.eval(llm.tokenize(b"<|user|>Who?<|end|><|assistant|>I.<|end|>", False, True))
        most = max(most, len(llm.kv.snapshot().spans))
    assert llm.kv_stats.evictions > 10
    assert most <= llm.kv_stats.cells
