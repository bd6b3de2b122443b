"""Whether llama.cpp may repack a model's weights for this processor.

By default llama.cpp uses the buffer types that the processor claims to support. If the claim is
wrong (AMX on some virtual machines), the process ends by SIGILL on the first batch. So these buffer
types are first tried in a child process (kvp_edge.processor.buffer_types), once per machine and
build of llama.cpp; the result is kept in the user's cache folder. Without them a model computes the
same up to rounding, more slowly with most types of weights.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvp_edge.processor import buffer_types, machine
from kvp_edge.processor.buffer_types import PLAIN
from kvp_edge.processor.trial import Trial, attempt, interpreter
from kvp_edge.processor.user_cache import recall, remember

#: What ``Llama(repack=...)`` and ``--repack`` can be.
REPACK = ("auto", "on", "off")

#: Weights of these types are never repacked.
_NEVER_REPACKED = {"f32", "bf16"}
#: Tried in a fifth of a second; a machine that is busy with something else takes longer.
_LIMIT_S = 30.0
#: Version of the stored result; raised whenever its meaning changes.
_VERSION = 1


@dataclass(frozen=True)
class Tried:
    """The trial's result for one buffer type.

    Attributes:
        name: "CPU" is the plain one, which every model needs.
        types: of weights that it computes with.
        fault: "" if it works; else what went wrong.
    """

    name: str
    types: list[str]
    fault: str


class NotTried(Exception):
    """Buffer types cannot be tried here: no child process could be started, or its answer was not
    understood. The message is the reason."""


def trial_command(library: Path) -> list[str]:
    """The command that tries the buffer types of the llama.cpp in ``library``.

    Raises:
        NotTried: there is no Python to run it.
    """
    python, script = interpreter(), Path(buffer_types.__file__)
    if python is None or not script.exists():
        raise NotTried(f"sys.executable ('{sys.executable}') cannot run a Python script")
    # -I and -S: nothing of the user's is imported, and it starts in a few milliseconds
    return [python, "-I", "-S", str(script), str(library)]


def try_buffer_types(command: Sequence[str], limit_s: float = _LIMIT_S) -> list[Tried]:
    """Try every buffer type, one after the other. If one ends the child, another child tries the
    rest.

    Args:
        command: a program that answers as kvp_edge.processor.buffer_types does.
        limit_s: seconds after which a child is taken to hang.

    Returns:
        The plain buffer type first, and alone if it ends the child: nothing works without it.

    Raises:
        NotTried: see there.
    """
    done: dict[str, Tried] = {}
    while True:
        try:
            trial = attempt([*command, *done], limit_s)
        except OSError as error:
            raise NotTried(f"cannot start a child process: {error}") from error
        names, found = _understood(trial)
        if not found.keys() - done.keys() and any(name not in done for name in names or [PLAIN]):
            raise NotTried(f"the child process gave no answer ({trial.failed or 'it ended early'})")
        done.update(found)
        if PLAIN in found and not found[PLAIN].types:
            return [done[PLAIN]]
        if all(name in done for name in names):
            return [done[name] for name in names]


def _understood(trial: Trial) -> tuple[list[str], dict[str, Tried]]:
    """The names of all buffer types, and the results of those that this child tried."""
    names: list[str] = []
    found: dict[str, Tried] = {}
    running, with_weights, wrong = "", "", ""
    for line in trial.lines:
        match line.split("\t"):
            case ["types", *all_names]:
                names = all_names
            case ["try", name, weights] if name in names:
                wrong = wrong if name == running else ""
                running, with_weights = name, weights
            case ["wrong", name, weights, error] if name == running:
                wrong = wrong or f"computes wrong numbers with {weights} weights (error {error})"
            case ["done", name, *types] if name == running:
                found[name] = Tried(name, types, wrong)
                running = ""
            case ["end"]:
                pass
            case _:
                raise NotTried(f"the child process wrote an unexpected line: '{line[:80]}'")
    # status 0 in the middle does not mean a normal end: a program that ignores SIGCHLD sees 0
    if running and (trial.crashed or not trial.failed):
        how = trial.failed or "without a message"
        fault = f"ends the process with {with_weights} weights ({how})"
        found[running] = Tried(running, [], fault)
    return names, found


# -- the machine and the build ---------------------------------------------------------------------


def llama_library() -> Path:
    """The libllama that ``import llama_cpp`` loads. It is not imported: doctor looks for reasons
    why it cannot be.

    Raises:
        FileNotFoundError: there is none.
    """
    given = os.environ.get("LLAMA_CPP_LIB_PATH")
    spec = find_spec("llama_cpp")
    folders = [Path(given)] if given else []
    if not given and spec is not None:
        folders = [Path(place) / "lib" for place in spec.submodule_search_locations or ()]
    for folder in folders:
        for name in ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll"):
            if (folder / name).exists():
                return folder / name
    where = f"in '{folders[0]}'" if folders else "because llama-cpp-python is not installed"
    raise FileNotFoundError(f"no llama.cpp library was found {where}")


def _build(library: Path) -> list[str]:
    """Which files compute: their names, sizes and times."""
    files = {library, *library.parent.glob("*ggml*")}
    found = ((file.name, file.stat()) for file in sorted(files) if file.is_file())
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found]


def _key(library: Path) -> str:
    about = f"{sorted(machine.identity().items())} {_build(library)}"
    return f"repack-{hashlib.sha256(about.encode()).hexdigest()[:16]}"


def keep(library: Path, tried: Sequence[Tried]) -> None:
    """Store a result for the next process."""
    remember(_key(library), {"version": _VERSION, "tried": [asdict(one) for one in tried]})


def kept(library: Path) -> list[Tried] | None:
    """The result that an earlier process stored; None if there is none, or it is not understood."""
    value: Any = recall(_key(library))
    try:
        if value["version"] != _VERSION:
            return None
        tried = [Tried(str(t["name"]), list(t["types"]), str(t["fault"])) for t in value["tried"]]
    except (TypeError, KeyError):
        return None
    return tried if any(one.name == PLAIN for one in tried) else None


# -- the decision ----------------------------------------------------------------------------------


def use_extra_buffers(
    repack: str, model_path: str, *, n_gpu_layers: int = 0, vocab_only: bool = False
) -> bool:
    """llama.cpp's model parameter ``use_extra_bufts`` for a model.

    Args:
        repack: one of REPACK; "auto": on if every buffer type works that this llama.cpp has for
            this processor.
        n_gpu_layers, vocab_only: llama_cpp.Llama's.
    """
    if repack != "auto":
        return repack == "on"
    # imported here because doctor looks at this module where it cannot be
    from llama_cpp import llama_cpp  # noqa: PLC0415

    library = Path(llama_cpp._lib._name)
    known = kept(library)
    if vocab_only or (known is not None and not _told(known)):
        return True
    if _has_nothing_to_repack(model_path, n_gpu_layers, llama_cpp._lib):
        return True
    fault = _fault(library)
    if fault:
        _say_once(fault)
    return not fault


def _has_nothing_to_repack(model_path: str, n_gpu_layers: int, lib: Any) -> bool:
    """Whether it is easy to see that no weight would be in an extra buffer type."""
    # these need the native library
    from kvp_edge.binding.fingerprint import tensor_types  # noqa: PLC0415
    from kvp_edge.binding.model import read_model_shape  # noqa: PLC0415
    from kvp_edge.errors import UnsupportedModelError  # noqa: PLC0415

    try:
        # the others of a model in several files may have other types
        if not re.search(r"-\d{5}-of-\d{5}\.gguf$", model_path):
            types = tensor_types(model_path)
            if types and types <= _NEVER_REPACKED:
                return True
        if n_gpu_layers == 0 or not _has_gpu(lib):
            return False
        # one more than the layers: the output layer, too
        return n_gpu_layers < 0 or n_gpu_layers > read_model_shape(model_path).n_layer
    except UnsupportedModelError:
        return False  # loading the file will say what is wrong


def _has_gpu(lib: Any) -> bool:
    by_type = lib["ggml_backend_dev_by_type"]
    by_type.restype, by_type.argtypes = ctypes.c_void_p, [ctypes.c_int]
    return any(by_type(kind) for kind in (1, 2))  # GPU, IGPU: enum ggml_backend_dev_type


@functools.cache
def _fault(library: Path) -> str:
    """Why no extra buffer type is used here; "" where they work."""
    return fault_of(library, lambda: trial_command(library))


def fault_of(library: Path, command: Callable[[], Sequence[str]], limit_s: float = _LIMIT_S) -> str:
    """Why no extra buffer type may be used with this llama.cpp on this machine; "" where they work.

    Args:
        command: returns the trial's command (``trial_command``).
    """
    tried = kept(library)
    if tried is None:
        try:
            names = buffer_types.extra_buffer_types(str(library))
        except OSError as error:
            return f"cannot list llama.cpp's buffer types ({error})"
        if not names:
            return ""
        try:
            tried = try_buffer_types(command(), limit_s)
        except NotTried as reason:
            # Only AMX is known to end processes; the others use the same instructions as the plain
            # buffer type, which every model needs.
            return f"llama.cpp's AMX could not be tried: {reason}" if "AMX" in names else ""
        keep(library, tried)
    return _told(tried)


def _told(tried: Sequence[Tried]) -> str:
    """The faults in a sentence; "" without any."""
    return "; ".join(f"llama.cpp's {one.name} {one.fault}" for one in tried if one.fault)


_said = False


def say_nothing() -> None:
    """Silence the message in this process: its parent has shown it."""
    global _said  # noqa: PLW0603  # one process, one line
    _said = True


def _say_once(fault: str) -> None:
    global _said  # noqa: PLW0603  # one process, one line
    if not _said:
        _said = True
        print(
            f"kvp-edge: weights are not repacked, which may be slower: {fault}. Run kvp-edge "
            "doctor for a fix",
            file=sys.stderr,
            flush=True,
        )
