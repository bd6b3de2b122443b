"""What a plan promises, held against what llama.cpp allocates when the model is loaded."""

from __future__ import annotations

import re
import shlex
from contextlib import closing

import pytest

from kvp_edge.cli import options, parse
from kvp_edge.llamacpp.log import Footprint

#: For each of a few buffers the log has two decimals.
SLACK = 0.05 * 2**20


def command_of(printed: str) -> list[str]:
    """The arguments of the command in the last line of a plan."""
    name, *argv = shlex.split(printed.splitlines()[-1])
    assert (name, argv[0]) == ("kvp-edge", "chat")
    return argv


def loaded_as(argv: list[str]) -> tuple[Footprint, int, str]:
    """What llama.cpp reports, the cells and their types, of ``kvp-edge chat`` with these
    arguments."""
    args = parse(argv).options
    with closing(options.load(options.model_path(args), args.n_ctx, args)) as llm:
        assert llm.n_cells == llm.kv_stats.cells
        return llm.reported, llm.n_cells, llm.kv_stats.kv_type


def row_of(printed: str, types: str) -> dict[str, float]:
    """The row of a plan."""
    (line,) = (one for one in printed.splitlines() if one.split()[:1] == [types])
    cells, kept, share, _, mib, compute, log, total = re.sub(r"\(\w+\)", "", line).split()[1:9]
    numbers = {"cells": cells, "kept": kept, "share": share, "mib": mib, "compute": compute}
    numbers |= {"log": log.replace("-", "0"), "total": total}
    return {name: float(value) for name, value in numbers.items()}


def assert_kept(printed: str, memory: int) -> None:
    """What the printed command allocates is what the plan says of the row that it marks."""
    (marked,) = re.findall(r"^(\S+) \((?:auto|asked)\)", printed, re.MULTILINE)
    row = row_of(printed, marked)
    reported, cells, types = loaded_as(command_of(printed))
    assert (cells, types) == (row["cells"], marked)
    assert reported.cells == pytest.approx(row["mib"] * 2**20, abs=SLACK)
    assert reported.compute == pytest.approx(row["compute"] * 2**20, abs=SLACK)
    total = reported.weights + reported.cells + reported.compute + row["log"] * 2**20
    assert total == pytest.approx(row["total"] * 2**20, abs=SLACK)
    assert total <= memory + SLACK
