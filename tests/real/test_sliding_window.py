"""Gemma 3, whose layers see 512 tokens but for every sixth: chats beyond the full cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import pytest

from kvp_edge import Llama

pytestmark = pytest.mark.real

RealModel = Callable[[str], str]
QUIET: dict[str, Any] = {"verbose": False, "policy": "keydiff", "n_ctx": 8192}


@pytest.fixture
def gemma(real_model: RealModel) -> Iterator[Callable[..., Llama]]:
    """gemma(**options) -> Llama, closed after the test."""
    loaded: list[Llama] = []

    def load(path: str | None = None, **options: Any) -> Llama:
        loaded.append(Llama(path or real_model("gemma"), **{**QUIET, **options}))
        return loaded[-1]

    yield load
    for llm in loaded:
        llm.close()


@pytest.fixture(scope="module")
def larger_window(real_model: RealModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same file with a window of 1,024 tokens, as the family's larger models have it."""
    path = tmp_path_factory.mktemp("gemma") / "gemma-window-1024.gguf"
    shutil.copy(real_model("gemma"), path)
    path.chmod(0o644)
    field = gguf.GGUFReader(path, "r+").fields["gemma3.attention.sliding_window"]
    field.parts[field.data[0]][0] = 1024
    yield str(path)
    path.unlink()


def read(llm: Llama, book: str, n: int) -> None:
    """Read n tokens, and write a few."""
    llm.eval(llm.tokenize(book.encode())[:n])
    for _ in range(4):
        llm.eval([llm.likeliest()])
    assert llm.n_tokens == n + 4
    assert np.isfinite(llm.newest_logits()).all()


@pytest.mark.parametrize("budget", [64, 128, 256, 400, 512, 700])
def test_reading_goes_on_beyond_the_full_cache_at_any_budget(
    gemma: Callable[..., Llama], book: str, budget: int
) -> None:
    llm = gemma(kv_budget=budget)
    assert llm.kv_stats.cells == (1024 if budget > 512 else 768)
    read(llm, book, llm.kv_stats.cells + 20)
    assert llm.kv_stats.evictions >= 1


@pytest.mark.parametrize("budget", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_every_message_of_a_long_chat_is_answered(
    gemma: Callable[..., Llama], book: str, budget: int
) -> None:
    llm = gemma(kv_budget=budget, chat_format="transcript", n_threads=1, n_threads_batch=1)
    messages: list[Any] = []
    for turn in range(8):
        text = book[700 * turn : 700 * (turn + 1)].replace("\n", " ")
        messages.append({"role": "user", "content": f"{text} What do you say?"})
        read = llm.n_tokens
        result = llm.create_chat_completion(messages, max_tokens=8, temperature=0)
        reply = result["choices"][0]["message"]["content"]
        assert reply.strip()
        cache = result["kv_cache"]
        assert read < cache["seen"] == cache["kept"] + cache["dropped"]
        assert cache["kept"] <= cache["cells"] == 768
        messages.append({"role": "assistant", "content": reply})
    assert cache["evictions"] >= 1
    assert cache["dropped"] > 500


def mean_loss(llm: Llama, book: str, n_read: int, n_scored: int) -> float:
    """Of the tokens after the first ``n_read``, in nats."""
    tokens = llm.tokenize(book.encode())[: n_read + n_scored]
    llm.eval(tokens[:n_read])
    losses = []
    for token in tokens[n_read:]:
        logits = llm.newest_logits().astype(np.float64)
        losses.append(np.logaddexp.reduce(logits) - logits[token])
        llm.eval([token])
    return float(np.mean(losses))


@pytest.mark.parametrize("budget", [256, pytest.param(700, marks=pytest.mark.slow)])
def test_in_place_and_through_the_state_the_text_to_come_is_as_likely(
    gemma: Callable[..., Llama], book: str, budget: int
) -> None:
    losses, ways = [], []
    for pack in ("device", "state"):
        llm = gemma(kv_budget=budget, pack=pack, n_threads=1, n_threads_batch=1)
        losses.append(mean_loss(llm, book, llm.kv_stats.cells + 20, 40))
        stats = llm.kv_stats
        assert stats.evictions >= 1
        ways.append(stats.evictions_as_state)
    # With the smaller budget the window's layers would lose tokens that they still see.
    assert ways == [1 if budget == 256 else 0, 1]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_with_a_window_of_1024_all_defaults_and_small_budgets_read_on(
    gemma: Callable[..., Llama], larger_window: str, book: str
) -> None:
    for options in ({"kv_budget": 512}, {"kv_budget": 128, "swa_full": False}):
        llm = gemma(larger_window, **options)
        assert llm.kv_stats.cells == 1280
        read(llm, book, 1300)
        assert llm.kv_stats.evictions >= 1
