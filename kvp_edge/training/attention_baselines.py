"""Baselines that know what earlier queries attended to: SnapKV, TOVA and H2O.

They use the attention in a trace; in a bounded chat the policies of the same names
(kvp_edge.policies) use logged queries. As everywhere in training, attention is the largest in a KV
head's query group (the originals: its mean, or one score per query head), and a window of queries
is rounded to whole blocks of the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.training.data import TraceLike

_WINDOW = 32  # queries; SnapKV's observation window in its experiments on long texts
_KERNEL = 5  # tokens that SnapKV pools over


class _Attended(TraceLike, Protocol):
    """A trace that also knows what was paid before an eviction (kvp_edge.traces.format.Trace)."""

    @property
    def block(self) -> int: ...
    def received(self, start: int, stop: int, n_tokens: int | None = None) -> FloatArray: ...


def snapkv(trace: _Attended, n: int) -> FloatArray:
    """Attention of the newest 32 queries, averaged over neighbouring tokens (arXiv:2404.14469,
    section 4): f32 [N, n] for N = layers x KV heads."""
    recent = trace.received(max(0, n - max(_WINDOW, trace.block)), n, n)
    half = _KERNEL // 2
    padded = np.pad(recent.reshape(-1, n), ((0, 0), (half, half)), mode="edge")
    pooled = sum(padded[:, i : i + n] for i in range(_KERNEL))
    return np.asarray(pooled / _KERNEL, np.float32)


def tova(trace: _Attended, n: int) -> FloatArray:
    """Attention of the newest query, or of its block (arXiv:2401.06104, section 3.2): [N, n]."""
    return trace.received(n - trace.block, n, n).reshape(-1, n)


def h2o(trace: _Attended, n: int) -> FloatArray:
    """Attention of all queries so far (arXiv:2306.14048, section 4): f32 [N, n]."""
    return trace.received(0, n, n).reshape(-1, n)


#: Scorers (see validate.py) of traces that know what was paid before an eviction.
ATTENTION_BASELINES: dict[str, Callable[[Any, int], FloatArray]] = {
    "snapkv": snapkv,
    "tova": tova,
    "h2o": h2o,
}
