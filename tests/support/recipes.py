"""The recipes of docs/serve.md, as their readers would run them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
from typing import Any

from support.one_chat import opening
from support.paths import ROOT
from support.server import Server

PAGE = ROOT / "docs" / "serve.md"


def recipes() -> dict[tuple[str, str], list[str]]:
    """(heading, language) -> the blocks of code below it, in order."""
    found: dict[tuple[str, str], list[str]] = {}
    for section in re.split(r"(?m)^##+ ", PAGE.read_text())[1:]:
        heading = section.partition("\n")[0]
        for language, code in re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", section):
            found.setdefault((heading, language), []).append(code)
    return found


class Recipe:
    """One block of code, made to talk to a server of the tests.

    Args:
        which: of the blocks of this language below the heading.

    Attributes:
        first: what its user says first: nothing that another one says.
        number: which that tells.
    """

    def __init__(self, server: Server, heading: str, language: str, which: int = 0) -> None:
        self.first, self.number = opening()
        (code,) = recipes()[heading, language][which : which + 1]
        changes = {
            "http://127.0.0.1:8080": server.url,
            '"none"': f'"{server.key}"',  # the key, in Python
            "Bearer none": f"Bearer {server.key}",
            "--value none": f"--value {server.key}",
            "The code for the harbour is 4711. Please remember it.": self.first,
        }
        for written, here in changes.items():
            code = code.replace(written, here)
        self.code = code

    def python(self) -> tuple[str, dict[str, Any]]:
        """
        Returns:
            What it printed, and its names.
        """
        printed, names = io.StringIO(), {"__name__": "recipe"}
        with contextlib.redirect_stdout(printed):
            exec(compile(self.code, str(PAGE), "exec", dont_inherit=True), names)
        return printed.getvalue(), names

    def shell(self, **variables: str) -> str:
        """
        Returns:
            What it printed.
        """
        done = subprocess.run(
            ["bash", "-e", "-c", self.code],
            env={**os.environ, "no_proxy": "*", **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
