"""Where things are in the checkout."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: PYTHONPATH of a child process that imports what tests do.
PYTHON_PATH = os.pathsep.join(
    [str(ROOT / "tests"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
)
