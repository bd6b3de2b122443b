#!/usr/bin/env python3
"""What learned scores cost: natively and in numpy, against the processor's matrix product.

    python scripts/bench_scoring.py [--tokens 1024] [--repeat 9] [--threads 1]

For agents in the shape of several models it scores random keys and values, and multiplies square
f32 matrices (numpy's BLAS, one thread: set OPENBLAS_NUM_THREADS=1) in between, so that a noisy
machine slows both. The last column is the share of that peak that native scoring reaches, counting
the multiplications of the first and second layer only.

Prints a Markdown table of medians on stdout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from kvp_edge.native import NativePolicy
from kvp_edge.policies.learned import forward, with_gaps
from kvp_edge.policy_file import PolicyInfo, PolicyWeights, weight_shapes

#: name -> layers, KV heads, head size
SHAPES = {"bundled model": (5, 2, 64), "0.5B": (24, 2, 64), "7B": (28, 4, 128)}
_SQUARE = 1024


def random_weights(info: PolicyInfo, rng: np.random.Generator) -> PolicyWeights:
    shapes = weight_shapes(info)
    arrays = {n: (0.2 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    if info.context == 1:
        arrays["conv"][:] = 1
    return PolicyWeights(**arrays)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def row(name: str, context: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    rng = np.random.default_rng(0)
    square = rng.standard_normal((_SQUARE, _SQUARE)).astype(np.float32)
    n_layer, n_head_kv, size = SHAPES[name]
    info = PolicyInfo("", n_layer, n_head_kv, size, size, args.hidden, context)
    weights = random_weights(info, rng)
    native = NativePolicy(weights)
    heads = (n_layer, n_head_kv, args.tokens, size)
    keys = rng.standard_normal(heads).astype(np.float32)
    values = rng.standard_normal(heads).astype(np.float32)
    at = np.arange(args.tokens, dtype=np.int32)
    slots = with_gaps(at, context // 2)
    ours, theirs, peaks = [], [], []
    for _ in range(args.repeat):
        ours.append(seconds(lambda: native.score(keys, values, at, threads=args.threads)))
        peaks.append(2 * _SQUARE**3 / seconds(lambda: square @ square))
        theirs.append(seconds(lambda: forward(weights, keys, values, at, slots)))
    flops = 2 * args.tokens * n_layer * n_head_kv * args.hidden * (2 * size + args.hidden)
    speed, peak = flops / statistics.median(ours), statistics.median(peaks)
    micro = [1e6 * statistics.median(s) / args.tokens for s in (ours, theirs)]
    return (
        f"| {name} | {context} | {micro[0]:.1f} | {micro[1]:.1f} | {speed / 1e9:.1f} "
        f"| {speed / peak:.2f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of native scoring")
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()
    print("| shape | context | native, us/token | numpy, us/token | GFLOP/s | of the peak |")
    print("|---|---|---|---|---|---|")
    cases = [(name, context) for name in SHAPES for context in (1, 9)]
    for name, context in tqdm(cases, disable=None):
        print(row(name, context, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
