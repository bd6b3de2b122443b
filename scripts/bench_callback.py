#!/usr/bin/env python3
"""What it costs to know where the cache lies: the callback that sees each decode's nodes.

    python scripts/bench_callback.py [--model MODEL.gguf] [--threads 2] [--seconds 180] [--gpu]

Two bounded caches of one model, one with the callback (pack="device") and one without
(pack="state"), write single tokens in turns; nothing is evicted. A round is --tokens tokens by each
of them, and its number the ratio of their times; there are as many rounds as --seconds allow for
each model. Prints a Markdown table on stdout: the median
ratio over the rounds with its 95 % interval (the percentiles of 10,000 bootstrap samples of the
rounds). Without --model it measures the bundled model and random weights of a 0.5B shape.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import numpy as np
from bench_common import bounded, models, write_ms
from tqdm import tqdm

HELD = 512


def row(name: str, model: str, args: argparse.Namespace) -> str:
    llms = [
        bounded(
            model,
            cells=2 * HELD,
            kept=HELD,
            threads=args.threads,
            n_ctx=4 * HELD,
            policy="recency",
            pack=pack,
            n_gpu_layers=-1 if args.gpu else 0,
        )
        for pack in ("device", "state")
    ]
    for llm in llms:
        llm.eval([7] * HELD)
        write_ms(llm, args.tokens)
    where = llms[0].kv_stats.where
    rounds: list[list[float]] = []
    end = time.monotonic() + args.seconds
    with tqdm(desc=name, unit="round", disable=None) as bar:
        while time.monotonic() < end:
            order = (0, 1) if len(rounds) % 2 else (1, 0)  # neither is always the first
            found = {which: write_ms(llms[which], args.tokens) for which in order}
            rounds.append([found[0], found[1]])
            bar.update()
    for llm in llms:
        assert llm.kv_stats.evictions == 0
        llm.close()
    times = np.array(rounds)
    ratios = times[:, 0] / times[:, 1]
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(ratios, len(ratios))) for _ in range(10_000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    with_ms, without_ms = np.median(times, axis=0)
    return (
        f"| {name} | {where} | {len(rounds)} | {without_ms:.3f} | {with_ms:.3f} "
        f"| {np.median(ratios):.4f} | {low:.4f} to {high:.4f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180, help="for each model")
    parser.add_argument("--tokens", type=int, default=8, help="written in a round by each")
    parser.add_argument("--gpu", action="store_true", help="put the models on the GPU")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| model | where | rounds | ms per token without | with | ratio | 95 % interval |")
        print("|---|---|---|---|---|---|---|")
        for name, model in models(folder, args.model).items():
            print(row(name, model, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
