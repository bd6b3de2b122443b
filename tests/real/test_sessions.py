"""Sessions, edits and regenerated answers of real chats, also after evictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvp_edge import Llama
from support.cache_types import CACHE_TYPES
from support.real_models import GEMMA, PLAIN

pytestmark = pytest.mark.real

Opened = Callable[..., Llama]
Messages = list[dict[str, str]]

FACT = "My dog is called Rex. Remember that, please."
LONG = "Here is a part of a novel, and you need not answer at length. "


@pytest.fixture
def opened(real_model: Callable[[str], str]) -> Iterator[Opened]:
    made: list[Llama] = []

    def make(name: str, types: str = "f16", **kwargs: Any) -> Llama:
        type_k, type_v, flash_attn = CACHE_TYPES[types]
        given: dict[str, Any] = {
            "n_ctx": 4000, "kv_budget": 160, "recent": 64, "reserve": 96, "verbose": False,
            "n_threads": 1, "n_threads_batch": 1,
            "type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, **kwargs,
        }  # fmt: skip
        made.append(Llama(real_model(name), **given))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def say(llm: Llama, messages: Messages, text: str, **sampling: Any) -> str:
    messages.append({"role": "user", "content": text})
    how: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, **sampling}
    reply: Any = llm.create_chat_completion(messages, **how)  # type: ignore[arg-type]
    messages.append(reply["choices"][0]["message"])
    return messages[-1]["content"]


def long_chat(llm: Llama, book: str) -> Messages:
    """Some 400 tokens; the cache of 256 cells was full."""
    messages: Messages = []
    say(llm, messages, FACT)
    for part in (book[:600], book[600:1200]):
        say(llm, messages, LONG + part)
    assert llm.kv_stats.evictions > 0
    return messages


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("granularity", "types"), [("head", "f16"), ("head", "q8_0-fa"), ("token", "f16")]
)
def test_a_saved_chat_goes_on_token_for_token(
    name: str, types: str, granularity: str, opened: Opened, book: str, tmp_path: Path
) -> None:
    first = opened(name, types, granularity=granularity)
    messages = long_chat(first, book)
    first.save_session(tmp_path / "s", extra=messages)
    second = opened(name, types, granularity=granularity)
    resumed = second.load_session(tmp_path / "s")
    assert resumed == messages
    np.testing.assert_array_equal(second.kv_indices, first.kv_indices)
    for text in ("What is my dog called?", LONG + book[1200:1800], "And what happened then?"):
        assert say(second, resumed, text) == say(first, messages, text)
    assert second.kv_stats.seen == first.kv_stats.seen
    np.testing.assert_array_equal(second.kv_indices, first.kv_indices)


@pytest.mark.slow
def test_a_saved_text_of_a_model_with_a_window_goes_on_token_for_token(
    opened: Opened, book: str, tmp_path: Path
) -> None:
    wide = {"kv_budget": 512, "recent": 64, "reserve": 256}
    first = opened(GEMMA, **wide)
    tokens = first.tokenize(book[:6000].encode())[:900]
    first.eval(tokens)
    assert first.kv_stats.evictions > 0
    first.save_session(tmp_path / "s")
    second = opened(GEMMA, **wide)
    second.load_session(tmp_path / "s")
    out = []
    for llm in (first, second):
        written = llm.generate([*tokens, tokens[5]], temp=0.0)
        out.append([next(written) for _ in range(20)])
        assert llm.kv_stats.seen == 920
    assert out[0] == out[1]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("evicted", [False, True])
def test_an_edited_message_is_answered_as_if_it_had_been_read_first(
    name: str, evicted: bool, opened: Opened, book: str
) -> None:
    """Without recall; with it, what the edit leaves of the conversation comes from the log."""
    how: dict[str, Any] = {"recall": "off"} if evicted else {"kv_budget": 900}
    llm, fresh = (opened(name, **how) for _ in range(2))
    if evicted:
        messages = long_chat(llm, book)
    else:
        messages = []
        for text in (FACT, "What do dogs like?", "And cats?"):
            say(llm, messages, text)
    edited = [dict(m) for m in messages[:-1]]
    edited[0]["content"] = FACT.replace("Rex", "Tigger")
    question = edited.pop()["content"]
    copy = [dict(m) for m in edited]
    assert say(llm, edited, question) == say(fresh, copy, question)
    assert llm.kv_stats.seen == fresh.kv_stats.seen
    np.testing.assert_array_equal(llm.kv_indices, fresh.kv_indices)


@pytest.mark.parametrize("name", PLAIN)
def test_a_regenerated_answer_is_the_same_and_reads_no_conversation_again(
    name: str, opened: Opened, book: str
) -> None:
    llm = opened(name)
    messages = long_chat(llm, book)
    answer = say(llm, messages, "What is my dog called?")
    seen, evictions = llm.kv_stats.seen, llm.kv_stats.evictions
    again = messages[:-2]
    assert say(llm, again, "What is my dog called?") == answer
    assert llm.kv_stats.seen == seen
    assert llm.kv_stats.evictions == evictions  # clearing counts anew
