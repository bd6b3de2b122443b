"""The machine that this process runs on, as far as it is known without llama.cpp."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

#: Lines of /proc/cpuinfo that stay as they are; x86's, then others'.
_OF_A_PROCESSOR = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision"),
    *("Features", "isa", "uarch", "cpu", "machine"),
}


def identity() -> dict[str, str]:
    """Identifies a machine with regard to products: the processor, and the virtual machine's maker,
    since a hypervisor may trap what the processor lists."""
    found = {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    try:
        with open(_PROC / "cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, colon, value = line.partition(":")
                if not colon:
                    break  # the next processor, the same once more
                if name.strip() in _OF_A_PROCESSOR:
                    found[name.strip()] = value.strip()
    except OSError:
        found["processor"] = platform.processor()
    for name in ("sys_vendor", "product_name"):
        try:
            found[name] = Path("/sys/class/dmi/id", name).read_text(errors="replace").strip()
        except OSError:
            continue
    return found


def processor_name() -> str:
    """The processor's name; "" if it has none."""
    found = identity()
    return found.get("model name") or found.get("cpu") or platform.processor()


def usable_cores() -> float:
    """Processors that this process may run on; fewer than a whole number where a control group
    (a container) gives it a share of time."""
    try:
        cores: float = len(os.sched_getaffinity(0))
    except AttributeError:  # no Linux
        cores = os.cpu_count() or 1
    for quota, period in _cgroup_quotas():
        cores = min(cores, quota / period)
    return cores


def memory() -> tuple[int, int | None]:
    """Bytes of memory, and how many of them are free for programs (None if unknown).

    Raises:
        OSError: the system does not report it.
    """
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {line.partition(":")[0]: line.split() for line in lines}
    if "MemTotal" in found:
        total, available = (found.get(name) for name in ("MemTotal", "MemAvailable"))
        assert total is not None
        return int(total[1]) * 1024, int(available[1]) * 1024 if available else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, ValueError) as error:
        raise OSError("this system does not report its memory") from error


def cgroup_memory_limit() -> int | None:
    """Bytes that the control group of this process may use; None without a limit."""
    texts = _cgroup_values("memory", "memory.max", "memory.limit_in_bytes")
    # without a limit there is "max", or a number beyond any memory
    limits = [int(text) for text in texts if text.isdigit() and int(text) < 2**60]
    return min(limits, default=None)


def _cgroup_quotas() -> Iterator[tuple[float, float]]:
    for text in _cgroup_values("cpu", "cpu.max", ""):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield float(quota), float(period)


def _cgroup_values(controller: str, name: str, old_name: str) -> Iterator[str]:
    """The contents of these files in the control group of this process and in all above it:
    ``name`` in the unified hierarchy, ``old_name`` (unless empty) in one of the older ones."""
    try:
        groups = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        number, controllers, path = (*group.split(":", 2), "", "")[:3]
        root, file = _CGROUPS, name
        if number != "0" or controllers:
            if controller not in controllers.split(",") or not old_name:
                continue
            root, file = root / controller, old_name
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            with suppress(OSError):  # a container may not see the groups above its own
                yield (place / file).read_text().strip()
            if place == root:
                break
