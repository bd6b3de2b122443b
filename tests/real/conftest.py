"""Models that people use (scripts/real_models.py). A test whose model is not here is skipped, or
fails if the model's name is in KVP_EDGE_REQUIRE_REAL, a list with commas between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

import kvp_edge  # noqa: F401  # before the path is changed: the installed one is tested
from scripts import real_models
from support.real_models import write_exact


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], str]:
    """real_model("smollm2" | "qwen" | "gemma") -> path of the file that was fetched before."""

    def path(name: str) -> str:
        found = real_models.found(name)
        if found is None:
            required = os.environ.get("KVP_EDGE_REQUIRE_REAL", "").split(",")
            sentence = f"needs a real model: python3 scripts/real_models.py {name}"
            (pytest.fail if name in required else pytest.skip)(sentence)
        return str(found)

    return path


@pytest.fixture(scope="session")
def exact_model(
    real_model: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """exact_model("smollm2") -> path of a copy with f32 weights (support.real_models)."""
    folder = tmp_path_factory.mktemp("exact")
    made: dict[str, str] = {}

    def path(name: str) -> str:
        if name not in made:
            made[name] = str(write_exact(real_model(name), folder / f"{name}.gguf"))
        return made[name]

    yield path
    for file in made.values():  # gigabytes, and pytest would keep the folders of three runs
        os.unlink(file)
