"""What the benchmarks share: models to measure, and caches that are filled without reading a text.

A cache is filled by restoring a state of random keys and values. Its table says what it would say
after an eviction and the tokens since, so the next eviction is one of many and not the first: the
rows that were kept have their scores, and only the tokens since then are scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import kvp_edge
from kvp_edge.bundled import bundled_model
from kvp_edge.cache.table import Table

ROOT = Path(__file__).resolve().parent.parent
from makers import blobs  # noqa: E402
from makers.gguf_models import HALF_B, write_model  # noqa: E402


def ms(action: Callable[..., Any], *args: Any) -> float:
    """Milliseconds that action(*args) takes."""
    started = time.perf_counter()
    action(*args)
    return 1e3 * (time.perf_counter() - started)


def models(folder: str, model: str | None) -> dict[str, str]:
    """Name -> file: the one asked for, else the bundled one and a 0.5B shape, written to folder."""
    if model:
        return {Path(model).stem: model}
    bundled = bundled_model()
    half_b = str(Path(folder) / "half-b.gguf")
    write_model(half_b, HALF_B)
    return {Path(bundled).stem: bundled, "0.5B shape": half_b}


def bounded(model: str, cells: int, kept: int, threads: int, **options: Any) -> kvp_edge.Llama:
    """A Llama of so many cells, of which an eviction leaves `kept`."""
    llm = kvp_edge.Llama(
        model,
        kv_budget=kept,
        reserve=cells - kept,
        verbose=False,
        n_threads=threads,
        n_threads_batch=threads,
        **options,
    )
    assert llm.kv_stats.cells == cells, llm.kv_stats
    return llm


def synthetic_state(shape: Any, n: int) -> np.ndarray:
    """A state of n tokens at positions 0 .. n - 1 with random keys and values."""
    f16 = llama_cpp.GGML_TYPE_F16
    assert shape.type_k == shape.type_v == f16
    assert shape.head_size_k == shape.head_size_v
    row = shape.n_head_kv * shape.head_size_k
    # one layer's numbers for all layers: only their number matters here
    one = np.random.default_rng(0).standard_normal((n, row), np.float32).astype(np.float16)
    rows = np.broadcast_to(one.view(np.uint8), (shape.n_layer, n, 2 * row))
    value_size = 2 if shape.v_transposed else 0
    cache = blobs.Cache(np.arange(n, dtype=np.int32), f16, f16, value_size, rows, rows)
    return np.frombuffer(blobs.write([cache]), np.uint8)


def fill(llm: kvp_edge.Llama, rows: int, seen: int, state: np.ndarray | None = None) -> None:
    """Make it hold `rows` rows as if `seen` tokens had been read.

    If that is more than `rows`, an eviction has left its budget, and the others were read since.
    ``state`` is a synthetic_state of `rows` tokens, if there is one already.
    """
    kv = llm.kv
    assert kv is not None
    empty, limits = kv.empty_table(), kv.limits
    packed_rows, scores, marked = 0, empty.scores, seen
    if seen > rows:
        packed_rows = limits.budget - limits.recent
        shape = (*empty.scores.shape[:2], limits.budget)
        scores = np.random.default_rng(1).standard_normal(shape, np.float32)
        scores = kv._final(scores, packed_rows, limits.budget)
        marked = seen - (rows - limits.budget)
    tail = seen - (rows - packed_rows)
    packed = np.arange(packed_rows, dtype=np.int32)
    table = Table(
        seen=seen,
        tail=tail,
        shift=tail - packed_rows,  # the synthetic state's positions begin at 0
        packed_indices=np.broadcast_to(packed, (*empty.packed_indices.shape[:2], packed_rows)),
        packed_rope_positions=np.broadcast_to(
            packed, (*empty.packed_indices.shape[:2], packed_rows)
        ),
        packed_llama_positions=packed,
        wanted=np.zeros((*empty.wanted.shape[:2], packed_rows), np.float32),
        scores=scores,
        spans=empty.spans,
        marked=marked,
    )
    llm.reset()
    with kv.restoring(table, synthetic_state(kv.cache.shape, rows) if state is None else state):
        llm.n_tokens = seen
    llm.input_ids[:seen] = 7


def rows_to_keep(llm: kvp_edge.Llama) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a full cache may be packed to, as NativeCache.pack takes it: the recent window, and of
    the older rows every head its own at random."""
    kv = llm.kv
    assert kv is not None
    limits, shape = kv.limits, kv.cache.shape
    present = np.arange(limits.cells, dtype=np.int32)
    older = np.tile(present[: -limits.recent], (shape.n_layer, shape.n_head_kv, 1))
    chosen = np.random.default_rng(0).permuted(older, axis=-1)[..., : limits.budget - limits.recent]
    recent = np.broadcast_to(present[-limits.recent :], (*chosen.shape[:2], limits.recent))
    keep = np.concatenate((np.sort(chosen, axis=-1), recent), axis=-1)
    oldest = present[: limits.budget - limits.recent]  # as EvictionManager names them
    return present, keep, np.concatenate((oldest, present[-limits.recent :]))


def write_ms(llm: llama_cpp.Llama, n: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds per token, one by one; the tokens are taken back."""
    before = llm.n_tokens
    llm.eval([7])  # warm up
    started = clock()
    for _ in range(n):
        llm.eval([7])
        llama_cpp.llama_synchronize(llm.ctx)  # as who looks at the logits waits for them
    spent = clock() - started
    llm.n_tokens = before
    return 1e3 * spent / n


def read_ms(llm: llama_cpp.Llama, n: int) -> float:
    """Milliseconds per token of n tokens read at once; they are taken back."""
    before = llm.n_tokens
    started = time.perf_counter()
    llm.eval([7] * n)
    llama_cpp.llama_synchronize(llm.ctx)
    spent = time.perf_counter() - started
    llm.n_tokens = before
    return 1e3 * spent / n


def peak_mib() -> float:
    """Largest memory of this process since it began, or since clear_refs, the model's
    file included (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
