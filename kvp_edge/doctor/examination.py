"""What works here, what does not, and what to do about it.

Nothing of llama.cpp is loaded into this process: what needs it is done in child processes
(kvp_edge.doctor.self_checks, kvp_edge.processor.buffer_types), so that a library that is missing,
does not fit, or ends its process is something to report.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import kvp_edge
from kvp_edge.processor import machine, repack
from kvp_edge.processor.buffer_types import PLAIN
from kvp_edge.processor.repack import NotTried, llama_library, trial_command, try_buffer_types
from kvp_edge.processor.trial import attempt, interpreter
from kvp_edge.processor.user_cache import cache_folder

#: A check reads at most a thousand tokens with a small model; opening a large one takes longer.
_LIMIT_S, _MODEL_LIMIT_S = 120.0, 900.0

_LLAMA = "llama-cpp-python"
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_RESTORE = "pip install --force-reinstall --no-deps --no-cache-dir"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section, name: what.
        value: what was found, as JSON has it.
        text: the same for a person.
        fault: a sentence if it is not as it should be.
        advice: what to do then.
    """

    section: str
    name: str
    value: Any
    text: str
    fault: str = ""
    advice: str = ""


@dataclass(frozen=True)
class _Checked:
    """What a check in a child process found, or why it found nothing."""

    found: dict[str, Any] | None
    fault: str = ""
    crashed: bool = False


def examine(model: str | None = None) -> Iterator[Finding]:
    """Look at everything, and at a model file if there is one; findings come as they are made."""
    yield from _versions()
    loads = _check(["llama_cpp", "native"], None)
    yield from _native_part(loads)
    works = all(one.found is not None for one in loads.values())
    yield from _processor()
    if works:
        yield from _llama_cpp_here()
    yield from _buffer_types(loads["llama_cpp"].found is not None)
    if works:
        yield from _caches()
    yield from _memory()
    yield _cache_folder()
    yield from _extras()
    if model is not None and works:
        yield from _model(model)


# -- what is installed -----------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    where = os.path.dirname(os.path.abspath(kvp_edge.__file__))
    yield _fact("versions", "kvp_edge", kvp_edge.__version__, f"{kvp_edge.__version__} ({where})")
    yield _fact("versions", _LLAMA, _version(_LLAMA), _version(_LLAMA) or "not installed")
    python = platform.python_version()
    yield _fact("versions", "Python", python, f"{python} ({sys.executable})")
    yield _fact("versions", "system", platform.platform())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _needed_llama() -> str:
    """What pip calls the one version that fits: "llama-cpp-python==1.2.3"."""
    return next((r for r in _requirements() if r.startswith(_LLAMA)), _LLAMA)


def _requirements() -> list[str]:
    try:
        return metadata.requires("kvp_edge") or []
    except metadata.PackageNotFoundError:  # a checkout on the path
        return []


def _native_part(loads: dict[str, _Checked]) -> Iterator[Finding]:
    llama, native = loads["llama_cpp"], loads["native"]
    reinstall = f"{_RESTORE} '{_needed_llama()}'"
    if llama.found is None:
        advice = f"Install it: pip install '{_needed_llama()}'"
        if "LLAMA_CPP_LIB_PATH" in os.environ:
            advice = f"Unset LLAMA_CPP_LIB_PATH, which is '{os.environ['LLAMA_CPP_LIB_PATH']}'"
        elif llama.crashed:
            advice = f"It was compiled for another processor. Compile it on this one: {reinstall}"
        elif _version(_LLAMA):
            advice = f"Reinstall it: {reinstall}"
        fault = f"llama-cpp-python cannot be imported: {llama.fault}"
        yield Finding("native part", "llama.cpp", None, "does not load", fault, advice)
    else:
        yield _fact("native part", "llama.cpp", llama.found["library"])
    if native.found is not None:
        found = native.found
        text = f"built for {_LLAMA} {found['built_for']}, llama.cpp {found['llama_cpp']}; it loads"
        yield _fact("native part", "kvp_edge", found, text)
    elif llama.found is not None:
        advice = "Reinstall kvp_edge: pip install --force-reinstall --no-deps --no-cache-dir . in "
        advice += "its folder"
        if "KVP_EDGE_LIBRARY" in os.environ:
            advice = f"Unset KVP_EDGE_LIBRARY, which is '{os.environ['KVP_EDGE_LIBRARY']}'"
        elif re.search(r"\bpip install\b", native.fault):  # it says so itself
            advice = "Do what this says"
        fault = f"kvp_edge's native part cannot be loaded: {native.fault}"
        yield Finding("native part", "kvp_edge", None, "does not load", fault, advice)


def _extras() -> Iterator[Finding]:
    packages: dict[str, list[str]] = {}
    for requirement in _requirements():
        found = re.match(r"([\w.-]+).*;.*\bextra\s*==\s*[\"']([\w-]+)[\"']", requirement)
        if found and found[2] != "dev":
            packages.setdefault(found[2], []).append(found[1])
    if not packages:
        yield _fact("extras", "extras", None, "not known: kvp_edge was not installed by pip")
    for extra, names in packages.items():
        missing = [name for name in names if _version(name) is None]
        text = "installed"
        if missing:
            text = f"without {', '.join(missing)}: pip install 'kvp_edge[{extra}]' adds it"
        yield _fact("extras", extra, {"missing": missing}, text)


# -- the machine -----------------------------------------------------------------------------------


def _processor() -> Iterator[Finding]:
    name = machine.processor_name() or "not told"
    yield _fact("processor", "name", name)
    listed, usable = multiprocessing.cpu_count(), round(machine.usable_cores(), 2)
    value = {"listed": listed, "usable": usable}
    threads = max(listed // 2, 1)  # llama_cpp.Llama's own default
    yield _fact("processor", "cores", value, f"{listed}, of which {usable:g} are usable here")
    text = f"{threads} to write, {listed} to read by default"
    if usable < listed:
        text += f"; --threads {max(1, int(usable))} is faster here, as threads wait for each other"
    yield _fact("processor", "threads", threads, text)


def _memory() -> Iterator[Finding]:
    try:
        total, available = machine.memory()
    except OSError as error:
        yield _fact("memory", "memory", None, str(error))
        return
    free = "" if available is None else f", {_bytes(available)} available"
    value = {"total_bytes": total, "available_bytes": available}
    yield _fact("memory", "memory", value, f"{_bytes(total)}{free}")
    limit = machine.cgroup_memory_limit()
    if limit is not None and limit < total:
        yield _fact("memory", "limit", limit, f"{_bytes(limit)} for this control group (container)")


def _cache_folder() -> Finding:
    folder = cache_folder()
    if folder is None:
        return _fact("cache folder", "folder", None, "none: there is no home folder")
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    writable = place.is_dir() and os.access(place, os.W_OK)
    note = "" if writable else " (it cannot be written: buffer types are tried at every start)"
    value = {"path": str(folder), "writable": writable}
    return _fact("cache folder", "folder", value, f"{folder}{note}")


def _llama_cpp_here() -> Iterator[Finding]:
    checked = _check(["system", "devices"], None)
    system, devices = checked["system"], checked["devices"]
    if system.found is None:
        yield _broken("processor", "llama.cpp", system, "llama.cpp cannot be asked about itself")
    else:
        yield _fact("processor", "llama.cpp", system.found["system_info"])
    if devices.found is None:
        yield _broken("devices", "devices", devices, "llama.cpp cannot list its devices")
        return
    for device in devices.found["devices"]:
        memory = f"{_bytes(device['free_bytes'])} free of {_bytes(device['total_bytes'])}"
        text = f"{device['description']} ({device['type']}, {memory})"
        yield _fact("devices", device["name"], device, text)


def _buffer_types(loads: bool) -> Iterator[Finding]:
    try:
        library = llama_library()
        started = time.perf_counter()
        tried = try_buffer_types(trial_command(library))
        seconds = time.perf_counter() - started
    except FileNotFoundError:
        return  # said already
    except NotTried as reason:
        if not loads:
            return
        yield Finding(
            *("buffer types", "trial", None, "could not be tried"),
            fault=f"llama.cpp's buffer types could not be tried: {reason}",
            advice="Models are loaded as llama.cpp does, but without AMX. If one ends the process "
            "by SIGILL, add --repack off",
        )
        return
    repack.keep(library, tried)
    for one in tried:
        value = {"types": one.types, "fault": one.fault}
        text = f"works ({', '.join(one.types)})"
        if not one.fault:
            yield _fact("buffer types", one.name, value, text)
            continue
        fault = f"llama.cpp's {one.name} {one.fault}"
        advice = _advice_for(one.name)
        yield Finding("buffer types", one.name, value, "does not work", fault, advice)
    yield _fact("buffer types", "time", round(seconds, 3), f"{seconds:.2f} s")


def _advice_for(buffer_type: str) -> str:
    build = f"{_RESTORE} '{_needed_llama()}'"
    if buffer_type == PLAIN:
        return (
            f"llama.cpp was compiled for another processor. Compile it on this one: {build} (or "
            f"for any: CMAKE_ARGS=-DGGML_NATIVE=OFF {build})"
        )
    if buffer_type == "AMX":
        flags = " ".join(f"-DCMAKE_{x}_FLAGS='{_WITHOUT_AMX}'" for x in ("C", "CXX"))
        return (
            "The processor, or this virtual machine, reports AMX, but it does not work. "
            "Models are loaded without repacked weights, which works but may be slower. "
            f'To repack weights again, compile llama.cpp without AMX: CMAKE_ARGS="{flags}" {build}'
        )
    return (
        "Models are loaded without repacked weights, which works but may be slower. A newer "
        "llama.cpp or compiler may fix it"
    )


def _caches() -> Iterator[Finding]:
    what = {
        "bounded cache": "A long text cannot be read through a small cache here",
        "flash attention": "Leave out --flash-attn",
        "quantised cache": "Leave out --type-k and --type-v",
    }
    for name, checked in _check(list(what), None).items():
        found = checked.found
        if found is None:
            yield _broken("caches", name, checked, f"{name}: a check failed", what[name])
        elif "off" in found:
            text = f"works (logits {found['off']:.2g} standard deviations off)"
            yield _fact("caches", name, found, text)
        else:
            text = f"works ({found['evictions']} evictions by {found['policy']})"
            yield _fact("caches", name, found, text)


# -- a model ---------------------------------------------------------------------------------------


def _model(path: str) -> Iterator[Finding]:
    checked = _check(["model"], path, _MODEL_LIMIT_S)["model"]
    found = checked.found
    if found is None:
        advice = "Look for another file of this model"
        if checked.crashed:
            advice = "It may be too large for the memory here"
        what = "this model cannot be used"
        yield _broken("model", os.path.basename(path), checked, what, advice)
        return
    heads = found["kv_heads"]
    size = found["cache_bytes_per_token"]
    window = f"{found['window']} tokens, in some layers" if found["window"] else "none"
    template = (
        "yes"
        if found["chat_template"]
        else "none: a base model, or made without one (chat uses a transcript)"
    )
    facts = {
        "file": (path, f"{path} ({_bytes(found['file_bytes'])})"),
        "architecture": (found["architecture"], found["architecture"]),
        "layers": (found["layers"], f"{found['layers']}"),
        "KV heads": (heads, " or ".join(map(str, heads)) + " in a layer"),
        "trained length": (found["trained_tokens"], f"{found['trained_tokens']} tokens"),
        "window": (found["window"], window),
        "chat template": (found["chat_template"], template),
        "cache per token": (size, "not known" if size is None else f"{size} bytes (f16)"),
        "policy": (found["policy"], f"{found['policy']} (chosen by auto)"),
    }
    for name, (value, text) in facts.items():
        yield _fact("model", name, value, text)
    for warning in found["warnings"]:
        yield Finding("model", "warning", None, warning, warning, "Remove or replace that file")
    yield _bounded(found)
    try:
        total, available = machine.memory()
    except OSError:
        return
    room = min(available or total, machine.cgroup_memory_limit() or total)
    if found["file_bytes"] > room:
        yield Finding(
            *("model", "memory", room, f"{_bytes(room)} for {_bytes(found['file_bytes'])}"),
            fault=f"the file has {_bytes(found['file_bytes'])}, but only {_bytes(room)} of memory "
            "are available, so it will be read from the disk repeatedly",
            advice="Use a smaller quantisation of it, or put layers on a GPU (--gpu-layers)",
        )


def _bounded(found: dict[str, Any]) -> Finding:
    granularity, reasons = found["granularity"], found["why_not"]
    value = {"granularity": granularity, "why_not": reasons}
    if granularity == "head":
        return _fact("model", "bounded cache", value, "yes, and every head keeps its own tokens")
    if granularity == "token":
        text = f"yes, with --granularity token only: {reasons['head']}"
        return _fact("model", "bounded cache", value, text)
    return Finding(
        *("model", "bounded cache", value, "no"),
        fault=f"the cache of this model cannot be bounded: {reasons['token']}",
        advice="In Python it runs without kv_budget, as with llama_cpp",
    )


# -- helpers ---------------------------------------------------------------------------------------


def _fact(section: str, name: str, value: Any, text: str | None = None) -> Finding:
    return Finding(section, name, value, str(value) if text is None else text)


def _broken(section: str, name: str, checked: _Checked, what: str, advice: str = "") -> Finding:
    if not advice:
        advice = f"Reinstall llama.cpp: {_RESTORE} '{_needed_llama()}'"
    return Finding(section, name, None, "does not work", f"{what}: {checked.fault}", advice)


def _check(
    names: Sequence[str], model: str | None, limit_s: float = _LIMIT_S
) -> dict[str, _Checked]:
    """Carry out checks in a child process; those after one that ended it, in another."""
    done: dict[str, _Checked] = {}
    left = list(names)
    while left:
        found = _checked_by_child(left, model, limit_s)
        done.update(found)
        left = [name for name in left if name not in found]
    return done


def _checked_by_child(
    names: Sequence[str], model: str | None, limit_s: float
) -> dict[str, _Checked]:
    """At least the first check."""
    python = interpreter()
    if python is None:
        reason = f"sys.executable ('{sys.executable}') is no Python that could run a check"
        return {name: _Checked(None, reason) for name in names}
    folder = str(Path(kvp_edge.__file__).resolve().parent.parent)
    # "-c" looks for packages in the current folder first; this one is wanted instead
    code = (
        "import sys; "
        f"sys.path[:1] = [] if {folder!r} in sys.path[1:] else [{folder!r}]; "
        "from kvp_edge.doctor.self_checks import main; main(sys.argv[2:], sys.argv[1] or None)"
    )
    try:
        trial = attempt([python, "-c", code, model or "", *names], limit_s)
    except OSError as error:
        return {name: _Checked(None, f"no child process can be started: {error}") for name in names}
    found: dict[str, _Checked] = {}
    running = names[0]
    for text in trial.lines:
        line = _json_object(text)
        name = str(line.get("check"))
        if name not in names:
            continue
        running = name
        if "found" in line or "fault" in line:
            found[name] = _Checked(line.get("found"), line.get("fault", ""))
            running = ""
    if running and running not in found:
        how = f"the process ended ({trial.failed or 'without a message'})"
        found[running] = _Checked(None, how, trial.crashed)
    elif not found:
        found[names[0]] = _Checked(None, f"no answer ({trial.failed or 'it ended early'})")
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _bytes(n: int) -> str:
    if n < 2**30:
        return f"{n / 2**20:.1f} MiB"
    return f"{n / 2**30:.1f} GiB"
