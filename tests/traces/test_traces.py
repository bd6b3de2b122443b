"""Traces on disk: made, resumed, read back, and refused when something is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvp_edge.traces.format
from conftest import DATA, RandomModel
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.fingerprint import model_identity
from kvp_edge.cli import main
from kvp_edge.cli.trace import SourceOptions, sources_of
from kvp_edge.corpora import evaluation_prose, training_prose
from kvp_edge.errors import TraceError, UnsupportedModelError
from kvp_edge.evaluation.item import names
from kvp_edge.llama import Llama
from kvp_edge.traces.format import Trace, TraceSet
from kvp_edge.traces.frames import FRAMES, LISTINGS, PAIRS_OF_QUESTIONS
from kvp_edge.traces.questions import Task as TraceTask
from kvp_edge.traces.questions import TaskMaker
from kvp_edge.traces.sources import ChatFile, Cut, Tasks, TextFile, plan
from kvp_edge.traces.writer import capture_traces
from makers.gguf_models import ModelShape, write_mamba

BOOK = str(DATA / "penelope_brandling.txt")
CHATS = str(DATA / "dialogues.jsonl")
SHAPE = ModelShape("llama", n_head=4, n_head_kv=2)
QUIET = {"n_threads": 1, "n_threads_batch": 1}

Maker = Callable[[ModelShape], RandomModel]


@pytest.fixture
def model(random_model: Maker) -> RandomModel:
    return random_model(SHAPE)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the thing and the other, on and on. " * 60)
    return str(path)


def traced(model: RandomModel, text: str, out: Path, **how: Any) -> TraceSet:
    how = {"length": 100, "n_traces": 4, **QUIET, **how}
    return TraceSet(capture_traces(model.path, [TextFile(text)], out, **how))


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# -- what a trace says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [SHAPE, ModelShape("qwen2", n_embd=256, head_dim=64), ModelShape("qwen3", head_dim=64)],
    ids=lambda s: s.arch,
)
def test_importance_is_the_attention_that_later_queries_pay(
    shape: ModelShape, random_model: Maker, text: str, tmp_path: Path
) -> None:
    model = random_model(shape)
    cache = {"type_k": 0, "type_v": 0}  # f32
    traces = traced(model, text, tmp_path / "out", n_traces=1, n_batch=32, n_ubatch=32, **cache)
    [trace] = traces
    paid = model.reference.attention(trace.tokens)
    largest = paid.reshape(shape.n_layer, shape.n_head_kv, -1, 100, 100).max(axis=2)
    assert trace.n_prompt in trace.splits
    assert len(trace.splits) == (100 + trace.block - 1) // trace.block - (100 % trace.block == 0)
    for n in [*trace.splits, trace.n_prompt]:
        got = trace.importance(n)
        assert got.shape == (shape.n_layer, shape.n_head_kv, n)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, largest[:, :, n:, :n].sum(axis=2), rtol=1e-3, atol=1e-4)
        later = [b for b in pairwise([*trace.splits.tolist(), 100]) if b[0] >= n]
        most = np.max([largest[:, :, a:b, :n].sum(axis=2) for a, b in later], axis=0)
        np.testing.assert_allclose(trace.peak(n), most, rtol=1e-3, atol=1e-4)
    for name in ("keys", "values"):
        want = getattr(model.reference, name)(trace.tokens)
        np.testing.assert_allclose(getattr(trace, name), want, rtol=2e-3, atol=2e-3)


def test_between_borders_the_queries_up_to_the_next_one_are_left_out(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    [trace] = traced(model, text, tmp_path, n_traces=1, block=10, future_tokens=43)
    assert trace.splits.tolist() == [7, *range(17, 100, 10)]
    np.testing.assert_array_equal(trace.importance(21), trace.importance(27)[:, :, :21])
    np.testing.assert_array_equal(
        trace.importance(27) - trace.importance(27, until=57),
        trace.received(57, 100)[:, :, :27],
    )
    total = trace.received(0, 100).sum(axis=2)
    assert (total > 99).all()  # the largest of a group is at least its mean, which sums to 1
    for n in (0, 98, 100):
        for of in (trace.importance, trace.peak):
            with pytest.raises(ValueError, match=f"from 1 to 97, .* not {n}"):
                of(n)


def test_a_trace_without_borders_has_no_split() -> None:
    trace = Trace(*[np.zeros((1, 1, 3))] * 3, np.zeros(3), np.zeros(0), 3, Blocks(8, 3), 1.0, "")
    assert len(trace.splits) == 0
    with pytest.raises(ValueError, match="from 1 to 0"):
        trace.importance(1)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_a_file_has_at_most_twice_the_bytes_of_its_keys_and_values(
    head_dim: int, random_model: Maker, tmp_path: Path
) -> None:
    model = random_model(ModelShape(head_dim=head_dim))
    out = capture_traces(model.path, [TextFile(BOOK)], tmp_path, length=400, n_traces=2, **QUIET)
    for entry, trace in zip(TraceSet(out).manifest["traces"], TraceSet(out), strict=True):
        size = (out / entry["file"]).stat().st_size
        assert size <= 2 * (trace.keys.nbytes + trace.values.nbytes)


def test_a_set_can_be_counted_indexed_sliced_and_checked(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    traces = traced(model, text, tmp_path)
    assert len(traces) == 4 == len(list(traces))
    assert traces[-1].tokens.tolist() == traces[3].tokens.tolist() == traces[2:][1].tokens.tolist()
    with pytest.raises(IndexError):
        traces[4]
    assert traces.model["n_head_kv"] == 2
    assert traces.model["architecture"] == "llama"
    assert TraceSet(tmp_path, model=model.path).manifest == traces.manifest
    assert traces[0].source.startswith("text.txt, token ")
    assert len(traces[0]) == 100
    assert traces[0].n_prompt == 75
    traces.check()


# -- sources -------------------------------------------------------------------------------------


@pytest.fixture
def llm(bundled_model: str, load: Callable[..., Llama]) -> Llama:
    return load(bundled_model, n_ctx=512)


def like(text: str) -> str:
    """A pattern for the text, with anything in its slots."""
    return re.sub(r"\\\{\w+\\\}", ".+", re.escape(text))


#: What the questions of tasks are like.
QUESTIONS = [
    like(text)
    for text in (
        *(way for f in (*FRAMES, *LISTINGS) for ways in f.questions.values() for way in ways),
        *PAIRS_OF_QUESTIONS,
    )
]


@pytest.mark.parametrize("future", ["text", "greedy"])
def test_every_piece_fits_and_has_a_future(future: str, llm: Llama) -> None:
    cut = Cut(1024, future, 64, seed=3)
    for source in (TextFile(BOOK), ChatFile(CHATS), Tasks(6), Tasks(3, (BOOK,))):
        pieces = plan([source], llm, cut, None)
        assert pieces
        for piece in pieces:
            n = len(piece.tokens) + piece.n_generate
            assert 8 <= piece.n_prompt < n <= 1024
            assert piece.n_generate == (64 if future == "greedy" else 0)


def test_the_future_of_a_task_is_its_question_and_answer(llm: Llama) -> None:
    for piece in plan([Tasks(9)], llm, Cut(400, "text", 64, seed=0), None):
        future = llm.detokenize(list(piece.tokens[piece.n_prompt :]), special=True).decode()
        assert any(re.match(question, future.strip()) for question in QUESTIONS), future
        answer = future.rpartition(">")[2].strip()
        before = llm.detokenize(list(piece.tokens[: piece.n_prompt])).decode()
        assert answer
        for part in [answer] if answer in before else answer.split(" and "):
            assert part in before


def tasks(count: int, n_tokens: int, seed: int = 0) -> list[TraceTask]:
    maker = TaskMaker(training_prose(), lambda text: len(text.split()), seed)
    return [maker.make(n_tokens) for _ in range(count)]


def test_the_answer_of_a_task_is_told_before_its_question_and_not_in_it() -> None:
    for task in tasks(400, 200):
        *before, last = [message["content"] for message in task.messages]
        assert last.endswith(task.question)
        told = "\n".join([*before, last.removesuffix(task.question)])
        parts = [task.answer] if task.answer in told else task.answer.split(" and ")
        for part in parts:
            assert part in told
            assert not names(task.question, part)


def test_tasks_are_told_in_prose_in_listings_in_turns_and_inside_of_sentences() -> None:
    made = tasks(200, 200)
    texts = ["\n".join(m["content"] for m in task.messages) for task in made]
    assert 20 < sum(len(task.messages) == 1 for task in made) < 120
    assert 10 < sum(len(task.messages) > 4 for task in made) < 120
    assert 10 < sum(any(h in text for f in LISTINGS for h in f.headings) for text in texts) < 80
    assert 10 < sum("nobody wrote down" in text for text in texts) < 120
    assert len({task.answer for task in made}) > 150
    roles = [[message["role"] for message in task.messages] for task in made]
    for those in roles:
        assert those[0] == those[-1] == "user"
        assert all(a != b for a, b in pairwise(those))


def test_a_task_without_room_for_prose_has_its_facts_alone() -> None:
    for task in tasks(40, 0):
        assert all(message["content"].strip() for message in task.messages)
        assert sum(len(message["content"].split()) for message in task.messages) < 260


def test_the_same_seed_makes_the_same_tasks_and_another_seed_others() -> None:
    assert tasks(5, 100, seed=1) == tasks(5, 100, seed=1)
    assert tasks(5, 100, seed=1) != tasks(5, 100, seed=2)


def test_tasks_read_training_prose_by_default() -> None:
    (prose,) = Tasks(1).about()["prose"]
    assert prose["sha256"] == hashlib.sha256(training_prose().encode()).hexdigest()
    assert prose["sha256"] != hashlib.sha256(evaluation_prose().encode()).hexdigest()


def test_the_future_of_a_chat_is_the_last_reply_that_fits(llm: Llama, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "My dog is called Ralph."},
        {"role": "assistant", "content": "Good to know."},
        {"role": "user", "content": "What is my dog called?"},
        {"role": "assistant", "content": "Ralph."},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    whole = plan([ChatFile(str(path))], llm, Cut(256, "text", 64, 0), None)
    assert [p.source for p in whole] == ["chats.jsonl, line 1", "chats.jsonl, line 3"]
    assert llm.detokenize(list(whole[0].tokens[whole[0].n_prompt :])).decode() == "Ralph."
    fewer = plan([ChatFile(str(path))], llm, Cut(len(whole[0].tokens) - 1, "text", 9, 0), None)
    assert llm.detokenize(list(fewer[0].tokens[fewer[0].n_prompt :])).decode() == "Good to know."
    n_prompt = fewer[0].n_prompt
    cut = plan([ChatFile(str(path))], llm, Cut(n_prompt + 2, "text", 2, 0), None)
    assert cut[0].tokens == fewer[0].tokens[: n_prompt + 2]


def test_the_same_seed_draws_the_same_pieces(llm: Llama) -> None:
    def drawn(seed: int) -> list[Any]:
        return plan([TextFile(BOOK), Tasks(5)], llm, Cut(300, "text", 64, seed), 6)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ('{"role": "user"}', "line 1 is not a chat"),
        ('[{"role": "user", "content": 3}]', "line 1 is not a chat"),
        ('[{"role": "user", "content": "Hello."}]', "nothing to trace"),
        ("", "nothing to trace"),
    ],
)
def test_a_bad_chat_is_named(line: str, says: str, llm: Llama, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(line)
    with pytest.raises(TraceError, match=says):
        plan([ChatFile(str(path))], llm, Cut(300, "text", 64, 0), None)


def test_books_kept_for_evaluation_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out, mine = str(tmp_path / "Doyle_Hound_1902.txt"), str(tmp_path / "mine.txt")
    both = [held_out, mine]
    made = sources_of(SourceOptions(text=both, tasks=2, task_prose=both))
    assert made == [TextFile(mine), Tasks(2, (mine,))]
    assert "policies are measured on them: Doyle_Hound_1902.txt" in capsys.readouterr().err
    sources_of(SourceOptions(text=[mine]))
    assert not capsys.readouterr().err


# -- interruptions -------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_what_is_finished_and_ends_in_the_same_files(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    whole = traced(model, text, tmp_path / "whole")
    out = tmp_path / "out"

    def stop(done: int, planned: int, n_tokens: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(model, text, out, progress=stop)
    with pytest.raises(TraceError, match="2 of 4 traces: the run was interrupted"):
        TraceSet(out)
    partial = TraceSet(out, partial=True)
    assert len(partial) == 2
    partial.check()

    made: list[float] = []
    kept = {path: path.stat().st_mtime_ns for path in out.glob("trace-*")}
    traced(model, text, out, progress=lambda *_: made.append(time.time()))
    assert len(made) == 4
    assert files(out) == files(whole.path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not made again


def test_a_killed_run_goes_on_from_the_files_it_left(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    whole = traced(model, text, tmp_path / "whole")
    out = tmp_path / "out"
    traced(model, text, out)
    # as if killed after the second trace, before the manifest was saved, in the middle of the third
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= {"complete": False, "traces": []}
    (out / "manifest.json").write_text(json.dumps(manifest))
    third = out / "trace-00002.safetensors"
    third.write_bytes(third.read_bytes()[:5000])
    (out / "trace-00003.safetensors").unlink()
    traced(model, text, out)
    assert files(out) == files(whole.path)


def test_a_damaged_trace_is_made_again(model: RandomModel, text: str, tmp_path: Path) -> None:
    before = files(traced(model, text, tmp_path / "out").path)
    path = tmp_path / "out" / "trace-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(TraceError, match=r"trace-00001\.safetensors' was changed"):
        TraceSet(tmp_path / "out").check()
    traced(model, text, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_a_full_disk_keeps_what_is_finished(
    model: RandomModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = traced(model, text, tmp_path / "whole")
    size = whole.manifest["traces"][0]["bytes"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    normal = kvp_edge.traces.writer._file_bytes
    written: list[int] = []

    def larger_at_last(*args: Any) -> bytes:
        data = normal(*args)
        written.append(len(data))
        return data + b"\0" * 4096 if len(written) == 3 else data

    monkeypatch.setattr(kvp_edge.traces.writer, "_file_bytes", larger_at_last)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1024, limits[1]))
    try:
        with pytest.raises(OSError, match="the disk is full .*: 2 of 4 traces are finished"):
            traced(model, text, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").glob(".*"))
    assert len(TraceSet(tmp_path / "out", partial=True)) == 2
    monkeypatch.undo()
    traced(model, text, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole.path)


# -- refusals ------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(
    model: RandomModel, text: str, tmp_path: Path, random_model: Maker
) -> None:
    out = tmp_path / "out"
    traced(model, text, out)
    with pytest.raises(
        TraceError, match="another run \\(length 100 instead of 90, .*choose another"
    ):
        traced(model, text, out, length=90)
    other = random_model(ModelShape("llama", seed=5))
    with pytest.raises(TraceError, match="another run \\(model "):
        traced(other, text, out)
    Path(text).write_text("another text " * 100)
    with pytest.raises(TraceError, match="another run \\(other sources\\)"):
        traced(model, text, out)
    with pytest.raises(TraceError, match=r"from another model than '.*fingerprint .*Trace this"):
        TraceSet(out, model=other.path)


def test_traces_from_before_there_was_an_identity_are_read_and_finished(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    new = traced(model, text, out).manifest
    assert new["model"]["identity"] == model_identity(model.path)
    old = {**new, "model": {k: v for k, v in new["model"].items() if k != "identity"}}
    (out / "manifest.json").write_text(json.dumps(old))
    assert len(TraceSet(out, model=model.path)) == len(new["traces"])
    assert traced(model, text, out).manifest == new


def test_what_is_no_set_of_traces_is_refused(model: RandomModel, text: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"contains no traces: manifest\.json is missing"):
        TraceSet(tmp_path / "none")
    out = tmp_path / "out"
    traces = traced(model, text, out)
    manifest = out / "manifest.json"
    for content, says in (
        ("{", "is damaged: it is not JSON"),
        ("[]", "is not the manifest of traces"),
        ('{"format": "something"}', "is not the manifest of traces"),
        (
            json.dumps({**traces.manifest, "format_version": 9}),
            "format version 9, but this .* reads 1",
        ),
        (json.dumps({"format": "kvp-traces", "format_version": 1}), "damaged: it has no complete"),
    ):
        manifest.write_text(content)
        with pytest.raises(TraceError, match=says):
            TraceSet(out)


def test_whatever_is_wrong_with_a_manifest_is_refused(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    traces = traced(model, text, tmp_path, n_traces=1)
    manifest = tmp_path / "manifest.json"
    good, accepted = traces.manifest, []
    entry = good["traces"][0]
    hostile: list[Any] = [
        *({**good, name: value} for name in good for value in (None, "x", 1, 2.5, [], [[]], [1])),
        *({**good, "model": {**good["model"], name: 1}} for name in ("name", "fingerprint")),
        *(
            {**good, "traces": [{**entry, name: value}]}
            for name in entry
            for value in (None, [], 2.5, {}, True)
        ),
        *(
            {**good, "traces": [{k: v for k, v in entry.items() if k != name}]}
            for name in ("file", "source", "n_tokens", "n_prompt", "bytes", "sha256")
        ),
    ]
    for value in hostile:
        manifest.write_text(json.dumps(value))
        try:
            found = TraceSet(tmp_path, partial=True)
            found.check()
            # what is only for people may be anything of its type
            if found.manifest | {"kvp_edge": 0, "llama_cpp": 0, "llama_cpp_python": 0} != good | {
                "kvp_edge": 0,
                "llama_cpp": 0,
                "llama_cpp_python": 0,
            }:
                accepted.append(found.manifest)
        except TraceError:
            pass
    kinds = [{k for k in good if one[k] != good[k]} for one in accepted]
    allowed = ({"planned"}, {"run"}, {"sources"}, {"traces"})  # other values of the same type
    assert [kind for kind in kinds if kind not in allowed] == []
    for content in ("[" * 100_000, '{"a":' * 100_000, "9" * 5000):
        manifest.write_text(content)
        with pytest.raises(TraceError, match="is damaged: it is not JSON"):
            TraceSet(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/dev/zero", "", ".", "..", "a/b", "a\\b", "a\0b", "-\n", ".hidden"]
)
def test_no_path_leads_out_of_the_folder_of_traces(
    model: RandomModel, text: str, tmp_path: Path, name: str
) -> None:
    traces = traced(model, text, tmp_path / "t", n_traces=1)
    manifest = {**traces.manifest, "traces": [{**traces.manifest["traces"][0], "file": name}]}
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TraceError, match="is not the name of a trace"):
        TraceSet(tmp_path / "t")


def test_what_is_no_file_is_no_trace_and_no_manifest(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    traces = traced(model, text, tmp_path, n_traces=1)
    path = tmp_path / "trace-00000.safetensors"
    data = path.read_bytes()
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        path.mkdir,
    ):
        path.unlink()
        make()
        with pytest.raises(TraceError, match="cannot read .*: it is not a regular file"):
            traces[0]
        with pytest.raises(TraceError, match="cannot read .*: it is not a regular file"):
            traces.check()
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
            path.touch()
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    with pytest.raises(TraceError, match=f"has 1099511627776 bytes instead of {len(data)}"):
        traces[0]
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(TraceError, match="it is not a regular file"):
        TraceSet(tmp_path)


def test_whatever_is_wrong_with_what_a_trace_says_of_itself_is_refused(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load, save

    traces = traced(model, text, tmp_path, n_traces=1)
    path = tmp_path / "trace-00000.safetensors"
    data = path.read_bytes()
    about, arrays = kvp_edge.traces.format.metadata_of(data), load(data)
    changed: list[Any] = [
        *({**about, "block": value} for value in (0, -1, 2**62, "16", None, 1.5)),
        *({**about, "first": value} for value in (0, -1, about["block"] + 1, True)),
        *({**about, "scale": value} for value in (0, -1, float("nan"), float("inf"), "1")),
        *({**about, "n_prompt": value} for value in (-1, 101, 2**70, None)),
        *({k: v for k, v in about.items() if k != name} for name in about),
        [],
    ]
    texts = [json.dumps(value) for value in changed] + ["{", "[" * 100_000]
    written = [save(arrays, {"kvp_trace": said}) for said in texts] + [save(arrays, {})]
    for name, array in arrays.items():
        written.append(save({**arrays, name: array.astype(np.float32)}, {"kvp_trace": texts[-1]}))
        good = {"kvp_trace": json.dumps(about)}
        written.append(save({**arrays, name: array.astype(np.float64)}, good))
        written.append(save({**arrays, name: array[..., None]}, good))
        written.append(save({k: v for k, v in arrays.items() if k != name}, good))
    for bad in written:
        path.write_bytes(bad)
        traces._entries[0]["bytes"] = len(bad)
        with pytest.raises(TraceError, match="00000.*' is damaged"):
            traces[0]


def test_traces_are_for_nobody_else_to_read(model: RandomModel, text: str, tmp_path: Path) -> None:
    """Token ids are the text: that of private chats, perhaps."""
    out = tmp_path / "out"
    traced(model, text, out, n_traces=1)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}


def test_a_truncated_or_missing_trace_is_named(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    traces = traced(model, text, tmp_path)
    path = tmp_path / "trace-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:3000])
    with pytest.raises(TraceError, match=rf"00001.* has 3000 bytes instead of {len(data)}"):
        traces[1]
    path.write_bytes(b"\xff" * len(data))
    with pytest.raises(TraceError, match="00001.* is damaged"):
        traces[1]
    path.unlink()
    with pytest.raises(TraceError, match="cannot read .*00001"):
        traces[1]
    assert len(traces[0]) == 100  # the others can be read all the same


def test_arrays_that_do_not_fit_are_refused(model: RandomModel, text: str, tmp_path: Path) -> None:
    from safetensors.numpy import load, save

    traces = traced(model, text, tmp_path, n_traces=1)
    path = tmp_path / "trace-00000.safetensors"
    data = path.read_bytes()
    about = json.dumps(kvp_edge.traces.format.metadata_of(data))
    arrays = load(data)
    arrays["positions"] = arrays["positions"][:-1]
    path.write_bytes(save(arrays, {"kvp_trace": about}))
    traces._entries[0]["bytes"] = path.stat().st_size
    with pytest.raises(TraceError, match="its arrays do not fit together"):
        traces[0]


def test_too_short_a_text_is_refused(model: RandomModel, text: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no text has 5000 tokens"):
        traced(model, text, tmp_path / "a", length=5000)
    with pytest.raises(TraceError, match=r"make \d+ traces of up to 100 tokens, fewer than the 99"):
        traced(model, text, tmp_path / "b", n_traces=99)
    with pytest.raises(TraceError, match="cannot have 95 of them in its future"):
        traced(model, text, tmp_path / "c", future_tokens=95)
    with pytest.raises(TraceError, match="cannot read '.*none.txt'"):
        traced(model, str(tmp_path / "none.txt"), tmp_path / "d")
    with pytest.raises(TraceError, match="is not text: it contains NUL bytes"):
        traced(model, model.path, tmp_path / "e")


def test_a_folder_that_cannot_be_written_is_named(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder '.*file/out': Not a directory"):
        traced(model, text, tmp_path / "file" / "out")


def test_without_safetensors_it_says_how_to_get_it(
    model: RandomModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install 'kvp_edge\[train\]'"):
        traced(model, text, tmp_path)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_traces_all_kinds_of_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "traces")
    argv = ["trace", "--out", out, "--text", BOOK, "--chats", CHATS, "--tasks", "3", "--traces"]
    argv += ["3", "--length", "300", "--threads", "1", "--future", "greedy"]
    argv += ["--future-tokens", "8"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert "3 traces," in printed.err
    assert "bytes per token" in printed.err
    assert len(TraceSet(out)) == 3
    before = files(tmp_path / "traces")
    assert main(argv) == 0
    assert files(tmp_path / "traces") == before


@pytest.mark.parametrize("how", [["--flash-attn"], ["--type-v", "q8_0", "--type-k", "q8_0"]])
def test_the_command_traces_with_flash_attention_and_quantised_values(
    how: list[str], tmp_path: Path
) -> None:
    argv = ["trace", "--text", BOOK, "--traces", "1", "--length", "200", "--threads", "1", "--out"]
    assert main([*argv, str(tmp_path / "plain")]) == 0
    assert main([*argv, str(tmp_path / "flash"), *how]) == 0
    [plain], [flash] = TraceSet(tmp_path / "plain"), TraceSet(tmp_path / "flash")
    np.testing.assert_array_equal(flash.tokens, plain.tokens)
    assert flash.attention.shape == plain.attention.shape
    np.testing.assert_allclose(flash.importance(150), plain.importance(150), atol=0.1)
    assert TraceSet(tmp_path / "flash").manifest["settings"]["flash_attn"] is True
    assert TraceSet(tmp_path / "plain").manifest["settings"]["flash_attn"] is False


def test_traces_with_flash_attention_and_without_do_not_mix(
    model: RandomModel, text: str, tmp_path: Path
) -> None:
    traced(model, text, tmp_path, n_traces=1)
    with pytest.raises(TraceError, match=r"another run \(flash_attn False instead of True\)"):
        traced(model, text, tmp_path, n_traces=1, flash_attn=True)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "nothing to read: give --text"),
        (["--task-prose", BOOK], "--task-prose needs --tasks N"),
        (["--tasks", "2", "--length", "20"], "nothing to trace"),
        (["--text", "none.txt"], "cannot read 'none.txt'"),
    ],
)
def test_the_command_says_what_is_wrong(
    argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "--out", str(tmp_path / "out"), *argv]) == 2
    assert says in capsys.readouterr().err


def test_the_command_refuses_a_recurrent_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mamba(tmp_path / "mamba.gguf")
    argv = ["trace", str(tmp_path / "mamba.gguf"), "--out", str(tmp_path / "o"), "--tasks", "1"]
    assert main(argv) == 2
    assert "recurrent" in capsys.readouterr().err
    with pytest.raises(UnsupportedModelError):
        capture_traces(tmp_path / "mamba.gguf", [Tasks(1)], tmp_path / "o")


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; sys.path.remove(''); from kvp_edge.cli import main; sys.exit(main())"
    argv = ["trace", "--out", str(out), "--text", BOOK, "--length", "512", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, env=os.environ.copy()
    ) as run:
        deadline = time.monotonic() + 300
        while not (out / "trace-00002.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert b"interrupted" in err
    traces = TraceSet(out, partial=True)
    assert len(traces) >= 2  # the third may be written and not yet listed
    traces.check()
    assert not list(out.glob(".*"))
