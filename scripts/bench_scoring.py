#!/usr/bin/env python3
"""What learned scores cost: natively and in numpy, against the processor's matrix product.

    python scripts/bench_scoring.py [--tokens 1024] [--repeat 9] [--threads 1]

For policies in the shape of several models, with a network per KV head or per layer, it scores
random keys and values, and multiplies square f32 matrices (numpy's BLAS, one thread: set
OPENBLAS_NUM_THREADS=1) in between, so that a noisy machine slows both. "Of the peak" is the share
of that which native scoring reaches, counting the multiplications of the first and second layer
only. The last two columns set it against llama.cpp reading 512 tokens at once and writing one by
one, with as many threads, in the bundled model and in one of the 0.5B shape with random weights: a
token is scored once, however it came in.

Prints a Markdown table of medians on stdout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from kvp_edge.binding.model import read_model_shape
from kvp_edge.binding.policy import NativePolicy
from kvp_edge.bundled import bundled_model
from kvp_edge.policies.learned import forward, with_gaps
from kvp_edge.policy_file import PolicyInfo, Scope
from makers.gguf_models import HALF_B, write_model
from makers.plain_llama import PlainLlama
from makers.policies import random_weights

SEVEN_B = (28, 4, 128)  # layers, KV heads, head size
_SQUARE = 1024


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def model_speed(path: str, threads: int, repeat: int) -> tuple[float, float]:
    """Microseconds per token of llama.cpp: reading 512 at once, writing one by one."""
    llm = PlainLlama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    tokens = [token % llm.n_vocab() for token in range(528)]
    reading, writing = [], []
    for _ in range(repeat):
        llm.reset()
        reading.append(seconds(lambda: llm.eval(tokens[:512])) / 512)
        writing.append(seconds(lambda: [llm.eval([token]) for token in tokens[512:]]) / 16)
    llm.close()
    return 1e6 * statistics.median(reading), 1e6 * statistics.median(writing)


def row(
    name: str,
    shape: tuple[int, int, int],
    scope: Scope,
    context: int,
    speeds: tuple[float, ...],
    args: Any,
) -> str:
    """One line of the table; ``speeds`` are the model's or empty."""
    rng = np.random.default_rng(0)
    square = rng.standard_normal((_SQUARE, _SQUARE)).astype(np.float32)
    n_layer, n_head_kv, size = shape
    info = PolicyInfo("", n_layer, n_head_kv, size, size, args.hidden, context, scope=scope)
    weights = random_weights(info)
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
    multiplied = args.hidden * (2 * size * n_head_kv + args.hidden * info.n_networks)
    flops = 2 * args.tokens * n_layer * multiplied
    speed, peak = flops / statistics.median(ours), statistics.median(peaks)
    micro = [1e6 * statistics.median(s) / args.tokens for s in (ours, theirs)]
    shares = "".join(f"| {100 * micro[0] / us:.2g}% " for us in speeds) + "|" if speeds else "| | |"
    return (
        f"| {name} | {scope} | {context} | {1e6 / micro[0]:.0f} | {micro[0]:.1f} | {micro[1]:.1f} "
        f"| {speed / 1e9:.1f} "
        f"| {speed / peak:.2f} {shares}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of native scoring")
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()
    print(
        "| shape | scope | context | native, tokens/s | us/token | numpy, us/token | GFLOP/s "
        "| of the peak | of reading | of writing |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        small, half_b = bundled_model(), str(Path(folder) / "half-b.gguf")
        write_model(half_b, HALF_B)
        s = read_model_shape(small)
        cases = [
            ("bundled model", (s.n_layer, s.n_head_kv[0], s.head_size_k), small),
            ("0.5B", (HALF_B.n_layer, HALF_B.n_head_kv, HALF_B.head_dim), half_b),
            ("7B", SEVEN_B, ""),
        ]
        for name, shape, model in tqdm(cases, disable=None):
            speeds = model_speed(model, args.threads, args.repeat) if model else ()
            for context, scope in product((1, 9), get_args(Scope)):
                print(row(name, shape, scope, context, speeds, args), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
