"""scripts/fresh.py, as far as that can be tested without compiling llama.cpp."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fresh.py"
WITHOUT = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
XEON = "processor\t: 0\nflags\t\t: fpu avx512_vnni amx_bf16 amx_tile amx_int8\n"
EPYC = "processor\t: 0\nflags\t\t: fpu avx512_vnni\n"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in an environment that says nothing of compilers."""
    for name in ("CMAKE_ARGS", "PIP_CACHE_DIR", "CFLAGS", "CXXFLAGS", "CC"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("fresh", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- AMX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "broken"),
    [(0, False), (None, False), (-signal.SIGILL, True), (-signal.SIGSEGV, True), (1, True)],
)
def test_amx_is_left_out_where_it_is_listed_and_does_not_work(
    status: int | None, broken: bool, fresh: ModuleType
) -> None:
    assert fresh.amx_is_broken(XEON, lambda: status) == broken


@pytest.mark.parametrize("cpuinfo", [EPYC, "", "Features\t: fp asimd\n", "model name: amx_tile\n"])
def test_amx_is_not_tried_where_it_is_not_listed(cpuinfo: str, fresh: ModuleType) -> None:
    assert not fresh.amx_is_broken(cpuinfo, lambda: pytest.fail("it was tried"))


def gcc_knows_amx() -> bool:
    probe = ["cc", "-mamx-tile", "-E", "-x", "c", os.devnull]
    return bool(shutil.which("cc")) and ends_well(probe)


def ends_well(command: list[str | Path]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not gcc_knows_amx(), reason="the C compiler knows no AMX")
def test_the_amx_program_compiles_and_tells_its_end(fresh: ModuleType) -> None:
    def listed() -> bool:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()

    assert fresh.run_amx_program("") is not None
    if not listed():
        assert fresh.run_amx_program("") == 0  # Linux does not grant what there is not
    # what the kernel does not grant must not be asked for by name alone
    ungranted = fresh.AMX_PROGRAM.replace("if (syscall", "if (0 && syscall")
    assert ungranted != fresh.AMX_PROGRAM
    fresh.AMX_PROGRAM = ungranted
    assert fresh.run_amx_program("") == -signal.SIGILL
    fresh.AMX_PROGRAM = "int main(void) { for (;;) {} }"
    assert fresh.run_amx_program("", limit_s=2) == 1
    fresh.AMX_PROGRAM = "this is no C"
    assert fresh.run_amx_program("") is None


def test_the_compiler_is_the_one_that_cmake_takes(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "ccache gcc-13")
    assert fresh._compiler("-DGGML_RPC=ON") == ["ccache", "gcc-13"]
    assert fresh._compiler("-DCMAKE_C_COMPILER:FILEPATH=/opt/cc") == ["/opt/cc"]
    assert fresh.run_amx_program("-DCMAKE_C_COMPILER=/no/such/compiler") is None


def test_settings_are_the_usual_ones_where_amx_works(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "broken_amx", lambda flags: False)
    found = fresh.settings()
    assert found["CMAKE_ARGS"] == "-DLLAVA_BUILD=OFF -DGGML_RPC=ON"
    assert found["KVP_EDGE_REQUIRE_RPC"] == "1"
    monkeypatch.setenv("CMAKE_ARGS", "-DX='a b'")
    found = fresh.settings()
    assert found["CMAKE_ARGS"] == "-DX='a b'"
    assert "KVP_EDGE_REQUIRE_RPC" not in found


@pytest.mark.parametrize(
    ("given", "cflags", "split"),
    [
        (
            None,
            None,
            [
                *("-DLLAVA_BUILD=OFF", "-DGGML_RPC=ON"),
                *(f"-DCMAKE_C_FLAGS={WITHOUT}", f"-DCMAKE_CXX_FLAGS={WITHOUT}"),
            ],
        ),
        ("", None, [f"-DCMAKE_C_FLAGS={WITHOUT}", f"-DCMAKE_CXX_FLAGS={WITHOUT}"]),
        (
            "-DA=1 '-DCMAKE_C_FLAGS=-O2 -g'",
            "-not-looked-at",
            ["-DA=1", f"-DCMAKE_C_FLAGS=-O2 -g {WITHOUT}", f"-DCMAKE_CXX_FLAGS={WITHOUT}"],
        ),
        ("", "-O1", [f"-DCMAKE_C_FLAGS=-O1 {WITHOUT}", f"-DCMAKE_CXX_FLAGS={WITHOUT}"]),
        (
            "-DCMAKE_CXX_FLAGS:STRING=-O1 -DCMAKE_CXX_FLAGS=-O3",
            None,
            [f"-DCMAKE_C_FLAGS={WITHOUT}", f"-DCMAKE_CXX_FLAGS=-O3 {WITHOUT}"],
        ),
    ],
)
def test_settings_leave_amx_out_and_keep_what_else_was_asked_for(
    given: str | None,
    cflags: str | None,
    split: list[str],
    fresh: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fresh, "broken_amx", lambda flags: False)
    for name, value in (("CMAKE_ARGS", given), ("CFLAGS", cflags)):
        if value is not None:
            monkeypatch.setenv(name, value)
    usual = fresh.settings()
    monkeypatch.setattr(fresh, "broken_amx", lambda flags: True)
    found = fresh.settings()
    assert shlex.split(found["CMAKE_ARGS"]) == split  # as scikit-build-core does
    assert found["PIP_CACHE_DIR"] != usual["PIP_CACHE_DIR"]
    assert ("KVP_EDGE_REQUIRE_RPC" in found) == ("KVP_EDGE_REQUIRE_RPC" in usual)


def test_a_shell_that_took_the_settings_has_the_same_ones(
    fresh: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fresh, "broken_amx", lambda flags: True)
    monkeypatch.setattr(sys, "argv", ["fresh.py", "env"])
    first = fresh.settings()
    assert fresh.main() == 0
    script = capsys.readouterr().out + 'printf "%s\\n" "$CMAKE_ARGS" "$PIP_CACHE_DIR"'
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == [first["CMAKE_ARGS"], first["PIP_CACHE_DIR"]]
    monkeypatch.setenv("CMAKE_ARGS", first["CMAKE_ARGS"])
    assert fresh.settings() == first


# -- the installation ------------------------------------------------------------------------------


def test_nothing_is_installed_or_compiled_but_what_is_locked(fresh: ModuleType) -> None:
    commands = fresh.installation(Path("python"), "test")
    files = [arg for command in commands for arg in command if isinstance(arg, Path)]
    assert all(path.exists() for path in files if path != Path("python"))
    for command in commands:
        assert "--require-hashes" in command or "--no-deps" in command
        assert command[-1] == fresh.ROOT or Path(command[-1]).parent.name == "locks"
    # the first brings a pip that knows the option
    assert ["--build-constraint" in command for command in commands] == [False, True, True]


# -- interrupted ---------------------------------------------------------------------------------


def test_an_environment_without_pip_is_incomplete_and_one_with_pip_stays(
    fresh: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / ".venv-test"
    venv.create(folder, with_pip=False)  # what a first run leaves that was interrupted
    made: list[tuple[Path, dict[str, object]]] = []
    monkeypatch.setattr(venv, "create", lambda folder, **how: made.append((folder, how)))
    fresh.make_environment(folder)
    assert made == [(folder, {"with_pip": True, "clear": True})]
    assert "incomplete" in capsys.readouterr().err
    (python,) = (folder / "lib").glob("python*")
    (python / "site-packages" / "pip").mkdir()
    (python / "site-packages" / "pip" / "__main__.py").write_text("")
    fresh.make_environment(folder)
    assert len(made) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_an_environment_without_pip_is_made_anew(
    fresh: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".venv-test"
    venv.create(folder, with_pip=False)
    python = fresh.make_environment(folder) / "python"
    assert "incomplete" in capsys.readouterr().err
    assert ends_well([python, "-m", "pip", "--version"])
    (folder / "installed").touch()
    fresh.make_environment(folder)
    assert (folder / "installed").exists()  # a whole one stays
    assert capsys.readouterr().err == ""


def test_an_environment_whose_python_is_gone_is_made_anew(
    fresh: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(venv, "create", lambda folder, **_: made.append(folder))
    folder = tmp_path / ".venv-test"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to("/no/such/python")
    fresh.make_environment(folder)
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("no program")
    fresh.make_environment(folder)
    assert made == [folder, folder]


def test_an_environment_that_cannot_be_made_is_told_in_a_sentence(
    fresh: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ensurepip(folder: Path, **_: object) -> None:
        raise subprocess.CalledProcessError(1, ["ensurepip"])

    monkeypatch.setattr(venv, "create", no_ensurepip)
    with pytest.raises(SystemExit, match="python3-venv"):
        fresh.make_environment(tmp_path / ".venv-test")


@pytest.mark.parametrize("reaches_child", [True, False])
def test_ctrl_c_ends_with_a_sentence(reaches_child: bool, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"fresh = runpy.run_path({str(SCRIPT)!r})\n"
        "names = fresh['main'].__globals__\n"
        "names['_PATIENCE_S'] = 0.5\n"
        f"names['make_environment'] = lambda folder: names['Path']({str(tmp_path)!r})\n"
        "sys.argv = ['fresh.py', 'demo']\n"
        "sys.exit(names['main']())\n"
    )
    installs = tmp_path / "python"
    installs.write_text(
        f"#!{sys.executable}\nimport time\nprint('begun', flush=True)\ntime.sleep(60)\n"
    )
    installs.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    send = os.killpg if reaches_child else os.kill
    send(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted: ")
