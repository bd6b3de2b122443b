"""When ggml ends the process: what is still done, and how a rescued conversation goes on.

Every failure here is the real ggml_abort() in a process of its own.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import stat
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge import Llama, SessionError
from kvp_edge.cache import session_file as session
from kvp_edge.llamacpp import abort_hook as last_words
from makers.gguf_models import ModelShape

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama")
BOUND: dict[str, Any] = {"n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 60}
N_READ = 400  # far more than the cells

SETUP = """
import ctypes, faulthandler, gc, os, sys, threading, time
from llama_cpp import llama_cpp
import kvp_edge
from kvp_edge.llamacpp.abort_hook import before_abort

faulthandler.disable()
ggml = llama_cpp._lib

def fail(message=b"the device is gone"):
    ggml.ggml_abort(b"device.cpp", 7, message)

def say(what):
    os.write(1, f"{what}\\n".encode())
"""

#: Ends inside llama_decode, in the thread that called it, or in another that does not wait for it.
FAIL_IN_DECODE = """
inside = threading.Event()

def fail_outside():
    inside.wait()
    fail()

@llama_cpp.ggml_abort_callback
def during_decode(data):
    if where == "caller":
        fail()
    inside.set()
    time.sleep(60)  # without the GIL, as the rest of llama_decode
    return False

threading.Thread(target=fail_outside, daemon=True).start()
llama_cpp.llama_set_abort_callback(llm.ctx, during_decode, None)
llm.eval([9])
"""


class Ended:
    def __init__(self, code: str, *argv: str, typed: str = "", **environment: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", SETUP + textwrap.dedent(code), *argv],
            input=typed,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            # "-c" puts the current folder first on the path: not the checkout's package
            cwd=Path(__file__).parent,
            env={**os.environ, "GGML_NO_BACKTRACE": "1", **environment},
        )
        self.status, self.said, self.err = done.returncode, done.stdout.splitlines(), done.stderr


# -- last words ----------------------------------------------------------------------------------


def test_unregistered_ggml_ends_the_process_as_ever() -> None:
    ended = Ended("fail()")
    assert ended.status == -signal.SIGABRT
    assert ended.err == "device.cpp:7: the device is gone\n"


def test_all_are_called_once_with_ggmls_message_the_newest_first_and_the_process_ends() -> None:
    ended = Ended("""
        before_abort(lambda message: say("first " + message))
        before_abort(lambda message: say("second " + message))
        fail()
    """)
    assert ended.status == -signal.SIGABRT
    message = "device.cpp:7: the device is gone"
    assert ended.said == [f"second {message}", f"first {message}"]
    assert ended.err == f"{message}\n"


def test_one_that_fails_does_not_keep_the_others_from_being_called() -> None:
    ended = Ended("""
        before_abort(lambda message: say("other"))
        def fails(message):
            raise KeyError("no such thing")
        before_abort(fails)
        before_abort(lambda message: sys.exit(3))
        fail()
    """)
    assert ended.status == -signal.SIGABRT
    assert ended.said == ["other"]
    for text in ("KeyError: 'no such thing'", "SystemExit: 3", "the device is gone"):
        assert text in ended.err


def test_what_was_taken_back_is_not_called_and_taking_back_twice_changes_nothing() -> None:
    ended = Ended("""
        back = before_abort(lambda message: say("gone"))
        before_abort(lambda message: say("here"))
        back()
        back()
        fail()
    """)
    assert ended.said == ["here"]


def test_when_the_last_is_taken_back_the_callback_before_it_is_there_again() -> None:
    ended = Ended("""
        callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        before = callback(lambda message: say("before"))
        ggml.ggml_set_abort_callback(before)
        back = before_abort(lambda message: say("ours"))
        back()
        before_abort(lambda message: say("again"))()
        fail()
    """)
    assert (ended.status, ended.said, ended.err) == (-signal.SIGABRT, ["before"], "")


def test_a_callback_that_was_there_is_called_after_ours() -> None:
    ended = Ended("""
        callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        before = callback(lambda message: say("before"))
        ggml.ggml_set_abort_callback(before)
        before_abort(lambda message: say("ours"))
        fail()
    """)
    assert (ended.said, ended.err) == (["ours", "before"], "")


def test_a_failure_while_one_is_handled_in_the_same_thread_ends_the_process() -> None:
    ended = Ended("""
        def again(message):
            say("once")
            fail(b"and again")
        before_abort(again)
        fail()
    """)
    assert (ended.status, ended.said) == (-signal.SIGABRT, ["once"])
    assert ended.err == "device.cpp:7: and again\n"


def test_when_all_threads_of_a_computation_fail_the_first_has_time_for_its_last_words() -> None:
    # ggml's own threads, which Python knows nothing of
    ended = Ended("""
        def slowly(message):
            time.sleep(0.5)
            say("all said")
        before_abort(slowly)

        pointer, number = ctypes.c_void_p, ctypes.c_int

        class Params(ctypes.Structure):  # ggml_init_params
            _fields_ = [("size", ctypes.c_size_t), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

        both = threading.Barrier(2)

        @ctypes.CFUNCTYPE(None, pointer, pointer, number, number, pointer)  # ggml_custom1_op_t
        def fails(out, a, ith, nth, data):
            both.wait()
            fail(b"thread %d" % ith)

        for name in ("ggml_init", "ggml_new_tensor_1d", "ggml_map_custom1", "ggml_new_graph"):
            getattr(ggml, name).restype = pointer
        ctx = pointer(ggml.ggml_init(Params(2**24, None, False)))
        a = pointer(ggml.ggml_new_tensor_1d(ctx, 0, ctypes.c_int64(4)))
        b = pointer(ggml.ggml_map_custom1(ctx, a, fails, 2, None))
        graph = pointer(ggml.ggml_new_graph(ctx))
        ggml.ggml_build_forward_expand(graph, b)
        ggml.ggml_graph_compute_with_ctx(ctx, graph, 2)
    """)
    assert (ended.status, ended.said) == (-signal.SIGABRT, ["all said"])
    assert "thread 0" in ended.err
    assert "thread 1" in ended.err


def test_it_is_the_ggml_that_llama_cpp_runs_on() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    ended = Ended("""
        before_abort(say)
        maps = open("/proc/self/maps").read().splitlines()
        say(len({line.split()[-1] for line in maps if "libggml-base" in line}))
    """)
    assert (ended.status, ended.said) == (0, ["1"])


# -- rescue --------------------------------------------------------------------------------------


def rescued(
    model: str, file: Path, where: str, *, extra: str = "dict", policy: str = "knorm"
) -> Ended:
    """A process that reads N_READ random tokens and fails while it reads one more."""
    return Ended(
        f"""
        where = {where!r}
        llm = kvp_edge.Llama(sys.argv[1], verbose=False, n_threads=1, granularity="token",
                             policy={policy!r}, **{BOUND!r})
        llm.eval({random_tokens(N_READ)!r})
        llm.rescue_to(sys.argv[2], {extra})
        assert not os.path.exists(sys.argv[2])
        """
        + textwrap.indent(FAIL_IN_DECODE, " " * 8),
        model,
        str(file),
    )


@pytest.mark.parametrize("where", ["caller", "another thread"])
def test_a_rescued_conversation_goes_on_as_if_read_here(
    random_model: Maker, load: Loader, tmp_path: Path, where: str
) -> None:
    model, file = random_model(LLAMA).path, tmp_path / "r"
    ended = rescued(model, file, where, extra='lambda: {"messages": ["hi"]}')
    assert ended.status == -signal.SIGABRT
    assert ended.err.endswith("device.cpp:7: the device is gone\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["r"]

    direct = load(model, policy="knorm", **BOUND)
    direct.eval(random_tokens(N_READ))
    llm = load(model, policy="knorm", **BOUND)
    llm.eval(random_tokens(50, seed=3))
    assert llm.load_session(file) == {"messages": ["hi"]}
    assert llm.input_ids[: llm.n_tokens].tolist() == random_tokens(N_READ)
    np.testing.assert_array_equal(llm.kv_indices, direct.kv_indices)
    np.testing.assert_array_equal(llm.newest_logits(), direct.newest_logits())


@pytest.fixture(scope="module")
def file(random_model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a policy that looks at queries."""
    path = tmp_path_factory.mktemp("rescue") / "r"
    ended = rescued(random_model(LLAMA).path, path, "caller", policy="tova")
    assert ended.status == -signal.SIGABRT
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "tova"},
        {"policy": "keydiff", "granularity": "head"},
        {"kv_budget": 70, "sinks": 0, "recent": 8},
        {"n_ctx": N_READ},
    ],
)
def test_it_may_go_on_with_any_policy_and_limits(
    random_model: Maker, load: Loader, file: Path, change: dict[str, Any]
) -> None:
    llm = load(random_model(LLAMA).path, **{**BOUND, **change})
    assert llm.load_session(file) == {}
    assert (llm.kv_stats.seen, llm.n_tokens) == (N_READ, N_READ)


def test_a_context_that_is_too_short_is_refused(
    random_model: Maker, load: Loader, file: Path
) -> None:
    llm = load(random_model(LLAMA).path, **{**BOUND, "n_ctx": N_READ - 1})
    llm.eval([5, 6, 7])
    with pytest.raises(SessionError, match="400 tokens, too many .* n_ctx=399"):
        llm.load_session(file)
    assert llm.n_tokens == 3


def test_another_model_is_refused(random_model: Maker, load: Loader, file: Path) -> None:
    llm = load(random_model(ModelShape("llama", seed=1)).path, **BOUND)
    llm.eval([5, 6, 7])
    with pytest.raises(SessionError, match="another model file .model = "):
        llm.load_session(file)
    assert llm.n_tokens == 3


def test_an_unbounded_model_is_refused(random_model: Maker, load: Loader, file: Path) -> None:
    llm = load(random_model(LLAMA).path)
    with pytest.raises(SessionError, match="load_session is for a bounded cache"):
        llm.load_session(file)
    with pytest.raises(SessionError, match="rescue_to is for a bounded cache"):
        llm.rescue_to("never")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, a: a.clear(), "is inconsistent"),
        (lambda h, a: h.pop("extra"), "is inconsistent"),
        (lambda h, a: a.update(tokens=a["tokens"].astype(np.float32)), "is inconsistent"),
        (lambda h, a: a.update(tokens=a["tokens"].reshape(2, -1)), "is inconsistent"),
        (lambda h, a: a.update(tokens=a["tokens"] - 1), "the model has no token"),
        (lambda h, a: a.update(tokens=a["tokens"] + 10**6), "the model has no token"),
        (lambda h, a: h.update(protected_prefix=99), "does not fit"),
    ],
)
def test_what_does_not_add_up_is_refused_and_the_conversation_at_hand_is_untouched(
    random_model: Maker, load: Loader, file: Path, tmp_path: Path, change: Any, says: str
) -> None:
    header, arrays = session.read(file)
    change(header, arrays)
    session.write(tmp_path / "changed", header, arrays)
    llm = load(random_model(LLAMA).path, protect_system=True, **BOUND)
    llm.eval([5, 6, 7])
    with pytest.raises(SessionError, match=says):
        llm.load_session(tmp_path / "changed")
    (tmp_path / "short").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SessionError, match="damaged or cut short"):
        llm.load_session(tmp_path / "short")
    assert llm.input_ids[: llm.n_tokens].tolist() == [5, 6, 7]
    llm.eval([8])


def test_the_tokens_are_written_even_if_what_shall_be_added_cannot_be(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    model = random_model(LLAMA).path
    ended = rescued(model, tmp_path / "r", "caller", extra="lambda: 1 / 0")
    assert "ZeroDivisionError" in ended.err
    llm = load(model, **BOUND)
    assert llm.load_session(tmp_path / "r") is None
    assert llm.n_tokens == N_READ


def test_nothing_is_rescued_after_taking_back_closing_or_collecting(
    random_model: Maker, tmp_path: Path
) -> None:
    ended = Ended(
        f"""
        def make(name):
            llm = kvp_edge.Llama(sys.argv[1], verbose=False, n_threads=1, **{BOUND!r})
            llm.eval([5, 6, 7])
            llm.rescue_to("first")
            llm.rescue_to(name)
            return llm

        os.chdir(sys.argv[2])
        taken, closed, collected, here, unread = map(make, ("a", "b", "c", "here", "unread"))
        taken.rescue_to(None)
        closed.close()
        del collected
        gc.collect()
        unread.reset()
        os.chdir("/")
        fail()
        """,
        random_model(LLAMA).path,
        str(tmp_path),
    )
    assert ended.err == "device.cpp:7: the device is gone\n"
    assert sorted(os.listdir(tmp_path)) == ["here", "unread"]


def test_a_conversation_of_no_tokens_can_be_rescued_too(
    random_model: Maker, load: Loader, file: Path, tmp_path: Path
) -> None:
    header, arrays = session.read(file)
    session.write(tmp_path / "r", {**header, "extra": 1}, {"tokens": arrays["tokens"][:0]})
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval([5, 6, 7])
    assert llm.load_session(tmp_path / "r") == 1
    assert llm.n_tokens == 0


def test_rescuing_keeps_no_model_alive(random_model: Maker, tmp_path: Path) -> None:
    llm = Llama(random_model(LLAMA).path, verbose=False, **BOUND)
    llm.rescue_to(tmp_path / "r", lambda: None)
    assert last_words._process._todo
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert not last_words._process._todo


# -- the command line ----------------------------------------------------------------------------

CHAT = """
from kvp_edge.cli import main, options
from kvp_edge.cli.progress import WatchedLlama

class FailsLater(WatchedLlama):
    def eval(self, tokens):
        super().eval(tokens)
        if b"What is my" in self.detokenize(self.input_ids[: self.n_tokens].tolist()):
            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()

options.WatchedLlama = FailsLater
sys.exit(main(sys.argv[1:]))
"""
GREEDY = ["--temperature", "0", "--threads", "1"]
TELL, ASK = "My dog is called Ralph.", "What is my dog called?"


def test_a_chat_whose_device_failed_goes_on_in_another_process(tmp_path: Path) -> None:
    ended = Ended(CHAT, "chat", *GREEDY, typed=f"{TELL}\n{ASK}\n", TMPDIR=str(tmp_path))
    assert ended.status == 1
    assert len(ended.said) == 1  # the first reply
    [name] = os.listdir(tmp_path)
    path = tmp_path / name
    assert name.startswith("kvp-edge-rescue-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ended.err.endswith(
        "\nkvp-edge: device.cpp:7: the device is gone\n"
        f"llama.cpp cannot continue after this. The conversation was written to {path}\n"
        f"To continue, start `kvp-edge chat` with the options you want, and type: /load {path}\n"
    )

    go_on = "from kvp_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    again = Ended(
        go_on, "chat", *GREEDY, "--policy", "knorm", typed=f"/load {path}\n{ASK}\n/undo\n/undo\n"
    )
    assert again.status == 0
    assert f"Your last message was not answered. To get a reply, send it again:\n{ASK}" in again.err
    assert len(again.said) == 1
    assert "Ralph" in again.said[0]
    assert again.err.count("Removed:") == 2


def test_a_chat_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    spoil = "import tempfile; tempfile.tempdir = '/nowhere/at/all'\n"
    ended = Ended(spoil + CHAT, "chat", *GREEDY, typed=f"{ASK}\n")
    assert ended.status == 1
    assert "SessionError: the session cannot be written to '/nowhere/at/all" in ended.err
    assert ended.err.endswith("The conversation could not be written to a file.\n")


def test_other_commands_end_with_a_sentence() -> None:
    ended = Ended(CHAT, "run", *GREEDY, "-p", ASK)
    assert (ended.status, ended.said) == (1, [])
    assert ended.err.endswith(
        "\nkvp-edge: device.cpp:7: the device is gone\nllama.cpp cannot continue after this.\n"
    )


def test_a_failure_while_a_model_is_loaded_is_told_though_llama_cpp_is_quiet_then() -> None:
    code = """
        from kvp_edge.cli import main, options
        from llama_cpp._utils import suppress_stdout_stderr

        def load(*args):
            with suppress_stdout_stderr(disable=False):  # as llama_cpp's own loading
                fail()
        options.load = load
        sys.exit(main(sys.argv[1:]))
    """
    ended = Ended(code, "run", "-p", ASK)
    assert ended.status == 1
    assert "kvp-edge: device.cpp:7: the device is gone\n" in ended.err


def test_a_model_named_by_the_user_is_named_in_the_advice(
    bundled_model: str, tmp_path: Path
) -> None:
    model = tmp_path / "a model.gguf"
    model.symlink_to(bundled_model)
    ended = Ended(CHAT, "chat", str(model), *GREEDY, typed=f"{ASK}\n", TMPDIR=str(tmp_path))
    assert f"start `kvp-edge chat {shlex.quote(str(model))}` with" in ended.err
