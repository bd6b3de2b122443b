#!/usr/bin/env python3
"""What eviction costs: its share of the run time, reading a text and writing one.

    python scripts/bench_eviction.py [--model MODEL.gguf] [--cells 512 4096] [--repeat 3]
                                     [--granularity head|token]

For each number of cells and each policy it reads a long text in batches and then writes tokens one
by one, with the cache full all the time. The share is eviction_ms over the wall time of the same
run, so a noisy machine moves both. It also shows the KV bytes that llama.cpp reports against those
of a plain context with as many cells, and the speed against one that never evicts (a plain context
that is cleared whenever it is full, so that both always work on the same number of cells).

Prints a Markdown table of medians on stdout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from tqdm import tqdm

import kvp_edge
from kvp_edge.bundled import bundled_model
from kvp_edge.policies import HEURISTICS
from makers.plain_llama import PlainLlama

TEXT = Path(__file__).parent.parent / "tests" / "data" / "penelope_brandling.txt"


@dataclass
class Run:
    """One measurement: seconds and eviction's part of them, reading (prefill) and writing."""

    prefill_s: float
    prefill_eviction_s: float
    decode_s: float
    decode_eviction_s: float
    kv_bytes: int


def bounded(
    model: str, cells: int, policy: str, granularity: str, tokens: list[int], n_decode: int
) -> Run:
    # budget + default reserve (a quarter of the budget, at least 256) = cells
    budget = cells - max(256, cells // 5)
    llm = kvp_edge.Llama(
        model, n_ctx=10**6, kv_budget=budget, policy=policy, granularity=granularity, verbose=False
    )
    try:
        assert llm.kv_stats.cells == cells, llm.kv_stats
        llm.eval(tokens[:cells])  # fill first: an empty cache evicts nothing
        before = llm.kv_stats.eviction_ms
        prefill = _seconds(lambda: llm.eval(tokens[cells:]))
        between = llm.kv_stats.eviction_ms
        decode = _seconds(lambda: _one_by_one(llm, tokens[:n_decode]))
        after = llm.kv_stats.eviction_ms
        return Run(
            prefill,
            (between - before) / 1e3,
            decode,
            (after - between) / 1e3,
            llm.kv_stats.kv_bytes,
        )
    finally:
        llm.close()


def plain(model: str, cells: int, n_batch: int, tokens: list[int], n_decode: int) -> Run:
    """The same work without eviction: a plain context, cleared when full, then kept near full."""
    llm = PlainLlama(model, n_ctx=cells, n_batch=n_batch, verbose=False)
    try:
        # Between evictions a bounded cache holds from budget to cells tokens, so does this one.
        low = cells - max(256, cells // 5)

        def read() -> None:
            for at in range(cells, len(tokens) - n_batch + 1, n_batch):
                if llm.n_tokens + n_batch > cells:
                    llm.n_tokens = low
                llm.eval(tokens[at : at + n_batch])

        def write() -> None:
            for token in tokens[:n_decode]:
                if llm.n_tokens == cells:
                    llm.n_tokens = low
                llm.eval([token])

        llm.eval(tokens[:cells])
        return Run(_seconds(read), 0.0, _seconds(write), 0.0, 0)
    finally:
        llm.close()


def _one_by_one(llm: kvp_edge.Llama, tokens: list[int]) -> None:
    for token in tokens:
        llm.eval([token])


def _seconds(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--cells", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--policies", nargs="+", default=list(HEURISTICS))
    parser.add_argument("--granularity", choices=("head", "token"), default="head")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--decode", type=int, default=2_000)
    args = parser.parse_args()

    vocabulary = llama_cpp.Llama(args.model, vocab_only=True, verbose=False)
    tokens = vocabulary.tokenize(TEXT.read_bytes())
    vocabulary.close()
    tokens = (tokens * (1 + args.tokens // len(tokens)))[: args.tokens]

    print("| cells | policy | prefill: eviction share | decode: eviction share |", end="")
    print(" prefill speed / no eviction | decode speed / no eviction | KV MiB |")
    print("|---|---|---|---|---|---|---|")
    bar = tqdm(total=len(args.cells) * len(args.policies) * args.repeat, file=sys.stderr)
    for cells in args.cells:
        for policy in args.policies:
            runs, bases = [], []
            for _ in range(args.repeat):  # side by side, so that drift meets both
                runs.append(
                    bounded(args.model, cells, policy, args.granularity, tokens, args.decode)
                )
                n_batch = min(512, max(256, cells // 5))
                bases.append(plain(args.model, cells, n_batch, tokens, args.decode))
                bar.update()
            n_read = len(tokens) - cells
            median = statistics.median
            prefill = median(r.prefill_eviction_s / r.prefill_s for r in runs)
            decode = median(r.decode_eviction_s / r.decode_s for r in runs)
            n_plain = n_read // n_batch * n_batch
            speed = median(
                (n_read / r.prefill_s) / (n_plain / b.prefill_s)
                for r, b in zip(runs, bases, strict=True)
            )
            slow = median(b.decode_s / r.decode_s for r, b in zip(runs, bases, strict=True))
            print(
                f"| {cells} | {policy} | {prefill:.1%} | {decode:.1%} | {speed:.2f} | {slow:.2f} "
                f"| {runs[0].kv_bytes / 2**20:.2f} |",
                flush=True,
            )
    bar.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
