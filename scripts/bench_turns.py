#!/usr/bin/env python3
"""A conversation that goes on for long: time and memory as it grows.

    python scripts/bench_turns.py --turns 10000 [--plot docs/chat-10000-turns.png]
    python scripts/bench_turns.py --tokens 1000000 [--plot FILE]

With --turns, each turn is a short message and a reply of at most four tokens, and all messages so
far are handed to create_chat_completion each time. With --tokens, a text is read in pieces of 1,000
tokens by eval, and the logits after each of its batches must be finite. Processor time is what
counts on a machine with other work. The plot shows the median of every hundredth part of the way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from kvp_edge.evaluation.plots import COLOURS, load_matplotlib

PIECE = 1000


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def turns(llm: Llama, n: int) -> Iterator[Callable[[], Any]]:
    messages: list[dict[str, str]] = []

    def turn(number: int) -> None:
        messages.append({"role": "user", "content": f"My dog {number} is Rex. Who?"})
        reply = llm.create_chat_completion(messages, max_tokens=4, temperature=0.0)
        messages.append(reply["choices"][0]["message"])

    for number in range(1, n + 1):
        yield lambda number=number: turn(number)


def pieces(llm: Llama, n: int) -> Iterator[Callable[[], Any]]:
    rng = np.random.default_rng(0)

    def finite(_: int, end: int) -> None:
        if not np.isfinite(llm.newest_logits()).all():
            raise SystemExit(f"logits after {end} tokens that are not finite")

    llm.on_batch = finite
    for _ in range(n // PIECE):
        tokens = rng.integers(0, llm.n_vocab(), PIECE).tolist()
        yield lambda tokens=tokens: llm.eval(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--turns", type=int, default=10_000)
    what.add_argument("--tokens", type=int, help=f"a multiple of {PIECE}")
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--plot", help="PNG to write")
    args = parser.parse_args()
    llm = Llama(
        args.model,
        n_ctx=args.tokens or 60 * args.turns + 1000,
        kv_budget=256,
        positions="compact",
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    if args.tokens:
        unit, steps, n = f"{PIECE:,} tokens", pieces(llm, args.tokens), args.tokens // PIECE
    else:
        unit, steps, n = "turn", turns(llm, args.turns), args.turns
    ms, mib = measure(llm, steps, n, unit)
    if args.plot:
        plot(args.plot, ms, mib, unit, 1 if unit == "turn" else PIECE)


def measure(
    llm: Llama, steps: Iterator[Callable[[], Any]], n: int, unit: str
) -> tuple[list[float], list[float]]:
    """Milliseconds of processor time of every step, and MiB of the process after it."""
    ms: list[float] = []
    mib: list[float] = []
    part, wall = max(1, n // 10), time.perf_counter()
    print(f"of the last {part:,}, per {unit}: processor time in ms, mean and median; time in ms")
    print(f"{'n':>7} {'tokens':>8} {'mean':>7} {'median':>7} {'time':>7} {'MiB':>7} {'kept':>5}")
    for i, step in enumerate(steps, 1):
        cpu = time.process_time()
        step()
        ms.append(1e3 * (time.process_time() - cpu))
        mib.append(resident_mib())
        if i % part == 0:
            took, wall = 1e3 * (time.perf_counter() - wall) / part, time.perf_counter()
            last = ms[-part:]
            print(
                f"{i:7} {llm.n_tokens:8} {np.mean(last):7.2f} {np.median(last):7.2f} {took:7.1f} "
                f"{mib[-1]:7.1f} {llm.kv_stats.kept:5}",
                flush=True,
            )
    return ms, mib


def plot(path: str, ms: list[float], mib: list[float], unit: str, scale: int) -> None:
    _, pyplot = load_matplotlib()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    parts = np.array_split(np.arange(len(ms)), min(100, len(ms)))
    at = [scale * (int(part[-1]) + 1) for part in parts]
    for values, label, colour, area in (
        (ms, f"ms of processor time\nper {unit}", COLOURS[0], axes[0]),
        (mib, "MiB of the process", COLOURS[1], axes[1]),
    ):
        area.plot(at, [float(np.median(np.take(values, part))) for part in parts], color=colour)
        area.set_ylim(bottom=0)
        area.set_ylabel(label)
        area.set_xlabel("turns" if scale == 1 else "tokens read")
        area.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        area.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
