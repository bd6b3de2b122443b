"""Template markers: found in any template, and as whole tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_chat_format as formats

from kvp_edge.text.chat_markers import MAX_MARKER_BYTES, template_markers, token_spans


def handler(template: str) -> Any:
    return formats.Jinja2ChatFormatter(
        template=template, eos_token="</s>", bos_token="<s>"
    ).to_chat_handler()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_text_between_two_messages_is_a_marker() -> None:
    markers = template_markers(handler(CHATML))
    assert b"<|im_end|>\n<|im_start|>assistant\n" in markers
    assert b"<|im_start|>user\n" in markers
    assert b"<|im_start|>system\n" in markers


@pytest.mark.parametrize("name", ["llama-2", "chatml", "gemma", "zephyr", "mistral-instruct"])
def test_the_formats_built_into_llama_cpp_python_are_understood(name: str) -> None:
    assert template_markers(formats.get_chat_completion_handler(name))


def test_a_template_that_refuses_system_messages_still_gives_the_others() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    markers = template_markers(handler(refuses))
    assert b"<|im_end|>\n<|im_start|>assistant\n" in markers
    assert b"<|im_start|>system\n" not in markers


def test_a_long_default_system_prompt_is_no_marker() -> None:
    markers = template_markers(handler("S" * 200 + CHATML))
    assert all(len(m) <= MAX_MARKER_BYTES for m in markers)


def test_a_handler_that_renders_nothing_has_no_markers() -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no template here")

    assert template_markers(broken) == []
    assert template_markers(lambda **_: None) == []


def test_tokens_that_hold_part_of_a_marker_belong_to_it() -> None:
    pieces = [b"hello", b" [IN", b"ST] w", b"orld"]
    assert token_spans(pieces, [b"[INST]"]) == [(1, 3)]


def test_neighbouring_markers_stay_apart_unless_they_share_a_token() -> None:
    assert token_spans([b"<a>", b"<a>"], [b"<a>"]) == [(0, 1), (1, 2)]
    assert token_spans([b"<a", b"><", b"a>"], [b"<a>"]) == [(0, 3)]


def test_the_beginning_of_a_marker_at_the_end_counts() -> None:
    assert token_spans([b"text", b"<|im", b"_st"], [b"<|im_start|>"]) == [(1, 3)]
    assert token_spans([b"text", b"<|im", b"_st", b"yle"], [b"<|im_start|>"]) == []


def test_nothing_to_find_is_nothing_found() -> None:
    assert token_spans([], [b"<a>"]) == []
    assert token_spans([b"abc"], []) == []
    assert token_spans([b"", b"abc", b""], [b"x"]) == []


@given(
    pieces=st.lists(st.binary(max_size=4).map(lambda b: bytes(x % 3 + 97 for x in b)), max_size=30),
    markers=st.lists(st.sampled_from([b"ab", b"bca", b"aa", b"cabb"]), max_size=3),
)
def test_every_byte_of_every_marker_is_inside_a_span_and_spans_are_in_order(
    pieces: list[bytes], markers: list[bytes]
) -> None:
    spans = token_spans(pieces, markers)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    text = b"".join(pieces)
    for marker in markers:
        at = text.find(marker)
        while at >= 0:
            tokens = {owner[b] for b in range(at, at + len(marker))}
            assert any(a <= min(tokens) and max(tokens) < b for a, b in spans)
            at = text.find(marker, at + 1)
    assert all(a < b for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
