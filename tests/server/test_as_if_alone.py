"""Chats that take turns in the same cells, each beside a Llama that nobody disturbs: as if alone.

The same text, the same tokens and, in every head, the same rows of the cells and the same KV log;
in memory, in a folder, over a restart, with two contexts, and with recall and without it.
"""

from __future__ import annotations

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from support.packages import needs

needs("fastapi", "server")
needs("httpx2", "dev")

from starlette.testclient import TestClient  # noqa: E402

from kvp_edge.server.app import Settings, make_app  # noqa: E402
from kvp_edge.server.chats import Chats  # noqa: E402
from kvp_edge.server.served import ServedLlama  # noqa: E402

OPTIONS: dict[str, Any] = {
    **{"kv_budget": 96, "recent": 16, "reserve": 64, "n_ctx": 2048},
    **{"verbose": False, "n_threads": 1, "n_threads_batch": 1},
}
TEXT = "the old man went to sea and my dog is called Rex snow fell on all roofs where we sang"
WORDS = TEXT.split()
COUNTS = ("evictions", "recalled")


class Alone:
    """One chat: what was said in it, and a Llama that has no other."""

    def __init__(self, number: int, recall: str) -> None:
        self.number = number
        self.llm = Llama(bundled_model(), recall=recall, **OPTIONS)
        self.messages: list[dict[str, str]] = []
        self.id: str | None = None
        self.grew = dict.fromkeys(COUNTS, 0)

    def ask(self, rng: random.Random) -> dict[str, Any]:
        """A body for the server. Most are long enough for evictions in a few turns."""
        text = f"Number {self.number}. {' '.join(rng.choices(WORDS, k=rng.randint(5, 90)))}?"
        self.messages.append({"role": "user", "content": text})
        how = {"max_tokens": 8, "temperature": rng.choice([0.0, 0.8]), "seed": rng.randrange(99)}
        return {"messages": list(self.messages), **how}

    def check(self, asked: dict[str, Any], got: dict[str, Any]) -> None:
        """What the server said is what it says here."""
        before, counts = self.llm.n_tokens, dict(self.llm.kv_stats)
        want = self.llm.create_chat_completion(**asked)
        self.messages.append(got["choices"][0]["message"])
        assert self.messages[-1] == want["choices"][0]["message"]
        assert got["usage"]["completion_tokens"] == want["usage"]["completion_tokens"]
        for name in ("seen", "kept", "evictions", "logged", "recalled"):
            assert got["kv_cache"][name] == self.llm.kv_stats[name], name
        self.grew = {name: self.llm.kv_stats[name] - counts[name] for name in COUNTS}
        self.id = self.id or got["chat_id"]
        assert got["chat_id"] == self.id
        # all that it had read, but for the last token or two, which a template ends otherwise
        assert got["usage"]["prompt_tokens_details"]["cached_tokens"] >= before - 2

    def check_cells(self, llm: Llama) -> None:
        assert llm.input_ids[: llm.n_tokens].tolist() == self.tokens
        assert np.array_equal(llm.kv_indices, self.llm.kv_indices)
        ours, theirs = (one.kv.log for one in (self.llm, llm))  # type: ignore[union-attr]
        assert (ours is None) is (theirs is None)
        if ours is not None and theirs is not None:
            assert len(ours.blocks) == len(theirs.blocks)
            for one, other in zip(ours.blocks, theirs.blocks, strict=True):
                assert (one.first, one.end) == (other.first, other.end)
                assert bytes(one.rows) == bytes(other.rows)

    @property
    def tokens(self) -> list[int]:
        return self.llm.input_ids[: self.llm.n_tokens].tolist()  # type: ignore[no-any-return]


class Together:
    """A server for all of them.

    Args:
        folder: for its chats; None: in memory.
        parallel: contexts.
    """

    def __init__(self, recall: str, folder: Path | None, parallel: int) -> None:
        self._folder = folder
        self._how = {**OPTIONS, "recall": recall}
        self._parallel = parallel
        self.start()

    def start(self) -> None:
        self.llms = [ServedLlama(bundled_model(), **self._how) for _ in range(self._parallel)]
        self._store = Chats(self._folder, 2**32)
        if self._folder is not None:
            assert self._store.read_folder(self.llms[0]) == []
        app = make_app(self.llms, self._store, Settings("bookworm"))
        self._client = TestClient(app, base_url="http://127.0.0.1").__enter__()

    def stop(self) -> None:
        self._client.__exit__(None, None, None)

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def counted(self) -> dict[str, int]:
        """Evictions and tokens that came back, in all chats since the server began."""
        text = self._client.get("/metrics").text
        found = [re.search(rf"^kvp_{name}_total (\S+)$", text, re.MULTILINE) for name in COUNTS]
        return {name: int(float(n[1])) for name, n in zip(COUNTS, found, strict=True) if n}

    def cells_of(self, chat: Alone) -> Llama | None:
        """The context that has a chat in its cells."""
        found = (m for m in self.llms if m.input_ids[: m.n_tokens].tolist() == chat.tokens)
        return next(found, None)


def take_turns(
    n_chats: int,
    n_turns: int,
    recall: str,
    folder: Path | None,
    parallel: int = 1,
    restarts: bool = False,
) -> None:
    rng = random.Random(n_turns)
    server = Together(recall, folder, parallel)
    chats = [Alone(i, recall) for i in range(n_chats)]
    try:
        for turn in range(0, n_turns, parallel):
            if restarts and turn == n_turns // 2:
                server.stop()
                server.start()
            now = rng.sample(chats, parallel)
            before = server.counted()
            asked = [chat.ask(rng) for chat in now]
            with ThreadPoolExecutor(parallel) as pool:
                answers = list(pool.map(server.ask, asked))
            for chat, body, answer in zip(now, asked, answers, strict=True):
                chat.check(body, answer)
                llm = server.cells_of(chat)
                assert llm is not None
                chat.check_cells(llm)
            for name, n in server.counted().items():
                assert n - before[name] == sum(chat.grew[name] for chat in now), name
        assert sum(chat.llm.kv_stats["evictions"] for chat in chats) > 0
        if recall != "off":
            assert sum(chat.llm.kv_stats["recalled"] for chat in chats) > 0
    finally:
        server.stop()
        for chat in chats:
            chat.llm.close()


def test_in_memory() -> None:
    take_turns(8, 30, "reply", None)


def test_in_a_folder_over_a_restart_without_recall(tmp_path: Path) -> None:
    take_turns(8, 30, "off", tmp_path, restarts=True)


def test_two_at_once_in_a_folder_over_a_restart(tmp_path: Path) -> None:
    take_turns(8, 30, "reply", tmp_path, parallel=2, restarts=True)


@pytest.mark.slow
@pytest.mark.parametrize("recall", ["off", "reply", "always"])
@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("where", ["in memory", "in a folder", "over a restart"])
def test_twenty_chats(recall: str, parallel: int, where: str, tmp_path: Path) -> None:
    folder = None if where == "in memory" else tmp_path
    take_turns(20, 160, recall, folder, parallel, where == "over a restart")
