#!/usr/bin/env python3
"""Build the native library with sanitizers and run what touches it.

    python scripts/sanitize.py [pytest arguments]               AddressSanitizer and UBSan
    python scripts/sanitize.py --thread [its arguments]         ThreadSanitizer

The first runs the default suite but for LEFT_OUT. The second runs scripts/stress_threads.py: a data
race between any two threads in kvp_edge's native code ends it with status 66. llama.cpp, ggml and
Python are not built with the sanitizer: races inside them are not seen, and what they order by
locks of pthread is. First it makes sure that a race which is made on purpose is found.

Run it in an environment where kvp_edge is installed with the dev extra, on Linux with GCC.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Tests that the first leaves out, and why: with them it takes three times as long. All else in
#: tests/ is run, new files and folders too.
LEFT_OUT = {
    "tests/cli": "programs that do what tests/test_llama.py does, and print",
    "tests/doctor": "programs that die on purpose",
    "tests/evaluation": "many chats as those of tests/test_llama.py, and Python that counts",
    "tests/export": "PyTorch, ONNX and Python",
    "tests/llamacpp/test_abort_hook.py": "programs that die on purpose",
    "tests/processor": "llama.cpp's kernels, not kvp_edge's",
    "tests/recipes": "programs that serve chats",
    "tests/scripts": "Python alone",
    "tests/server": "chats as those of tests/test_llama.py and tests/test_session.py",
    "tests/text": "Python alone, and chats as those of tests/test_llama.py",
    "tests/training": "PyTorch",
}
#: The share of the examples that a property is tried with: a memory error needs few.
EXAMPLES = "0.25"

#: Two threads that write the result of kvp_choose_tokens to one place.
A_RACE = """
import threading
import numpy as np
from kvp_edge.binding.library import call
n = 4096
scores, unit = np.ones((1, n), np.float32), np.arange(n, dtype=np.int32)
protected, keep = np.zeros(n, np.uint8), np.zeros(n, np.uint8)
def choose():
    for _ in range(20):
        call("kvp_choose_tokens", scores, 1, unit, protected, n, n // 2, keep)
threads = [threading.Thread(target=choose) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
RACED = 66  # ThreadSanitizer's status for it


def _runtime_library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _build(folder: str, option: str) -> dict[str, str]:
    """Compile the library there; returns the environment that makes kvp_edge take it."""
    configure = ["cmake", "-G", "Ninja", "-S", ROOT / "native", "-B", folder, f"-D{option}=ON"]
    subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    return {**os.environ, "KVP_EDGE_LIBRARY": str(Path(folder) / "libkvp_edge.so")}


def addresses(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        variables = _build(folder, "KVP_SANITIZE")
        # Python is not built with the sanitizer, so its runtime must come first; and libstdc++ with
        # it, or the runtime does not find the function that throws exceptions.
        runtime = [_runtime_library(name) for name in ("libasan.so", "libstdc++.so")]
        variables |= {
            "LD_PRELOAD": ":".join(runtime),
            # Python itself never frees everything, and ctypes callbacks look odd to the checker.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "KVP_EDGE_EXAMPLES": EXAMPLES,
        }
        tests = arguments or [f"--ignore={path}" for path in LEFT_OUT]
        # without a cache: what this run skips is not what pytest --skipped is to run
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode


def threads(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        variables = _build(folder, "KVP_SANITIZE_THREAD")
        variables |= {
            "LD_PRELOAD": _runtime_library("libtsan.so"),
            "TSAN_OPTIONS": f"exitcode={RACED}",
        }
        # it needs its part of the address space free, which random addresses may take
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        python = [*fixed, sys.executable]
        control = subprocess.run(
            [*python, "-c", A_RACE], cwd=ROOT, env=variables, capture_output=True, check=False
        )
        if control.returncode != RACED or b"kvp_choose_tokens" not in control.stderr:
            print(control.stderr.decode(errors="replace"), file=sys.stderr)
            print("ThreadSanitizer does not find a race made on purpose", file=sys.stderr)
            return 1
        stress = [*python, ROOT / "scripts" / "stress_threads.py", *arguments]
        return subprocess.run(stress, cwd=ROOT, env=variables, check=False).returncode


def main() -> int:
    if sys.argv[1:2] == ["--thread"]:
        return threads(sys.argv[2:])
    return addresses(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
