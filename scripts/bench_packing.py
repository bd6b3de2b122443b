#!/usr/bin/env python3
"""What per-head eviction costs, and what a small cache saves.

    python scripts/bench_packing.py [--model MODEL.gguf] [--cells 512 4096 16384] [--long 32768]

Without --model it measures the bundled model and random weights of a 0.5B shape (24 layers, 2 KV
heads of 64 values; about 700 MB on disk for a while). Long caches are filled by restoring synthetic
states, so nothing is read. Medians; compare numbers of one run only, machines are noisy.

Two Markdown tables on stdout:

1. packing: the packer alone (gather every head's rows inside the state), and with llama.cpp reading
   the state out and back in, against a memcpy of the same state in the same minute; a whole
   eviction, scoring included, and its share in the time until the next one, writing token by token
   and reading in batches.
2. speed of writing with 2,048 cells at a logical position of --long, against a full cache of
   --long cells and against a fresh context of 2,048 cells that holds as many tokens.
   Each in a process of its own, with its peak memory while writing (bounded: and evicting once).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import kvp_edge
from kvp_edge.cli.options import bundled_model
from kvp_edge.eviction import Table
from kvp_edge.native import pack_state

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support import blobs  # noqa: E402
from support.gguf_models import HALF_B, write_model  # noqa: E402

SMALL = 2048


def median_ms(action: Callable[[], Any], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def synthetic_state(shape: Any, n: int) -> np.ndarray:
    """A state of n tokens at positions 0 .. n - 1 with random keys and values."""
    f16 = llama_cpp.GGML_TYPE_F16
    assert shape.type_k == shape.type_v == f16
    row = shape.n_head_kv * shape.head_size_k
    # one layer's numbers for all layers: only their number matters here
    one = np.random.default_rng(0).standard_normal((1, n, row), np.float32).astype(np.float16)
    rows = np.repeat(one.view(np.uint8), shape.n_layer, axis=0)
    value_size = 2 if shape.v_transposed else 0
    cache = blobs.Cache(np.arange(n, dtype=np.int32), f16, f16, value_size, rows, rows)
    return np.frombuffer(blobs.write([cache]), np.uint8)


def bounded(model: str, cells: int, n_ctx: int, threads: int) -> kvp_edge.Llama:
    reserve = max(256, cells // 5)
    llm = kvp_edge.Llama(
        model,
        n_ctx=n_ctx,
        kv_budget=cells - reserve,
        reserve=reserve,
        verbose=False,
        n_threads=threads,
        n_threads_batch=threads,
    )
    assert llm.kv_stats.cells == cells
    return llm


def fill(llm: kvp_edge.Llama, rows: int, seen: int) -> None:
    """Make it hold `rows` rows as if `seen` tokens had been read."""
    kv = llm._kv
    assert kv is not None
    empty = kv.empty_table()
    packed_rows = rows - kv.limits.recent if seen > rows else 0
    tail = seen - (rows - packed_rows)
    packed = np.arange(packed_rows, dtype=np.int32)
    table = Table(
        seen=seen,
        tail=tail,
        shift=tail - packed_rows,  # the synthetic state's positions begin at 0
        packed=np.broadcast_to(packed, (*empty.packed.shape[:2], packed_rows)),
        rotated=np.broadcast_to(packed, (*empty.packed.shape[:2], packed_rows)),
        cells=packed,
        scores=empty.scores,
        spans=empty.spans,
        marked=seen,
        settled=0,
    )
    kv.restore_with(table, synthetic_state(kv.cache.shape, rows))
    llm.n_tokens = seen
    llm.input_ids[:seen] = 7


def write_ms(llm: llama_cpp.Llama, n: int) -> float:
    """Milliseconds per token, one by one; the tokens are taken back."""
    before = llm.n_tokens
    llm.eval([7])  # warm up
    started = time.perf_counter()
    for _ in range(n):
        llm.eval([7])
    spent = time.perf_counter() - started
    llm.n_tokens = before
    return 1e3 * spent / n


def packing_row(name: str, model: str, cells: int, repeat: int, threads: int) -> str:
    llm = bounded(model, cells, 4 * cells, threads)
    kv = llm._kv
    assert kv is not None
    shape, budget = kv.cache.shape, kv.limits.budget
    state = synthetic_state(shape, cells)
    present = np.arange(cells, dtype=np.int32)
    rng = np.random.default_rng(0)
    rows = np.tile(present, (shape.n_layer, shape.n_head_kv, 1))
    keep = np.sort(rng.permuted(rows, axis=-1)[..., :budget], axis=-1)
    keep[..., -1] = cells - 1
    positions = np.append(np.arange(budget - 1), cells - 1).astype(np.int32)
    target = np.empty_like(state)

    pack, alone, copy = [], [], []
    for _ in range(repeat):  # in turn, so that noise meets both
        kv.cache.restore(state, present)
        pack.append(median_ms(lambda: kv.cache.pack(present, keep, positions), 1))
        copy.append(median_ms(lambda: np.copyto(target, state), 1))
        alone.append(median_ms(lambda: pack_state(target, 0, present, keep, positions), 1))
    pack_ms, alone_ms, copy_ms = map(statistics.median, (pack, alone, copy))

    fill(llm, cells - 40, cells - 40)
    token_ms = write_ms(llm, 12)
    fill(llm, budget, budget)
    batch = min(kv.limits.n_batch, kv.limits.reserve)
    started = time.perf_counter()
    llm.eval([7] * batch)
    read_ms = 1e3 * (time.perf_counter() - started) / batch

    evict = []
    for _ in range(repeat):
        llm.reset()
        fill(llm, cells, cells)
        kv.evictions, kv.eviction_ms = 0, 0.0
        kv.make_room(1)
        evict.append(kv.eviction_ms)
    evict_ms = statistics.median(evict)
    llm.close()
    share = [evict_ms / (evict_ms + kv.limits.reserve * ms) for ms in (token_ms, read_ms)]
    return (
        f"| {name} | {cells} | {budget} | {len(state) / 2**20:.1f} | {copy_ms:.2f} "
        f"| {alone_ms:.2f} | {copy_ms / alone_ms:.2f} | {pack_ms:.2f} | {evict_ms:.1f} "
        f"| {100 * share[0]:.2f}% | {100 * share[1]:.1f}% |"
    )


def peak_mib() -> float:
    """Largest memory of this process since clear_refs, the model's file included (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def one_of_three(which: str, model: str, long: int, threads: int, n: int) -> dict[str, float]:
    """Speed and memory of one way to be at position `long`; in a process of its own."""
    n_held = SMALL - 256
    if which == "bounded":
        llm: Any = bounded(model, SMALL, long + 4096, threads)
        fill(llm, n_held, long)
    else:
        cells, held = (long, long - 256) if which == "full" else (SMALL, n_held)
        llm = kvp_edge.Llama(
            model, n_ctx=cells, kv_budget=cells - 1, recent=1, reserve=1, granularity="token",
            verbose=False, n_threads=threads, n_threads_batch=threads,
        )  # fmt: skip
        fill(llm, held, held)
    # what filling took is gone again; from here on it is what a run takes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is held now
    times = [write_ms(llm, n) for _ in range(5)]
    if which == "bounded":
        fill(llm, SMALL, long)
        gc.collect()
        llm.eval([7])
        assert llm.kv_stats.evictions == 1
    return {
        "ms": statistics.median(times),
        "kv_mib": llm.kv_stats.kv_bytes / 2**20,
        "peak_mib": peak_mib(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--cells", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--long", type=int, default=32768)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="written for table 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one_of_three(args.only, args.model, args.long, args.threads, args.tokens)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        models = {Path(args.model).stem: args.model} if args.model else {}
        if not models:
            bundled = bundled_model()
            models[Path(bundled).stem] = bundled
            models["0.5B shape"] = str(Path(folder) / "half-b.gguf")
            write_model(models["0.5B shape"], HALF_B)

        print("| model | cells | kept | state MiB | memcpy ms | packer ms | of memcpy's speed "
              "| with read and write ms | eviction ms | share, writing "
              "| share, reading |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for name, model in models.items():
            for cells in args.cells:
                print(packing_row(name, model, cells, args.repeat, args.threads), flush=True)

        print(f"\n| model | cache | ms per token | KV MiB | peak MiB | (position {args.long}) |")
        print("|---|---|---|---|---|---|")
        for name, model in models.items():
            found = {}
            for which in ("bounded", "full", "fresh"):
                command = [sys.executable, __file__, "--model", model, "--only", which]
                command += ["--long", str(args.long), "--threads", str(args.threads)]
                command += ["--tokens", str(args.tokens)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[which] = json.loads(done.stdout)
            for which, r in found.items():
                speed = found["fresh"]["ms"] / r["ms"]
                print(
                    f"| {name} | {which} | {r['ms']:.2f} | {r['kv_mib']:.1f} | {r['peak_mib']:.0f} "
                    f"| {speed:.2f} of fresh |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
