"""A function of llama.cpp's or ggml's that fails once, in a process of its own (LD_PRELOAD)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as bindings

from support.paths import PYTHON_PATH

#: Marks the tests that use this.
possible = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None or "LD_PRELOAD" in os.environ,
    reason="needs Linux, a C compiler, and no sanitizer's library that is loaded already",
)

#: Of a script: `llm`, in which the call will fail, is read to, with the words `failed` in its
#: error, and then again from the start, as `fresh`, in which none fails, reads the same.
READ_AGAIN = """
from kvp_edge import KVCacheError
tokens = [0, *(6 + i * 7 % 200 for i in range(600))]
try:
    llm.eval(tokens)
except KVCacheError as error:
    assert failed in str(error) and "The cache is empty now" in str(error), error
else:
    raise SystemExit("it did not fail")
assert int(llm._kv.cache.newest_position()) == -1
try:
    llm.eval([5])
except KVCacheError as error:
    assert "reset" in str(error), error
answer = next(iter(llm.generate(tokens, temp=0.0)))
assert answer == next(iter(fresh.generate(tokens, temp=0.0)))
assert (llm.kv_indices == fresh.kv_indices).all()
"""


def run(folder: Path, stand_in: str, script: str, *argv: str, **variables: str) -> tuple[str, str]:
    """Run a Python script with a C function in place of llama.cpp's own of that name.

    Args:
        folder: where the stand-in is compiled.
        stand_in: C source; it finds the real function in dlopen(getenv("LLAMA_LIBRARY")).
        variables: for the script's environment, which the stand-in sees too.

    Returns:
        What it wrote to stdout and to stderr.
    """
    source, library = folder / "stand_in.c", folder / "stand_in.so"
    source.write_text(stand_in)
    command = ["cc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        env={
            **os.environ,
            "LD_PRELOAD": str(library),
            "LLAMA_LIBRARY": bindings._lib._name,
            "PYTHONPATH": PYTHON_PATH,
            **variables,
        },
        cwd=folder,  # "-c" puts the current folder first on the path: not the checkout's package
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.stdout, done.stderr
