"""What CI skips without the extras it runs with them, by pytest --skipped (support/skipped.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LACKING = """
from support.packages import needs
{}
def test_of_{}(): pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tests: of a whole file that lacks a package, one that lacks it itself, one that does not, and
    one that is skipped for another reason."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_whole.py").write_text(LACKING.format('needs("not_there", "train")', "file"))
    (tmp_path / "test_single.py").write_text(
        LACKING.format("", "nothing")
        + '\ndef test_alone():\n    needs("not_there", "train")\n'
        + '\ndef test_elsewhere():\n    __import__("pytest").skip("no device")\n'
    )
    return tmp_path


def run(folder: Path, *options: str, **variables: str) -> tuple[int, list[str]]:
    """The status, and the last line's counts of a run of these tests."""
    path = os.pathsep.join([str(TESTS), str(folder / "packages")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.skipped", *options]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "KVP_EDGE_REQUIRE_EXTRAS": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stdout.splitlines() or [done.stderr])[-1].split(" in ")[0].split(
        ", "
    )


def test_a_second_run_tests_what_the_first_one_lacked_a_package_for(folder: Path) -> None:
    assert run(folder) == (0, ["1 passed", "3 skipped"])
    # a run without a cache in between, as of scripts/sanitize.py, changes nothing
    assert run(folder, "-p", "no:cacheprovider", "test_single.py")[0] == 0
    (folder / "packages").mkdir()
    (folder / "packages" / "not_there.py").write_text("")
    assert run(folder, "--skipped", KVP_EDGE_REQUIRE_EXTRAS="train,onnx") == (
        0,
        ["2 passed", "1 skipped", "1 deselected"],
    )
    # the device is still not there
    assert run(folder, "--skipped") == (0, ["1 skipped", "3 deselected"])


def test_a_package_that_must_be_there_fails_its_tests(folder: Path) -> None:
    status, counts = run(folder, KVP_EDGE_REQUIRE_EXTRAS="onnx,train")
    assert (status, counts) == (2, ["1 error"])  # the file is not even collected
    (folder / "test_whole.py").unlink()
    status, counts = run(folder, KVP_EDGE_REQUIRE_EXTRAS="onnx,train")
    assert (status, counts) == (1, ["1 failed", "1 passed", "1 skipped"])
    assert run(folder, KVP_EDGE_REQUIRE_EXTRAS="onnx") == (0, ["1 passed", "2 skipped"])


def test_without_a_run_before_nothing_is_known_to_be_skipped(folder: Path) -> None:
    status, _ = run(folder, "--skipped")
    assert status == pytest.ExitCode.USAGE_ERROR
