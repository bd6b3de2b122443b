#!/usr/bin/env python3
"""From a fresh clone to the result in one command, in an environment of its own.

    python3 scripts/fresh.py demo     set up, then run the main job on the bundled model
    python3 scripts/fresh.py test     set up, then pass the tests
    python3 scripts/fresh.py env      print the settings of these installations, for a shell:
                                      eval "$(python3 scripts/fresh.py env)" && pip install .

Needs Python 3.10 or newer with venv, a C++17 compiler, and access to a package registry. The first
run compiles llama.cpp (minutes); pip keeps the result, so later ones are quick. Arguments after the
name go on to it:  python3 scripts/fresh.py demo --items 5

pip keeps what it compiled without regard to CMAKE_ARGS, so every set of flags has a pip cache of
its own, kvp_edge/pip-<hash of the flags> in the user's cache folder; PIP_CACHE_DIR names another.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: name -> (what to install, what to run)
JOBS = {
    "demo": (".", ["kvp-edge", "demo"]),
    "test": (".[dev]", ["pytest"]),
}

#: llama-cpp-python compiles llama.cpp's multimodal library unless told otherwise; nothing here uses
#: it, and leaving it out shortens the compilation. The tests put models on devices of the RPC
#: backend, whose memory the host cannot touch.
CMAKE_ARGS = "-DLLAVA_BUILD=OFF -DGGML_RPC=ON"


def settings() -> dict[str, str]:
    """Environment variables for pip and for the tests, those of the caller first."""
    flags = os.environ.get("CMAKE_ARGS", CMAKE_ARGS)
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(default))
    own = home / "kvp_edge" / f"pip-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    variables = {
        "CMAKE_ARGS": flags,
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(own)),
    }
    if "-DGGML_RPC=ON" in flags.split():
        variables["KVP_EDGE_REQUIRE_RPC"] = "1"  # the tests that need it fail without: conftest.py
    return variables


def main() -> int:
    if sys.argv[1:] == ["env"]:
        for name, value in settings().items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in JOBS:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    if sys.version_info < (3, 10):
        print(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    name, *rest = sys.argv[1:]
    package, command = JOBS[name]
    environment = ROOT / f".venv-{name}"
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    if not (binaries / "python").exists() and not (binaries / "python.exe").exists():
        print(f"creating {environment.relative_to(ROOT)}", file=sys.stderr)
        venv.create(environment, with_pip=True)
    variables = {**os.environ, **settings()}
    # another checkout on the path, or its native library, would be run in place of this one
    for foreign in ("PYTHONPATH", "KVP_EDGE_LIBRARY"):
        variables.pop(foreign, None)
    print("installing; the first time compiles llama.cpp, which takes minutes", file=sys.stderr)
    install = [binaries / "python", "-m", "pip", "install", "--quiet", package]
    status = subprocess.run(install, cwd=ROOT, env=variables, check=False).returncode
    if status:
        print("the installation failed; its messages are above", file=sys.stderr)
        return status
    return subprocess.run(
        [binaries / command[0], *command[1:], *rest], cwd=ROOT, env=variables, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
