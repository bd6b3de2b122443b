#!/usr/bin/env python3
"""What it costs to know where the cache lies: the callback that sees each decode's nodes.

    python scripts/bench_callback.py [--model MODEL.gguf] [--threads 2] [--seconds 180] [--gpu]
    python scripts/bench_callback.py --processor-time --threads 1 --tokens 100 --pairs 12

A pair is two bounded caches of one model, one with the callback (pack="device") and one without
(pack="state"), which write single tokens in turns; nothing is evicted. A round is --tokens tokens
by each of them, and a pair's number is the median of its rounds' ratios. Two caches of the same
kind differ by up to a percent, depending on where their memory happens to lie, so several --pairs
are opened one after the other, and the one with the callback comes first in every second. Prints a
Markdown table on stdout: the mean over pairs with its 95 % interval (the percentiles of 10,000
bootstrap samples of the pairs). Without --model it measures the bundled model and random weights of
a 0.5B shape. Processor time is less disturbed by what else runs on the machine; with more than one
thread it counts their waiting, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from bench_common import bounded, models, write_ms

HELD = 512
Rounds = tuple[npt.NDArray[np.float64], str]


def pair(model: str, args: argparse.Namespace, first: str, seconds: float) -> Rounds:
    """Milliseconds per token [rounds, with and without the callback], and where the cache lies."""
    kinds = (first, "state" if first == "device" else "device")
    llms = {
        kind: bounded(
            model,
            cells=2 * HELD,
            kept=HELD,
            threads=args.threads,
            n_ctx=4 * HELD,
            policy="recency",
            pack=kind,
            n_gpu_layers=-1 if args.gpu else 0,
        )
        for kind in kinds
    }
    clock = time.process_time if args.processor_time else time.perf_counter
    for llm in llms.values():
        llm.eval([7] * HELD)
        write_ms(llm, args.tokens)
    where = llms["device"].kv_stats.where or ""
    rounds: list[list[float]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        order = kinds[:: 1 if len(rounds) % 2 else -1]  # neither is always the first
        found = {kind: write_ms(llms[kind], args.tokens, clock) for kind in order}
        rounds.append([found["device"], found["state"]])
    for llm in llms.values():
        assert llm.kv_stats.evictions == 0
        llm.close()
    return np.array(rounds), where


def row(name: str, model: str, args: argparse.Namespace) -> str:
    pairs = [
        pair(model, args, ("device", "state")[i % 2], args.seconds / args.pairs)
        for i in tqdm(range(args.pairs), desc=name, unit="pair", disable=None)
    ]
    ratios = np.array([np.median(rounds[:, 0] / rounds[:, 1]) for rounds, _ in pairs])
    rng = np.random.default_rng(0)
    means = rng.choice(ratios, (10_000, len(ratios))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    rounds = np.concatenate([rounds for rounds, _ in pairs])
    with_ms, without_ms = np.median(rounds, axis=0)
    return (
        f"| {name} | {pairs[0][1]} | {len(pairs)} | {len(rounds)} | {without_ms:.3f} "
        f"| {with_ms:.3f} | {ratios.mean():.4f} | {low:.4f} to {high:.4f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180, help="for each model")
    parser.add_argument("--pairs", type=int, default=6, help="of caches that are compared")
    parser.add_argument("--tokens", type=int, default=8, help="written in a round by each")
    parser.add_argument("--processor-time", action="store_true", help="and not the wall's")
    parser.add_argument("--gpu", action="store_true", help="put the models on the GPU")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| model | where | pairs | rounds | ms without | with | ratio | 95 % interval |")
        print("|---|---|---|---|---|---|---|---|")
        for name, model in models(folder, args.model).items():
            print(row(name, model, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
