"""Nothing is in training and in evaluation: no sentence frame, no word of a list, no text.

Training is what traces are made of (kvp_edge/traces) and what the scripts train on; evaluation is
kvp_edge/evaluation, the demo and scripts/recall_eval. Frames and lists of the evaluation are read
from its source files, so that a new one is compared, too.

The bundled model is not part of this: it was trained to understand the sentences of its evaluation
(scripts/train_model), as docs/bundled-model.md says, with other words and books.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from kvp_edge import corpora
from kvp_edge.cli import demo_tasks
from kvp_edge.evaluation.item import Continuation, Item
from kvp_edge.evaluation.tasks import GENERATION, TASKS
from kvp_edge.traces import questions, vocabulary
from kvp_edge.traces.frames import FRAMES, LISTINGS, slots
from support.paths import ROOT

#: A run of so many words is a frame; a slot is a word.
RUN = 6

#: In novels of one century shorter runs are chance ("on the other side of the").
TEXT_RUN = 8

#: Words that may be in any list, as parts of its entries.
STOP_WORDS = {*"a an and at before half in of on over the to".split()}  # noqa: SIM905

EVALUATION = [
    *sorted((ROOT / "kvp_edge/evaluation/tasks").glob("*.py")),
    ROOT / "kvp_edge/evaluation/facts.py",
    ROOT / "kvp_edge/cli/demo_tasks.py",
    ROOT / "scripts/recall_eval/conversations.py",
]
TRAINING = [ROOT / "kvp_edge/traces/frames.py"]


# -- what there is --------------------------------------------------------------------------------


class _Strings(ast.NodeVisitor):
    """All strings of a module but its docstrings; in f-strings, expressions are slots."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
        self.found.append("".join(map(str, parts)))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.found.append(node.value)


def strings(path: Path) -> list[str]:
    visitor = _Strings()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.found


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Every line of the texts, and every sentence of it."""
    for text in texts:
        for line in text.splitlines():
            yield line
            yield from re.split(r"(?<=[.?!:]) ", line)


def words(frame: str) -> list[str]:
    """The words of a frame; a slot is "_"."""
    return re.findall(r"[a-z0-9']+|_", re.sub(r"\{[^{}]*\}", " _ ", frame.lower()))


def skeleton(frame: str) -> tuple[str, ...]:
    """The words of a frame without its slots."""
    return tuple(word for word in words(frame) if word != "_")


def runs(text: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}


@cache
def frames(*paths: Path) -> frozenset[str]:
    """All lines that may be frames."""
    return frozenset(line for path in paths for line in lines(strings(path)))


def skeletons(found: Iterable[str]) -> set[tuple[str, ...]]:
    """Of sentences, and of anything else with two words at least (`{key}: {value}` has none)."""
    kept = (f for f in found if re.search(r"[a-zA-Z].*[.?!]$", f) or len(skeleton(f)) > 1)
    return {skeleton(frame) for frame in kept} - {()}


def frame_runs(found: Iterable[str]) -> set[tuple[str, ...]]:
    return {run for frame in found for run in runs(words(frame), RUN)}


def listed(path: Path) -> set[str]:
    """The words of all lists in a module: strings of at least eight words and nothing else, and
    tuples, lists and sets of at least five words."""
    found = [
        s.split() for s in strings(path) if re.fullmatch(r"\s*(?:[\w'-]+\s+){7,}[\w'-]+\s*", s)
    ]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and len(node.elts) >= 5:
            entries = [e.value for e in node.elts if isinstance(e, ast.Constant)]
            if all(isinstance(e, str) and len(e.split()) == 1 for e in entries):
                found.append([str(e) for e in entries])
    return {part for word in found for entry in word for part in re.split(r"[-_]", entry.lower())}


@cache
def asked_in_evaluation() -> frozenset[tuple[str, ...]]:
    """All runs of words that evaluation and demo show a model, of several items of every task."""

    def count(text: str) -> int:
        return len(text.split())

    texts: list[str] = []
    for name, task in TASKS.items():
        for made in task.make(2 if name in GENERATION else 8, 1024, count, 0):
            if isinstance(made, Item):
                texts += [message["content"] for message in made.messages]
                texts += [question.text for question in made.more]
            elif isinstance(made, Continuation):
                texts.append(str(made.context))
                texts += made.questions
            else:
                texts += [str(made.context), made.ending]
    for item in demo_tasks.make_items(30, 300, count, 0):
        texts += [message["content"] for message in item.messages]
    return frozenset(run for text in texts for run in runs(words(text), RUN))


def asked_in_training() -> set[tuple[str, ...]]:
    """All runs of words in the facts and questions of many traces, without the prose."""
    maker = questions.TaskMaker("Nothing.", lambda text: len(text.split()), seed=0)
    tasks = [maker.make(40) for _ in range(1500)]
    texts = [message["content"] for task in tasks for message in task.messages]
    return {run for line in lines(texts) for run in runs(words(line), RUN)}


# -- sentences ------------------------------------------------------------------------------------


def test_the_frames_of_both_sides_are_found() -> None:
    evaluation = skeletons(frames(*EVALUATION))
    for frame in (
        "One of the special magic numbers for {key} is {value}.",  # the demo's, and recall_eval's
        "One of the special magic {kind} for {key} is: {value}.",  # RULER's
        "My favourite {key} is {value}.",
        "Please look up the door code of {key}.",
        "VAR {a} = {b}.",
        "What is the value of {key}?",
        "Who had the courage to quiet the bear?",
    ):
        assert skeleton(frame) in evaluation
    training = skeletons(frames(*TRAINING))
    for told in FRAMES:
        assert {skeleton(way) for part in told.parts for way in part} <= training
        assert {skeleton(way) for ways in told.questions.values() for way in ways} <= training


def test_no_frame_is_in_training_and_evaluation() -> None:
    assert sorted(skeletons(frames(*TRAINING)) & skeletons(frames(*EVALUATION))) == []


def test_no_run_of_words_is_in_a_frame_of_training_and_in_one_of_evaluation() -> None:
    assert sorted(frame_runs(frames(*TRAINING)) & frame_runs(frames(*EVALUATION))) == []


def test_no_run_of_words_is_in_a_frame_of_training_and_in_what_evaluation_asks() -> None:
    asked = asked_in_evaluation()
    assert len(asked) > 10_000
    assert sorted(frame_runs(frames(*TRAINING)) & asked) == []


def test_no_run_of_words_is_in_the_facts_of_traces_and_in_what_evaluation_asks() -> None:
    asked = asked_in_training()
    assert len(asked) > 10_000
    assert sorted(asked & asked_in_evaluation()) == []
    assert sorted(asked & frame_runs(frames(*EVALUATION))) == []


def test_episodes_are_not_what_the_bundled_model_was_trained_on_either() -> None:
    train_model = [ROOT / "scripts/train_model" / name for name in ("phrases.py", "wordings.py")]
    trained = frames(*train_model)
    episodes = frames(ROOT / "kvp_edge/evaluation/tasks/episodes.py")
    assert sorted(skeletons(episodes) & skeletons(trained)) == []
    assert sorted(frame_runs(episodes) & frame_runs(trained)) == []


# -- words ----------------------------------------------------------------------------------------


def test_no_word_of_a_list_is_in_training_and_evaluation() -> None:
    evaluation = set().union(*map(listed, EVALUATION))
    assert {"margaret", "teapot", "beacon", "locker", "spyglass"} <= evaluation
    training = {
        part
        for entries in vocabulary.WORDS.values()
        for entry in entries
        for part in re.findall(r"[a-z]+", entry.lower())
    } - STOP_WORDS
    assert {"aisha", "kayak", "paella", "halcyon"} <= training
    assert sorted(training & evaluation) == []


@pytest.mark.parametrize(
    "lists", [demo_tasks.WORDS, demo_tasks.NAMES, " ".join(demo_tasks.PERSONAL)]
)
def test_the_demo_has_words_of_its_own(lists: str) -> None:
    training = {entry.lower() for entries in vocabulary.WORDS.values() for entry in entries}
    assert sorted({word.lower() for word in lists.split()} & training) == []


# -- texts ----------------------------------------------------------------------------------------


def test_the_bundled_prose_of_training_is_not_that_of_evaluation() -> None:
    prose = (corpora.training_prose(), corpora.evaluation_prose())
    texts = [re.findall(r"[a-z']+", text.lower()) for text in prose]
    assert all(len(text) > 15_000 for text in texts)
    assert sorted(runs(texts[0], TEXT_RUN) & runs(texts[1], TEXT_RUN)) == []


def test_a_book_is_for_training_or_for_evaluation() -> None:
    assert not corpora.TRAINING_BOOKS & corpora.EVALUATION_BOOKS
    assert len(corpora.TRAINING_BOOKS | corpora.EVALUATION_BOOKS) == 100
    for title in corpora.TRAINING_BOOKS:
        assert corpora.for_training(f"books/{title}.txt")
        assert not corpora.for_evaluation(f"books/{title}.txt")
    for title in corpora.EVALUATION_BOOKS:
        assert corpora.for_evaluation(f"books/{title}.txt")
        assert not corpora.for_training(f"books/{title}.txt")
    assert corpora.for_training("mine.txt")
    assert corpora.for_evaluation("mine.txt")


def test_the_bundled_prose_comes_from_books_of_its_own_side() -> None:
    assert {*corpora.TRAINING_PROSE_BOOKS} <= corpora.TRAINING_BOOKS
    assert {*corpora.EVALUATION_PROSE_BOOKS} <= corpora.EVALUATION_BOOKS


def test_no_book_to_train_on_matches_a_pattern_of_evaluation_alone() -> None:
    evaluation = [*corpora.DIALOGUE_FILES, corpora.MEETING_FILES, corpora.QUESTION_FILE]
    evaluation += corpora.PAIR_FILES.values()
    assert not any(
        Path(f"books/{title}.txt").match(p) for title in corpora.TRAINING_BOOKS for p in evaluation
    )


def test_no_chat_or_meeting_is_on_both_sides() -> None:
    sides = (
        (*corpora.DIALOGUE_FILES, corpora.MEETING_FILES),
        (*corpora.TRAINING_DIALOGUE_FILES, corpora.TRAINING_MEETING_FILES),
    )
    topical = [f"{split}_{rare}" for split in ("valid", "test") for rare in ("freq", "rare")]
    files = [
        "dialogue/oasst_en100/en_100_tree.jsonl",
        *(f"dialogue/topical_chat/conversations/{name}.json" for name in topical),
        *(f"dialogue/taskmaster4/data/data_0{i}.json" for i in range(8)),
        *(f"meetings/qmsum/{name}.jsonl" for name in ("val", "test")),
    ]
    on = {file: [any(Path(file).match(p) for p in side) for side in sides] for file in files}
    assert all(sum(side) == 1 for side in on.values()), on


def test_every_file_that_evaluation_or_a_script_names_is_one_of_the_split() -> None:
    """No other module names a book or a data file."""
    named = re.compile(
        r"\b(?:[A-Z][a-z]+_[A-Z][a-z]+_(?:18|19)\d\d)\b|(?:dialogue|meetings|qa)/\w+/"
    )
    modules = [*ROOT.glob("kvp_edge/**/*.py"), *ROOT.glob("scripts/**/*.py")]
    assert len(modules) > 150
    naming = {
        str(module.relative_to(ROOT))
        for module in modules
        if named.search(module.read_text(encoding="utf-8"))  # then, not in a docstring?
        and any(map(named.search, strings(module)))
    }
    assert naming == {"kvp_edge/corpora.py"}


# -- frames that can be used ----------------------------------------------------------------------


def test_there_are_many_frames_in_many_domains() -> None:
    assert len(FRAMES) >= 50
    assert len(LISTINGS) >= 10
    assert len({frame.domain for frame in (*FRAMES, *LISTINGS)}) >= 40
    assert sum(len(frame.parts) > 1 for frame in FRAMES) >= 8
    told = [way for frame in FRAMES for part in frame.parts for way in part]
    assert len({skeleton(way) for way in told}) == len(told)


def test_every_way_to_tell_a_part_tells_all_of_it() -> None:
    for frame in FRAMES:
        for part in frame.parts:
            assert len(part) >= 2
            assert len({frozenset(slots(way)) for way in part}) == 1
    for listing in LISTINGS:
        assert all(set(slots(line)) == {listing.key, listing.value} for line in listing.lines)


def test_every_question_names_what_it_is_about_and_not_its_answer() -> None:
    for frame in (*FRAMES, *LISTINGS):
        known = frame.slots if frame in FRAMES else {frame.key, frame.value}
        for slot, ways in frame.questions.items():
            assert slot in known
            for way in ways:
                assert slots(way), way
                assert set(slots(way)) <= set(known) - {slot}, way


def test_some_questions_need_two_facts() -> None:
    """Neither part alone has both the answer and what the question names."""
    for frame in FRAMES:
        if len(frame.parts) > 1:
            parts = [set(slots(part[0])) for part in frame.parts]
            needed = [{slot, *slots(way)} for slot, ways in frame.questions.items() for way in ways]
            assert any(not any(need <= part for part in parts) for need in needed), frame.domain


def test_there_are_words_enough_for_six_facts_of_a_frame() -> None:
    for frame in FRAMES:
        kinds = list(frame.slots.values())
        for kind in kinds:
            assert kind in vocabulary.VALUES or len(vocabulary.WORDS[kind]) >= 6 * kinds.count(kind)
    for entries in vocabulary.WORDS.values():
        assert len(set(entries)) == len(entries)


def test_no_statement_begins_with_a_word_that_a_sentence_would_capitalise() -> None:
    """The answer is what was told, letter for letter."""
    for frame in FRAMES:
        for way in (way for part in frame.parts for way in part if way.startswith("{")):
            kind = next(iter(slots(way).values()))
            for word in vocabulary.WORDS.get(kind, ()):
                assert word[0].isupper() or not word.split()[0].isalpha(), way


def test_every_value_can_be_drawn() -> None:
    rng = random.Random(0)
    for kind in (*vocabulary.VALUES, *vocabulary.WORDS):
        drawn = {vocabulary.draw(kind, rng) for _ in range(200)}
        assert len(drawn) > 6
        assert not any(set("@#%{}") & set(value.removesuffix(" %")) for value in drawn), kind
