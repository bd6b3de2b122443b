#!/usr/bin/env python3
"""How fast a model reads and writes from caches of other types.

    python scripts/bench_types.py --model model.gguf [--cells 2048] [--types f16,q8_0,q4_0]

Two full caches of every type are measured: one with as many cells as asked for, one with as many
as fit into the bytes that these take in f16. Unquantised ones are measured without and with flash
attention; quantised values need it. All caches are filled by reading a text, then measured in turn
in one process, so that noise meets all: reading 64 more tokens at once, writing 8 one by one.

Prints a Markdown table of medians on stdout, in tokens a second and relative to the first row.
"""

from __future__ import annotations

import argparse
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

TEXT = ROOT / "tests" / "data" / "penelope_brandling.txt"
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

    def row(self, first: Measured, bytes_per_cell: int) -> str:
        read, wrote = (statistics.median(s) for s in (self.reading, self.writing))
        first_read, first_wrote = (statistics.median(s) for s in (first.reading, first.writing))
        cells = [
            str(self.types),
            "on" if self.flash else "off",
            f"{self.cells:,}",
            f"{self.cells * bytes_per_cell / 2**20:.1f}",
            f"{READ / read:.0f}",
            f"{first_read / read:.2f}",
            f"{WRITTEN / wrote:.1f}",
            f"{first_wrote / wrote:.2f}",
        ]
        return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=bundled_model(), help="GGUF file (the bundled model)")
    add("--types", type=names, default=["f16", "q8_0", "q8_0/q4_0", "q5_1", "q4_0"])
    add("--cells", type=int, default=2048, help="of every cache, and in f16 those of its bytes")
    add("--repeat", type=int, default=5)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if args.cells < CELL_UNIT or args.cells % CELL_UNIT:
        parser.error(f"--cells must be a multiple of {CELL_UNIT}, not {args.cells}")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
