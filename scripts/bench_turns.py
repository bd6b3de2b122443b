#!/usr/bin/env python3
"""Time and memory per turn of a chat that goes on for long, through create_chat_completion.

    python scripts/bench_turns.py [--turns 10000] [--model MODEL]

Each turn is a short message and a reply of at most four tokens; all messages so far are handed over
each time. Processor time is what counts on a machine with other work.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from kvp_edge import Llama
from kvp_edge.cli.options import bundled_model


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--model", default=bundled_model())
    args = parser.parse_args()
    llm = Llama(
        args.model,
        n_ctx=60 * args.turns + 1000,
        kv_budget=256,
        positions="compact",
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    messages: list[dict[str, str]] = []
    part = max(1, args.turns // 10)
    print(f"{'turns':>7} {'tokens':>8} {'ms cpu':>7} {'ms':>7} {'MiB':>7}   (per turn)")
    wall, cpu = time.perf_counter(), time.process_time()
    for turn in range(1, args.turns + 1):
        messages.append({"role": "user", "content": f"My dog {turn} is Rex. Who?"})
        reply = llm.create_chat_completion(messages, max_tokens=4, temperature=0.0)
        messages.append(reply["choices"][0]["message"])
        if turn % part == 0:
            took = [
                1e3 * (now - then) / part
                for now, then in ((time.process_time(), cpu), (time.perf_counter(), wall))
            ]
            print(
                f"{turn:7} {llm.n_tokens:8} {took[0]:7.1f} {took[1]:7.1f} {resident_mib():7.1f}",
                flush=True,
            )
            wall, cpu = time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
