"""Gemma 3, whose layers see 512 tokens but for every sixth: chats beyond the full cache."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.cli import main

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
        llm.eval([llm._likeliest()])
    assert llm.n_tokens == n + 4
    assert np.isfinite(llm._newest_logits()).all()


@pytest.mark.parametrize("budget", [64, 128, 256, 400, 512, 700])
def test_reading_goes_on_beyond_the_full_cache_at_any_budget(
    gemma: Callable[..., Llama], book: str, budget: int
) -> None:
    llm = gemma(kv_budget=budget)
    assert llm.kv_stats.cells == (1024 if budget > 512 else 768)
    read(llm, book, llm.kv_stats.cells + 20)
    assert llm.kv_stats.evictions >= 1


def test_the_cache_packed_in_place_is_the_one_packed_through_the_state(
    gemma: Callable[..., Llama], book: str
) -> None:
    held, logits = [], []
    for pack in ("device", "state"):
        ways: list[str] = []
        llm = gemma(
            kv_budget=600,  # without the recent tokens still more than the window
            recent=60,
            pack=pack,
            on_evict=lambda e, ways=ways: ways.append(e.pack),
        )
        read(llm, book, 1044)
        assert ways == [pack]
        held.append(llm.kv_positions)
        logits.append(llm._newest_logits().copy())
    np.testing.assert_array_equal(*held)
    # sums over cells in another order; measured: below 0.02
    assert np.abs(logits[0] - logits[1]).max() / logits[1].std() < 0.1


def test_with_a_window_of_1024_all_defaults_and_small_budgets_read_on(
    gemma: Callable[..., Llama], larger_window: str, book: str
) -> None:
    for options in ({"kv_budget": 512}, {"kv_budget": 128, "swa_full": False}):
        llm = gemma(larger_window, **options)
        assert llm.kv_stats.cells == 1280
        read(llm, book, 1300)
        assert llm.kv_stats.evictions >= 1


def test_every_message_of_a_long_chat_is_answered(
    real_model: RealModel,
    book: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Through the command line: at a budget of 256 nine of these messages used to be answered."""
    sentences = [s.strip().replace("\n", " ") for s in book[4000:].split(".") if len(s) > 100]
    messages = [f"{s}. Who is that?" for s in sentences[:24]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(messages)))
    code = main(
        ["chat", real_model("gemma"), "--kv-budget", "256", "--max-tokens", "8", "--temp", "0"]
    )
    out = capfd.readouterr()
    assert code == 0
    assert "llama_decode" not in out.err
    assert out.err.count("[kvp:") == 24
    assert "(0 evictions)" not in out.err.splitlines()[-1]
