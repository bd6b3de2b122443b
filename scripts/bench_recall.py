#!/usr/bin/env python3
"""What it costs to ask all tokens of a conversation: queries against a KV log (kvp_log_score).

    python scripts/bench_recall.py [--tokens 8192 32768] [--queries 16 64] [--types f16 q8_0]

Random keys in the shape of a model, 0.5B by default, in blocks that lie in memory one after the
other; their values are left out, which scoring does not read. On a machine with other work, look at
the best time, and at processor time: the median over all threads together.

Prints a Markdown table on stdout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import gguf
import numpy as np
from tqdm import tqdm

from kvp_edge.binding.log_scores import score_log
from kvp_edge.binding.queries import Queries
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.binding.structs import LogBlock, LogLayout


def random_log(args: Any, kind: gguf.GGMLQuantizationType, n: int) -> tuple[Any, list[LogBlock]]:
    """A layout, and the blocks of n tokens."""
    n_layer, n_head_kv, _, size = args.shape
    one = np.random.default_rng(0).standard_normal((args.block, n_head_kv * size), np.float32)
    rows = gguf.quants.quantize(one, kind).view(np.uint8)
    row = rows.shape[1]
    layout = LogLayout(
        n_layer=n_layer,
        n_head_kv=n_head_kv,
        head_size_k=size,
        head_size_v=size,
        type_k=int(kind),
        type_v=int(kind),
        k_row=row,
        v_row=0,
        bytes_per_token=n_layer * row,
    )
    blocks = []
    for first in range(0, n, args.block):
        here = min(args.block, n - first)
        memory = np.tile(rows[:here].ravel(), n_layer)
        blocks.append(LogBlock(rows=memory, first=first, n=here, rope_first=first))
    return layout, blocks


def random_queries(args: Any, n: int, m: int) -> Queries:
    """Of the last m of n tokens."""
    n_layer, _, n_head, size = args.shape
    queries = np.random.default_rng(1).standard_normal((n_layer, n_head, m, size), np.float32)
    at = np.arange(n - m, n, dtype=np.int32)
    return Queries(queries, at, np.full(n_layer, size**-0.5, np.float32))


def row(args: Any, name: str, layout: LogLayout, blocks: list[LogBlock], m: int) -> str:
    """One line of the table."""
    n = blocks[-1].first + blocks[-1].n
    queries = random_queries(args, n, m)
    turning: dict[str, Any] = {}
    if args.turn:
        radians = np.tile(10_000.0 ** -np.linspace(0, 1, args.shape[3] // 2), (args.shape[0], 1))
        turn = -np.arange(len(blocks), dtype=np.float64)
        turning = {"turn": turn, "frequencies": KeyFrequencies(radians, True)}
    wall, processor = [], []
    score_log(layout, blocks, queries, args.threads, **turning)  # warm up
    for _ in range(args.repeat):
        started = time.perf_counter(), time.process_time()
        score_log(layout, blocks, queries, args.threads, **turning)
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    n_layer, _, n_head, size = args.shape
    multiplied = 2 * n * n_layer * n_head * m * size
    return (
        f"| {n} | {m} | {name} | {1e3 * min(wall):.0f} | {1e3 * statistics.median(wall):.0f} "
        f"| {1e3 * statistics.median(processor):.0f} | {multiplied / min(wall) / 1e9:.0f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="in the log")
    parser.add_argument("--queries", type=int, nargs="+", default=[16, 64], help="tokens that ask")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0"], help="of the keys")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--block", type=int, default=256, help="tokens of a block")
    parser.add_argument(
        "--turn", action="store_true", help="the keys of every block count as turned differently"
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        default=[24, 2, 14, 64],
        metavar=("LAYERS", "KV_HEADS", "HEADS", "SIZE"),
        help="of the model, 0.5B",
    )
    args = parser.parse_args()
    print(
        "| tokens | queries | keys | best ms | median ms | processor ms | GFLOP/s, products "
        "|\n|---|---|---|---|---|---|---|"
    )
    for n in args.tokens:
        for name in tqdm(args.types, disable=None):
            layout, blocks = random_log(args, gguf.GGMLQuantizationType[name.upper()], n)
            for m in args.queries:
                print(row(args, name, layout, blocks, m), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
