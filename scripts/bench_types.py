#!/usr/bin/env python3
"""How fast a model reads and writes from caches of other types.

    python scripts/bench_types.py --model model.gguf [--cells 2048] [--types f16,q8_0,q4_0]
    python scripts/bench_types.py --model model.gguf --ship kvp_edge/data/kv_types.json

Two full caches of every type are measured: one with as many cells as asked for, one with as many
as fit into the bytes that these take in f16. Unquantised ones are measured without and with flash
attention; quantised values need it. All caches are filled by reading a text, then measured in turn
in one process, so that noise meets all: reading 64 more tokens at once, writing 8 one by one.

Prints a Markdown table of medians on stdout, in tokens a second and relative to the first row.
--ship also puts the caches of equal bytes into the table that comes with kvp_edge, in place of what
it says of this model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import kvp_edge  # noqa: F401  # says what is missing, before anything else is imported
from bench_common import ROOT
from kvp_edge.binding.model import read_model_shape
from kvp_edge.bundled import bundled_model
from kvp_edge.cache.limits import CELL_UNIT
from kvp_edge.cache.types import F16, KVTypes
from lists import names
from makers.plain_llama import PlainLlama
from memory_eval.shipped import save

TEXT = ROOT / "tests" / "data" / "penelope_brandling.txt"
TYPES = "f16,q8_0/f16,q4_0/f16,q8_0,q8_0/q4_0,q4_0"
READ, WRITTEN = 64, 8


@dataclass
class Measured:
    """One cache, full but for what is measured, and the seconds that this took."""

    types: KVTypes
    flash: bool
    cells: int
    llm: PlainLlama
    reading: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)

    def fill(self, tokens: Sequence[int]) -> None:
        n = self.cells - READ
        self.llm.eval([tokens[i % len(tokens)] for i in range(n)])

    def measure(self, tokens: Sequence[int]) -> None:
        n = self.cells - READ
        for seconds, batches in (
            (self.reading, [list(tokens[:READ])]),
            (self.writing, [[token] for token in tokens[:WRITTEN]]),
        ):
            self.llm.n_tokens = n  # eval removes what is after it
            started = time.perf_counter()
            for batch in batches:
                self.llm.eval(batch)
            seconds.append(time.perf_counter() - started)

    @property
    def speed(self) -> tuple[float, float]:
        """Tokens a second: reading, writing."""
        return READ / statistics.median(self.reading), WRITTEN / statistics.median(self.writing)

    def relative(self, first: Measured) -> tuple[float, float]:
        (reads, writes), (of_reads, of_writes) = self.speed, first.speed
        return reads / of_reads, writes / of_writes

    def row(self, first: Measured, bytes_per_cell: int) -> str:
        (reads, writes), (of_reads, of_writes) = self.speed, self.relative(first)
        cells = [
            str(self.types),
            "on" if self.flash else "off",
            f"{self.cells:,}",
            f"{self.cells * bytes_per_cell / 2**20:.1f}",
            f"{reads:.0f}",
            f"{of_reads:.2f}",
            f"{writes:.1f}",
            f"{of_writes:.2f}",
        ]
        return f"| {' | '.join(cells)} |"


def ship(path: Path, model: str, caches: Sequence[Measured], command: str) -> None:
    """Put the caches of as many bytes as the first, without flash attention where that can be, into
    the file of kvp_edge.cache.type_table."""
    table = json.loads(path.read_text(encoding="utf-8"))
    # of each type the last, which has as many bytes
    of_bytes = {one.types: one for one in caches if one.flash == one.types.quantised_values}
    speeds = [one for one in table["speeds"] if one["model"] != model]
    for one in of_bytes.values():
        reads, writes = one.relative(caches[0])
        speeds.append(
            {
                **{"model": model, "types": str(one.types), "cells": one.cells},
                **{"reads": round(reads, 2), "writes": round(writes, 2)},
            }
        )
    table["speeds"] = speeds
    table["commands"] = list(dict.fromkeys([*table["commands"], command]))
    save(path, table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=bundled_model(), help="GGUF file (the bundled model)")
    add("--types", type=names, default=names(TYPES), help=f"the first is f16 ({TYPES})")
    add("--ship", type=Path, metavar="JSON", help="also put the result into this file")
    add("--cells", type=int, default=2048, help="of every cache, and in f16 those of its bytes")
    add("--repeat", type=int, default=5)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if args.cells < CELL_UNIT or args.cells % CELL_UNIT:
        parser.error(f"--cells must be a multiple of {CELL_UNIT}, not {args.cells}")
    if args.types[:1] != ["f16"]:
        parser.error("the first of --types must be f16, to which all others are relative")
    shape = read_model_shape(args.model)
    f16 = shape.bytes_per_cell(F16.keys, F16.values)
    caches: list[Measured] = []
    with ExitStack() as stack:
        for name in args.types:
            types = KVTypes.parse("--types", name)
            of_bytes = args.cells * f16 // shape.bytes_per_cell(types.keys, types.values)
            sizes = dict.fromkeys((args.cells, of_bytes // CELL_UNIT * CELL_UNIT))
            for flash in (True,) if types.quantised_values else (False, True):
                for cells in sizes:
                    llm = PlainLlama(
                        args.model,
                        n_ctx=cells,
                        type_k=types.keys,
                        type_v=types.values,
                        flash_attn=flash,
                        n_threads=args.threads,
                        n_threads_batch=args.threads,
                        verbose=False,
                    )
                    stack.enter_context(closing(llm))
                    caches.append(Measured(types, flash, cells, llm))
        tokens = caches[0].llm.tokenize(TEXT.read_bytes()[:40_000])
        for one in tqdm(caches, desc="filling", unit="cache"):
            one.fill(tokens)
        for _ in tqdm(range(args.repeat), desc="measuring", unit="round"):
            for one in caches:
                one.measure(tokens)
        print(f"{Path(args.model).stem}, {args.threads} threads, medians of {args.repeat}\n")
        head = "types|flash attention|cells|MiB|reads, t/s|relative|writes, t/s|relative"
        columns = head.split("|")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for one in caches:
            per_cell = shape.bytes_per_cell(one.types.keys, one.types.values)
            print(one.row(caches[0], per_cell))
        if args.ship:
            command = (
                "python scripts/bench_types.py --model MODEL.gguf "
                f"--ship kvp_edge/data/kv_types.json --cells {args.cells} "
                f"--threads {args.threads} --repeat {args.repeat}"
            )
            ship(args.ship, Path(args.model).stem, caches, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
