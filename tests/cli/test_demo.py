"""The demo: its questions, its table, and what it reads out of the table."""

from __future__ import annotations

import contextlib
import io
import json
from itertools import pairwise

import pytest

from kvp_edge import Llama
from kvp_edge.cli import main
from kvp_edge.cli.demo import FULL, SHIFT, Row, prompt_tokens, reading, table
from kvp_edge.cli.demo_tasks import Item, make_items
from kvp_edge.policies import HEURISTICS
from kvp_edge.policies.policy_of_model import own_policy


def count_words(text: str) -> int:
    return len(text.split())


# -- the questions -------------------------------------------------------------------------------


def test_the_same_seed_asks_the_same_and_another_seed_something_else() -> None:
    first, again, other = (make_items(6, 300, count_words, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_answer_is_told_once_before_the_question_and_not_in_it() -> None:
    for item in make_items(30, 300, count_words, 3):
        *before, question = [m["content"] for m in item.messages]
        if not before:  # prose and question are one message
            text, question = question.rsplit(". ", 1)
            before = [text + "."]
        assert question.endswith("?")
        assert Item("", [], item.answer).is_right(" ".join(before))
        assert item.answer not in question


def test_chat_roles_alternate_and_the_user_asks_last() -> None:
    for item in make_items(9, 300, count_words, 0):
        roles = [m["role"] for m in item.messages]
        assert roles[-1] == "user"
        assert all(a != b for a, b in pairwise(roles))


@pytest.mark.parametrize("length", [300, 1500, 4000])
def test_conversations_are_about_as_long_as_asked_for(length: int) -> None:
    for item in make_items(9, length, count_words, 0):
        n = sum(count_words(m["content"]) for m in item.messages)
        assert 0.7 * length < n < 1.4 * length + 150


def test_an_answer_counts_as_a_word_of_its_own() -> None:
    item = Item("", [], "481220")
    assert item.is_right("The number is 481220.")
    assert not item.is_right("The number is 4812207.")
    assert Item("", [], "Ralph").is_right("ralph!")


# -- the table -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    """Rows of a small demo on the bundled model."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["demo", "--items", "4", "--length", "900", "--threads", "1", "--json"]) == 0
    found: list[dict[str, object]] = json.loads(out.getvalue())
    return found


def test_there_is_a_row_for_every_way_of_reading(
    rows: list[dict[str, object]], bundled_model: str
) -> None:
    own = ["learned"] if own_policy(bundled_model) else []
    recalls = f"{(own or HEURISTICS)[0]} + recall"
    assert [row["cache"] for row in rows] == [FULL, SHIFT, recalls, *own, *HEURISTICS]


def test_the_row_with_recall_alone_has_a_log_and_answers_more(
    rows: list[dict[str, object]],
) -> None:
    (recalls,) = (row for row in rows if row["log_bytes"])
    assert str(recalls["cache"]).endswith(" + recall")
    without = next(row for row in rows if f"{row['cache']} + recall" == recalls["cache"])
    assert int(str(recalls["right"])) >= int(str(without["right"]))
    (recency,) = (row for row in rows if row["cache"] == "recency")
    assert int(str(recalls["right"])) > int(str(recency["right"]))


def test_the_full_context_is_at_least_as_good_as_any_other(rows: list[dict[str, object]]) -> None:
    full, *others = rows
    assert all(int(str(full["right"])) >= int(str(row["right"])) for row in others)
    assert int(str(full["right"])) >= 3  # the bundled model can do the task


def test_all_other_rows_have_the_same_fewer_cells_and_dropped_something(
    rows: list[dict[str, object]],
) -> None:
    full, *others = rows
    assert full["dropped"] == 0
    for row in others:
        assert row["cells"] == 512
        assert int(str(row["kv_bytes"])) < int(str(full["kv_bytes"]))
        assert int(str(row["dropped"])) > 4 * 256


def test_the_command_prints_table_reading_and_where_to_go_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--items", "1", "--length", "700", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    for name in (FULL, SHIFT, *HEURISTICS):
        assert sum(line.startswith(f"{name}  ") for line in out.splitlines()) == 1
    assert out.splitlines()[-1].startswith("Try it: kvp-edge chat")
    assert "512 cells" in err
    assert "This takes up to" in err
    assert "conversations" not in out


def test_prompts_are_those_of_create_chat_completion(bundled_model: str) -> None:
    llm = Llama(bundled_model, n_ctx=256, verbose=False)
    messages = [{"role": "user", "content": "My dog is called Ralph."}]
    usage = llm.create_chat_completion(messages, max_tokens=1)["usage"]
    tokens = prompt_tokens(llm, messages)
    assert len(tokens) == usage["prompt_tokens"]
    assert llm.input_ids[: len(tokens)].tolist() == tokens
    llm.close()


# -- what is read out of the table ---------------------------------------------------------------


def made_up(**right: int) -> list[Row]:
    return [
        Row(name.replace("_", " "), cells, cells * 2048, 20, n, 30_000, 2.0, 0)
        for (name, n), cells in zip(right.items(), [2048] + [512] * 9, strict=False)
    ]


def test_the_reading_names_the_best_policy_and_those_that_do_not_help() -> None:
    text = "\n".join(reading(made_up(full=20, shift=4, keydiff=17, knorm=3, random=5)))
    assert "answers 20 of 20" in text
    assert "with keydiff, it answers 17, in 25% of the memory" in text
    assert "Not clearly better than dropping the oldest half: knorm, random." in text


def test_the_reading_does_not_praise_what_may_be_chance() -> None:
    text = "\n".join(reading(made_up(full=20, shift=8, keydiff=12, knorm=3)))
    assert "No policy is clearly better" in text
    assert "less than 7 answers apart may differ by chance" in text


def test_the_reading_says_when_the_model_itself_fails() -> None:
    text = "\n".join(reading(made_up(full=6, shift=4, keydiff=5)))
    assert "misses many even then" in text
    assert "gone" not in text  # so few answers less may be chance
    assert "with llama.cpp's rule, it answers 4: the old tokens are gone." in "\n".join(
        reading(made_up(full=20, shift=4, keydiff=5))
    )


def test_the_reading_tells_what_recall_answers_and_what_its_log_takes() -> None:
    rows = made_up(full=20, shift=4, keydiff_plus_recall=19, keydiff=12)
    rows[2].log_bytes = 5 * 2**19
    text = "\n".join(reading(rows))
    assert "With keydiff plus recall it answers 19" in text
    assert "a log of 2.5 MiB" in text
    assert "with keydiff, it answers 12, in 25%" in text  # its memory is told of those without
    assert "recall" not in "\n".join(reading(made_up(full=20, shift=4, keydiff=12)))


def test_the_columns_of_the_table_line_up() -> None:
    lines = table(made_up(full_context=20, drop_oldest_half=4, keydiff=17))
    assert len({len(line) for line in lines}) == 1
