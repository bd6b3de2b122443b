#!/usr/bin/env python3
"""How long policies take to train: steps on synthetic traces in the shapes of several models.

    python scripts/bench_training.py [--steps 20] [--tokens 1024] [--device cuda] [--precision bf16]

Traces are random numbers, because time does not depend on what is learned. One step has the
default settings of `kvp-edge train`, all heads at once. "Whole run" is what its default number of
steps takes at the measured speed, with the validations in between and without the traces.

Prints a Markdown table on stdout.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from kvp_edge.training.settings import Settings
from kvp_edge.training.train import train
from makers.synthetic_traces import SyntheticTraces

SHAPES = {  # layers, KV heads, head sizes of keys and values
    "bundled": (5, 2, 64, 64),
    "0.5B": (24, 2, 64, 64),
    "7B": (28, 4, 128, 128),
}
TRACES = 8


def row(name: str, args: argparse.Namespace) -> str:
    usual = Settings(objective=args.objective, precision=args.precision)
    few = replace(usual, steps=args.steps, eval_every=args.steps)
    if args.objective == "kvp":
        few = replace(few, token_steps=0)
    traces = SyntheticTraces(TRACES, tokens=args.tokens, shape=SHAPES[name])
    with tempfile.TemporaryDirectory() as folder:
        train(
            traces, Path(folder) / "first", replace(few, steps=2, eval_every=2), device=args.device
        )
        started = time.perf_counter()
        result = train(traces, Path(folder) / "run", few, device=args.device)
        wall = time.perf_counter() - started
    tokens_per_step = usual.states * (usual.tokens if args.objective == "kvp" else args.tokens)
    step = tokens_per_step / result.tokens_per_second
    # three validations were in it: the baselines, the only one on the way, and the best agents
    validation = (wall - args.steps * step) / 3
    steps = sum(count for _, count in usual.phases)
    whole = steps * step + steps / usual.eval_every * validation
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    layers, heads, size, _ = SHAPES[name]
    return (
        f"| {name} | {layers} x {heads} x {size} | {result.tokens_per_second:.0f} "
        f"| {step:.2f} | {validation:.1f} | {whole / 60:.0f} | {memory:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["bundled", "0.5B"])
    parser.add_argument("--objective", choices=("kvp", "global"), default=Settings.objective)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1024, help="of a trace")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    print(
        "| model shape | layers x KV heads x size | tokens/s (all heads) | s per step "
        "| s per validation | whole run, min | peak GiB |\n|---|---|---|---|---|---|---|"
    )
    for name in args.shapes:
        print(row(name, args), flush=True)


if __name__ == "__main__":
    main()
