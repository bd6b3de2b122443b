#!/usr/bin/env python3
"""Build the native library with AddressSanitizer and UBSan and run the tests that touch it.

    python scripts/sanitize.py [pytest arguments]

Run it in an environment where kvp_edge is installed with the dev extra, on Linux with GCC.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "tests/policies/test_baselines.py",
    "tests/cache/test_devices.py",
    "tests/cache/test_in_place.py",
    "tests/binding/test_native.py",
    "tests/binding/test_native_policy.py",
    "tests/test_llama.py",
    "tests/traces/test_capture.py",
    "tests/cache/test_packing.py",
    "tests/cache/test_per_head.py",
    "tests/cache/test_positions.py",
    "tests/test_session.py",
]


def _runtime_library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as build:
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            ROOT / "native",
            "-B",
            build,
            "-DKVP_SANITIZE=ON",
        ]
        subprocess.run([*configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        # Python is not built with the sanitizer, so its runtime must come first; and libstdc++ with
        # it, or the runtime does not find the function that throws exceptions.
        runtime = [_runtime_library(name) for name in ("libasan.so", "libstdc++.so")]
        variables = {
            **os.environ,
            "LD_PRELOAD": ":".join(runtime),
            # Python itself never frees everything, and ctypes callbacks look odd to the checker.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "KVP_EDGE_LIBRARY": str(Path(build) / "libkvp_edge.so"),
        }
        command = [sys.executable, "-m", "pytest", "-q", *(sys.argv[1:] or TESTS)]
        return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
