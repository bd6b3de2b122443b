"""kvp-edge doctor: what works, what does not, and what to do about it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import kvp_edge
from kvp_edge.binding.library import BUILT_FOR, LLAMA_VERSION
from kvp_edge.binding.model import read_model_shape
from kvp_edge.cli import main
from kvp_edge.doctor import examination as doctor
from kvp_edge.doctor.examination import Finding
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.processor import machine, repack, trial
from makers.gguf_models import write_mamba
from support.buffer_type_child import SIGILL, Child

#: The command in a process of its own, with this package whatever the current folder holds.
COMMAND = [
    sys.executable,
    "-c",
    f"import sys; sys.path[0] = {str(Path(kvp_edge.__file__).parents[1])!r}; "
    "from kvp_edge.cli import main; sys.exit(main())",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of these tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "kvp_edge"


def command(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *argv],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*argv: str) -> tuple[int, str]:
    out = StringIO()
    with redirect_stdout(out):
        status = main(["doctor", *argv])
    return status, out.getvalue()


@pytest.fixture(scope="module")
def healthy(bundled_model: str, amx_works: None) -> dict[str, Any]:
    """What it says of this machine, and of the bundled model."""
    status, out = run("--json", bundled_model)
    found: dict[str, Any] = json.loads(out)
    assert status == 0, found["faults"]
    return found


def faults(findings: Iterator[Finding] | list[Finding]) -> list[Finding]:
    return [one for one in findings if one.fault]


# -- where all is well -------------------------------------------------------------------------


def test_an_installation_that_works_has_no_fault(healthy: dict[str, Any]) -> None:
    assert healthy["ok"] is True
    assert healthy["faults"] == []
    found = healthy["found"]
    assert found["versions"]["kvp_edge"] == kvp_edge.__version__
    assert found["versions"]["llama-cpp-python"] == BUILT_FOR
    assert found["native part"]["kvp_edge"] == {"built_for": BUILT_FOR, "llama_cpp": LLAMA_VERSION}
    assert Path(found["native part"]["llama.cpp"]).samefile(repack.llama_library())
    assert found["devices"]["CPU"]["type"] == "CPU"
    assert "q4_0" in found["buffer types"]["CPU"]["types"]
    assert 0 < found["buffer types"]["time"] < 30
    assert found["caches"]["bounded cache"]["evictions"] > 0
    for name in ("flash attention", "quantised cache"):
        assert 0 < found["caches"][name]["off"] < 0.1  # something else was computed
    total, available = found["memory"]["memory"].values()
    assert total > 2**28
    assert available is None or 0 < available <= total
    assert found["processor"]["cores"]["listed"] == os.cpu_count()


def test_it_keeps_its_answer_about_buffer_types(healthy: dict[str, Any], cache: Path) -> None:
    kept = repack.kept(repack.llama_library())
    assert kept is not None
    assert {one.name for one in kept} == {*healthy["found"]["buffer types"]} - {"time"}
    assert healthy["found"]["cache folder"]["folder"] == {"path": str(cache), "writable": True}


def test_a_model_is_described(healthy: dict[str, Any], bundled_model: str) -> None:
    found, shape = healthy["found"]["model"], read_model_shape(bundled_model)
    assert found["architecture"] == shape.architecture
    assert found["layers"] == shape.n_layer
    assert found["KV heads"] == sorted(set(shape.n_head_kv))
    assert found["trained length"] == shape.n_ctx_train
    assert found["window"] == 0
    assert found["chat template"] is True
    assert found["cache per token"] == shape.bytes_per_cell(1, 1)
    assert found["policy"] == own_policy(bundled_model)
    assert found["bounded cache"] == {"granularity": "head", "why_not": {}}


def test_a_person_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [
        Finding("versions", "Python", "3.1", "3.1 (/bin/python)"),
        Finding("devices", "GPU", None, "does not work", "it burns", "Put it out"),
    ]
    monkeypatch.setattr("kvp_edge.cli.doctor.examine", lambda model: iter(findings))
    assert run() == (
        1,
        "versions\n  Python           3.1 (/bin/python)\n"
        "devices\n  GPU              does not work\n"
        "\n1 fault found:\n- it burns.\n  Put it out.\n",
    )
    del findings[1]
    assert run()[0] == 0
    assert run()[1].endswith("\nNo fault was found.\n")


# -- models that cannot be bounded, or used ------------------------------------------------------


def test_a_model_without_a_kv_cache_cannot_be_bounded_and_it_says_why(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    write_mamba(path)
    found = {one.name: one for one in doctor._model(str(path))}
    assert found["architecture"].value == "mamba"
    assert found["bounded cache"].value["granularity"] is None
    assert "recurrent" in found["bounded cache"].fault


def test_a_model_without_a_chat_template_is_told_of(bundled_model: str, tmp_path: Path) -> None:
    key = b"tokenizer.chat_template"
    data = Path(bundled_model).read_bytes()
    assert data.count(key) == 1
    path = tmp_path / "base.gguf"
    path.write_bytes(data.replace(key, b"tokenizer.none_of_that!"))
    found = {one.name: one for one in doctor._model(str(path))}
    assert found["chat template"].value is False
    assert "base model" in found["chat template"].text
    assert "transcript" in found["chat template"].text
    assert not faults(list(found.values()))


def test_a_file_that_is_no_model_is_a_fault_and_one_that_is_missing_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "not.gguf"
    path.write_text("nothing")
    (one,) = faults(doctor._model(str(path)))
    assert "cannot be read as a GGUF file" in one.fault
    assert run(str(tmp_path / "missing.gguf"))[0] == 2
    assert "missing.gguf' not found" in capsys.readouterr().err


def test_a_model_larger_than_the_memory_is_a_fault(
    bundled_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (2**30, 2**20))
    (one,) = faults(doctor._model(bundled_model))
    assert "1.0 MiB of memory are available" in one.fault


# -- a library that does not load ----------------------------------------------------------------


@pytest.mark.usefixtures("amx_works")
def test_without_the_native_part_doctor_says_so_and_other_commands_point_to_it() -> None:
    got = command("doctor", "--json", KVP_EDGE_LIBRARY="/no/such/library.so")
    assert got.returncode == 1
    found = json.loads(got.stdout)
    (one,) = found["faults"]
    assert "native library is missing (/no/such/library.so)" in one["fault"]
    assert one["advice"] == "Unset KVP_EDGE_LIBRARY, which is '/no/such/library.so'"
    assert found["found"]["buffer types"]["CPU"]["fault"] == ""  # that needs no native part
    assert "doctor" in command("--help", KVP_EDGE_LIBRARY="/no/such/library.so").stdout
    for argv in (["chat"], ["chat", "--help"], ["--version"]):
        got = command(*argv, KVP_EDGE_LIBRARY="/no/such/library.so")
        assert got.returncode == 1
        assert got.stderr.splitlines()[-1] == "Run kvp-edge doctor to find the cause."
        assert "Traceback" not in got.stderr


def test_without_llama_cpp_doctor_says_so(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").write_text("no library")
    got = command("doctor", "--json", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert got.returncode == 1
    (one,) = json.loads(got.stdout)["faults"]
    assert "llama-cpp-python cannot be imported" in one["fault"]
    assert one["advice"] == f"Unset LLAMA_CPP_LIB_PATH, which is '{tmp_path}'"


def test_the_package_gives_its_names_when_they_are_asked_for() -> None:
    code = (
        f"import sys; sys.path[0] = {str(Path(kvp_edge.__file__).parents[1])!r}\n"
        "import kvp_edge\n"
        "assert 'llama_cpp' not in sys.modules\n"
        "assert set(kvp_edge.__all__) <= set(dir(kvp_edge))\n"
        "assert not hasattr(kvp_edge, 'Lama')\n"
        "from kvp_edge import *\n"
        "print(Llama is kvp_edge.Llama, POLICIES is kvp_edge.POLICIES, __version__)\n"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout == f"True True {kvp_edge.__version__}\n"
    for name in kvp_edge.__all__:
        assert getattr(kvp_edge, name) is not None


@pytest.mark.usefixtures("amx_works")
@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_library_that_ends_the_process_is_told_of(tmp_path: Path) -> None:
    source, library = tmp_path / "trap.c", tmp_path / "trap.so"
    source.write_text("__attribute__((constructor)) static void f(void) { __builtin_trap(); }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    got = command("doctor", "--json", KVP_EDGE_LIBRARY=str(library))
    assert got.returncode == 1
    (one,) = json.loads(got.stdout)["faults"]
    assert "the process ended (SIG" in one["fault"]


def test_a_crash_in_one_check_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    normal, asked = trial.attempt, []

    def crash_first(argv: list[str], limit_s: float) -> trial.Trial:
        asked.append(argv[4:])
        if len(asked) > 1:
            return normal(argv, limit_s)
        lines = ['{"check": "system"}', '{"check": "system", "found": {"system_info": "?"}}']
        return trial.Trial([*lines, "noise", '{"check": "devices"}'], "SIGSEGV", crashed=True)

    monkeypatch.setattr(doctor, "attempt", crash_first)
    found = doctor._check(["system", "devices", "llama_cpp"], None)
    assert asked == [["system", "devices", "llama_cpp"], ["llama_cpp"]]
    assert found["system"].found == {"system_info": "?"}
    assert (found["devices"].fault, found["devices"].crashed) == (
        "the process ended (SIGSEGV)",
        True,
    )
    assert found["llama_cpp"].found is not None


@pytest.mark.parametrize("python", [None, "/no/such/python"])
def test_where_no_child_process_can_be_started_it_says_so(
    python: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "interpreter", lambda: python)
    found = doctor._check(["system", "devices"], None)
    assert [one.found for one in found.values()] == [None, None]
    assert all(one.fault for one in found.values())


# -- a processor that promises more than it does ---------------------------------------------------


@pytest.fixture
def keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))


def test_amx_that_traps_is_a_fault_and_the_advice_compiles_llama_cpp_without(
    tmp_path: Path, keeps_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(tmp_path, {"AMX": SIGILL})
    monkeypatch.setattr(doctor, "trial_command", lambda library: child.command)
    found = list(doctor._buffer_types(True))
    (one,) = faults(found)
    assert one.fault == "llama.cpp's AMX ends the process with q4_0 weights (SIGILL)"
    assert [x.name for x in found] == ["CPU", "AMX", "CPU_REPACK", "time"]
    words = shlex.split(one.advice[one.advice.index("CMAKE_ARGS=") :])
    flags = shlex.split(words[0].removeprefix("CMAKE_ARGS="))  # as scikit-build-core does
    without = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    assert flags == [f"-DCMAKE_C_FLAGS={without}", f"-DCMAKE_CXX_FLAGS={without}"]
    assert words[1:3] == ["pip", "install"]
    # a model that is loaded after this asks no child of its own
    assert "AMX" in repack.fault_of(repack.llama_library(), lambda: pytest.fail("asked again"))


def test_a_llama_cpp_for_another_processor_is_a_fault(
    tmp_path: Path, keeps_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(tmp_path, {"CPU": SIGILL})
    monkeypatch.setattr(doctor, "trial_command", lambda library: child.command)
    (one,) = faults(doctor._buffer_types(True))
    assert "compiled for another processor" in one.advice


def test_buffer_types_that_cannot_be_tried_are_a_fault_unless_llama_cpp_is_missing(
    keeps_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "trial_command", lambda library: ["/no/such/program"])
    (one,) = faults(doctor._buffer_types(True))
    assert "cannot start a child process" in one.fault
    assert list(doctor._buffer_types(False)) == []


# -- the machine -----------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """groups("0::/a/b", {"a/memory.max": "1"}) puts this process there."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "groups")

    def make(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return make


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max", "a/memory.max": "4096", "memory.max": "8192"},
            4096,
        ),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        ("0::/../other\n", {"memory.max": "512"}, 512),  # another namespace's
        ("0::/\n", {}, None),
        ("4:memory,hugetlb:/a\n0::/\n", {"memory,hugetlb/a/x": "", "memory/a/y": ""}, None),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "1024"}, 1024),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("nonsense\n", {}, None),
    ],
)
def test_the_memory_limit_is_the_smallest_of_the_control_groups(
    membership: str, files: dict[str, str], limit: int | None, groups: Callable[..., None]
) -> None:
    groups(membership, files)
    assert machine.cgroup_memory_limit() == limit


def test_a_share_of_a_core_is_told_and_how_many_threads_fit_it(
    groups: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups("0::/a\n", {"a/cpu.max": "50000 100000", "cpu.max": "max 100000"})
    assert machine.usable_cores() == 0.5
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 8)
    found = {one.name: one for one in doctor._processor()}
    assert found["cores"].text == "8, of which 0.5 are usable here"
    assert "--threads 1 is faster" in found["threads"].text


def test_memory_is_that_of_the_system(groups: Callable[..., None], tmp_path: Path) -> None:
    groups("0::/\n", {})
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  2048 kB\nMemAvailable:   512 kB\n")
    assert machine.memory() == (2**21, 2**19)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  2048 kB\n")
    assert machine.memory() == (2**21, None)
    (tmp_path / "proc" / "meminfo").unlink()
    total, available = machine.memory()  # as on macOS
    assert total > 2**28
    assert available is None
