#!/usr/bin/env python3
"""What a bounded cache costs and saves on models that people use.

    python scripts/bench_models.py [NAME or MODEL.gguf ...] [--cells 512 8192] [--full 8192 32768]

Names are those of scripts/real_models.py; without any, all of its models that are here. A cache is
filled by reading a short text once and restoring its state repeated, so that long caches cost no
reading; window caches get their window. Everything of a model is measured in turn in one process,
so that noise meets all; medians. Compare numbers of one run only.

Three Markdown tables on stdout, one after the other for each model:

1. of each number of cells: one eviction, one of many (scripts/bench_common.py), its share in the
   time until the next one, writing token by token and reading in batches; and the time of writing
   and reading against llama_cpp.Llama with as many cells that holds as much and evicts nothing.
2. writing and reading at the end of a long conversation: --small cells, against llama_cpp.Llama
   with a full cache of so many tokens and against a fresh one of --small cells.
3. loading, and the peak memory of a process that loads the model, fills --small cells, and evicts;
   or that fills as many with llama_cpp.Llama.

A full cache longer than the model was trained for is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import kvp_edge
from bench_common import ROOT, blobs, fill, ms, peak_mib, read_ms, write_ms
from kvp_edge.binding.model import read_model_shape
from makers.plain_llama import PlainLlama
from real_models import MODELS, found

TEXT = ROOT / "tests" / "data" / "penelope_brandling.txt"
N_READ = 600


def kept_of(cells: int) -> int:
    """The budget whose default reserve makes it so many cells."""
    return cells - max(256, cells // 5)


def repeated(state: bytes, n: int) -> np.ndarray:
    """A state of n tokens at positions 0 .. n - 1 whose rows are those of `state`, over and over;
    a window cache keeps as many of them, the newest."""
    caches = []
    for number, cache in enumerate(blobs.read(state)):
        there = len(cache.positions)
        size = n if number == 0 else min(there, n)
        rows = np.argsort(cache.positions)[np.arange(size) % there]
        caches.append(
            blobs.Cache(
                np.arange(n - size, n, dtype=np.int32),
                cache.type_k,
                cache.type_v,
                cache.value_size,
                cache.keys[:, rows],
                cache.values[:, rows],
            )
        )
    return np.frombuffer(blobs.write(caches), np.uint8)


class Bench:
    """One model: contexts of it that hold as many tokens as asked for."""

    def __init__(self, path: str, flash: bool, threads: int) -> None:
        self.path = path
        self.engine: dict[str, Any] = {
            "flash_attn": flash,
            "n_threads": threads,
            "n_threads_batch": threads,
            "verbose": False,
        }
        with closing(self.bounded(2048)) as llm:
            text = TEXT.read_bytes()[:20_000]
            llm.eval(llm.tokenize(text)[:N_READ])
            assert llm.kv is not None
            self._state = llm.kv.cache.state().tobytes()

    def bounded(self, cells: int, **options: Any) -> kvp_edge.Llama:
        """As a user opens it; a model with a window may have more cells."""
        how = {**self.engine, **options}
        return kvp_edge.Llama(self.path, n_ctx=10**6, kv_budget=kept_of(cells), **how)

    def plain(self, cells: int, n_batch: int = 512) -> PlainLlama:
        return PlainLlama(self.path, n_ctx=cells, n_batch=n_batch, **self.engine)

    def fill_bounded(self, llm: kvp_edge.Llama, rows: int, seen: int) -> None:
        fill(llm, rows, seen, repeated(self._state, rows))

    def fill_plain(self, llm: llama_cpp.Llama, rows: int) -> None:
        state = repeated(self._state, rows)
        llm.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        taken = llama_cpp.llama_state_seq_set_data(llm.ctx, data, len(state), 0)
        assert taken == len(state), "llama.cpp did not take the state"
        llm.n_tokens = rows
        llm.input_ids[:rows] = 7


def eviction_row(bench: Bench, name: str, cells: int, repeat: int, n: int) -> str:
    with closing(bench.bounded(cells)) as llm:
        assert llm.kv is not None
        kv, limits = llm.kv, llm.kv.limits
        n_batch, kept, cells = limits.n_batch, limits.budget, limits.cells
        middle, seen = (kept + cells) // 2, 4 * cells
        evictions, write, read = [], [], []
        write_plain, read_plain = [], []
        with closing(bench.plain(cells, n_batch)) as other:
            for _ in range(repeat):
                bench.fill_bounded(llm, cells, seen)
                evictions.append(ms(kv.make_room, 1))
                bench.fill_bounded(llm, middle, seen)
                write.append(write_ms(llm, n))
                bench.fill_plain(other, middle)
                write_plain.append(write_ms(other, n))
                bench.fill_bounded(llm, kept, seen)
                read.append(read_ms(llm, n_batch))
                bench.fill_plain(other, kept)
                read_plain.append(read_ms(other, n_batch))
        packed = "state" if llm.kv_stats.evictions_as_state else llm.kv_stats.pack
        evict, writing, reading = map(statistics.median, (evictions, write, read))
        writing_share, reading_share = (
            evict / (evict + limits.reserve * until_next) for until_next in (writing, reading)
        )
        return (
            f"| {name} | {cells} | {kept} | {packed} | {evict:.1f} "
            f"| {writing_share:.2%} | {reading_share:.2%} "
            f"| {ratio(write, write_plain)} | {ratio(read, read_plain)} |"
        )


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of the ratios of pairs measured one after the other, and the extremes."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def long_rows(bench: Bench, name: str, small: int, fulls: list[int], repeat: int, n: int) -> None:
    ways: dict[str, tuple[Any, Callable[[], None]]] = {}
    trained = read_model_shape(bench.path).n_ctx_train
    bounded = bench.bounded(small)
    assert bounded.kv is not None
    cells, held = bounded.kv.limits.cells, bounded.kv.limits.budget
    for full in fulls:
        if full <= trained:
            plain = bench.plain(full)
            ways[f"full, {full}"] = plain, lambda p=plain, f=full: bench.fill_plain(p, f - 520)
    fresh = bench.plain(cells, bounded.kv.limits.n_batch)
    ways[f"fresh, {cells}"] = fresh, lambda: bench.fill_plain(fresh, held)
    at = max([f for f in fulls if f <= trained], default=8192)
    ways[f"bounded, {cells} at {at}"] = bounded, lambda: bench.fill_bounded(bounded, held, at)
    times: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in ways}
    for _ in range(repeat):
        for way, (llm, fill_it) in ways.items():
            fill_it()
            times[way][0].append(write_ms(llm, n))
            times[way][1].append(read_ms(llm, bounded.kv.limits.n_batch))
    base = times[f"bounded, {cells} at {at}"]
    shape = bounded.kv.cache.shape
    for way, (write, read) in times.items():
        size = int(way.split()[1].rstrip(","))
        print(
            f"| {name} | {way} | {size * shape.bytes_per_cell / 2**20:.1f} "
            f"| {statistics.median(write):.1f} | {ratio(write, base[0])} "
            f"| {1e3 / statistics.median(read):.0f} | {ratio(read, base[1])} |",
            flush=True,
        )
    for llm, _ in ways.values():
        llm.close()


def loaded(way: str, path: str, small: int, threads: int) -> dict[str, float]:
    """Seconds to load and peak memory, in a process of its own."""
    engine: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    started = time.perf_counter()
    llm: Any
    if way == "llama_cpp":
        llm = PlainLlama(path, n_ctx=small, n_batch=512, **engine)
    else:
        llm = kvp_edge.Llama(path, n_ctx=10**6, kv_budget=kept_of(small), **engine)
    seconds = time.perf_counter() - started
    tokens = llm.tokenize(TEXT.read_bytes()[: 20 * small])
    llm.eval(tokens[: small if way == "llama_cpp" else llm.kv_stats.cells + 1])
    peak = peak_mib()
    assert way == "llama_cpp" or llm.kv_stats.evictions == 1
    llm.close()
    return {"seconds": seconds, "peak": peak}


def load_rows(path: str, name: str, small: int, threads: int, repeat: int) -> None:
    found_: dict[str, list[dict[str, float]]] = {"llama_cpp": [], "kvp_edge": []}
    for _ in range(repeat):
        for way, outcomes in found_.items():
            command = [sys.executable, __file__, path, "--only", way, "--small", str(small)]
            command += ["--threads", str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            outcomes.append(json.loads(done.stdout))
    for way, outcomes in found_.items():
        seconds = statistics.median(o["seconds"] for o in outcomes)
        peak = statistics.median(o["peak"] for o in outcomes)
        print(f"| {name} | {way} | {small} | {seconds:.2f} | {peak:.0f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--cells", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--full", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--small", type=int, default=1024)
    parser.add_argument("--flash", action="store_true", help="with flash attention")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8, help="written at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    paths = [str(found(m) or m) if m in MODELS else m for m in args.models]
    paths = paths or [str(path) for m in MODELS if (path := found(m))]
    if args.only:
        print(json.dumps(loaded(args.only, paths[0], args.small, args.threads)))
        return 0
    for path in paths:
        name = Path(path).stem
        bench = Bench(path, args.flash, args.threads)
        print("| model | cells | kept | packed | eviction ms | share, writing | share, reading "
              "| writing, time / llama_cpp's | reading, time / llama_cpp's |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|")
        for cells in args.cells:
            print(eviction_row(bench, name, cells, args.repeat, args.tokens), flush=True)
        print("\n| model | cache | KV MiB | ms per token written | time / bounded's "
              "| tokens/s read | time / bounded's |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        long_rows(bench, name, args.small, args.full, args.repeat, args.tokens)
        print("\n| model | | cells | seconds to load | peak MiB |")
        print("|---|---|---|---|---|")
        load_rows(path, name, args.small, args.threads, args.repeat)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
