#!/usr/bin/env python3
"""What per-head eviction costs, and what a small cache saves.

    python scripts/bench_packing.py [--model MODEL.gguf] [--cells 512 4096 16384] [--long 32768]

Without --model it measures the bundled model and random weights of a 0.5B shape (24 layers, 2 KV
heads of 64 values; about 700 MB on disk for a while). Long caches are filled by restoring synthetic
states, so nothing is read. Medians; compare numbers of one run only, machines are noisy.

Two Markdown tables on stdout:

1. packing a full cache where it lies, against a memcpy of the kept bytes in the same minute, and
   against packing it through llama.cpp's state; a whole eviction by the model's own policy, one of
   many (scripts/bench_common.py); and its share in the time until the next one, writing token by
   token and reading in batches. "a / b" is in place / through the state.
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
from pathlib import Path
from typing import Any

import numpy as np

import kvp_edge
from bench_common import (
    bounded,
    fill,
    models,
    ms,
    peak_mib,
    read_ms,
    rows_to_keep,
    synthetic_state,
    write_ms,
)

SMALL = 2048


def kept_of(cells: int) -> int:
    """The budget whose default reserve makes it so many cells."""
    return cells - max(256, cells // 5)


def packing_row(name: str, model: str, cells: int, flash: bool, repeat: int, threads: int) -> str:
    kept = kept_of(cells)
    llms = {
        pack: bounded(model, cells, kept, threads, n_ctx=4 * cells, flash_attn=flash, pack=pack)
        for pack in ("device", "state")
    }
    present, keep, positions = rows_to_keep(llms["device"])
    shape = llms["device"]._kv.cache.shape
    state = synthetic_state(shape, cells)
    source = state[: kept * shape.bytes_per_cell]
    target = source.copy()  # its pages are there
    copies: list[float] = []
    packs: dict[str, list[float]] = {pack: [] for pack in llms}
    evictions: dict[str, list[float]] = {pack: [] for pack in llms}
    for _ in range(repeat):  # in turn, so that noise meets all
        for pack, llm in llms.items():
            kv = llm._kv
            kv.cache.restore(state, present)
            copies.append(ms(np.copyto, target, source))
            packs[pack].append(ms(kv.cache.pack, present, keep, positions))
            fill(llm, cells, 2 * cells, state)
            evictions[pack].append(ms(kv.make_room, 1))
            place = kv.cache.location
            went = place.packed_in_place if pack == "device" else place.packed_as_state
            assert went == 2 * len(packs[pack]), "it was packed in another way than asked for"
    evict = {pack: statistics.median(times) for pack, times in evictions.items()}
    writing, reading = {}, {}
    for pack, llm in llms.items():
        limits = llm._kv.limits
        fill(llm, cells - 40, 2 * cells)
        until_next = limits.reserve * write_ms(llm, 12)
        writing[pack] = evict[pack] / (evict[pack] + until_next)
        fill(llm, kept, 2 * cells)
        until_next = limits.reserve * read_ms(llm, limits.n_batch)
        reading[pack] = evict[pack] / (evict[pack] + until_next)
        llm.close()
    copy, there, through = map(statistics.median, (copies, packs["device"], packs["state"]))
    return (
        f"| {name} | {'on' if flash else 'off'} | {cells} | {kept} | {len(state) / 2**20:.1f} "
        f"| {copy:.2f} | {there:.2f} | {there / copy:.2f} | {through:.2f} "
        f"| {evict['device']:.1f} / {evict['state']:.1f} "
        f"| {writing['device']:.2%} / {writing['state']:.2%} "
        f"| {reading['device']:.1%} / {reading['state']:.1%} |"
    )


def one_of_three(which: str, model: str, long: int, threads: int, n: int) -> dict[str, float]:
    """Speed and memory of one way to be at position `long`; in a process of its own."""
    n_held = SMALL - 256
    if which == "bounded":
        llm: Any = bounded(model, SMALL, kept_of(SMALL), threads, n_ctx=long + 4096)
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
        files = models(folder, args.model)
        print("| model | flash attention | cells | kept | state MiB | memcpy of the kept ms "
              "| packing in place ms | of memcpy's time | through the state ms | eviction ms "
              "| share, writing | share, reading |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for name, model in files.items():
            for flash in (False, True):
                for cells in args.cells:
                    row = packing_row(name, model, cells, flash, args.repeat, args.threads)
                    print(row, flush=True)

        print(f"\n| model | cache | ms per token | KV MiB | peak MiB | (position {args.long}) |")
        print("|---|---|---|---|---|---|")
        for name, model in files.items():
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
