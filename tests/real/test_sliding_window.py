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


def test_with_a_window_of_1024_all_defaults_and_small_budgets_read_on(
    gemma: Callable[..., Llama], larger_window: str, book: str
) -> None:
    for options in ({"kv_budget": 512}, {"kv_budget": 128, "swa_full": False}):
        llm = gemma(larger_window, **options)
        assert llm.kv_stats.cells == 1280
        read(llm, book, 1300)
        assert llm.kv_stats.evictions >= 1
