"""SnapKV, TOVA and H2O on a trace, against sums over the attention it was made of."""

from __future__ import annotations

import numpy as np
import pytest

from support.packages import needs

needs("torch", "train")

from kvp_edge.binding.blocks import Blocks  # noqa: E402
from kvp_edge.traces.format import Trace  # noqa: E402
from kvp_edge.training.attention_baselines import ATTENTION_BASELINES  # noqa: E402

L, H, T = 2, 3, 100


def trace_of(attention: np.ndarray, block: int) -> Trace:
    """A trace of f32 [L, H, T, T] attention: query, token."""
    sums, begin = [], 0
    for begin in range(0, T, block):
        end = min(T, begin + block)
        sums.append(attention[:, :, begin:end, :end].sum(2))
    empty = np.zeros((L, H, T, 1), np.float16)
    number = np.arange(T, dtype=np.int32)
    packed = np.concatenate(sums, axis=2).astype(np.float16)
    return Trace(empty, empty, number, number, packed, 64, Blocks(block, block), 1.0, "made up")


@pytest.mark.parametrize("block", [1, 4])
def test_baselines_are_sums_over_the_newest_queries(block: int) -> None:
    rng = np.random.default_rng(0)
    attention = np.tril(rng.random((L, H, T, T), np.float32))
    attention /= attention.sum(-1, keepdims=True)
    trace, n = trace_of(attention, block), 64
    seen = attention[:, :, :n, :n].reshape(L * H, n, n)
    got = {name: score(trace, n) for name, score in ATTENTION_BASELINES.items()}
    close = {"rtol": 2e-3, "atol": 1e-5}  # the blocks' sums are half precision
    np.testing.assert_allclose(got["tova"], seen[:, -block:].sum(1), **close)
    np.testing.assert_allclose(got["h2o"], seen.sum(1), **close)
    window = seen[:, -32:].sum(1)
    for token in (2, 30, n - 3):
        around = window[:, token - 2 : token + 3].mean(1)
        np.testing.assert_allclose(got["snapkv"][:, token], around, **close)


def test_a_cut_before_the_window_is_full_takes_what_there_is() -> None:
    attention = np.tril(np.ones((L, H, T, T), np.float32))
    got = ATTENTION_BASELINES["snapkv"](trace_of(attention, 4), 8)
    assert got.shape == (L * H, 8)
    assert (np.diff(got, axis=1) <= 1e-6).all()  # earlier tokens were seen by more queries
