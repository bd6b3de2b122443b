"""Conversations are put to models as their own chat templates write them, or as transcripts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvp_edge.cli import main
from kvp_edge.evaluation import run
from kvp_edge.evaluation.records import read_records
from kvp_edge.evaluation.setting import Prompt
from kvp_edge.evaluation.tasks import TASKS
from kvp_edge.llama import Llama
from kvp_edge.measuring import MeasuringLlama
from kvp_edge.text.chat_prompt import ends_reply, transcribe_without_template
from kvp_edge.text.pieces import token_text
from kvp_edge.traces.tracer import Tracer
from support.own_replies import ENGINE, assert_replies_are_llama_cpps

TASKS_ASKED = ["fact", "recall", "quiz"]


def text(llm: Llama, tokens: Any) -> str:
    """With special tokens."""
    return b"".join(token_text(llm.vocab, int(t)) for t in tokens).decode()


def prompts(path: str, length: int = 400) -> Iterator[tuple[Llama, Prompt]]:
    with closing(Llama(path, n_ctx=256, **ENGINE)) as llm:
        for prompt in run.prompts(llm, TASKS, TASKS_ASKED, length, 1, seed=0):
            yield llm, prompt


def assert_cut_before_the_question(llm: Llama, prompt: Prompt) -> None:
    """And everything of the conversation is in it, the question last."""
    assert prompt.item is not None
    before = text(llm, prompt.tokens[: prompt.border])
    after = text(llm, prompt.tokens[prompt.border :])
    assert after.strip().startswith(prompt.item.question)
    for message in prompt.item.messages:
        content = message["content"].removesuffix(prompt.item.question).strip()
        assert content in before


def test_everything_but_the_question_comes_before_the_cut(bundled_model: str, bare: str) -> None:
    for path in (bundled_model, bare):
        for llm, prompt in prompts(path):
            assert_cut_before_the_question(llm, prompt)


def test_the_full_caches_reply_is_llama_cpps_own(bundled_model: str, bare: str) -> None:
    for path in (bundled_model, bare):
        assert_replies_are_llama_cpps(path, ["fact", "recall"], 400)


def test_without_a_template_conversations_are_transcripts(bare: str) -> None:
    for llm, prompt in prompts(bare):
        assert prompt.item is not None
        written = text(llm, prompt.tokens)
        assert "[INST]" not in written
        assert written.removeprefix(text(llm, [llm.token_bos()])).startswith("User: ")
        assert written.endswith(f"{prompt.item.question}\nAssistant:")
        assert len(prompt.turns) == len(prompt.item.more)
        for turn, question in zip(prompt.turns, prompt.item.more, strict=True):
            assert text(llm, turn) == f"\nUser: {question.text}\nAssistant:"


def test_in_transcripts_a_reply_ends_with_its_line_and_elsewhere_it_does_not(
    bundled_model: str, bare: str
) -> None:
    for path in (bundled_model, bare):
        with closing(Llama(path, n_ctx=256, **ENGINE)) as llm:
            [line_end] = llm.tokenize(b"\n", add_bos=False)
            [word] = llm.tokenize(b" the", add_bos=False)
            assert transcribe_without_template(llm) == (path == bare)
            assert ends_reply(llm, line_end) == (path == bare)
            assert ends_reply(llm, llm.token_eos())
            assert not ends_reply(llm, word)


def test_replies_and_traces_of_a_transcript_are_one_line(bare: str) -> None:
    for llm, prompt in prompts(bare):
        tokens = prompt.tokens.tolist()
        with closing(MeasuringLlama.whole(bare, prompt.longest, **ENGINE)) as subject:
            subject.read(tokens)
            reply = subject.reply(prompt.reply_tokens)
        with closing(Tracer(bare, prompt.longest, **ENGINE)) as tracer:
            traced = tracer.capture(tokens, prompt.border, prompt.reply_tokens).tokens
        assert traced[len(tokens) :].tolist() == reply
        assert "\n" not in text(llm, reply)


def test_the_commands_say_that_there_is_no_template(
    bare: str, bundled_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--threads", "1", "--items", "1"]
    asked = ["--tasks", "quiz", "--lengths", "200", "--budgets", "1/2", "--policies", "keydiff"]
    for path in (bare, bundled_model):
        out = tmp_path / Path(path).stem
        assert main(["eval", path, *command, *asked, "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert ("no chat template" in said) == (path == bare)
        assert len(read_records(out / "records.jsonl")) == 2
    assert main(["demo", bare, *command, "--length", "600"]) == 0
    assert "The model has no chat template" in capsys.readouterr().err
