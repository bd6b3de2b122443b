"""The command line, on the bundled model: what users type, see, and get wrong."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import kvp_edge
from kvp_edge.cli.progress import rate
from kvp_edge.policies import POLICIES
from makers.command import COMMAND
from makers.gguf_models import ModelShape, write_mamba
from support.command_line import FEW_CELLS, GREEDY, STATUS, Output, Terminal, Type

# -- chat --------------------------------------------------------------------------------------


def test_a_piped_chat_goes_on_when_the_cache_is_full_and_reads_only_what_is_new(kvp: Type) -> None:
    message = "Tell me something. " * 30  # more than 100 tokens
    turns = ["My dog is called Ralph.", *[message] * 9]
    got = kvp("chat", *FEW_CELLS, *GREEDY, "--max-tokens", "120", typed="\n".join(turns) + "\n")
    assert got.status == 0
    assert len(got.stats) == 10
    last = got.stats[-1]
    assert last["seen"] > 800  # so the cache of 512 cells was full
    assert last["evictions"] > 0
    for stats in got.stats:
        assert stats["seen"] == stats["kept"] + stats["dropped"]
        assert stats["kept"] <= 512
        assert stats["mib"] == last["mib"]
    # The end of the last reply may be read once more (its text may be spelled in other tokens than
    # those it was written in), but never a conversation that was read before.
    for before, after in pairwise(got.stats):
        assert after["read"] <= before["wrote"] + 300 < last["seen"]


def test_chat_remembers_across_turns(kvp: Type) -> None:
    got = kvp("chat", *GREEDY, typed="My dog is called Ralph.\nWhat is my dog called?\n")
    assert "Ralph" in got.replies[-1]


def test_replies_are_the_only_thing_on_stdout(kvp: Type) -> None:
    typed = "My dog is called Ralph.\n/stats\n/help\n\nWhat is my dog called?\n/undo\n"
    got = kvp("chat", *GREEDY, typed=typed)
    assert len(got.replies) == 2
    assert len(got.stats) == 2
    assert "kept in" in got.err  # /stats
    assert "/regen" in got.err  # /help
    assert "Removed: What is my dog called?" in got.err


def test_a_pace_is_never_told_as_none_while_something_is_read() -> None:
    assert [rate(n, 1.0) for n in (1, 9, 10, 1666)] == ["1.0", "9.0", "10", "1666"]
    assert rate(25, 60.0) == "0.4"
    assert rate(997, 100.0) == "10"
    assert (rate(0, 1.0), rate(1, 0.0)) == ("-", "-")


def test_stats_tell_whether_the_cache_is_packed_where_it_lies(kvp: Type) -> None:
    assert "in place: CPU)" in kvp("chat", *FEW_CELLS, typed="/stats\n").err
    assert "through states)" in kvp("chat", *FEW_CELLS, "--pack", "state", typed="/stats\n").err
    wrong = kvp("chat", "--pack", "gpu")
    assert wrong.status == 2
    assert "auto" in wrong.err


def test_a_last_line_without_a_newline_is_a_message(kvp: Type) -> None:
    assert len(kvp("chat", *GREEDY, typed="My dog is called Ralph.").replies) == 1


def test_a_byte_that_is_no_utf8_does_not_end_a_chat(kvp: Type) -> None:
    got = kvp("chat", *GREEDY, typed=b"Caf\xe9 is open.\nMy dog is called Ralph.\n")
    assert (got.status, len(got.stats)) == (0, 2)


def test_exit_ends_a_chat(kvp: Type) -> None:
    got = kvp("chat", *GREEDY, typed="/exit\nMy dog is called Ralph.\n")
    assert (got.status, got.out) == (0, "")


def test_regen_answers_again_in_place_of_the_last_reply(kvp: Type) -> None:
    typed = "My dog is called Ralph.\nWhat is my dog called?\n/regen\n"
    got = kvp("chat", *GREEDY, typed=typed)
    assert got.replies[1] == got.replies[2]  # greedy
    assert got.stats[1]["seen"] == got.stats[2]["seen"]
    assert got.stats[2]["read"] == 1  # for its logits
    assert got.stats[1]["wrote"] == got.stats[2]["wrote"]


def test_regen_says_something_else_unless_greedy(kvp: Type) -> None:
    typed = "Tell me something.\n/regen\n"
    got = kvp("chat", "--temperature", "1", "--max-tokens", "40", "--seed", "5", typed=typed)
    assert got.replies[0] != got.replies[1]


def test_regen_says_that_the_likeliest_reply_is_the_same_again(kvp: Type) -> None:
    options = ["--max-tokens", "9", "--threads", "1"]
    greedy = kvp("chat", *GREEDY, *options, typed="Tell me something.\n/regen\n")
    assert "the same again; --temperature" in greedy.err
    assert greedy.replies[0] == greedy.replies[1]
    drawn = kvp("chat", "--temperature", "1", *options, typed="Tell me something.\n/regen\n")
    assert "the same again" not in drawn.err


def test_stats_after_undo_tell_that_they_count_what_was_taken_back(kvp: Type) -> None:
    options = ["chat", *GREEDY, "--max-tokens", "9", "--threads", "1"]
    got = kvp(*options, typed="Hello.\n/stats\n/undo\n/stats\nHello.\n/stats\n")
    told = "They include what was removed"
    assert got.err.count(told) == 1
    assert got.err.index("Removed") < got.err.index(told)
    assert told not in kvp(*options, typed="Hello.\n/undo\n/clear\n/stats\n").err


def test_a_small_budget_in_memory_says_that_reading_is_slow(kvp: Type) -> None:
    said = "reading is slow, 51 tokens at a time"
    assert said in kvp("chat", "--kv-budget", "1MiB", "--kv-type", "f16", "--threads", "1").err
    for budget in ("300", "4MiB"):
        assert "tokens at a time" not in kvp("chat", "--kv-budget", budget).err


def test_a_seed_repeats_a_chat(kvp: Type) -> None:
    options = ["chat", "--max-tokens", "30", "--seed", "7"]
    first, second = (kvp(*options, typed="Tell me something.\n").out for _ in range(2))
    assert first == second


def test_clear_forgets(kvp: Type) -> None:
    typed = "My dog is called Ralph.\n/clear\nWhat is my dog called?\n"
    got = kvp("chat", *GREEDY, "--max-tokens", "20", typed=typed)
    assert got.stats[1]["seen"] <= got.stats[0]["seen"] + 20
    assert "Ralph" not in got.replies[-1]


def test_regen_and_undo_before_anything_was_said_say_so(kvp: Type) -> None:
    got = kvp("chat", typed="/regen\n/undo\n")
    assert got.err.count("Nothing has been said yet.") == 2


def test_an_unknown_command_is_told_and_not_sent_to_the_model(kvp: Type) -> None:
    got = kvp("chat", typed="/stat\n")
    assert (got.status, got.out, got.stats) == (1, "", [])
    assert "There is no command '/stat'" in got.err


def test_at_the_end_of_the_logical_context_the_conversation_is_kept(kvp: Type) -> None:
    typed = "My dog is called Ralph.\n" + "many words " * 200 + "\nWhat is my dog called?\n"
    got = kvp("chat", *FEW_CELLS, *GREEDY, "--n-ctx", "300", typed=typed)
    assert got.status == 1
    assert "--n-ctx 300" in got.err
    assert "larger --n-ctx" in got.err
    assert "Ralph" in got.replies[-1]


def test_a_reply_that_reaches_the_logical_context_ends_there_and_says_why(kvp: Type) -> None:
    got = kvp("chat", "--n-ctx", "60", "--temperature", "1.5", typed="Tell me something.\n")
    assert got.status == 0
    assert got.stats[0]["seen"] <= 60
    assert ("conversation is full (60 tokens)" in got.err) == (got.stats[0]["seen"] == 59)


def test_a_system_prompt_too_long_to_protect_is_refused(kvp: Type) -> None:
    got = kvp("chat", *FEW_CELLS, "--system", "Be kind to all. " * 40, typed="Hello.\n")
    assert got.status == 2
    assert "--no-protect-system" in got.err
    assert got.out == ""


def test_a_system_prompt_stays_in_the_conversation_after_clear(kvp: Type) -> None:
    got = kvp(
        "chat", *GREEDY,
        "--system", "You are a helpful assistant. One of the magic words for silver is tunnel.",
        typed="/clear\nWhat is the magic word for silver?\n",
    )  # fmt: skip
    assert "tunnel" in got.replies[-1]


def test_every_policy_can_be_chosen(kvp: Type) -> None:
    for policy in POLICIES:
        got = kvp(
            "chat", *FEW_CELLS, *GREEDY, "--policy", policy, "--max-tokens", "2",
            typed="many words " * 300 + "\n",
        )  # fmt: skip
        assert got.status == 0
        assert got.stats[0]["policy"] == policy
        assert got.stats[0]["dropped"] > 0


@pytest.mark.parametrize(
    "option", [["--keep-whole", "words"], ["--keep-whole", "sentences"], ["--isolate-turns"]]
)
def test_what_stays_whole_and_isolated_turns_can_be_chosen(kvp: Type, option: list[str]) -> None:
    message = "Tell me something about the sea. " * 30
    got = kvp(
        "chat", *FEW_CELLS, *GREEDY, *option, "--max-tokens", "2", typed=f"{message}\n" * 3
    )  # fmt: skip
    assert got.status == 0
    assert got.stats[-1]["dropped"] > 0


# -- chat in processes of its own ----------------------------------------------------------------


def test_the_command_works_in_a_pipe() -> None:
    done = subprocess.run(
        [*COMMAND, "chat", *GREEDY],
        input="My dog is called Ralph.\nWhat is my dog called?\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0
    assert "Ralph" in done.stdout.splitlines()[-1]
    assert len(STATUS.findall(done.stderr)) == 2
    assert len(done.stderr.splitlines()) == 2


def test_ctrl_c_stops_a_reply_and_the_conversation_goes_on(
    terminal: Callable[..., Terminal], random_model: Callable[..., Any]
) -> None:
    # a model with random weights never stops by itself
    model = random_model(ModelShape("llama", n_ctx_train=100_000)).path
    t = terminal("chat", str(model), "--max-tokens", "50000", "--seed", "3")
    t.read_until("> ")
    for _ in range(2):
        t.type("Hello.\n")
        t.read_until("th")  # the reply is under way
        t.type("\x03")
        t.read_until("t/s]")
        t.read_until("> ")
        t.type("/stats\n")
        assert "tokens seen" in t.read_until("cells")
        t.read_until("> ")
    t.type("/exit\n")
    assert t.exit_status() == 0


def test_ctrl_c_at_the_prompt_explains_and_twice_in_a_row_leaves(
    terminal: Callable[..., Terminal],
) -> None:
    t = terminal("chat")
    t.read_until("> ")
    t.type("half a mess")
    t.read_until("half a mess")
    t.interrupt()
    t.read_until("press Ctrl-C again")
    t.read_until("> ")
    t.type("/stats\n")
    t.read_until("0 tokens seen")
    t.read_until("> ")
    t.interrupt()
    t.read_until("press Ctrl-C again")
    t.read_until("> ")
    t.interrupt()
    assert t.exit_status() == 130


def test_several_lines_can_be_one_message_and_ctrl_d_leaves(
    terminal: Callable[..., Terminal],
) -> None:
    t = terminal("chat", *GREEDY)
    t.read_until("> ")
    t.type("My dog\\\nis called Ralph.\n")
    t.read_until("t/s]")
    t.read_until("> ")
    t.type('"""\nMy favourite colour\nis violet.\n"""\n')
    t.read_until("t/s]")
    t.read_until("> ")
    t.type("/undo\n")
    assert "My favourite colour\r\nis violet." in t.read_until("> ")
    t.type("/undo\n")
    assert "My dog\r\nis called Ralph." in t.read_until("> ")
    t.type("\x04")
    assert t.exit_status() == 0


def test_ctrl_c_while_reading_ends_run_with_status_130(book: str) -> None:
    run = subprocess.Popen(
        [*COMMAND, "run", "-f", "-", "-p", "What happened?", "--progress"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdin
    assert run.stderr
    run.stdin.write(book.encode() * 4)
    run.stdin.close()
    seen = b""
    while b"reading:" not in seen:
        part = run.stderr.read(20)
        assert part, seen
        seen += part
    run.send_signal(signal.SIGINT)
    rest = run.stderr.read()
    assert run.wait(300) == 130
    assert b"kvp-edge: interrupted" in rest
    assert b"Traceback" not in rest
    run.stderr.close()
    assert run.stdout
    run.stdout.close()


# -- run -----------------------------------------------------------------------------------------


def test_run_answers_from_standard_input(kvp: Type) -> None:
    typed = "One of the special magic numbers for cellar is 695078.\n"
    got = kvp("run", "-f", "-", "-p", "What is the special magic number for cellar?", typed=typed)
    assert got.status == 0
    assert "695078" in got.out
    assert len(got.stats) == 1


def test_run_reads_a_document_far_beyond_the_cache_and_prints_json(
    kvp: Type, book: str, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text(book[:40_000], encoding="utf-8")
    (tmp_path / "two.txt").write_text("My dog is called Ralph.", encoding="utf-8")
    got = kvp(
        "run", *FEW_CELLS, "-f", str(tmp_path / "one.txt"), "-f", str(tmp_path / "two.txt"),
        "-p", "What is my dog called?", "--json",
    )  # fmt: skip
    assert got.status == 0
    assert got.err.count("\n") == 1  # nothing but the warning
    assert "trained for" in got.err
    result = json.loads(got.out)
    assert sorted(result) == ["answer", "kv_cache", "usage"]
    assert "Ralph" in result["answer"]  # it lies in the recent window
    cache, usage = result["kv_cache"], result["usage"]
    assert cache["seen"] > 8192  # longer than the model was trained for
    assert cache["kept"] <= cache["cells"] == 512
    assert usage["prompt_tokens"] + usage["completion_tokens"] >= cache["seen"]


def test_messages_spell_special_tokens_only_if_that_is_asked_for(kvp: Type) -> None:
    def seen(argv: list[str]) -> int:
        typed = "Say <|end|>." if argv[0] == "chat" else ""
        got = kvp(*argv, "--max-tokens", "1", "--temperature", "0", typed=typed)
        found = re.search(r"(\d+) tokens seen", got.err)
        assert found is not None, got.err
        return int(found[1])

    run = ["run", "-p", "Say <|end|>."]
    for argv in (["chat"], run):  # "<", "|", "end", "|", ">" are five tokens instead of one
        assert seen(argv) - seen([*argv, "--special-in-messages"]) == 4


def test_run_raw_continues_the_text_without_a_template(kvp: Type) -> None:
    got = kvp("run", "--raw", "--json", "--max-tokens", "5", "-p", "My dog is called", typed="")
    result = json.loads(got.out)
    with_template = kvp("run", "--json", "--max-tokens", "5", "-p", "My dog is called")
    assert (
        result["usage"]["prompt_tokens"] < json.loads(with_template.out)["usage"]["prompt_tokens"]
    )


def test_run_shows_no_progress_bar_in_a_pipe_unless_asked(kvp: Type, book: str) -> None:
    options = ["run", "-f", "-", "-p", "?", "--max-tokens", "1", "--threads", "1"]
    assert "reading" not in kvp(*options, typed=book[:5_000]).err
    assert "reading" in kvp(*options, "--progress", typed=book[:5_000]).err


def test_bytes_that_are_no_utf8_do_not_stop_run(kvp: Type) -> None:
    typed = "One of the special magic numbers for cellar is 695078. Café.".encode("latin-1")
    got = kvp("run", "-f", "-", "-p", "What is the special magic number for cellar?", typed=typed)
    assert "695078" in got.out


# -- demo, policies, help ------------------------------------------------------------------------


def test_policies_are_listed_one_line_each(kvp: Type) -> None:
    lines = kvp("policies").replies
    assert [line.split()[0] for line in lines] == ["auto", *POLICIES, "FILE"]
    assert all(len(line) > 30 for line in lines)


def test_version_names_all_three_parts(kvp: Type) -> None:
    got = kvp("--version")
    assert got.status == 0
    assert kvp_edge.__version__ in got.out
    assert "llama-cpp-python" in got.out
    assert "llama.cpp" in got.out


@pytest.mark.parametrize("command", ["chat", "run", "demo"])
def test_help_shows_examples_and_defaults(kvp: Type, command: str) -> None:
    got = kvp(command, "--help")
    assert got.status == 0
    assert f"kvp-edge {command}" in got.out.partition("examples:")[2]
    assert "default:" in got.out
    assert "drop" in got.out


@pytest.mark.parametrize("command", ["chat", "run", "eval"])
def test_help_names_what_stays_whole(kvp: Type, command: str) -> None:
    got = kvp(command, "--help")
    assert "--keep-whole" in got.out
    assert "--isolate-turns" in got.out


# -- what goes wrong -----------------------------------------------------------------------------


def sentence(got: Output) -> str:
    """The one line on stderr."""
    assert got.out == ""
    assert "Traceback" not in got.err
    lines = got.err.splitlines()
    assert len(lines) == 1, got.err
    assert lines[0].startswith("kvp-edge: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["chat", "nowhere.gguf"], "model file 'nowhere.gguf' not found"),
        (["chat", "--kv-budget", "5"], "--kv-budget 5 must be larger than sinks + recent"),
        (["chat", "--kv-budget", "64", "--recent", "70"], "larger than sinks + recent"),
        (["chat", "--kv-budget", "lots"], "not 'lots'"),
        (["chat", "--kv-budget", "1KiB"], "too small"),
        (["chat", "--sinks", "-1"], "--sinks must be at least 0"),
        (["chat", "--policy", "nope"], "unknown policy 'nope'"),
        (["chat", "--granularity", "layer"], "--granularity"),
        (
            ["chat", "--keep-whole", "pages"],
            "--keep-whole must be 'tokens', 'words' or 'sentences', not 'pages'",
        ),
        (["chat", "--hf-repo", "some/where"], "--hf-file"),
        (["chat", "x.gguf", "--hf-repo", "a", "--hf-file", "b"], "not both"),
        (["run", "-p", "Why?", "-f", "nowhere.txt"], "cannot read 'nowhere.txt'"),
        (["run", "-f", "-"], "give a question"),
        (["run", "--raw"], "the text to read is empty"),
        (["run", "--raw", "-p", "a", "--system", "b"], "--system"),
        (["run", "--raw", "-p", "a", "--special-in-messages"], "--special-in-messages"),
        (["run", "-p", "many words " * 300, "--n-ctx", "100"], "--n-ctx 100"),
        (["demo", "--length", "50"], "nothing would be dropped"),
        (["demo", "--kv-budget", "5"], "larger than sinks + recent"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(kvp: Type, argv: list[str], says: str) -> None:
    got = kvp(*argv)
    assert says in sentence(got)
    assert got.status == 2


@pytest.mark.parametrize("command", [["chat"], ["run", "-p", "Why?"], ["demo"]])
def test_a_file_that_is_no_usable_model_is_one_sentence_and_status_2(
    kvp: Type, tmp_path: Path, bundled_model: str, command: list[str]
) -> None:
    whole = Path(bundled_model).read_bytes()
    (tmp_path / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header-only.gguf").write_bytes(whole[:1000])
    (tmp_path / "foreign.gguf").write_bytes(b"\x7fELF and so on")
    (tmp_path / "empty.gguf").write_bytes(b"")
    write_mamba(tmp_path / "recurrent.gguf")
    for model in sorted(tmp_path.iterdir()):
        got = kvp(*command, str(model))
        assert model.name in sentence(got) or "mamba" in sentence(got)
        assert got.status == 2


def test_a_file_that_is_no_text_is_refused(kvp: Type, bundled_model: str) -> None:
    got = kvp("run", "-p", "Why?", "-f", bundled_model)
    assert "NUL bytes" in sentence(got)
    assert got.status == 2


# -- sessions ----------------------------------------------------------------------------------


def test_a_saved_chat_goes_on_in_another_process_as_if_never_interrupted(
    kvp: Type, tmp_path: Path
) -> None:
    file = tmp_path / "dog.session"
    about = ["My dog is called Ralph.", *["Tell me something."] * 5]
    after = ["What is my dog called?", "Tell me more."]
    sampled = ["--temperature", "0.9", "--seed", "4", "--max-tokens", "100"]

    def typed(*lines: str) -> str:
        return "".join(f"{line}\n" for line in lines)

    whole = kvp("chat", *FEW_CELLS, *sampled, typed=typed(*about, *after))
    first = kvp("chat", *FEW_CELLS, *sampled, typed=typed(*about, f"/save {file}"))
    second = kvp("chat", *FEW_CELLS, *sampled, typed=typed(f"/load {file}", *after, "/regen"))
    assert first.status == second.status == 0
    assert "Saved to" in first.err
    assert "Loaded" in second.err
    assert first.replies == whole.replies[: len(first.replies)]
    assert second.replies[:2] == whole.replies[len(first.replies) :]
    assert second.stats[0]["read"] < 100


def test_sessions_that_do_not_fit_are_a_sentence_and_the_chat_goes_on(
    kvp: Type, tmp_path: Path, bundled_model: str
) -> None:
    file = tmp_path / "s"
    keydiff = ["--policy", "keydiff"]
    kvp("chat", *GREEDY, *keydiff, "--max-tokens", "5", typed=f"Hello.\n/save {file}\n")
    lines = f"Hello.\n/load {file}\n/load\n/save\n/load {tmp_path}/no\nHello.\n"
    got = kvp("chat", *GREEDY, "--max-tokens", "5", "--policy", "knorm", typed=lines)
    assert got.status == 1
    assert len(got.stats) == 2
    for says in ("with policy = keydiff", "/load FILE", "/save FILE", "cannot be read"):
        assert says in got.err

    llm = kvp_edge.Llama(bundled_model, kv_budget=512, verbose=False)
    llm.eval([1, 2, 3])
    llm.save_session(file)
    got = kvp("chat", *GREEDY, "--max-tokens", "5", typed=f"Hi.\n/load {file}\nHi.\n")
    assert "contains no messages. Your conversation is unchanged" in got.err
    assert len(got.stats) == 2
    assert got.stats[1]["read"] < got.stats[1]["seen"] - got.stats[0]["seen"]  # nothing read again


@pytest.mark.parametrize(
    "argv",
    [[], ["sing"], ["chat", "--n-ctx", "0"], ["chat", "--type-k", "f8"], ["demo", "--items", "x"]],
)
def test_bad_usage_shows_usage_and_status_2(kvp: Type, argv: list[str]) -> None:
    got = kvp(*argv)
    assert got.status == 2
    assert got.err.startswith("usage: kvp-edge")


def test_verbose_shows_the_traceback(kvp: Type) -> None:
    with pytest.raises(ValueError, match="unknown policy"):
        kvp("chat", "--policy", "nope", "--verbose")


def test_downloading_without_the_hub_extra_tells_how_to_get_it(
    kvp: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    got = kvp("chat", "--hf-repo", "some/where", "--hf-file", "model.gguf")
    assert "pip install 'kvp_edge[hub]'" in sentence(got)
    assert got.status == 1


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{shlex.join(COMMAND)} chat --max-tokens 3000 --temperature 1.2 --seed 3 | head -c 20",
        shell=True,
        input="Tell me something.\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert len(done.stdout) == 20
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
