"""scripts/sanitize.py leaves out what it names, and nothing else."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_the_sanitizers_leave_out_is_there_and_has_a_reason() -> None:
    left_out = runpy.run_path(str(ROOT / "scripts" / "sanitize.py"))["LEFT_OUT"]
    for path, reason in left_out.items():
        assert (ROOT / path).exists(), path
        assert reason
