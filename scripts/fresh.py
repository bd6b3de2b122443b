#!/usr/bin/env python3
"""From a fresh clone to the result in one command, in an environment of its own.

    python3 scripts/fresh.py demo     set up, then run the main job on the bundled model
    python3 scripts/fresh.py test     set up, then pass the tests
    python3 scripts/fresh.py env      print the settings of these installations, for a shell:
                                      eval "$(python3 scripts/fresh.py env)" && pip install .

Needs Python 3.10 or newer with venv, a C++17 compiler, and access to a package registry. The first
run compiles llama.cpp (minutes); pip keeps the result, so later ones are quick. Arguments after the
name go on to it:  python3 scripts/fresh.py demo --items 5

What is installed, what it is compiled with, and pip are the versions in locks/, whose files are
known by their hashes (scripts/lock.py).

pip keeps what it compiled without regard to CMAKE_ARGS, so every set of flags has a pip cache of
its own, kvp_edge/pip-<hash of the flags> in the user's cache folder; PIP_CACHE_DIR names another.

Where the processor lists AMX, a small C program tries it first. On some virtual machines it ends
the process; there llama.cpp is compiled without it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: name -> (the lock of what to install, what to run)
JOBS = {
    "demo": ("run", ["kvp-edge", "demo"]),
    "test": ("test", ["pytest"]),
}

#: llama-cpp-python compiles llama.cpp's multimodal library unless told otherwise; nothing here uses
#: it, and leaving it out shortens the compilation. The tests put models on devices of the RPC
#: backend, whose memory the host cannot touch.
CMAKE_ARGS = "-DLLAVA_BUILD=OFF -DGGML_RPC=ON"


#: Seconds that a command may take to end after Ctrl-C.
_PATIENCE_S = 20.0

#: Ends with status 0 where AMX works, or where Linux does not grant it: then llama.cpp, which asks
#: in the same way, does without. What it multiplies are matrices of ones.
AMX_PROGRAM = r"""
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
static unsigned char config[64], ones[1024];
static int sums[256];
int main(void) {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    config[0] = 1; /* palette; then bytes of a row, and rows, of tiles 0 to 2 */
    for (int tile = 0; tile < 3; tile++) { config[16 + 2 * tile] = 64; config[48 + tile] = 16; }
    for (int i = 0; i < 1024; i++) ones[i] = 1;
    _tile_loadconfig(config);
    _tile_zero(0); _tile_loadd(1, ones, 64); _tile_loadd(2, ones, 64);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, sums, 64); _tile_release();
    for (int i = 0; i < 256; i++) if (sums[i] != 64) return 1;
    return 0;
}
"""

#: What leaves AMX out of -march=native; AVX-512, VNNI and repacked weights stay.
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def amx_is_broken(cpuinfo: str, attempt: Callable[[], int | None]) -> bool:
    """Whether the processor lists AMX and does not compute with it.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
        attempt: runs AMX_PROGRAM (run_amx_program). It is called only where AMX is listed.
    """
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    if "amx_tile" not in flags.split():
        return False
    status = attempt()
    # a compiler that does not know AMX makes no use of it in llama.cpp either
    return status is not None and status != 0


def run_amx_program(cmake_args: str, limit_s: float = 20.0) -> int | None:
    """The exit status of AMX_PROGRAM, negative for a signal, 1 if it hangs; None if it cannot be
    compiled."""
    compiler = _compiler(cmake_args)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "amx.c"), Path(folder, "amx")
        source.write_text(AMX_PROGRAM)
        compile_it = [*compiler, "-mamx-tile", "-mamx-int8", source, "-o", program]
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": limit_s}
        try:
            if subprocess.run(compile_it, check=False, **quiet).returncode != 0:
                return None
        except (OSError, subprocess.TimeoutExpired):
            return None
        try:
            # in that folder, where a core file is removed with it
            return subprocess.run([program], cwd=folder, check=False, **quiet).returncode
        except subprocess.TimeoutExpired:
            return 1
        except OSError:  # a folder that no program may be run in
            return None


def _compiler(cmake_args: str) -> list[str]:
    """The C compiler that CMake will take."""
    for flag in shlex.split(cmake_args):
        name, _, value = flag.partition("=")
        if name.split(":")[0] == "-DCMAKE_C_COMPILER":
            return [value]
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "cc")
    return shlex.split(os.environ.get("CC", "")) or [found]


def without_amx(cmake_args: str) -> str:
    """CMAKE_ARGS that leave AMX out of the build, too. scikit-build-core splits them as a shell
    would. What they, or CFLAGS and CXXFLAGS, say of the compilers' flags stays; arguments that this
    function made stay as they are."""
    args = shlex.split(cmake_args)
    for language, variable in (("C", "CFLAGS"), ("CXX", "CXXFLAGS")):
        name = f"-DCMAKE_{language}_FLAGS"
        # CMake takes the last of several, and no CFLAGS beside one
        mine = [arg for arg in args if arg.partition("=")[0].split(":")[0] == name]
        flags = mine[-1].partition("=")[2] if mine else os.environ.get(variable, "")
        if WITHOUT_AMX not in flags:
            args = [arg for arg in args if arg not in mine]
            args.append(f"{name}={f'{flags} {WITHOUT_AMX}'.strip()}")
    return shlex.join(args)


def broken_amx(cmake_args: str) -> bool:
    """Whether AMX must be left out on this machine."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False  # no Linux: no AMX in llama.cpp, or no trap that is known
    return amx_is_broken(cpuinfo, lambda: run_amx_program(cmake_args))


def settings() -> dict[str, str]:
    """Environment variables for pip and for the tests, those of the caller first."""
    flags = os.environ.get("CMAKE_ARGS", CMAKE_ARGS)
    if broken_amx(flags):
        flags = without_amx(flags)
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(default))
    own = home / "kvp_edge" / f"pip-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    variables = {
        "CMAKE_ARGS": flags,
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(own)),
    }
    if "-DGGML_RPC=ON" in shlex.split(flags):
        variables["KVP_EDGE_REQUIRE_RPC"] = "1"  # the tests that need it fail without: conftest.py
    return variables


def make_environment(folder: Path) -> Path:
    """The folder with the programs of an environment that has pip. It is made unless it is there,
    and made anew if what is there has none: an earlier run was interrupted.

    Raises:
        SystemExit: with a sentence.
    """
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    if (binaries / "python").exists() or (binaries / "python.exe").exists():
        if _has_pip(binaries / "python"):
            return binaries
        print(f"{folder.name} is incomplete: making it anew", file=sys.stderr)
    else:
        print(f"creating {folder.name}", file=sys.stderr)
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"no environment could be made in '{folder}': {error}. On Debian and Ubuntu it takes "
            "the package python3-venv"
        ) from error
    return binaries


def _has_pip(python: Path) -> bool:
    try:
        asked = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
    except OSError:  # the Python it was made with is gone
        return False
    return asked.returncode == 0


def installation(python: Path, lock: str) -> list[list[str | Path]]:
    """The commands that install kvp_edge and what a lock lists, in this order."""
    locks = ROOT / "locks"
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    # for isolated builds, too: kvp_edge's, and llama-cpp-python's
    pinned_builds = ["--build-constraint", locks / "build.txt"]
    return [
        [*install, "--require-hashes", "-r", locks / "pip.txt"],
        [*install, "--require-hashes", *pinned_builds, "-r", locks / f"{lock}.txt"],
        [*install, "--no-deps", *pinned_builds, ROOT],
    ]


def run(command: Sequence[str | Path], variables: dict[str, str]) -> int:
    """Run a command in the checkout; returns its exit status. Ctrl-C reaches it, too, and it has
    time to end in its own way."""
    with subprocess.Popen(command, cwd=ROOT, env=variables) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.terminate()
            raise


def main() -> int:
    try:
        return _main()
    except KeyboardInterrupt:
        print("\ninterrupted: give the same command again to go on", file=sys.stderr)
        return 130


def _main() -> int:
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
    lock, command = JOBS[name]
    binaries = make_environment(ROOT / f".venv-{name}")
    variables = {**os.environ, **settings()}
    # another checkout on the path, or its native library, would be run in place of this one
    for foreign in ("PYTHONPATH", "KVP_EDGE_LIBRARY"):
        variables.pop(foreign, None)
    print("installing; the first time compiles llama.cpp, which takes minutes", file=sys.stderr)
    for install in installation(binaries / "python", lock):
        status = run(install, variables)
        if status:
            print("the installation failed; its messages are above", file=sys.stderr)
            return status
    return run([binaries / command[0], *command[1:], *rest], variables)


if __name__ == "__main__":
    sys.exit(main())
