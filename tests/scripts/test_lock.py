"""The pins in locks/ are those of pyproject.toml."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
RUN: list[str] = PROJECT["project"]["dependencies"]
BUILD: list[str] = PROJECT["build-system"]["requires"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = ("linux", "darwin")


def pins(name: str) -> list[tuple[Requirement, list[str]]]:
    """What a lock and those that it includes list, with the hashes."""
    found: list[tuple[Requirement, list[str]]] = []
    for line in (ROOT / "locks" / f"{name}.txt").read_text().replace("\\\n", " ").splitlines():
        if line.startswith("-r "):
            found += pins(line[3:].removesuffix(".txt"))
        elif line and not line.startswith("#"):
            requirement, *hashes = line.split(" --hash=sha256:")
            found.append((Requirement(requirement), [h.strip() for h in hashes]))
    return found


def versions(lock: str, python: str, platform: str) -> dict[str, Version]:
    """The version of every package that pip installs from a lock there.

    Raises:
        ValueError: a package is pinned to two.
    """
    where = {"python_version": python, "python_full_version": f"{python}.1"}
    where |= {"sys_platform": platform, "platform_python_implementation": "CPython"}
    found: dict[str, Version] = {}
    for pin, _ in pins(lock):
        if pin.marker is None or pin.marker.evaluate(where):
            (specifier,) = pin.specifier
            version, name = Version(specifier.version), canonicalize_name(pin.name)
            if found.setdefault(name, version) != version:
                raise ValueError(f"{name} is pinned to {version} and to {found[name]}")
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("lock", "asked"),
    [
        ("build", BUILD),
        ("run", RUN),
        ("test", RUN + EXTRAS["dev"] + EXTRAS["server"]),
        ("recipes", RUN + EXTRAS["dev"] + EXTRAS["server"] + EXTRAS["recipes"]),
        ("train", RUN + EXTRAS["dev"] + EXTRAS["server"] + EXTRAS["train"] + EXTRAS["onnx"]),
    ],
)
def test_every_dependency_is_pinned_within_its_bounds(
    lock: str, asked: list[str], python: str, platform: str
) -> None:
    found = versions(lock, python, platform)
    if lock == "train":
        found |= versions("torch", python, platform)
    where = {"python_version": python, "sys_platform": platform}
    for line in asked:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(where):
            name = canonicalize_name(requirement.name)
            assert name in found, f"{line}: python scripts/lock.py"
            assert found[name] in requirement.specifier, f"{line}: python scripts/lock.py"


@pytest.mark.parametrize("lock", ["pip", "build", "run", "test", "recipes", "train", "torch"])
def test_every_file_is_known_by_its_hash(lock: str) -> None:
    listed = pins(lock)
    assert listed
    for pin, hashes in listed:
        assert [s.operator for s in pin.specifier] == ["=="]
        assert hashes
        assert all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)


@pytest.mark.parametrize("python", PYTHONS)
def test_what_it_is_compiled_with_is_what_it_runs_with(python: str) -> None:
    build, run = versions("build", python, "linux"), versions("train", python, "linux")
    for name in build.keys() & run.keys():
        assert build[name] == run[name]


def test_every_dependency_has_an_upper_bound() -> None:
    for line in [*RUN, *BUILD, *(line for extra in EXTRAS.values() for line in extra)]:
        specifiers = Requirement(line).specifier
        assert any(s.operator in ("<", "==") for s in specifiers), line


def test_pip_is_new_enough_to_check_what_others_are_compiled_with() -> None:
    for python in PYTHONS:
        assert versions("pip", python, "linux")["pip"] >= Version("25.3")
