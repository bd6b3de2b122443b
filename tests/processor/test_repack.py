"""Buffer types for weights are tried in a child process before a model may use them.

No processor that promises more than it does is at hand: children that crash, hang or talk nonsense
are programs that do so on purpose. The products themselves are computed on this processor.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

import kvp_edge
from kvp_edge.cli import main, options, parse
from kvp_edge.measuring import MeasuringLlama
from kvp_edge.processor import buffer_types, machine, repack, trial
from kvp_edge.processor.repack import NotTried, Tried, fault_of, llama_library, try_buffer_types
from kvp_edge.traces.tracer import Tracer
from makers.gguf_models import ModelShape
from support.buffer_type_child import SIGILL, Child

Load = Callable[..., kvp_edge.Llama]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, and a process that has tried and said nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(repack, "_said", False)
    repack._fault.cache_clear()
    return tmp_path / "cache" / "kvp_edge"


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., Child]:
    """child(AMX="...") computes with CPU and CPU_REPACK, and between them runs that code."""
    return lambda **types: Child(tmp_path, types)


Made = Callable[..., Child]


def use(monkeypatch: pytest.MonkeyPatch, child: Child, *extra: str) -> None:
    """Llama shall ask this child, on a machine that has these buffer types."""
    monkeypatch.setattr(repack, "trial_command", lambda library: child.command)
    monkeypatch.setattr(buffer_types, "extra_buffer_types", lambda library: list(extra))


def faults(tried: list[Tried]) -> list[tuple[str, str]]:
    return [(one.name, one.fault) for one in tried]


# -- the products ------------------------------------------------------------------------------


@pytest.mark.usefixtures("amx_works")
def test_every_buffer_type_of_this_machine_computes_what_the_plain_one_does() -> None:
    library = llama_library()
    tried = try_buffer_types(repack.trial_command(library))
    extra = buffer_types.extra_buffer_types(str(library))
    assert faults(tried) == [(name, "") for name in ["CPU", *extra]]
    assert set(buffer_types._WEIGHT_TYPES) == set(tried[0].types)
    for one in tried[1:]:
        assert one.types, f"{one.name} computes with no weights at all"


@pytest.mark.parametrize("factor", [1.0, 1.1, float("nan")])
def test_numbers_that_are_not_the_plain_ones_are_told(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ggml = buffer_types._Ggml(str(llama_library()))
    plain, other = ggml.types["CPU"], -1
    ggml.types = {"CPU": plain, "OTHER": other}
    normal = buffer_types._Products.product

    def product(self: Any, weights: int, where: int, n: int) -> Any:
        found = normal(self, weights, plain, n)
        assert found is not None
        return [factor * x for x in found] if where == other else found

    monkeypatch.setattr(buffer_types._Products, "product", product)
    lines = list(buffer_types._try(ggml, ["CPU"]))
    wrong = [line[2] for line in lines if line[0] == "wrong"]
    assert wrong == ([] if factor == 1.0 else list(buffer_types._WEIGHT_TYPES))
    assert lines[-1] == ["end"]


# -- children that do not come back --------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGILL")
def test_a_buffer_type_that_ends_the_child_is_named_and_the_others_are_tried(child: Made) -> None:
    one = child(AMX=SIGILL)
    tried = try_buffer_types(one.command)
    assert faults(tried) == [
        ("CPU", ""),
        ("AMX", "ends the process with q4_0 weights (SIGILL)"),
        ("CPU_REPACK", ""),
    ]
    assert one.starts == 2


def test_a_child_that_hangs_is_ended_and_counts_as_broken(child: Made) -> None:
    tried = try_buffer_types(child(AMX="time.sleep(60)").command, limit_s=1)
    assert faults(tried)[1] == ("AMX", "ends the process with q4_0 weights (no answer within 1 s)")
    assert [one.name for one in tried] == ["CPU", "AMX", "CPU_REPACK"]


def test_wrong_numbers_count_as_broken(child: Made) -> None:
    tried = try_buffer_types(child(AMX="say('wrong', name, 'q4_0', '0.9')").command)
    assert faults(tried)[1] == ("AMX", "computes wrong numbers with q4_0 weights (error 0.9)")


@pytest.mark.parametrize(
    "before",
    [
        "print('Welcome!'); sys.exit()",
        "sys.exit()",
        "sys.exit(3)",
        "os.write(1, bytes(range(256)))",
        "print('try\\tNOT_LISTED\\tq4_0'); sys.exit()",
        "print('types\\tCPU\\tAMX'); sys.exit()",
    ],
)
def test_a_child_that_talks_nonsense_says_nothing_of_the_machine(
    before: str, tmp_path: Path
) -> None:
    with pytest.raises(NotTried, match="child process"):
        try_buffer_types(Child(tmp_path, {}, before).command)


def test_a_child_that_the_system_ends_says_nothing_of_the_machine(child: Made) -> None:
    with pytest.raises(NotTried, match="SIGKILL"):  # Linux does so when memory runs out
        try_buffer_types(child(CPU="os.kill(os.getpid(), signal.SIGKILL)").command)


def test_where_the_plain_buffer_type_crashes_no_other_is_tried(child: Made) -> None:
    one = child(CPU=SIGILL)
    assert faults(try_buffer_types(one.command)) == [
        ("CPU", "ends the process with q4_0 weights (SIGILL)")
    ]
    assert one.starts == 1


def test_a_child_hears_no_keyboard_and_reads_no_terminal() -> None:
    code = "import os, sys; print(os.getsid(0) == os.getpid(), sys.stdin.read() == '')"
    assert trial.attempt([sys.executable, "-c", code], 60).lines == ["True True"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_crash_that_was_looked_for_leaves_no_core_file() -> None:
    code = (
        "import ctypes, runpy\n"
        f"script = runpy.run_path({buffer_types.__file__!r})\n"
        "dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"
        "print(dumpable()); script['leave_no_traces'](); print(dumpable())\n"
    )
    assert trial.attempt([sys.executable, "-c", code], 60).lines == ["1", "0"]


@pytest.mark.parametrize("program", ["/opt/app/app", "", "/usr/bin/blender", "pythonservice.exe"])
def test_a_program_that_is_no_python_is_not_started_again(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(NotTried, match="cannot run a Python script"):
        repack.trial_command(llama_library())


def test_a_frozen_app_does_not_start_itself_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.interpreter() == sys.executable
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert trial.interpreter() is None


@pytest.mark.parametrize(
    ("extra", "used"), [(["AMX", "CPU_REPACK"], False), (["CPU_REPACK"], True)]
)
def test_what_cannot_be_tried_is_used_unless_it_is_known_to_crash(
    extra: list[str], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffer_types, "extra_buffer_types", lambda library: extra)
    for command in (["/no/such/program"], [sys.executable, "-c", "print('Welcome!')"]):
        assert (fault_of(llama_library(), lambda command=command: command) == "") == used


# -- the answer is kept ----------------------------------------------------------------------------


def test_a_machine_is_asked_once(
    child: Made, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child(AMX=SIGILL)
    use(monkeypatch, one, "AMX", "CPU_REPACK")
    told = [fault_of(llama_library(), lambda: one.command) for _ in range(3)]
    assert told == ["llama.cpp's AMX ends the process with q4_0 weights (SIGILL)"] * 3
    assert one.starts == 2
    assert len(list(folder.iterdir())) == 1


def test_another_build_or_machine_is_asked_anew(
    child: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child()
    use(monkeypatch, one, "CPU_REPACK")
    libraries = [tmp_path / name / "libllama.so" for name in ("a", "b")]
    for n, library in enumerate(libraries):
        library.parent.mkdir()
        library.write_bytes(b"x" * n)
        (library.parent / "libggml-cpu.so").write_bytes(b"")
    for n_starts, library in enumerate([*libraries, *libraries]):
        assert fault_of(library, lambda: one.command) == ""
        assert one.starts == min(n_starts + 1, 2)
    (libraries[0].parent / "libggml-cpu.so").write_bytes(b"compiled again")
    fault_of(libraries[0], lambda: one.command)
    assert one.starts == 3
    monkeypatch.setattr(machine, "identity", lambda: {"flags": "of another processor"})
    fault_of(libraries[0], lambda: one.command)
    assert one.starts == 4


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{", "[]", "null", "{}", '{"version": 0}', '{"version": 1}'),
        '{"version": 1, "tried": [1]}',
        '{"version": 1, "tried": []}',
        '{"version": 1, "tried": [{"name": "CPU"}]}',
    ],
)
def test_a_damaged_answer_is_asked_for_again(
    damage: str, child: Made, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child()
    use(monkeypatch, one, "CPU_REPACK")
    fault_of(llama_library(), lambda: one.command)
    (file,) = folder.iterdir()
    whole = file.read_text()
    file.write_text(damage)
    fault_of(llama_library(), lambda: one.command)
    assert one.starts == 2
    assert json.loads(file.read_text()) == json.loads(whole)


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    child: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child(AMX=SIGILL)
    use(monkeypatch, one, "AMX", "CPU_REPACK")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "/proc/1/nowhere"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert "AMX" in fault_of(llama_library(), lambda: one.command)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home, either
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert "AMX" in fault_of(llama_library(), lambda: one.command)
    assert one.starts == 6


# -- models ------------------------------------------------------------------------------------


def uses_extra(llm: kvp_edge.Llama) -> bool:
    return bool(llm.model_params.use_extra_bufts)


def first(llm: kvp_edge.Llama) -> int:
    llm.eval(llm.tokenize(b"The house stood on a hill, and nobody had lived in it for"))
    return int(llm.sample(temp=0.0))


def test_where_a_buffer_type_crashes_models_do_without_and_one_line_says_so(
    child: Made,
    bundled_model: str,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, child(AMX=SIGILL), "AMX", "CPU_REPACK")
    bounded = load(bundled_model, kv_budget=64)
    plain = load(bundled_model, n_ctx=256)
    assert not uses_extra(bounded)
    assert not uses_extra(plain)
    assert first(bounded) == first(plain) == first(load(bundled_model, n_ctx=256, repack="off"))
    assert not uses_extra(pickle.loads(pickle.dumps(bounded)))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("kvp-edge: weights are not repacked")
    assert "AMX ends the process with q4_0 weights (SIGILL)" in said[0]
    assert "kvp-edge doctor" in said[0]


def test_an_evaluation_with_workers_says_so_once(
    bundled_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # processes of their own, which find what an earlier one kept
    fault = "ends the process with q4_0 weights (SIGILL)"
    repack.keep(llama_library(), [Tried("CPU", ["f16"], ""), Tried("AMX", [], fault)])
    how = "--items 1 --lengths 256 --tasks fact,facts --policies recency --budgets 128 --threads 1"
    asked = ["eval", bundled_model, *how.split(), "--workers", "2", "--out", str(tmp_path / "out")]
    assert main(asked) == 0
    said = capfd.readouterr().err
    assert said.count("weights are not repacked") == 1


@pytest.mark.usefixtures("amx_works")
def test_where_all_work_models_use_them_and_nothing_is_said(
    bundled_model: str, load: Load, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert uses_extra(load(bundled_model, kv_budget=64))
    assert capfd.readouterr().err == ""
    assert (folder.exists()) == bool(buffer_types.extra_buffer_types(str(llama_library())))


def test_on_and_off_ask_nothing_and_are_kept_by_pickling(
    child: Made, bundled_model: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child(AMX=SIGILL)
    use(monkeypatch, one, "AMX", "CPU_REPACK")
    for how, expected in (("on", True), ("off", False)):
        for bound in ({"kv_budget": 64}, {"n_ctx": 256}):
            llm = load(bundled_model, repack=how, **bound)
            again = pickle.loads(pickle.dumps(llm))
            assert [uses_extra(x) for x in (llm, again)] == [expected] * 2
            again.close()
    assert one.starts == 0
    with pytest.raises(ValueError, match="repack must be 'auto', 'on' or 'off', not 'yes'"):
        kvp_edge.Llama(bundled_model, repack="yes")


def test_no_child_is_started_where_nothing_is_repacked(
    child: Made,
    bundled_model: str,
    load: Load,
    random_model: Callable[[ModelShape], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = child(AMX=SIGILL)
    use(monkeypatch, one, "AMX", "CPU_REPACK")
    load(random_model(ModelShape("llama")).path, n_ctx=256)  # f32
    load(bundled_model, vocab_only=True)
    monkeypatch.setattr(repack, "_has_gpu", lambda lib: True)
    load(bundled_model, n_ctx=256, n_gpu_layers=-1)  # there is none; it asks as if there were
    assert one.starts == 0
    load(bundled_model, n_ctx=256, n_gpu_layers=1)
    assert one.starts == 2


def test_a_llama_cpp_without_extra_buffer_types_starts_no_child(
    child: Made, bundled_model: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = child()
    use(monkeypatch, one)
    assert uses_extra(load(bundled_model, n_ctx=256))
    assert one.starts == 0


def test_every_kind_of_model_takes_the_option(bundled_model: str) -> None:
    how = {"repack": "off", "verbose": False, "n_threads": 1, "n_threads_batch": 1}
    made = [Tracer(bundled_model, 64, **how), MeasuringLlama.whole(bundled_model, 256, **how)]
    assert [uses_extra(llm) for llm in made] == [False, False]
    for llm in made:
        llm.close()


@pytest.mark.parametrize("how", ["on", "off"])
def test_the_command_line_passes_it_on(how: str, bundled_model: str) -> None:
    command = parse(["chat", bundled_model, "--repack", how, "--threads", "1"])
    llm = options.load(bundled_model, None, command.options)
    assert uses_extra(llm) == (how == "on")
    llm.close()


@pytest.mark.parametrize("name", ["chat", "run", "demo", "learn", "trace", "train", "eval"])
def test_every_command_that_loads_a_model_has_the_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"--repack WHEN [^:]*: on, off, or auto", text)


def test_types_have_the_numbers_that_gguf_gives_them() -> None:
    known = {one.name.lower(): one.value for one in GGMLQuantizationType}
    ours = {name.lower(): number for name, number in buffer_types._WEIGHT_TYPES.items()}
    assert ours.keys() - known.keys() <= {"mxfp4", "q1_0"}  # newer than some releases of gguf
    assert {name: known[name] for name in ours.keys() & known.keys()} == {
        name: ours[name] for name in ours.keys() & known.keys()
    }
