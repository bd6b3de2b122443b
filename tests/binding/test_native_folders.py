"""The native sources include each other in one direction."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"

#: Folder -> folders whose headers it may include, besides its own and what lies beside kvp_edge.h.
BELOW = {
    "state": set[str](),
    "model": set[str](),
    "graph": {"state"},
    "log": {"state"},
    "observe": {"state"},
    "cache": {"state", "graph", "observe"},
    "fuzz": {"state"},
}


def test_every_folder_has_its_place() -> None:
    assert {f.name for f in NATIVE.iterdir() if f.is_dir()} == BELOW.keys()


@pytest.mark.parametrize("folder", [*BELOW, "."])
def test_a_folder_includes_only_what_lies_below_it(folder: str) -> None:
    allowed = {*BELOW.get(folder, set()), folder, "."}
    for path in sorted((NATIVE / folder).glob("*.[ch]*")):
        for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            if (NATIVE / included).exists():  # else it is ggml's or llama.cpp's
                assert str(Path(included).parent) in allowed, f"{path.name} includes {included}"
