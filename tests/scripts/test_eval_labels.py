"""scripts/eval_labels.py: labels are what they say, tokens go by them, and losses are compared with
those of the full cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import RandomModel, random_tokens
from kvp_edge.bundled import bundled_model
from kvp_edge.cache.recall import share, widen
from kvp_edge.policies import Recency
from kvp_edge.traces.labels import LATER, NEAR, QUESTIONED, REPEATED
from kvp_edge.traces.tracer import Tracer
from label_eval import subject as subject_module
from label_eval.labels import ASKED, CONTINUED, DEFAULT, LATER_SUM, PARTS, Given, Label
from label_eval.records import KEY, key
from label_eval.subject import Subject
from makers.gguf_models import ModelShape
from scripts.eval_labels import REPLY, main

ROWS = ("asked", "later*value", "recency")
N = 90

Maker = Callable[[ModelShape], RandomModel]


def command(out: Path) -> list[str]:
    return [
        *("--out", str(out), "--length", "240", "--items", "1", "--facts", "2"),
        *("--tasks", "look-ups,books", "--labels", "asked,later*value", "--rules", "recency"),
        *("--shares", "1,4", "--threads", "1"),
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "measured.jsonl"
    assert main(command(out)) == 0
    return out


def losses(path: Path) -> dict[tuple[Any, ...], float]:
    """By task, question, row and share."""
    return {(r["task"], r["question"], r["row"], r["share"]): r["loss"] for r in read(path)}


def test_a_longer_piece_of_a_reply_is_measured_anew(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer.jsonl"
    old = [{k: v for k, v in r.items() if k != "measured"} for r in read(measured)]
    out.write_text("".join(json.dumps(r) + "\n" for r in old), encoding="utf-8")
    arguments = [*command(out), "--tasks", "look-ups", "--labels", "", "--shares", "4"]
    assert main(arguments) == 0
    assert len(read(out)) == len(old), "files without the number have the default"
    assert main([*arguments, "--reply", "2"]) == 0
    new = read(out)[len(old) :]
    assert {(r["row"], r["measured"]) for r in new} == {("full cache", 2), ("recency", 2)}
    assert all(len(r["reply"]) == 2 for r in new if r["row"] == "full cache")


def test_every_row_is_measured_once_on_every_question_that_the_full_cache_answers(
    measured: Path,
) -> None:
    found = read(measured)
    assert len({key(record) for record in found}) == len(found)
    full = [r for r in found if r["row"] == "full cache"]
    assert [(r["task"], r["question"]) for r in full] == [
        *(("look-ups", 0), ("look-ups", 1), ("books", 0))
    ]
    assert [r["score"] for r in full] == [1, 1, 1], "else there is nothing to measure"
    assert [r["measure"] for r in full] == ["reply", "reply", "text"]
    assert all(len(r["reply"]) <= REPLY for r in full[:2])
    want = {
        (task, question, row, share)
        for task, question in (("look-ups", 0), ("look-ups", 1), ("books", 0))
        for row in ROWS
        for share in (1, 4)
    }
    assert losses(measured).keys() - want == {
        (r["task"], r["question"], "full cache", None) for r in full
    }
    for record in found:
        assert set(KEY) < set(record)
        if record["share"] is not None:
            assert record["budget"] == record["context"] // record["share"]
        assert (record["same"] is None) == (record["task"] == "books")


def test_a_cut_that_keeps_all_tokens_loses_nothing(measured: Path) -> None:
    found = losses(measured)
    whole = {asked: loss for asked, loss in found.items() if asked[3] == 1}
    assert len(whole) == 3 * len(ROWS)
    for (task, question, _, _), loss in whole.items():
        assert loss == found[task, question, "full cache", None]
    assert all(r["same"] in (True, None) for r in read(measured) if r["share"] == 1)


def test_a_label_of_the_true_future_loses_nothing_where_others_lose_the_answer(
    measured: Path,
) -> None:
    found = losses(measured)
    for question in (0, 1):
        full = found["look-ups", question, "full cache", None]
        assert abs(found["look-ups", question, "asked", 4] - full) < 0.02
        assert found["look-ups", question, "recency", 4] > full + 0.3
    assert {r["same"] for r in read(measured) if (r["row"], r["share"]) == ("asked", 4)} == {
        *(True, None)
    }


def test_what_is_in_the_file_is_not_measured_again_and_what_is_missing_comes_out_the_same(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = measured.read_bytes()
    capsys.readouterr()
    assert main(command(measured)) == 0
    assert measured.read_bytes() == before
    assert capsys.readouterr().err == "", "no text was read"
    lines = before.splitlines(keepends=True)
    interrupted = tmp_path / "interrupted.jsonl"
    # in the middle of an item, and of a line
    interrupted.write_bytes(b"".join(lines[:4]) + lines[4][:40])
    assert main(command(interrupted)) == 0
    assert losses(interrupted) == losses(measured)
    assert len(read(interrupted)) == len(lines)


def test_the_table_shows_what_each_row_loses(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["--out", str(measured), "--table"]) == 0
    table = capsys.readouterr().out
    found = losses(measured)
    for row in ROWS:
        increase = np.mean(
            [
                found["look-ups", question, row, 4]
                - found["look-ups", question, "full cache", None]
                for question in (0, 1)
            ]
        )
        same = sum(
            r["same"]
            for r in read(measured)
            if (r["task"], r["row"], r["share"]) == ("look-ups", row, 4)
        )
        assert f"| {increase:+.3f} [too few items] ({same} of 2) |" in table
    assert "| mean increase | look-ups, 1/1 | look-ups, 1/4 | books, 1/1 | books, 1/4 |" in table
    assert "The full cache answers 2 of 2 questions rightly." in table


def test_intervals_are_of_items_paired_with_the_full_cache(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [r for r in read(measured) if r["task"] == "look-ups"]
    more = tmp_path / "more.jsonl"
    # other items: harder, but by the same amount for all rows
    items = [
        r | {"item": item, "loss": r["loss"] + item, "score": 1}
        for item in (0, 1, 2)
        for r in lines
    ]
    more.write_text("".join(json.dumps(r) + "\n" for r in items), encoding="utf-8")
    capsys.readouterr()
    assert main(["--out", str(more), "--table"]) == 0
    table = capsys.readouterr().out
    assert "+0.000 [+0.000, +0.000] (6 of 6)" in table
    assert "The full cache answers 6 of 6 questions rightly." in table
    found = losses(measured)
    less = np.mean(
        [
            found["look-ups", question, "asked", 4] - found["look-ups", question, "recency", 4]
            for question in (0, 1)
        ]
    )
    assert main(["--out", str(more), "--table", "--against", "asked"]) == 0
    assert f"| {less:+.3f} [{less:+.3f}, {less:+.3f}] |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no row 'nobody': there are"):
        main(["--out", str(more), "--table", "--against", "nobody"])


def test_questions_that_the_full_cache_gets_wrong_do_not_count(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.jsonl"
    lines = [
        r | {"score": 0.0} if (r["row"], r["question"]) == ("full cache", 1) else r
        for r in read(measured)
    ]
    wrong.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    before = wrong.read_bytes()
    assert main(command(wrong)) == 0
    assert wrong.read_bytes() == before
    capsys.readouterr()
    assert main(["--out", str(wrong), "--table"]) == 0
    table = capsys.readouterr().out
    assert "The full cache answers 1 of 2 questions rightly." in table
    assert "of 2) |" not in table


def test_a_name_stands_for_one_policy_in_a_file(measured: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    lines = [
        r | {"policy": "recency(newest=3)"} if r["row"] == "recency" else r for r in read(measured)
    ]
    other.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"'recency' was measured as recency\(newest=3\), and is"):
        main(command(other))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"model": "bookworm"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="line 1 is no record"):
        main(["--out", str(damaged), "--table"])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--labels", "no such"],
        ["--labels", "later+later"],
        ["--labels", "later:narrow"],
        ["--labels", "later,later", "--rules", "later"],
        ["--labels", "", "--rules", ""],
        ["--rules", "no-such-policy"],
        ["--policies", "no-such-file.gguf"],
        ["--tasks", "quiz"],
        ["--data", "no-such-folder"],
        ["--shares", "0"],
        ["--facts", "1"],
        ["--length", "100"],
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--out", str(tmp_path / "none.jsonl"), *wrong])
    assert refused.value.code == 2
    assert not (tmp_path / "none.jsonl").exists()
    assert "error:" in capsys.readouterr().err


# -- labels by name ------------------------------------------------------------------------------


def test_a_label_is_named_as_it_was_asked_for() -> None:
    for name in (*DEFAULT, *PARTS, "later+repeated*value:shared:wide"):
        assert Label.parse(name).name == name
    assert Label.parse("later:wide:shared").name == "later:shared:wide"


def test_scores_are_made_of_attention_as_the_name_says() -> None:
    rng = np.random.default_rng(0)
    shape = (2, 3, 40)
    attention = {part: rng.random(shape, np.float32) for part in PARTS}
    given = {part: a.copy() for part, a in attention.items()}
    norms = 1 + rng.random(shape, np.float32)

    def scores(name: str, sinks: int = 0) -> np.ndarray:
        return Label.parse(name).scores(attention, norms, sinks)

    later, repeated = attention["later"], attention["repeated"]
    np.testing.assert_array_equal(scores("later"), later)
    np.testing.assert_array_equal(scores("later*value"), later * norms)
    mixed = sum(a / a.mean(axis=-1, keepdims=True) for a in (later * norms, repeated * norms))
    np.testing.assert_allclose(scores("later+repeated*value"), mixed, rtol=1e-5)
    np.testing.assert_array_equal(scores("later:shared"), share(later, 0.8))
    np.testing.assert_array_equal(scores("later:wide"), widen(later, 3, 1))
    both = widen(share(later, 0.8), 3, 1)
    np.testing.assert_array_equal(scores("later:shared:wide"), both)
    # what a sink gets has no part in any scale
    attention["later"][:, :, :4] = 1e6
    rest = {part: a[:, :, 4:] for part, a in attention.items()}
    for name in ("later", "later+repeated*value", "later:shared", "later:wide"):
        label = Label.parse(name)
        np.testing.assert_allclose(
            scores(name, 4)[:, :, 5:],
            label.scores(rest, norms[:, :, 4:], 0)[:, :, 1:],
            rtol=1e-5,
        )
        assert (scores(name, 4)[:, :, :3] == 0).all()
    for part, before in given.items():
        if part != "later":
            np.testing.assert_array_equal(attention[part], before)


def test_a_label_of_which_nothing_is_asked_ranks_by_the_others() -> None:
    zeros, ones = np.zeros((1, 1, 5), np.float32), np.ones((1, 1, 5), np.float32)
    found = Label.parse("questioned+later").scores({"questioned": zeros, "later": ones}, ones, 0)
    np.testing.assert_array_equal(found, ones)


# -- attention, and what is lost -----------------------------------------------------------------


LLAMA = ModelShape("llama", head_dim=32)
F32 = {"type_k": 0, "type_v": 0}


@pytest.fixture
def model(random_model: Maker) -> RandomModel:
    return random_model(LLAMA)


def subject_of(model: RandomModel, parts: list[str]) -> Subject:
    return Subject(model.path, Subject.room(N, parts) + 40, parts, [Recency()], 1, **F32)


def largest(attention: np.ndarray, shape: ModelShape) -> np.ndarray:
    """Of [n_layer, n_head, queries, n], over the queries and the heads of a group."""
    n_layer, _, _, n = attention.shape
    grouped = attention.reshape(n_layer, shape.n_head_kv, -1, n)
    most: np.ndarray = grouped.max(axis=2)
    return most


def test_what_the_model_is_asked_for_is_labelled_as_in_traces(
    model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject_module, "WRITTEN", 12)
    text, names = random_tokens(N), [LATER, QUESTIONED, REPEATED]
    with closing(Tracer(model.path, N, labels=names, written=12, n_threads=1, **F32)) as tracer:
        want = tracer.capture(text, 40).labels
    with closing(subject_of(model, names)) as subject:
        for _ in range(2):  # the second text as the first
            got = subject.attention(subject.begin(text), names, [])
    assert got.keys() == set(names)
    for name in (QUESTIONED, REPEATED):
        assert (got[name] > 0).any()
        np.testing.assert_allclose(got[name], want[name].astype(np.float32), rtol=2e-3, atol=1e-5)
    # a trace has the pieces, one after the other, each with the tokens until its end
    far, at = np.zeros_like(got[LATER]), 0
    for begin in range(0, N, NEAR):
        end = min(begin + NEAR, N)
        old = max(0, begin - NEAR + 1)
        piece = want[LATER][:, :, at : at + end].astype(np.float32)
        np.maximum(far[:, :, :old], piece[:, :, :old], out=far[:, :, :old])
        at += end
    np.testing.assert_allclose(got[LATER], far, rtol=2e-3, atol=1e-5)


def test_attention_of_the_text_of_a_continuation_and_of_what_is_asked(
    model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject_module, "CONTINUATION", 6)
    text, parts = random_tokens(N), [LATER, LATER_SUM, CONTINUED, ASKED]
    uses = [random_tokens(7, seed=1), random_tokens(20, seed=2)]
    with closing(subject_of(model, parts)) as subject:
        at = subject.begin(text)
        got = subject.attention(at, parts, uses)
        norms = subject.value_norms(at)
        assert subject.n_tokens == N, "what came after the text is forgotten"
    reference = model.reference
    own = reference.attention(text)
    most, total = np.zeros_like(got[LATER]), np.zeros_like(got[LATER])
    for token in range(N):
        begin = -(-(token + NEAR) // NEAR) * NEAR  # the first piece that is far enough
        if begin < N:
            paid = own[:, :, begin:, token : token + 1]
            most[:, :, token] = largest(paid, LLAMA)[:, :, 0]
            groups = paid.reshape(len(paid), LLAMA.n_head_kv, -1, N - begin)
            total[:, :, token] = groups.mean(axis=2).sum(axis=2)
    assert (most[:, :, : N - 2 * NEAR] > 0).all()
    np.testing.assert_allclose(got[LATER], most, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(got[LATER_SUM], total, rtol=1e-3, atol=1e-6)
    asked = [largest(reference.attention(text + use)[:, :, N:, :N], LLAMA) for use in uses]
    np.testing.assert_allclose(got[ASKED], np.maximum(*asked), rtol=1e-3, atol=1e-6)
    written = list(text)
    for _ in range(6):
        written.append(int(reference.logits(written)[-1].argmax()))
    paid = largest(reference.attention(written)[:, :, N:, :N], LLAMA)
    np.testing.assert_allclose(got[CONTINUED], paid, rtol=1e-3, atol=1e-6)
    values = np.stack([reference.values(text)]).reshape(*norms.shape, -1)
    np.testing.assert_allclose(norms, np.linalg.norm(values, axis=-1), rtol=1e-3)


def test_every_head_keeps_its_own_best_tokens_and_comes_back_to_all(model: RandomModel) -> None:
    scores = np.random.default_rng(0).random((2, 2, N), np.float32)
    with closing(subject_of(model, [LATER])) as subject:
        at = subject.begin(random_tokens(N))
        for _ in range(2):
            subject.cut(subject.ranked(at, Given(scores)), 40)
            held = np.asarray(subject.kv_indices)
            assert held.shape == (2, 2, 40)
            recent = 10  # a quarter of the budget
            for head in np.ndindex(2, 2):
                best = 4 + np.argsort(-scores[head][4 : N - recent])[: 40 - 4 - recent]
                want = sorted({*range(4), *best.tolist(), *range(N - recent, N)})
                assert held[head].tolist() == want
            subject.cut(subject.ranked(at, Recency()), 40)
            assert np.asarray(subject.kv_indices)[0, 0].tolist() == [
                *range(4),
                *range(N - 36, N),
            ]


def test_a_reply_is_the_same_while_each_of_its_tokens_is_the_likeliest(model: RandomModel) -> None:
    text, question = random_tokens(N), random_tokens(5, seed=3)
    with closing(subject_of(model, [LATER])) as subject:
        at = subject.begin(text)
        subject.read(question)
        reply = subject.reply(6)
        assert len(reply) == 6
        logits = model.reference.logits(text + question + reply).astype(np.float64)
        chances = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
        for changed, same in ((reply, True), ([*reply[:5], (reply[5] + 1) % 50], False)):
            subject.go_back(at)
            found = subject.forced(question, changed)
            assert found.same == same
            rows = chances[N + 5 - 1 : N + 5 + 5]
            want = -np.mean([row[token] for row, token in zip(rows, changed, strict=True)])
            assert found.loss == pytest.approx(want, abs=1e-3)


def test_a_model_whose_policy_is_another_models_is_refused(model: RandomModel) -> None:
    from kvp_edge.errors import PolicyFileError
    from kvp_edge.policies import get_policy
    from kvp_edge.policies.policy_of_model import own_policy

    path = own_policy(bundled_model())
    assert path is not None
    with pytest.raises(PolicyFileError):
        Subject(model.path, 256, [LATER], [get_policy(path)], 1)
