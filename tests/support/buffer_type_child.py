"""Stands in for the program that tries buffer types: it crashes, hangs or lies where it is told."""

from __future__ import annotations

import sys
from pathlib import Path

SIGILL = "os.kill(os.getpid(), signal.SIGILL)"


class Child:
    """Answers as kvp_edge.processor.buffer_types does, and counts how often it is started."""

    def __init__(self, folder: Path, types: dict[str, str], before: str = "") -> None:
        self._starts = folder / "starts"
        self._script = folder / "child.py"
        self._script.write_text(
            "import os, signal, sys, time\n"
            f"open({str(self._starts)!r}, 'a').write('x')\n"
            f"{before}\n"
            "def say(*words): print(*words, sep='\\t', flush=True)\n"
            f"types = { {'CPU': 'pass', **types, 'CPU_REPACK': 'pass'}!r}\n"
            "say('types', *types)\n"
            "for name, code in types.items():\n"
            "    if name in sys.argv[1:]: continue\n"
            "    say('try', name, 'q4_0')\n"
            "    exec(code)\n"
            "    say('done', name, 'q4_0')\n"
            "say('end')\n"
        )
        self.command = [sys.executable, str(self._script)]

    @property
    def starts(self) -> int:
        return len(self._starts.read_text()) if self._starts.exists() else 0
