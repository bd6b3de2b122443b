"""Words and sentences: found in any cut of a text into tokens, and the same bit by bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.cache.table import Table
from kvp_edge.text.spans import (
    KEEP_WHOLE,
    LOOK_BACK,
    MARKER,
    MAX_SENTENCE,
    MAX_WORD,
    TEXT,
    TURN,
    Span,
    find_spans,
    sentences,
    words,
)
from support.properties import examples

MARKERS = [b"<a>", b"</a>\n<b>", b"<c>"]

#: Texts of letters, ends of sentences, markers and characters of two, three and four bytes.
ATOMS = ["a", "bc", "\u00e9", "7", " ", "  ", "\n", ".", "!", '"', ")", ",", "'", "_", "\u4f60",
         "\u3002", "\uff01", "\u300d", "\u201d", "\u3000", "\u00a0", "\U0001f600", "\u00d7",
         "<a>", "</a>\n<b>", "<c>", "<", "</a"]  # fmt: skip


@st.composite
def cut_texts(draw: st.DrawFn) -> list[bytes]:
    """The pieces of a text cut anywhere, inside of characters too; some are empty."""
    atoms = draw(st.lists(st.sampled_from(ATOMS), max_size=60))
    if draw(st.booleans()):
        atoms += ["x"] * draw(st.integers(0, 120))
    text = "".join(atoms).encode()
    if draw(st.booleans()):
        at = list(range(len(text) + 1))  # as long in tokens as it can be
    else:
        at = sorted([0, *draw(st.lists(st.integers(0, len(text)), max_size=60)), len(text)])
    return [text[a:b] for a, b in pairwise(at)]


def shown(pieces: list[bytes], spans: list[tuple[int, int]]) -> list[str]:
    return [b"".join(pieces[a:b]).decode() for a, b in spans]


def split(text: str) -> list[bytes]:
    """The pieces between the bars."""
    return [piece.encode() for piece in text.split("|")]


# -- words ---------------------------------------------------------------------------------------


def test_a_word_is_its_letters_and_digits() -> None:
    pieces = split(" Ral|ph| call|ed| 4|17|b|.| don|'|t| a")
    assert shown(pieces, words(pieces)) == [" Ralph", " called", " 417b"]


def test_a_character_divided_by_a_border_is_decoded_first() -> None:
    pieces = [b" O", b"\xc3", b"\xb9", b" est", b"\xc3\x97", b"x"]
    assert shown(pieces, words(pieces)) == [" O\u00f9"]


def test_scripts_without_spaces_and_broken_bytes_make_no_words() -> None:
    pieces = [b"\xe4", b"\xbd", b"\xa0", b"\xe5\xa5\xbd", b"a", b"\xff", b"b"]
    assert words(pieces) == []
    assert words(["\u0dff".encode(), "\u0d85".encode()]) == []  # the first is not assigned
    assert words(["\u0d85".encode(), "\u0d86".encode()]) == [(0, 2)]
    assert words(["\u0e01".encode(), "\u0e02".encode()]) == []


def test_a_run_of_more_tokens_than_a_word_has_is_none() -> None:
    assert words([b"x"] * MAX_WORD) == [(0, MAX_WORD)]
    assert words([b"x"] * (MAX_WORD + 1)) == []


@pytest.mark.parametrize("finder", [words, sentences])
def test_nothing_to_find_is_nothing_found(finder: object) -> None:
    assert callable(finder)
    assert finder([]) == []


def test_a_token_alone_is_no_word() -> None:
    assert words([b"word"]) == []
    assert words([b"a", b" b", b" c"]) == []


@given(cut_texts())
def test_words_are_disjoint_and_hold_no_border_between_words(pieces: list[bytes]) -> None:
    found = words(pieces)
    assert all(2 <= b - a <= MAX_WORD for a, b in found)
    assert all(b <= c for (_, b), (c, _) in pairwise(found))
    text = b"".join(pieces)
    ends = np.cumsum([0, *map(len, pieces)])
    for a, b in found:
        inner = text[ends[a + 1] : ends[b - 1]] if b < len(pieces) else b""
        # what lies between the first and the last token is of letters and digits only
        assert all(c.isalnum() or c == "\ufffd" for c in inner.decode(errors="replace"))


@given(cut_texts(), cut_texts())
def test_more_text_never_changes_a_finished_word(first: list[bytes], more: list[bytes]) -> None:
    finished = [span for span in words(first) if span[1] < len(first)]
    after = words(first + more)
    assert [span for span in after if span[1] < len(first)][: len(finished)] == finished


# -- sentences -----------------------------------------------------------------------------------


def test_a_sentence_ends_at_stops_before_white_space_and_at_line_ends() -> None:
    pieces = split('My| dog|.| He| said| "|no|!"| 3|.|14| e|.g|. so|\n|\n|Lists|\n|- a|\n')
    assert shown(pieces, sentences(pieces)) == [
        "My dog.", ' He said "no!"', " 3.14 e.g. so\n\n", "Lists\n", "- a\n",
    ]  # fmt: skip


def test_full_width_stops_need_no_space() -> None:
    pieces = split("\u4f60|\u597d|\u3002|\u5417|\uff1f|\u300d|a")
    assert shown(pieces, sentences(pieces)) == ["\u4f60\u597d\u3002", "\u5417\uff1f\u300d", "a"]


def test_a_sentence_of_exactly_the_most_tokens_is_whole_and_one_more_is_cut() -> None:
    exact = [b" w"] * (MAX_SENTENCE - 1) + [b"."]
    assert sentences([*exact, b" next"]) == [(0, MAX_SENTENCE), (MAX_SENTENCE, MAX_SENTENCE + 1)]
    longer = [b" w", *exact]
    assert sentences(longer) == [(0, MAX_SENTENCE), (MAX_SENTENCE, MAX_SENTENCE + 1)]
    assert [b - a for a, b in sentences([b"w"] * 200)] == [64, 64, 64, 8]


@given(cut_texts())
def test_sentences_hold_every_token_once(pieces: list[bytes]) -> None:
    found = sentences(pieces)
    assert [t for a, b in found for t in range(a, b)] == list(range(len(pieces)))
    assert all(1 <= b - a <= MAX_SENTENCE for a, b in found)


@given(cut_texts(), cut_texts())
def test_more_text_never_changes_a_finished_sentence(first: list[bytes], more: list[bytes]) -> None:
    finished = sentences(first)[:-1]
    assert sentences(first + more)[: len(finished)] == finished


# -- with markers, bit by bit --------------------------------------------------------------------


def test_no_word_or_sentence_reaches_into_a_marker() -> None:
    pieces = split("Hel|lo|<|a>|Wor|ld|</a>|\n<|b>|x|<")
    assert find_spans(pieces, MARKERS, "words", 0) == [
        (0, 2, TEXT), (2, 4, TURN), (4, 6, TEXT), (6, 9, TURN), (10, 11, MARKER),
    ]  # fmt: skip
    assert find_spans(pieces, MARKERS, "sentences", 0)[-2:] == [(9, 10, TEXT), (10, 11, MARKER)]
    assert find_spans(pieces, MARKERS, "tokens", 0) == [
        (2, 4, TURN), (6, 9, TURN), (10, 11, MARKER),
    ]  # fmt: skip


def look(table: Table, pieces: list[bytes], keep_whole: str, seen: int) -> Table:
    """What an eviction does when ``seen`` tokens were read and are all still held."""
    table = Table.empty(1, 1, "token") if table.seen == 0 else table
    arrays, numbers = table.arrays(), {**table.numbers(), "seen": seen}
    table = Table.of(numbers, arrays)
    start = table.unsure_from
    first = max(0, start - LOOK_BACK)
    found = find_spans(pieces[first:seen], MARKERS, keep_whole, start - first)
    return table.with_spans([(first + a, first + b, kind) for a, b, kind in found])


@examples(300)
@given(
    pieces=cut_texts(), keep_whole=st.sampled_from(KEEP_WHOLE), data=st.data(), cut=st.booleans()
)
def test_spans_found_bit_by_bit_and_after_going_back_are_those_of_the_whole_text(
    pieces: list[bytes], keep_whole: str, data: st.DataObject, cut: bool
) -> None:
    n = len(pieces)
    stops = sorted(data.draw(st.sets(st.integers(1, n), max_size=6))) if n else []
    table = Table.empty(1, 1, "token")
    for stop in stops:
        table = look(table, pieces, keep_whole, stop)
        if cut and table.seen > 1:
            table = table.cut(data.draw(st.integers(1, table.seen)))
    table = look(table, pieces, keep_whole, n)
    want = find_spans(pieces, MARKERS, keep_whole, 0)
    got: list[Span] = [(a, b, kind) for a, b, kind in table.spans.tolist()]
    assert got == want


def test_spans_of_which_nothing_is_held_are_forgotten_but_not_the_newest_turns() -> None:
    packed = np.array([[[0, 4, 5]]], np.int32)
    spans = [(0, 2, TURN), (2, 4, TEXT), (4, 6, TEXT), (6, 8, TURN), (9, 10, TEXT)]
    table = Table(
        seen=10,
        tail=9,
        shift=0,
        packed_indices=packed,
        packed_rope_positions=packed,
        packed_llama_positions=packed[0, 0],
        wanted=np.zeros((1, 1, 3), np.float32),
        scores=np.empty((1, 1, 0), np.float32),
        spans=np.array(spans[:4], np.int32),
        marked=9,
    )
    got = table.with_spans(spans[4:]).spans.tolist()
    assert [tuple(span) for span in got] == [spans[2], spans[3], spans[4]]
