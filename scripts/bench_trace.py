#!/usr/bin/env python3
"""What capturing costs: a traced text against the same text read without, and bytes per token.

    python scripts/bench_trace.py [MODEL.gguf] [--text FILE] [--length 1024] [--repeat 3]
                                  [--flash-attn] [--type-k q8_0] [--type-v q8_0]

Both runs have the same cache, threads and batches, with flash attention or without, and take turns.
Values in a quantised type turn flash attention on. Time is processor time, so that other work on
the machine counts less; with several threads llama.cpp's waiting counts, too. "captured" has
attention, keys and values in memory; "written" is also a whole file on disk. Prints a Markdown
table of medians on stdout.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import llama_cpp

import kvp_edge
from kvp_edge.bundled import bundled_model
from kvp_edge.traces.tracer import Captured, Tracer
from kvp_edge.traces.writer import _file_bytes, _write_whole

TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
TEXT = Path(__file__).parent.parent / "tests" / "data" / "penelope_brandling.txt"


def seconds(work: Callable[[], object]) -> float:
    # of processor time: others may be busy on the same machine
    started = time.process_time()
    work()
    return time.process_time() - started


def write(path: Path, got: Captured) -> None:
    _write_whole(path, _file_bytes(got, {"n_prompt": 0}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=bundled_model())
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flash-attn", action="store_true")
    parser.add_argument("--type-k", choices=TYPES, default="f16")
    parser.add_argument("--type-v", choices=TYPES, default="f16")
    args = parser.parse_args()

    how = {
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "flash_attn": args.flash_attn or args.type_v != "f16",
        "type_k": TYPES[args.type_k],
        "type_v": TYPES[args.type_v],
        "verbose": False,
    }
    tracer = Tracer(args.model, args.length, **how)
    plain = kvp_edge.Llama(args.model, n_ctx=tracer.n_ctx(), n_batch=tracer.n_batch, **how)
    tokens = plain.tokenize(args.text.read_text(encoding="utf-8-sig").encode())[: args.length]
    if len(tokens) < args.length:
        raise SystemExit(f"'{args.text}' has {len(tokens)} tokens, fewer than --length")

    def read() -> None:
        plain.reset()
        plain._ctx.kv_cache_clear()
        plain.eval(tokens)

    times: dict[str, list[float]] = {"read": [], "captured": [], "written": []}
    read()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        for _ in range(args.repeat):
            times["read"].append(seconds(read))
            times["captured"].append(seconds(lambda: tracer.capture(tokens, args.length // 2)))
            got = tracer.capture(tokens, args.length // 2)
            times["written"].append(times["captured"][-1] + seconds(partial(write, path, got)))
        size = path.stat().st_size

    middle = {name: statistics.median(all_) for name, all_ in times.items()}
    keys_and_values = got.keys.nbytes + got.values.nbytes
    print(f"{Path(args.model).name}, {args.length} tokens, {args.threads} threads\n")
    print("| run | CPU ms | against reading |\n|---|---|---|")
    for name, took in middle.items():
        print(f"| {name} | {took * 1e3:.0f} | {took / middle['read']:.2f} |")
    print(
        f"\n{size / args.length:.0f} bytes per token, {size / keys_and_values:.2f} times its keys "
        f"and values in float16; blocks of {tracer.block} queries"
    )
    tracer.close()
    plain.close()


if __name__ == "__main__":
    main()
