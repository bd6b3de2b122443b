#!/usr/bin/env python3
"""What it costs to know where the cache lies: the callback that sees each decode's nodes.

    python scripts/bench_callback.py [--model MODEL.gguf] [--threads 2] [--rounds 400] [--gpu]

Two bounded caches of one model, one with the callback (pack="device") and one without
(pack="state"), write single tokens in turns; nothing is evicted. A round is --tokens tokens by each
of them, and its number the ratio of their times. Prints a Markdown table on stdout: the median
ratio over the rounds with its 95 % interval (the percentiles of 10,000 bootstrap samples of the
rounds). Without --model it measures the bundled model and random weights of a 0.5B shape.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

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
    times = np.empty((args.rounds, 2))
    for i in tqdm(range(args.rounds), desc=name, disable=None):
        for which in (0, 1) if i % 2 else (1, 0):  # neither is always the first
            times[i, which] = write_ms(llms[which], args.tokens)
    for llm in llms:
        assert llm.kv_stats.evictions == 0
        llm.close()
    ratios = times[:, 0] / times[:, 1]
    drawn = np.random.default_rng(0).choice(ratios, (10_000, args.rounds))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    with_ms, without_ms = np.median(times, axis=0)
    return (
        f"| {name} | {where} | {without_ms:.3f} | {with_ms:.3f} | {np.median(ratios):.4f} "
        f"| {low:.4f} to {high:.4f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=8, help="written in a round by each")
    parser.add_argument("--gpu", action="store_true", help="put the models on the GPU")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| model | where | ms per token without | with | ratio | 95 % interval |")
        print("|---|---|---|---|---|---|")
        for name, model in models(folder, args.model).items():
            print(row(name, model, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
