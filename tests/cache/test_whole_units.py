"""What an eviction keeps with whole words, whole sentences and isolated turns: every choice is
compared with one made in plain Python from the whole text."""

from __future__ import annotations

import tempfile
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_tokens
from kvp_edge import Llama, SessionError
from kvp_edge.cache.selection import clipped, no_longer_held, several_held, units
from kvp_edge.cache.table import Table
from kvp_edge.cache.turns import settled_before, settled_share
from kvp_edge.policies import CacheView, Policy
from kvp_edge.text.chat_markers import template_markers
from kvp_edge.text.chat_prompt import prompt_tokens
from kvp_edge.text.pieces import token_text
from kvp_edge.text.spans import KEEP_WHOLE, TEXT, TURN, Span, find_spans
from support.properties import examples

Loader = Callable[..., Llama]

QUIET: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
TIGHT: dict[str, Any] = {"n_ctx": 6000, "kv_budget": 120, "reserve": 136, "recent": 24}
SAYINGS = [
    "My dog is called Ralph. He is brown, and he sleeps a lot!",
    "I see. What else would you like to tell me about the dog called Ralph?",
    "Where did Isabella go?\nShe went to Constantinople in 1453. Nobody followed her.",
    "O\u00f9 est-il ? \u4f60\u597d\u3002Na\u00efvet\u00e9 is no crime \U0001f600 and so on and on",
    "word " * 70 + "without a stop " * 10,
]


class Numbered(Policy):
    """A number for every token, another one in every head."""

    name = "numbered"

    def score(self, view: CacheView) -> Any:
        n_layer, n_head_kv, _ = view.shape
        return numbers(n_layer, n_head_kv, int(np.max(view.indices)) + 1)[..., view.indices]


def numbers(n_layer: int, n_head_kv: int, n: int) -> Any:
    heads = np.arange(n_layer * n_head_kv).reshape(n_layer, n_head_kv, 1)
    x = (np.arange(n) * 2654435761 + heads * 40503 * 7919) % 2**32
    return ((x * x // 2**16) % 1000003).astype(np.float32)


@dataclass
class Expected:
    """Tokens that stay, in one head."""

    certain: set[int]
    room: int  # rows left, into which no whole unit fits


def greedy(parts: list[list[int]], score: dict[int, float], room: int) -> Expected:
    stays: set[int] = set()
    for part in sorted(parts, key=lambda p: (-np.mean([score[t] for t in p]), -p[0])):
        if len(part) <= room:
            stays |= set(part)
            room -= len(part)
    return Expected(stays, room)


class Watch:
    """Compares every eviction of a Llama with the rules, as this file writes them down."""

    def __init__(self, llm: Llama, keep_whole: str, isolate_turns: bool) -> None:
        self.llm, self.keep_whole, self.isolate = llm, keep_whole, isolate_turns
        self.evictions, self.divided, self.unused = 0, 0, 0
        assert llm.kv is not None
        self.kv = llm.kv
        inner = self.kv._evict

        def evict(**how: bool) -> None:
            before = self.kv.snapshot()
            inner(**how)
            self.check(before, self.kv.snapshot())

        self.kv._evict = evict  # type: ignore[method-assign]

    def spans(self, seen: int) -> list[Span]:
        pieces = [token_text(self.llm.vocab, int(t)) for t in self.llm.input_ids[:seen]]
        return find_spans(
            pieces, template_markers(self.llm.chat_completion_handler()), self.keep_whole, 0
        )

    def check(self, before: Table, after: Table) -> None:
        limits, seen = self.kv.limits, before.seen
        spans = self.spans(seen)
        first, newest = self.kv.protected_prefix, seen - limits.recent
        for a, b, kind in spans:
            if kind != TEXT:
                first = b if a < first < b else first
                newest = a if a < newest < b else newest
        longest = max([b - a for a, b, kind in spans if kind != TEXT], default=1)
        # what is protected grows by no more than the rest of a marker at either end
        assert first < self.kv.protected_prefix + longest
        assert newest > seen - limits.recent - longest
        unit = list(range(seen))
        for a, b, _ in spans:
            for t in range(max(a, first), min(b, newest)):
                unit[t] = max(a, first)
        shape = self.kv.cache.shape
        score = numbers(shape.n_layer, shape.n_head_kv, seen)
        kept = after.indices()
        turns = [a for a, _, kind in spans if kind == TURN]
        settled = min(max(turns, default=0), before.tail) if self.isolate else 0
        if self.kv.granularity == "token":
            held = before.indices()[0, 0].tolist()
            self.compare(held, kept[0, 0].tolist(), first, newest, unit, score, settled)
        else:
            for head in np.ndindex(kept.shape[:2]):
                held = before.indices()[head].tolist()
                mine = score[head][None, None]
                self.compare(held, kept[head].tolist(), first, newest, unit, mine, settled)
        self.evictions += 1

    def compare(
        self,
        held: list[int],
        kept: list[int],
        first: int,
        newest: int,
        unit: list[int],
        scores: Any,
        settled: int,
    ) -> None:
        budget = self.kv.limits.budget
        protected = {t for t in held if t < first or t >= newest}
        assert protected <= set(kept)
        assert held[-1] in kept
        assert len(kept) <= max(budget, len(protected))
        sides = [[t for t in held if t < settled], [t for t in held if t >= settled]]
        rest = [[t for t in side if t not in protected] for side in sides]
        room = max(0, budget - len(protected))
        share = min(len(rest[0]), room - min(len(rest[1]), -(-room // 4)))
        certain = set(protected)
        for side in rest:
            most = share
            if side is rest[1]:  # with what settled units were too large for
                most = max(0, budget - len(certain))
            flat = scores.reshape(-1, scores.shape[-1])[:, side].astype(np.float64)
            if self.kv.granularity == "token" and side:
                flat = (flat - flat.mean(1, keepdims=True)) / np.maximum(
                    flat.std(1, keepdims=True), 1e-12
                )
            mean = dict(zip(side, flat.mean(0), strict=True))
            parts: dict[int, list[int]] = {}
            for t in side:
                parts.setdefault(unit[t], []).append(t)
            want = greedy(list(parts.values()), mean, most)
            here = set(kept) & set(side)
            assert want.certain <= here
            extra = here - want.certain
            if self.kv.granularity == "token":
                assert not extra
                self.unused += want.room
            elif extra:  # one unit too large for the last rows is divided, and nothing else
                assert len(extra) == want.room
                assert len({unit[t] for t in extra}) == 1
                self.divided += 1
            certain |= here
        if self.kv.granularity == "head":
            assert len(kept) == max(budget, len(protected))


def conversation(llm: Llama, picks: list[int]) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": SAYINGS[p]} for i, p in enumerate(picks)]
    return prompt_tokens(llm, messages)


@examples(40)
@given(
    keep_whole=st.sampled_from(KEEP_WHOLE),
    isolate_turns=st.booleans(),
    granularity=st.sampled_from(["head", "token"]),
    positions=st.sampled_from(["keep", "compact"]),
    chat_format=st.sampled_from([None, "chatml"]),
    budget=st.integers(40, 150),
    recent=st.integers(1, 30),
    sinks=st.integers(0, 6),
    data=st.data(),
)
def test_every_choice_is_the_one_that_the_rules_make_from_the_whole_text(
    bundled_model: str,
    keep_whole: str,
    isolate_turns: bool,
    granularity: str,
    positions: str,
    chat_format: str | None,
    budget: int,
    recent: int,
    sinks: int,
    data: st.DataObject,
) -> None:
    """With reads, going back and sessions in any order. Rows are ranked in f32: scores so near to
    each other that this decides are no part of ``Numbered``."""
    options: dict[str, Any] = {
        "n_ctx": 3000,
        "kv_budget": budget,
        "reserve": data.draw(st.integers(30, 100)),
        "recent": recent,
        "sinks": sinks,
        "policy": Numbered(),
        "keep_whole": keep_whole,
        "isolate_turns": isolate_turns,
        "granularity": granularity,
        "positions": positions,
        "chat_format": chat_format,
        **QUIET,
    }
    llm = Llama(bundled_model, **options)
    watch = Watch(llm, keep_whole, isolate_turns)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for _ in range(data.draw(st.integers(1, 4))):
                action = data.draw(st.sampled_from(["read", "read", "back", "session"]))
                if action == "read":
                    picks = st.lists(st.integers(0, len(SAYINGS) - 1), min_size=1, max_size=6)
                    llm.eval(conversation(llm, data.draw(picks)))
                elif action == "back":
                    length = llm.n_tokens - data.draw(st.integers(0, 40))
                    if length > 0 and watch.kv.can_rewind(length):
                        llm.n_tokens = length
                        llm.eval([9])
                elif llm.n_tokens:
                    llm.save_session(Path(folder) / "s")
                    llm.close()
                    llm = Llama(bundled_model, **options)
                    llm.load_session(Path(folder) / "s")
                    watch = Watch(llm, keep_whole, isolate_turns)
            llm.eval(random_tokens(200)[1:])
        finally:
            llm.close()


@pytest.mark.parametrize("granularity", ["head", "token"])
def test_without_words_or_turns_in_the_text_the_options_change_nothing(
    bundled_model: str, load: Loader, granularity: str
) -> None:
    spaced = load(bundled_model, **TIGHT).tokenize(b" a b c d e f g" * 120)
    held = []
    for change in ({}, {"keep_whole": "words"}, {"isolate_turns": True}):
        llm = load(bundled_model, **TIGHT, granularity=granularity, policy="keydiff", **change)
        llm.eval(spaced)
        assert llm.kv_stats.evictions > 2
        held.append(llm.kv_indices)
    np.testing.assert_array_equal(held[0], held[1])
    np.testing.assert_array_equal(held[0], held[2])


def test_sentences_leave_little_of_a_budget_unused(
    bundled_model: str, load: Loader, book: str
) -> None:
    llm = load(bundled_model, **TIGHT, policy="keydiff", keep_whole="sentences")
    kept: list[int] = []
    assert llm.kv is not None
    llm.kv.on_evict = lambda e: kept.append(e.kept)
    llm.eval(llm.tokenize(book[3000:12000].encode()))
    assert len(kept) > 5
    assert np.mean(kept) > 0.95 * 120


@pytest.mark.parametrize("keep_whole", KEEP_WHOLE)
def test_the_table_of_spans_does_not_grow_with_the_text(
    bundled_model: str, load: Loader, book: str, keep_whole: str
) -> None:
    llm = load(bundled_model, **TIGHT, policy="keydiff", keep_whole=keep_whole)
    llm.eval(llm.tokenize(book.encode())[:4000])
    assert llm.kv is not None
    assert len(llm.kv.snapshot().spans) <= 256  # no more than there are cells


def test_what_is_clipped_away_is_no_span_and_borders_may_cross() -> None:
    spans = np.array([(0, 4, TEXT), (4, 9, TEXT), (9, 12, TURN)], np.int32)
    assert clipped(spans, 2, 10).tolist() == [[2, 4], [4, 9], [9, 10]]
    assert clipped(spans, 4, 9).tolist() == [[4, 9]]
    assert clipped(spans, 9, 4).tolist() == []
    tokens = np.arange(6, dtype=np.int32)
    assert units(tokens, clipped(spans, 2, 10)).tolist() == [0, 1, 2, 2, 4, 4]
    assert units(tokens, clipped(spans, 9, 4)) is tokens


@examples(60)
@given(data=st.data())
def test_units_and_what_is_held_of_spans_are_those_of_a_walk_through_them(
    data: st.DataObject,
) -> None:
    borders = data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=12, unique=True))
    borders.sort()
    found = np.array([*zip(borders[::2], borders[1::2], strict=False)], np.int32).reshape(-1, 2)
    n, heads = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 3))
    drawn = st.lists(st.integers(0, 45), min_size=n, max_size=n, unique=True).map(sorted)
    tokens = np.array([data.draw(drawn) for _ in range(heads)], np.int32)

    def unit(token: int) -> int:
        return next((a for a, b in found.tolist() if a <= token < b), token)

    assert units(tokens, found).tolist() == [[unit(t) for t in row] for row in tokens.tolist()]
    assert units(tokens, found).dtype == np.int32
    held = {int(t) for t in tokens.ravel()}
    want = [len(held & set(range(a, b))) > 1 for a, b in found.tolist()]
    assert several_held(tokens, found).tolist() == want


def test_an_eviction_is_no_more_work_in_a_long_conversation() -> None:
    def peak(first: int) -> int:
        tokens = np.arange(first, first + 500, dtype=np.int32)
        found = np.array([(first + 3, first + 9)], np.int32)
        tracemalloc.start()
        try:
            units(tokens, found)
            several_held(tokens, found)
            no_longer_held(tokens, tokens[::2])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(0)
    assert peak(10**7) < 2 * peak(0)


# -- turns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_settled", "n_newer", "room", "stay"),
    [
        (0, 100, 40, 0),  # nothing is settled yet
        (30, 100, 40, 30),  # exactly three quarters: nothing settled goes
        (31, 100, 40, 30),
        (100, 5, 40, 35),  # newer tokens do not fill their quarter
        (100, 0, 40, 40),
        (3, 100, 1, 0),  # of a single place the newest turn has the quarter
        (5, 5, 0, 0),
    ],
)
def test_settled_tokens_keep_three_quarters_or_what_newer_ones_leave(
    n_settled: int, n_newer: int, room: int, stay: int
) -> None:
    assert settled_share(n_settled, n_newer, room) == stay


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_the_room_is_used_and_a_new_turn_never_starves(settled: int, newer: int, room: int) -> None:
    stay = settled_share(settled, newer, room)
    left = min(newer, room - stay)
    assert 0 <= stay <= settled
    assert stay + left == min(room, settled + newer)
    assert left >= min(newer, room // 4)


@pytest.mark.parametrize("granularity", ["head", "token"])
@pytest.mark.parametrize("isolate_turns", [False, True])
def test_new_turns_leave_settled_tokens_three_quarters_of_the_room(
    bundled_model: str, load: Loader, granularity: str, isolate_turns: bool
) -> None:
    """Recency would drop everything but the newest."""
    llm = load(
        bundled_model,
        **TIGHT,
        n_batch=8,
        policy="recency",
        granularity=granularity,
        isolate_turns=isolate_turns,
    )
    kv = llm.kv
    assert kv is not None
    tokens = conversation(llm, [0, 1, 2, 1] * 10)
    llm.eval(tokens[:257])
    assert llm.kv_stats.evictions == 1
    settled = kv.snapshot().tail  # all turns before it will be finished
    assert settled == 256 - 24
    old = 232  # before the recent window
    assert (np.unique(llm.kv_indices) < old).sum() == 120 - 24
    llm.eval(tokens[257:400])
    assert llm.kv_stats.evictions == 2
    held = np.unique(llm.kv_indices)
    room = 120 - 4 - 24
    assert (held < settled).sum() == 4 + (room - room // 4 if isolate_turns else 0)


def test_a_turn_that_goes_on_after_going_back_is_not_settled(
    bundled_model: str, load: Loader
) -> None:
    llm = load(bundled_model, **TIGHT, policy="recency", isolate_turns=True)
    llm.eval(conversation(llm, [2, 1] * 6)[:300])
    llm.evict()
    assert llm.kv is not None
    table = llm.kv.snapshot()
    (one, _), (newest, end) = [s[:2] for s in table.spans.tolist() if s[2] == TURN][-2:]
    # the border of what is protected lies in the turn before the newest
    assert one < table.rewind_from == 277 < newest
    assert settled_before(table) == 276
    for length, settled in ((300, 276), (end, 276), (end - 1, one), (newest, one), (277, one)):
        assert settled_before(table.cut(length)) == settled


def test_a_template_without_markers_is_told_once(bundled_model: str, load: Loader) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no template here")

    llm = load(bundled_model, **TIGHT, isolate_turns=True, chat_handler=broken)
    with pytest.warns(UserWarning, match="isolate_turns has no effect") as told:
        llm.eval(random_tokens(900))
    assert len(told) == 1
    assert llm.kv_stats.evictions > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(bundled_model, **TIGHT, chat_handler=broken).eval(random_tokens(900))


# -- chats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"keep_whole": "words"}, {"keep_whole": "sentences"}, {"isolate_turns": True}],
    ids=["words", "sentences", "turns"],
)
@pytest.mark.parametrize("granularity", ["head", "token"])
def test_a_chat_with_each_option_remembers_and_a_saved_one_goes_on(
    bundled_model: str, load: Loader, tmp_path: Path, granularity: str, options: dict[str, Any]
) -> None:
    kind = {"n_ctx": 4000, "kv_budget": 200, "reserve": 56, "granularity": granularity, **options}
    llm = load(bundled_model, **kind)
    messages: list[Any] = []

    def say(to: Llama, text: str) -> str:
        messages.append({"role": "user", "content": text})
        answer: Any = to.create_chat_completion(messages, max_tokens=24, temperature=0.0)
        messages.append(answer["choices"][0]["message"])
        return str(messages[-1]["content"])

    say(llm, "My dog is called Ralph.")
    for _ in range(6):
        say(llm, "Tell me something about the sea, and about the land behind it. " * 3)
    assert llm.kv_stats.evictions > 1
    llm.save_session(tmp_path / "s", extra=list(messages))
    before = list(messages)
    said = say(llm, "What is my dog called?")
    assert "Ralph" in said
    other = load(bundled_model, **kind)
    messages[:] = other.load_session(tmp_path / "s")
    assert messages == before
    assert say(other, "What is my dog called?") == said
    np.testing.assert_array_equal(other.kv_indices, llm.kv_indices)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"keep_whole": "words"}, "keep_whole"), ({"isolate_turns": True}, "isolate_turns")],
)
def test_sessions_refuse_other_settings(
    bundled_model: str, load: Loader, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    llm = load(bundled_model, **TIGHT)
    llm.eval(random_tokens(300))
    llm.save_session(tmp_path / "s")
    other = load(bundled_model, **TIGHT, **change)
    with pytest.raises(SessionError, match=f"with {name} = .* but here it is"):
        other.load_session(tmp_path / "s")


def test_what_cannot_be_kept_whole_is_refused(bundled_model: str, load: Loader) -> None:
    with pytest.raises(ValueError, match="must be 'tokens', 'words' or 'sentences', not 'pages'"):
        load(bundled_model, **TIGHT, keep_whole="pages")
