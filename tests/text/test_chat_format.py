"""Chat templates: none, bad ones, chosen ones, and those of models that call tools."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import llama_chat_format

import kvp_edge
from kvp_edge.binding.model import read_model_shape
from kvp_edge.errors import UnsupportedModelError
from kvp_edge.text import transcript
from kvp_edge.text.chat_head import Head
from kvp_edge.text.chat_markers import template_markers
from kvp_edge.text.chat_prompt import prompt_tokens
from kvp_edge.text.pieces import token_text
from support.command_line import FEW_CELLS, GREEDY, Type

Loader = Callable[..., kvp_edge.Llama]
SHORT = [*GREEDY, "--threads", "1", "--max-tokens", "12"]
HELLO = [{"role": "user", "content": "Hello."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "write_note",
        "description": "write a note",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": 30, "maxLength": 40}},
            "required": ["text"],
        },
    },
}


# -- no template ---------------------------------------------------------------------------------


def test_the_transcript_is_one_of_speakers_with_the_system_prompt_above() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "My dog is called Rex."},
        {"role": "assistant", "content": " Noted."},
        {"role": "user", "content": [{"type": "text", "text": "What is he called?"}]},
    ]
    written = transcript.transcript(messages)
    assert written.prompt == (
        "Be brief.\n\nUser: My dog is called Rex.\nAssistant: Noted.\n"
        "User: What is he called?\nAssistant:"
    )
    assert written.stop == ["\nUser:", "\nAssistant:"]
    assert transcript.transcript(messages[1:2]).prompt == "User: My dog is called Rex.\nAssistant:"
    handler = llama_chat_format.get_chat_completion_handler(transcript.NAME)
    assert b"\nAssistant:" in template_markers(handler)


def test_a_chat_without_a_template_says_so_and_is_a_transcript(kvp: Type, bare: str) -> None:
    got = kvp("chat", bare, *FEW_CELLS, *SHORT, typed="Hello.\nMy dog is called Ralph.\n")
    assert got.status == 0
    assert "bare.gguf has no chat template, so it reads the conversation" in got.err
    assert len(got.stats) == 2
    assert got.stats[1]["read"] < got.stats[1]["seen"] - got.stats[0]["seen"]
    assert not any(reply.startswith((" ", "User:")) for reply in got.replies)
    chosen = kvp("chat", bare, *SHORT, "--chat-format", "chatml", typed="Hello.\n")
    assert (chosen.status, chosen.err.count("\n")) == (0, 1)  # the status line alone


def test_a_model_with_a_template_is_told_nothing(kvp: Type) -> None:
    assert kvp("chat", *SHORT, typed="Hello.\n").err.count("\n") == 1


def test_run_without_a_template_continues_the_text(kvp: Type, bare: str) -> None:
    got = kvp("run", bare, *SHORT, "-p", "He was a", "--json")
    raw = kvp("run", bare, *SHORT, "-p", "He was a", "--json", "--raw")
    assert json.loads(got.out)["answer"] == json.loads(raw.out)["answer"] != ""
    assert "bare.gguf has no chat template, so it continues the text" in got.err
    assert raw.err == ""
    chat = kvp("run", bare, *SHORT, "-p", "He was a", "--chat-format", "transcript")
    assert (chat.status, "continues" in chat.err) == (0, False)
    refused = kvp("run", bare, *SHORT, "-p", "He was a", "--system", "Be kind.")
    assert (refused.status, "--system cannot be used" in refused.err) == (2, True)


def test_a_model_without_a_template_warns_unless_one_was_asked_for(
    bare: str, bundled_model: str, load: Loader
) -> None:
    llm = load(bare, kv_budget=512)
    for one in (llm, copy.copy(llm), load(bare)):
        assert one.lacks_chat_template
        with pytest.warns(UserWarning, match=r"'bare.gguf' has no chat template.*'transcript'"):
            one.create_chat_completion(HELLO, max_tokens=1)
    llm.chat_format = transcript.NAME
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (llm, load(bundled_model), load(bare, chat_format="llama-2")):
            one.create_chat_completion(HELLO, max_tokens=1)


# -- chosen templates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('no system role\x1b[2J') }}", "no system role␛"),
        ("{{ messages[0].nothing.at_all }}", "no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{% if %}", "is not a chat template"),
    ],
)
@pytest.mark.parametrize("command", [["chat"], ["run", "-p", "Why?"]])
def test_a_template_that_fails_is_a_sentence(
    kvp: Type, tmp_path: Path, template: str, says: str, command: list[str]
) -> None:
    file = tmp_path / "t"
    file.write_text(template)
    got = kvp(*command, "--chat-template", str(file), "--threads", "1", typed="Hello.\n")
    assert (got.status, got.out) == (2, "")
    assert says in got.err
    assert got.err.startswith("kvp-edge: ")


def test_templates_that_cannot_be_had_are_a_sentence(kvp: Type, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for options, says in (
        (["--chat-template", str(tmp_path / "absent")], "cannot read"),
        (["--chat-template", str(tmp_path / "bytes")], "is not a chat template"),
        (["--chat-format", "nope"], "chatml"),
        (["--chat-format", "chatml", "--chat-template", "x"], "not both"),
    ):
        got = kvp("chat", *options, typed="Hello.\n")
        assert (got.status, got.out) == (2, "")
        assert says in got.err
    raw = kvp("run", "--raw", "-p", "a", "--chat-format", "chatml")
    assert (raw.status, "--raw uses no chat template" in raw.err) == (2, True)


def test_a_chosen_template_is_the_one_the_model_reads(
    kvp: Type, tmp_path: Path, bundled_model: str, load: Loader
) -> None:
    file = tmp_path / "t"
    file.write_text("{{ bos_token }}{{ messages[-1].content }}")
    got = kvp("chat", *SHORT, "--chat-template", str(file), typed="My dog is called\n")
    llm = load(bundled_model, kv_budget=512, granularity="head", n_ctx=8192)
    plain = llm.create_completion("My dog is called", max_tokens=12, temperature=0)
    assert got.replies == [plain["choices"][0]["text"]]


# -- tools ---------------------------------------------------------------------------------------


def test_a_handler_that_completes_at_once_has_markers_and_a_prompt(
    bundled_model: str, load: Loader
) -> None:
    name = "chatml-function-calling"
    markers = template_markers(llama_chat_format.get_chat_completion_handler(name))
    assert b"<|im_end|>\n<|im_start|>assistant\n" in markers
    llm = load(bundled_model, kv_budget=512, chat_format=name)
    tokens = prompt_tokens(llm, HELLO)
    llm.create_chat_completion(HELLO, max_tokens=1)
    assert llm.input_ids[: len(tokens)].tolist() == tokens


def test_the_system_prompt_stays_while_a_handler_completes_a_second_time(
    bundled_model: str, load: Loader, book: str
) -> None:
    system = "You are the harbour master of Pellworm. The secret number is 7341. " * 3
    llm = load(
        bundled_model,
        n_ctx=4096,
        kv_budget=128,
        policy="recency",
        protect_system=True,
        chat_format="chatml-function-calling",
    )
    evicted = False
    for length in range(200, 340, 20):  # at some of these the cells become full in the second
        llm.reset()
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": book[3000 : 3000 + length]},
        ]
        with pytest.warns(UserWarning, match="definitions of tools are not protected.*Raise"):
            llm.create_chat_completion(
                messages, tools=[TOOL], tool_choice="auto", temperature=0, max_tokens=90
            )
        if llm.kv_stats.evictions:
            held = b"".join(token_text(llm.vocab, int(llm.input_ids[p])) for p in llm.kv_indices)
            assert system.strip().encode() in held
            evicted = True
    assert evicted


@pytest.mark.parametrize(
    "system", ["You keep notes.", [{"type": "text", "text": "You keep notes."}]]
)
def test_definitions_of_tools_stay_with_the_system_prompt(
    bundled_model: str, load: Loader, book: str, system: Any
) -> None:
    llm = load(bundled_model, n_ctx=4096, kv_budget=256, policy="recency", protect_system=True)
    llm.chat_handler = llama_chat_format.Jinja2ChatFormatter(
        "<|im_start|>system\n"
        "{% if messages[0].content is string %}{{ messages[0].content }}"
        "{% else %}{{ messages[0].content[0].text }}{% endif %}{{ tools | tojson }}<|im_end|>\n"
        "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n",
        eos_token="",
        bos_token="",
    ).to_chat_handler()
    question = book[3000:6000].strip()
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    llm.create_chat_completion(messages, tools=[TOOL], max_tokens=2)
    assert llm.kv_stats.evictions > 0
    held = b"".join(token_text(llm.vocab, int(llm.input_ids[p])) for p in llm.kv_indices)
    head = f"<|im_start|>system\nYou keep notes.{json.dumps([TOOL])}<|im_end|>\n<|im_start|>user\n"
    assert held.startswith(head.encode())


def test_the_head_of_a_chat_ends_where_its_first_message_begins() -> None:
    system = {"role": "system", "content": " Be kind. "}
    text = b"<s>Be kind.<tools>Hello.<user>Hello."
    marks = [b"<end><user>", b"<user>"]
    alone = Head.of([system, *HELLO], False)
    assert alone == Head([b"Be kind."], None)
    assert alone.end(text, marks) == len(b"<s>Be kind.")
    assert alone.end(b"<s>Bye.", marks) is None
    with_tools = Head.of([system, *HELLO], True)
    assert with_tools == Head([b"Be kind."], b"Hello.")
    assert with_tools.end(text, marks) == len(b"<s>Be kind.<tools>Hello.<user>")
    assert with_tools.end(b"<s>Be kind.<tools>Hello.", marks) is None
    telling = with_tools._replace(first=b"Hello, is it me you are looking for?")
    assert telling.end(b"<s>Be kind.<tools>" + (telling.first or b""), []) == len(
        b"<s>Be kind.<tools>"
    )
    quoted = Head([b"Don't <b>."], None)
    assert quoted.end(b"<s>Don't <b>.</s>", marks) == len(b"<s>Don't <b>.")
    assert quoted.end(b"<s>Don&#39;t &lt;b&gt;.</s>", marks) == len(b"<s>Don&#39;t &lt;b&gt;.")
    assert Head.of(HELLO, True) == Head([], b"Hello.")
    assert Head.of(HELLO, False) is None
    assert Head.of([{"role": "system", "content": " "}], True) is None
    assert Head.of([], True) is None


def test_what_is_completed_after_a_chat_protects_nothing(
    bundled_model: str, load: Loader, book: str
) -> None:
    llm = load(
        bundled_model, n_ctx=8192, kv_budget=256, policy="recency", protect_system=True,
        chat_format="chatml",
    )  # fmt: skip
    messages = [{"role": "system", "content": book[3000:3400]}, *HELLO]
    for stream in (False, True):
        result = llm.create_chat_completion(messages, max_tokens=2, stream=stream)
        chunks = list(result) if stream else [result]
        assert chunks
        llm.create_completion(book[:6000], max_tokens=1)
        assert llm.kv_stats.evictions > 0
        assert llm.kv_indices.tolist() == [
            *range(4),
            *range(llm.n_tokens - len(llm.kv_indices) + 4, llm.n_tokens),
        ]
    assert np.all(np.diff(llm.kv_indices) > 0)


# -- arguments -----------------------------------------------------------------------------------


def test_texts_that_are_no_utf8_are_read_like_files(kvp: Type) -> None:
    for command in (["run", "-p", "Caf\udce9?"], ["chat", "--system", "Caf\udce9."]):
        got = kvp(*command, *SHORT, typed="Hello.\n")
        assert (got.status, got.err.count("\n")) == (0, 1)


def test_what_llama_cpp_would_wait_for_or_cannot_open_is_no_model(
    kvp: Type, tmp_path: Path, bundled_model: str
) -> None:
    pipe, name = tmp_path / "pipe", tmp_path / "mod\udce9l.gguf"
    os.mkfifo(pipe)
    name.symlink_to(bundled_model)
    for path, says in ((pipe, "a pipe or a device"), (tmp_path, "a folder"), (name, "not UTF-8")):
        for command in (["chat"], ["run", "-p", "Why?"]):
            got = kvp(*command, str(path))
            assert (got.status, says in got.err) == (2, True)
        with pytest.raises(UnsupportedModelError, match=says):
            kvp_edge.Llama(str(path))
        with pytest.raises(UnsupportedModelError, match=says):
            read_model_shape(path)


def test_absurd_numbers_of_threads_are_bad_usage(kvp: Type) -> None:
    for n in ("0", "513", "1000000"):
        got = kvp("chat", "--threads", n)
        assert got.status == 2
        assert n in got.err
    assert "at most 512" in got.err
    assert kvp("chat", *GREEDY, "--threads", "16", typed="").status == 0
