"""``kvp_edge.export`` lies in export/ of a checkout; an installation puts it into the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import kvp_edge

if importlib.util.find_spec("kvp_edge.export") is None:
    folder = Path(kvp_edge.__file__).parents[1] / "export"
    spec = importlib.util.spec_from_file_location(
        "kvp_edge.export", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kvp_edge.export"] = module
    spec.loader.exec_module(module)
