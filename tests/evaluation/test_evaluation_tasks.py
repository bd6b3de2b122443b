"""The tasks of `kvp-edge eval`: what they ask, what the answer is, and how long they are."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from kvp_edge.corpora import PAIR_FILES, QUESTION_FILE, TRAINING_BOOKS, evaluation_prose
from kvp_edge.evaluation.item import Continuation, CountTokens, Item, Reading, Task, names
from kvp_edge.evaluation.tasks import RULER, TASKS, data_tasks, episodes, novel, words
from kvp_edge.evaluation.tasks.dialogues import exchanges
from kvp_edge.evaluation.tasks.filling import Draft, conversation, fill
from kvp_edge.traces import vocabulary


def words_and_signs(text: str) -> int:
    """A tokenizer that makes many tokens: every word, every sign, every space."""
    return len(re.findall(r"\w+|\W", text))


def thirds(text: str) -> int:
    """A tokenizer whose tokens have three characters."""
    return -(-len(text) // 3)


COUNTS = (words_and_signs, thirds)

READINGS = ("books", "continuation", "story")
QUESTIONS = [name for name in TASKS if name not in READINGS]
DATA = ("qa_1", "qa_2", "kv_75", "kv_140", "books", "dialogues", "meetings")

#: What answers of one place in the text are; in the others they are spread over it, or made of it.
HIDDEN = [name for name in QUESTIONS if name not in ("cwe", "fwe", "copy", "edits", "sums")]


def items(name: str, count: int = 3, length: int = 1024, seed: int = 0) -> list[Item]:
    made = TASKS[name].make(count, length, words_and_signs, seed)
    assert all(isinstance(item, Item) for item in made)
    return made  # type: ignore[return-value]


def before_question(item: Item) -> str:
    """All that is said before the question."""
    *earlier, last = [message["content"] for message in item.messages]
    assert last.endswith(item.question)
    return "\n".join([*earlier, last.removesuffix(item.question)])


def total(made: Item | Reading | Continuation, count: CountTokens) -> int:
    """The tokens of all that is said."""
    texts: list[str]
    if isinstance(made, Continuation) and isinstance(made.context, str):
        return count(made.context) + made.tokens
    if isinstance(made, Item | Continuation):
        messages = made.messages if isinstance(made, Item) else made.context
        texts = [message["content"] for message in messages if isinstance(message, dict)]
        more = made.more if isinstance(made, Item) else made.questions
        asked = [one if isinstance(one, str) else one.text for one in more]
        texts += [*asked, *asked]  # replies are about as long as questions
    elif isinstance(made.context, str):
        texts = [made.context, made.ending]
    else:
        texts = [*(message["content"] for message in made.context), made.ending]
    return sum(map(count, texts))


# -- a folder with a little of all data ----------------------------------------------------------


def write_lines(path: Path, entries: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up data in the formats of the published files."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def sentence(n_words: int = 9) -> str:
        return " ".join(rng.choices(words.WORDS, k=n_words)).capitalize() + "."

    def text(n_sentences: int) -> str:
        return " ".join(sentence() for _ in range(n_sentences))

    (root / "books").mkdir()
    for title in ("First", "Second"):
        (root / "books" / f"{title}.txt").write_text("\n\n".join(text(5) for _ in range(200)))

    path = root / QUESTION_FILE
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i in range(200):
            answer = f"Answer{i} Person"
            answers = [answer] if i % 2 else [answer, f"the {answer}"]
            gold = {"title": f"Title {i}", "text": f"{sentence()} It was {answer}. {sentence()}"}
            entry = {"question": f"who was it in case {i}", "answers": answers, "ctxs": [gold]}
            file.write(json.dumps(entry) + "\n")

    for n_pairs, file_name in PAIR_FILES.items():
        path = root / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for _ in range(20):
                uuids = words.draw("uuids", 2 * n_pairs, rng)
                pairs = list(zip(uuids[::2], uuids[1::2], strict=True))
                key, value = rng.choice(pairs)
                entry = {"ordered_kv_records": pairs, "key": key, "value": value}
                file.write(json.dumps(entry) + "\n")

    def tree(i: int) -> dict[str, object]:
        last = {"role": "prompter", "text": f"thanks {i}", "replies": [], "rank": None}
        replies = [
            {"role": "assistant", "text": f"worse {i}", "rank": 1, "replies": []},
            {"role": "assistant", "text": f"better {i} {text(3)}", "rank": 0, "replies": [last]},
        ]
        return {"prompt": {"role": "prompter", "text": f"asked {i} {text(2)}", "replies": replies}}

    write_lines(root / "dialogue/oasst_en100/en_100_tree.jsonl", [tree(i) for i in range(100)])
    said = [
        [{"message": f"{i} {text(2)}", "agent": f"agent_{1 + i % 2}"} for i in range(10)]
        for _ in range(30)
    ]
    chats = {f"chat{i}": {"content": turns} for i, turns in enumerate(said)}
    write_lines(root / "dialogue/topical_chat/conversations/test_freq.json", [chats])
    orders = [
        {"utterances": [{"speaker": who, "text": sentence()} for who in ("user", "assistant") * 3]}
        for _ in range(80)
    ]
    write_lines(root / "dialogue/taskmaster4/data/data_06.json", [orders])

    turns = [{"speaker": f"Person {i % 3}", "content": f"Turn{i} {sentence()}"} for i in range(500)]
    turns[0]["content"] = "Well {disfmarker} good , then ."
    asked = [
        {
            "query": f"What about {i}?",
            "answer": sentence(),
            "relevant_text_span": [[f"{i}", f"{i}"]],
        }
        for i in (0, 100, 250, 499)
    ]
    meeting = {"meeting_transcripts": turns, "specific_query_list": asked}
    write_lines(root / "meetings/qmsum/test.jsonl", [meeting])
    return root


@pytest.fixture(params=[*TASKS, *(f"{name} of a folder" for name in DATA)])
def task(request: pytest.FixtureRequest, folder: Path) -> Task:
    """Every task, with and without data."""
    name = str(request.param)
    if not name.endswith(" of a folder"):
        return TASKS[name]
    return data_tasks(folder)[name.removesuffix(" of a folder")]


# -- what holds for all ---------------------------------------------------------------------------


def test_the_same_seed_asks_the_same_and_another_seed_something_else(task: Task) -> None:
    first, again, other = (task.make(3, 1024, words_and_signs, seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert len(first) == 3
    assert first[0] != first[1]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_conversations_are_as_long_as_asked_for_and_no_longer(
    task: Task, length: int, count: CountTokens
) -> None:
    for made in task.make(3, length, count, 0):
        # Templates need some tokens for each of many messages, and filler comes in whole sentences,
        # turns or paragraphs.
        assert length * 0.45 < total(made, count) <= length


def test_too_few_tokens_are_refused_in_a_sentence(task: Task) -> None:
    with pytest.raises(ValueError, match=rf"'{task.name}' .* 5 tokens"):
        task.make(1, 5, words_and_signs, 0)


def test_every_task_tells_in_a_sentence_what_it_is(task: Task) -> None:
    assert len(task.about) > 20
    assert "\n" not in task.about
    assert not task.about.endswith(".")


def test_roles_alternate_and_the_users_message_comes_last(task: Task) -> None:
    for made in task.make(3, 1024, words_and_signs, 0):
        messages = made.messages if isinstance(made, Item) else made.context
        if isinstance(messages, str):
            continue
        roles = [message["role"] for message in messages]
        assert roles[0] == roles[-1] == "user"
        assert all(a != b for a, b in pairwise(roles))
        assert all(m["content"] and m["content"] == m["content"].strip() for m in messages)


def test_a_reply_with_all_answers_is_right_and_an_empty_one_wrong(task: Task) -> None:
    assert (task.reply_tokens == 0) == (task.name in (*READINGS, "dialogues", "meetings"))
    for item in task.make(3, 1024, words_and_signs, 0):
        if isinstance(item, Item):
            answers = [item.answers, *(question.answers for question in item.more)]
            right = [f"Perhaps {', '.join(those)}." for those in answers]
            assert item.score(*right) == 1
            assert item.score(*("" for _ in right)) == 0
            assert item.score("", *right[1:]) == pytest.approx(1 - 1 / len(right))
            room = len(item.answers) * 32 <= 2.5 * task.reply_tokens
            assert room or item.match in ("any", "order")


def test_the_first_items_are_the_same_when_more_are_asked_for() -> None:
    for name in QUESTIONS:
        assert items(name, 2) == items(name, 4)[:2]


# -- hidden answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HIDDEN)
def test_answers_stand_before_the_question_and_not_in_it(name: str) -> None:
    for item in items(name, 5):
        told = before_question(item)
        assert len(set(item.answers)) == len(item.answers)
        for answer in item.answers:
            assert names(told, answer)
            assert not names(item.question, answer)


NEEDLE = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")


@pytest.mark.parametrize(
    ("name", "keys", "values", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needles_are_as_many_as_rulers(name: str, keys: int, values: int, asked: int) -> None:
    for item in items(name, 5):
        needles = NEEDLE.findall(before_question(item))
        assert len({key for key, _ in needles}) == keys
        assert len({value for _, value in needles}) == len(needles) == values
        assert len(item.answers) == asked
        assert {v for k, v in needles if names(item.question, k)} == set(item.answers)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_is_nothing_else(name: str) -> None:
    for item in items(name, 5):
        _opening, *lines = before_question(item).strip().splitlines()
        needles = [NEEDLE.fullmatch(line) for line in lines]
        told = {needle[1]: needle[2] for needle in needles if needle}
        assert len(told) == len(lines) > 5
        assert [v for k, v in told.items() if k in item.question] == list(item.answers)


def test_needles_are_told_in_the_kinds_of_the_task() -> None:
    number, uuid = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
    word = "[a-z]+-[a-z]+"
    kinds = {"niah_single_2": (word, number), "niah_single_3": (word, uuid)}
    for name, (key, value) in {**kinds, "niah_multikey_3": (uuid, uuid)}.items():
        for item in items(name):
            for needle in NEEDLE.findall(before_question(item)):
                assert re.fullmatch(key, needle[0])
                assert re.fullmatch(value, needle[1])


def test_needles_lie_anywhere() -> None:
    for name in ("niah_single_1", "niah_single_2", "niah_multikey_2", "lookup", "pairs", "fact"):
        depths = []
        for item in items(name, 40):
            told = before_question(item)
            depths.append(told.index(item.answers[0]) / len(told))
        assert min(depths) < 0.3
        assert max(depths) > 0.7


def test_variables_are_those_that_the_assignments_give_the_value() -> None:
    for item in items("vt", 5):
        value = re.findall(r"\d+", item.question)
        state: dict[str, str] = {}
        for new, old in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", before_question(item)):
            state[new] = state.get(old, old)  # an assignment comes after those that it needs
        assert [name for name, its in state.items() if its == value[0]] == list(item.answers)
        assert len(item.answers) == 5


@pytest.mark.parametrize(
    ("length", "often", "seldom"), [(512, 6, 1), (2048, 6, 1), (4096, 30, 3), (8192, 30, 3)]
)
def test_common_words_are_the_most_common(length: int, often: int, seldom: int) -> None:
    for item in items("cwe", 3, length):
        listed = re.findall(r"(\d+)\. ([a-z]+)", before_question(item))
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, n in counts.items() if n == often} == set(item.answers)
        assert len(item.answers) == 10
        assert {n for word, n in counts.items() if word not in item.answers} == {seldom}


@pytest.mark.parametrize("length", [512, 1024, 4096, 16384])
def test_frequent_words_are_the_most_frequent_but_for_the_dots(length: int) -> None:
    for item in items("fwe", 3, length):
        text = before_question(item).strip().split(". ", 2)[2]
        (dots, n_dots), *most = Counter(text.split(" ")).most_common(5)
        assert dots == "..."
        assert [word for word, _ in most[:3]] == list(item.answers)
        assert n_dots > most[0][1] > most[1][1] > most[2][1] > most[3][1]


def test_a_list_that_needs_more_words_than_the_novel_has_goes_on() -> None:
    (item,) = TASKS["cwe"].make(1, 65536, words_and_signs, 0)
    assert isinstance(item, Item)
    listed = re.findall(r"\d+\. ([a-z]+)", before_question(item))
    assert len(set(listed)) > 3000
    assert total(item, words_and_signs) > 60000


# -- look-up and facts ----------------------------------------------------------------------------


def test_the_json_of_lookup_has_the_value_under_the_key() -> None:
    for item in items("lookup", 5):
        told = json.loads(before_question(item).split("JSON data:\n")[1])
        asked = item.question.split('"')[1]
        assert told[asked] == item.answers[0]
        assert len(told) > 5


def told_pairs(item: Item) -> list[tuple[str, str]]:
    return list(json.loads(before_question(item).split("JSON data:\n")[1]).items())


@pytest.mark.parametrize("n_pairs", PAIR_FILES)
def test_published_pairs_are_as_many_as_fit_in_their_order(folder: Path, n_pairs: int) -> None:
    with gzip.open(folder / PAIR_FILES[n_pairs], "rt", encoding="utf-8") as file:
        objects = [json.loads(line)["ordered_kv_records"] for line in file]
    for length, fewest, most in ((512, 5, 20), (1024, 20, 40), (65536, n_pairs, n_pairs)):
        for item in data_tasks(folder)[f"kv_{n_pairs}"].make(5, length, words_and_signs, 0):
            assert isinstance(item, Item)
            told = told_pairs(item)
            assert fewest <= len(told) <= most
            whole = [[tuple(pair) for pair in pairs] for pairs in objects]
            (whole_object,) = [pairs for pairs in whole if told[0] in pairs]
            assert told == [pair for pair in whole_object if pair in told]
            assert dict(told)[item.question.split('"')[1]] == item.answers[0]


def test_the_pair_asked_for_lies_anywhere(folder: Path) -> None:
    depths = []
    for item in data_tasks(folder)["kv_140"].make(40, 1024, words_and_signs, 0):
        assert isinstance(item, Item)
        told = told_pairs(item)
        depths.append([value for _, value in told].index(item.answers[0]) / len(told))
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_a_file_of_pairs_without_the_one_asked_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / PAIR_FILES[75]
    path.parent.mkdir(parents=True)
    for content, says in (
        (json.dumps({"ordered_kv_records": [["a", "b"]], "key": "a", "value": "c"}), "object 0"),
        ("", "it is empty"),
    ):
        path.write_bytes(gzip.compress(content.encode()))
        with pytest.raises(ValueError, match=rf"{path} cannot be read .*{says}"):
            data_tasks(tmp_path)["kv_75"].make(1, 512, words_and_signs, 0)


def test_the_list_of_pairs_has_one_value_for_the_key() -> None:
    for item in items("pairs", 5):
        told = dict(re.findall(r"(\S+): (\d{7})\.", before_question(item)))
        asked = item.question.removeprefix("What is the value of ").removesuffix("?")
        assert told[asked] == item.answers[0]
        assert len(told) == len(set(told.values())) > 50


@pytest.mark.parametrize(("name", "facts"), [("fact", 1), ("facts", 4)])
def test_facts_in_prose_are_so_many_with_different_values(name: str, facts: int) -> None:
    for item in items(name, 5):
        told = re.findall(r"special magic \w+ for (\w+) is (\w+)\.", before_question(item))
        assert len(dict(told)) == len({value for _, value in told}) == facts
        assert [v for k, v in told if names(item.question, k)] == list(item.answers)


def test_recall_tells_six_facts_in_turns_of_their_own() -> None:
    fact = r"My (?:favourite )?\w+ is (?:called )?(\w+)\.|The code of my \w+ is (\d+)\."
    for item in items("recall", 5):
        said = [m["content"] for m in item.messages if m["role"] == "user"]
        told = [a or b for a, b in re.findall(fact, "\n".join(said))]
        assert len(told) == len(set(told)) == 6
        assert item.answers[0] in told
        assert item.messages[-1]["content"] == item.question
        assert len(item.messages) > 13  # prose between them


def test_no_key_or_value_is_one_that_policies_are_trained_on() -> None:
    trained = {entry for entries in vocabulary.WORDS.values() for entry in entries}
    assert not trained & set(words.WORDS)
    for item in items("recall", 60, 512):
        assert item.answers[0] not in trained
        assert not trained & set(re.findall(r"\w+", item.question))


def test_words_are_different_and_plain() -> None:
    assert len(set(words.WORDS)) == len(words.WORDS)
    assert all(re.fullmatch("[a-z]+", word) for word in words.WORDS)


@pytest.mark.parametrize("kind", ["words", "numbers", "uuids"])
def test_no_value_is_drawn_twice(kind: words.Kind) -> None:
    assert len(set(words.draw(kind, words.MOST, random.Random(0)))) == words.MOST


# -- episodes -------------------------------------------------------------------------------------


def test_episodes_have_many_wordings_and_every_question_can_be_answered_from_its_own() -> None:
    assert len(episodes.WORDINGS) >= 12
    for told, asked in episodes.WORDINGS:
        known = set(re.findall(r"\{(\w+)\}", told))
        for question, slot in asked:
            assert slot in known
            assert set(re.findall(r"\{(\w+)\}", question)) <= known - {slot}


@pytest.mark.parametrize(("name", "count"), [("episode", 1), ("episodes", 6)])
def test_an_answer_is_what_its_episode_says_and_no_other_episode_names_it(
    name: str, count: int
) -> None:
    slot = re.compile(r"\\\{\w+\\\}")
    forms = {
        slot.sub(lambda _: r"([\w-]+)", re.escape(told)): asked for told, asked in episodes.WORDINGS
    }
    seen = set()
    for item in items(name, 40):
        before = before_question(item)
        told = {form: found for form in forms if (found := re.findall(form, before))}
        assert len(told) == count
        naming = [form for form in told if any(names(str(f), item.answers[0]) for f in told[form])]
        assert len(naming) == 1
        seen.add(naming[0])
        asked = [slot.sub(".+", re.escape(question)) for question, _ in forms[naming[0]]]
        assert any(re.fullmatch(question, item.question) for question in asked)
    assert len(seen) >= 12


# -- questions about paragraphs -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "golds"), [("qa_1", 1), ("qa_2", 2)])
def test_only_the_paragraphs_asked_about_name_the_answer(
    folder: Path, name: str, golds: int
) -> None:
    for item in data_tasks(folder)[name].make(5, 1024, words_and_signs, 0):
        assert isinstance(item, Item)
        documents = re.split(r"Document \d+:\n", before_question(item))[1:]
        assert len(documents) > 5
        naming = [d for d in documents if any(names(d, answer) for answer in item.answers)]
        assert len(naming) == golds
        for case in re.findall(r"case (\d+)", item.question):
            assert f"Answer{case} Person" in item.answers
        assert item.match == ("any" if golds == 1 else "all")


def test_two_questions_are_half_right_with_one_answer(folder: Path) -> None:
    (item,) = data_tasks(folder)["qa_2"].make(1, 1024, words_and_signs, 0)
    assert isinstance(item, Item)
    assert item.score(item.answers[0]) == 0.5


# -- readings -------------------------------------------------------------------------------------


def test_a_books_ending_goes_on_where_its_context_ends() -> None:
    novel_words = " ".join(evaluation_prose().split())
    for reading in TASKS["books"].make(4, 1024, words_and_signs, 0):
        assert isinstance(reading, Reading)
        assert isinstance(reading.context, str)
        assert reading.context + reading.ending in novel_words
        share = words_and_signs(reading.context) / total(reading, words_and_signs)
        assert 0.7 < share < 0.8


def test_a_book_is_never_read_twice_in_one_text() -> None:
    with pytest.raises(ValueError, match="'books' has no text of which 100000 tokens are a part"):
        TASKS["books"].make(1, 100_000, words_and_signs, 0)


def test_books_take_turns_and_short_ones_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for title, count in (("long", 2000), ("longer", 3000), ("short", 40), ("empty", 0)):
        (tmp_path / "books" / f"{title}.txt").write_text(f"{title} " * count)
    made = data_tasks(tmp_path)["books"].make(4, 512, words_and_signs, 0)
    read = [reading.ending.split()[0] for reading in made if isinstance(reading, Reading)]
    assert Counter(read) == {"long": 2, "longer": 2}


def test_books_to_train_on_are_not_measured(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    trained = sorted(TRAINING_BOOKS)[0]
    (tmp_path / "books" / f"{trained}.txt").write_text("trained " * 2000)
    assert data_tasks(tmp_path) == {}
    (tmp_path / "books" / "mine.txt").write_text("mine " * 2000)
    for reading in data_tasks(tmp_path)["books"].make(3, 512, words_and_signs, 0):
        assert isinstance(reading, Reading)
        assert "trained" not in reading.ending


def test_dialogues_end_in_a_reply_and_come_from_all_collections(folder: Path) -> None:
    made = data_tasks(folder)["dialogues"].make(6, 512, words_and_signs, 0)
    endings = [reading.ending for reading in made if isinstance(reading, Reading)]
    assert sum(ending.startswith("better") for ending in endings) == 2
    assert sum(ending[0].isdigit() for ending in endings) == 2
    for reading in made:
        assert isinstance(reading, Reading)
        said = [m["content"] for m in reading.context if isinstance(m, dict)]
        assert sum(map(words_and_signs, said)) > 200
        assert not any(text.startswith(("worse", "thanks")) for text in said)


def test_turns_of_one_speaker_are_joined_and_loose_ends_fall_away() -> None:
    said = [("assistant", "Hello."), ("user", "A"), ("user", " B "), ("user", ""),
            ("assistant", "C"), ("assistant", "D"), ("user", "E")]  # fmt: skip
    assert exchanges(said) == [("A\nB", "C\nD")]
    assert exchanges([("assistant", "Hello.")]) == []


def test_meetings_hold_the_turns_that_the_question_is_about(folder: Path) -> None:
    made = data_tasks(folder)["meetings"].make(4, 1024, words_and_signs, 0)
    for reading in made:
        assert isinstance(reading, Reading)
        assert isinstance(reading.context, list)
        text = reading.context[0]["content"]
        about = re.search(r"What about (\d+)\?$", text)
        assert about
        if about[1] == "0":
            assert "Person 0: Well good, then.\n" in text
        else:
            assert f"Turn{about[1]} " in text
        turns = [int(n) for n in re.findall(r"Turn(\d+) ", text)]
        assert turns == list(range(turns[0], turns[-1] + 1))
        assert len(turns) > 20


def test_more_conversations_than_there_are_are_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'meetings' has 4 conversations for 1024 tokens .* not 5"
    ):
        data_tasks(folder)["meetings"].make(5, 1024, words_and_signs, 0)


# -- the folder -----------------------------------------------------------------------------------


def test_a_folder_has_the_tasks_whose_files_it_has(folder: Path, tmp_path: Path) -> None:
    assert tuple(data_tasks(folder)) == DATA
    assert data_tasks(tmp_path) == {}
    assert data_tasks(tmp_path / "missing") == {}
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "A.txt").write_text("Once upon a time.")
    assert list(data_tasks(tmp_path)) == ["books"]


def test_ruler_is_thirteen_tasks_of_which_two_need_data(folder: Path) -> None:
    assert len(set(RULER)) == len(RULER) == 13
    assert set(RULER) - set(TASKS) == {"qa_1", "qa_2"}
    assert set(RULER) <= {*TASKS, *data_tasks(folder)}
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (QUESTION_FILE, "qa_1"),
        *((file, f"kv_{n}") for n, file in PAIR_FILES.items()),
        ("dialogue/oasst_en100/en_100_tree.jsonl", "dialogues"),
        ("dialogue/topical_chat/conversations/test_rare.json", "dialogues"),
        ("meetings/qmsum/test.jsonl", "meetings"),
    ],
)
@pytest.mark.parametrize("content", [b"nothing of the sort\n", b'{"a": 1}\n', b"[1]\n"])
def test_a_file_of_another_format_is_named(
    tmp_path: Path, file: str, name: str, content: bytes
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_bytes(
        gzip.compress(content) if file.endswith(".gz") and b"[" in content else content
    )
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a file of")):
        data_tasks(tmp_path)[name].make(1, 512, words_and_signs, 0)


# -- filling --------------------------------------------------------------------------------------


def even(pieces: int) -> Item:
    return Item(conversation("word " * pieces, "Why?"), "Why?", ("word",))


def uneven(pieces: int) -> Item:
    """The n-th piece has n words."""
    text = " ".join("word " * n for n in range(pieces + 1))
    return Item(conversation(text, "Why?"), "Why?", ("word",))


@pytest.mark.parametrize("length", [100, 1000, 30000])
@pytest.mark.parametrize("lay_out", [even, uneven])
def test_few_measurements_of_the_whole_are_enough(lay_out: object, length: int) -> None:
    assert callable(lay_out)
    measured = []

    def count(text: str) -> int:
        measured.append(text)
        return words_and_signs(text)

    item = fill(Draft[Item](lay_out), length, count)
    assert item is not None
    assert total(item, count) > length * 0.9 - 60
    assert len(measured) < 16


def test_filler_ends_where_there_is_no_more_of_it() -> None:
    item = fill(Draft(even, most=10), 1000, words_and_signs)
    assert item == even(10)
    assert fill(Draft(even), 20, words_and_signs) is None


def test_statements_are_spread_by_their_depths() -> None:
    assert novel.spread("ABC", [1, 0, 0.5], "....") == list("B..C..A")
    assert novel.spread("AB", [0.2, 0.1], "") == ["A", "B"]
