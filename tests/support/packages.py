"""Packages that some tests need and that an installation without the extras lacks."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def needs(package: str, extra: str) -> Any:
    """The module. Without it: a skip, of all tests of a file if it is called at its top; or a
    failure where the extra is among those that KVP_EDGE_REQUIRE_EXTRAS names, with commas."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        sentence = f"needs {package}: pip install 'kvp_edge[{extra}]'"
        if extra in os.environ.get("KVP_EDGE_REQUIRE_EXTRAS", "").split(","):
            pytest.fail(sentence, pytrace=False)
        pytest.skip(sentence, allow_module_level=True)
