#!/usr/bin/env python3
"""Pin every package that CI and scripts/fresh.py install, with the hashes of its files.

    pip install uv && python scripts/lock.py                 # after a change of pyproject.toml
    pip install uv && python scripts/lock.py --upgrade       # to the newest that it allows
    pip install uv && python scripts/lock.py --upgrade numpy

What is pinned stays at its version unless --upgrade is given. The files in locks/ hold for Linux
and macOS, and every Python from 3.10 on; but train.txt not for Macs with Intel's processors, which
ONNX Runtime has no files for any more.

    pip.txt     pip itself: older ones cannot check the hashes of build requirements
    build.txt   what kvp_edge and llama-cpp-python are compiled with
    run.txt     what kvp_edge needs
    test.txt    that, and what its tests need (the extras dev and server)
    recipes.txt that, and the libraries that talk to the server in tests (the extra recipes)
    train.txt   test.txt, and the extras train and onnx without torch
    torch.txt   torch for the processor alone. Its files are not on the common package index, whose
                own need gigabytes more on Linux; the hash is that of the file that pip finds here,
                for this Python and machine. Others install torch by its version.

Needs Python 3.11 and access to a package index.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"

#: The release that CI tests with. The bounds in pyproject.toml allow others.
TORCH = "torch==2.13.0"
#: What only the CUDA build of torch needs.
ONLY_CUDA = re.compile(r"(nvidia|cuda|triton)\b")

HEADER = "# Made by scripts/lock.py: do not edit.\n"


def blocks(lock: str) -> dict[str, str]:
    """``name==version ; marker`` -> all that a lock says of it, with its hashes."""
    found = re.findall(r"^[^\s#-].*\n(?:[ \t].*\n)*", lock, re.MULTILINE)
    return {block.splitlines()[0].rstrip("\\ "): block for block in found}


def compiled(sources: list[str], lines: list[str], output: Path, *options: str) -> str:
    """One resolution for every platform, written to ``output``: of these files and requirements.
    uv keeps the versions that ``output`` holds already."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as extra:
        extra.write("\n".join(lines))
        extra.flush()
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--output-file", output]
        subprocess.run([*command, *options, *sources, extra.name], cwd=ROOT, check=True)
    return output.read_text()


def write_torch() -> None:
    """The lock of the file that pip takes for torch here, if it is one for the processor alone."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        subprocess.run([*download, TORCH], check=True)
        (file,) = Path(folder).iterdir()
        if "+cpu" not in file.name:
            print("pip finds no torch for the processor alone: torch.txt stays", file=sys.stderr)
            return
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    _write("torch", "", {TORCH: f"{TORCH}+cpu \\\n    --hash=sha256:{digest}\n"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upgrade", nargs="*", metavar="NAME", help="these, or all")
    names = parser.parse_args().upgrade
    upgrade = [] if names is None else [f"--upgrade-package={n}" for n in names] or ["--upgrade"]

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    build += ["cmake", "ninja"]  # scikit-build-core asks for them where the system has none
    project = ["pyproject.toml"]
    test = ["--extra=dev", "--extra=server"]
    recipes = [*test, "--extra=recipes"]
    train = [*test, "--extra=train", "--extra=onnx"]
    all_extras = {*recipes, *train}

    LOCKS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        everything, part = Path(folder, "everything.txt"), Path(folder, "part.txt")
        present = [path.read_text() for path in LOCKS.glob("*.txt") if path.stem != "torch"]
        everything.write_text("".join(pin for lock in present for pin in blocks(lock).values()))
        compiled(project, [TORCH, "pip", *build], everything, *sorted(all_extras), *upgrade)

        def pinned(sources: list[str], lines: list[str], *options: str) -> dict[str, str]:
            part.unlink(missing_ok=True)
            return blocks(compiled(sources, lines, part, f"--constraints={everything}", *options))

        locks = {
            "pip": pinned([], ["pip"]),
            "build": pinned([], build),
            "run": pinned(project, []),
            "test": pinned(project, [], *test),
            "recipes": pinned(project, [], *recipes),
            "train": pinned(project, [TORCH], *train),
        }
    del locks["train"][TORCH]

    # each of these begins with another one, so that no pin is written twice
    for name, base in (("run", None), ("test", "run"), ("recipes", "test"), ("train", "test")):
        known = locks[base] if base else {}
        more = {k: v for k, v in locks[name].items() if k not in known and not ONLY_CUDA.match(k)}
        _write(name, f"-r {base}.txt\n" if base else "", more)
    for name in ("pip", "build"):
        _write(name, "", locks[name])
    write_torch()


def _write(name: str, includes: str, lock: dict[str, str]) -> None:
    (LOCKS / f"{name}.txt").write_text(HEADER + includes + "".join(lock.values()))


if __name__ == "__main__":
    main()
