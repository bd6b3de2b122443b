"""Labels of tokens that may be asked for, against the numpy reference of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import DATA, RandomModel, random_tokens
from kvp_edge.cli import main
from kvp_edge.errors import KVCacheError, TraceError, UnsupportedModelError
from kvp_edge.text.chat_prompt import next_turn
from kvp_edge.traces import labels as labels_module
from kvp_edge.traces.format import TraceSet, metadata_of
from kvp_edge.traces.labels import LABELS, LATER, NEAR, PIECE, QUESTIONED, REPEATED, tokens_needed
from kvp_edge.traces.sources import TextFile
from kvp_edge.traces.tracer import Captured, Tracer, smallest_block
from kvp_edge.traces.writer import capture_traces
from makers.gguf_models import ModelShape
from support.more_than_softmax import write_more_than_a_softmax

BOOK = str(DATA / "penelope_brandling.txt")
F32 = {"type_k": 0, "type_v": 0}
QUIET = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
SHAPES = {
    "llama, 2 queries to a key": ModelShape("llama", head_dim=32),
    "qwen2, 4 queries to a key": ModelShape("qwen2", n_embd=256, head_dim=64, n_head_kv=1),
    "gemma3, sliding window": ModelShape("gemma3", n_layer=3, sliding_window=24),
}
LLAMA = SHAPES["llama, 2 queries to a key"]

Maker = Callable[[ModelShape], RandomModel]
Make = Callable[..., "Watched"]
Floats = NDArray[np.float32]


class Watched(Tracer):
    """Remembers what it read after the text: one entry for every batch."""

    def capture(self, *args: Any, **kwargs: Any) -> Captured:
        self.batches: list[list[int]] = []
        return super().capture(*args, **kwargs)

    def eval(self, tokens: Any) -> None:
        super().eval(tokens)
        self.batches.append([int(token) for token in tokens])


@pytest.fixture
def tracer() -> Iterator[Make]:
    made: list[Watched] = []

    def make(path: str, length: int, *labels: str, written: int = 12, **how: Any) -> Watched:
        made.append(Watched(path, length, labels=labels, written=written, **{**QUIET, **how}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def paid_by(model: RandomModel, tokens: list[int], asking: list[int], n: int) -> Floats:
    """The largest attention of the positions ``asking`` to the first n tokens: base layers."""
    shape = model.shape
    base = [il for il in range(shape.n_layer) if not shape.is_local(il)]
    paid = model.reference.attention(tokens)[base][:, :, asking, :n]
    largest: Floats = paid.reshape(len(base), shape.n_head_kv, -1, n).max(axis=2)
    return largest


def ends(llm: Watched) -> list[tuple[int, list[int]]]:
    """The position behind every batch, and its tokens."""
    found, at = [], 0
    for batch in llm.batches:
        at += len(batch)
        found.append((at, batch))
    return found


@pytest.mark.parametrize("flash", [False, True], ids=["as computed", "flash attention"])
@pytest.mark.parametrize("n_ubatch", [7, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_is_the_most_attention_that_a_repetition_pays(
    shape: str, n_ubatch: int, flash: bool, random_model: Maker, tracer: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(labels_module, "PIECE", 30)  # three pieces
    model, text = random_model(SHAPES[shape]), random_tokens(70)
    llm = tracer(model.path, 70, REPEATED, n_ubatch=n_ubatch, flash_attn=flash, **F32)
    got = llm.capture(text, 40)
    assert got.tokens.tolist() == text
    read = [token for batch in llm.batches for token in batch]
    asking, again = [], []
    at = 70
    for begin in (1, 31, 61):  # without the token that begins the text
        piece = text[begin : begin + 30]
        # the piece comes after an instruction, which does not ask
        while read[at : at + len(piece)] != piece:
            at += 1
        asking += range(at, at + len(piece))
        again += piece
        at += len(piece)
    assert again == text[1:]
    assert at == len(read)
    assert len(asking) == 69 < len(read) - 70
    want = paid_by(model, read, asking, 70)
    assert got.labels.keys() == {REPEATED}
    label = got.labels[REPEATED]
    assert label.dtype == np.float16
    # gemma3: ggml looks GELU up in an f16 table (see test_reference.py); flash attention is in f16
    tolerance = 0.01 if flash or model.shape.arch == "gemma3" else 1e-3
    np.testing.assert_allclose(label.astype(np.float32), want, rtol=tolerance, atol=tolerance / 10)
    # what follows the text in it does not ask
    assert np.abs(want - paid_by(model, read, list(range(40, 70)), 70)).max() > 0.1


@pytest.mark.parametrize("flash", [False, True], ids=["as computed", "flash attention"])
@pytest.mark.parametrize("n_ubatch", [7, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_later_is_the_most_attention_that_the_tokens_of_each_piece_pay(
    shape: str, n_ubatch: int, flash: bool, random_model: Maker, tracer: Make
) -> None:
    model, text = random_model(SHAPES[shape]), random_tokens(3 * NEAR + 5)
    llm = tracer(model.path, len(text), LATER, n_ubatch=n_ubatch, flash_attn=flash, **F32)
    label = llm.capture(text, 40).labels[LATER].astype(np.float32)
    ends = [NEAR, 2 * NEAR, 3 * NEAR, len(text)]
    assert label.shape[2] == sum(ends)
    tolerance = 0.01 if flash or model.shape.arch == "gemma3" else 1e-3
    at = begin = 0
    for end in ends:
        want = paid_by(model, text, list(range(begin, end)), end)
        got = label[:, :, at : at + end]
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance / 10)
        at, begin = at + end, end


def test_later_does_not_depend_on_the_batches_that_a_text_is_read_in(
    random_model: Maker, tracer: Make
) -> None:
    path, text = random_model(LLAMA).path, random_tokens(2 * NEAR + 9)
    whole, parts = (tracer(path, len(text), LATER, n_batch=n, n_ubatch=n) for n in (512, 11))
    parted = parts.capture(text, 40).labels[LATER].astype(np.float32)
    read = whole.capture(text, 40).labels[LATER].astype(np.float32)
    np.testing.assert_allclose(parted, read, rtol=1e-3, atol=1e-5)


def test_what_the_rest_of_a_text_looks_at_is_read_from_its_pieces(
    random_model: Maker, text: str, tmp_path: Path
) -> None:
    model = random_model(LLAMA)
    [trace] = traced(model.path, text, tmp_path / "out", "later", n_traces=1, length=2 * NEAR + 9)
    tokens = trace.tokens.tolist()
    for n, since in ((1, NEAR), (NEAR, NEAR), (NEAR + 1, 2 * NEAR), (2 * NEAR, 2 * NEAR)):
        want = paid_by(model, tokens, list(range(since, len(tokens))), n)
        np.testing.assert_allclose(trace.asked_later(n), want, rtol=1e-2, atol=1e-3)
    for n in (0, 2 * NEAR + 1):
        with pytest.raises(ValueError, match=f"no piece of {NEAR} queries begins at {n} or later"):
            trace.asked_later(n)
    [bare] = traced(model.path, text, tmp_path / "bare", "text", n_traces=1)
    with pytest.raises(ValueError, match="recorded without --future later"):
        bare.asked_later(1)


@pytest.mark.parametrize("n_ubatch", [5, 512])
def test_questioned_is_the_most_attention_that_what_the_model_writes_pays(
    n_ubatch: int, random_model: Maker, tracer: Make
) -> None:
    model, text = random_model(LLAMA), random_tokens(50)
    llm = tracer(model.path, 50, QUESTIONED, written=12, n_ubatch=n_ubatch, **F32)
    got = llm.capture(text, 40)
    read = [token for batch in llm.batches for token in batch]
    written = [batch[0] for at, batch in ends(llm) if at > len(read) - 12]
    assert len(written) == 12 == len(read) - 50 - len(next_turn(llm, labels_module._QUESTIONS))
    likeliest = model.reference.logits(read).argmax(axis=-1)[-13:-1]
    assert likeliest.tolist() == written == read[-12:]
    want = paid_by(model, read, list(range(len(read) - 12, len(read))), 50)
    label = got.labels[QUESTIONED].astype(np.float32)
    np.testing.assert_allclose(label, want, rtol=1e-3, atol=1e-4)


def test_a_model_that_asks_nothing_leaves_zeros(
    random_model: Maker, tracer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "ends_reply", lambda llm, token: True)
    llm = tracer(random_model(LLAMA).path, 50, *LABELS)
    got = llm.capture(random_tokens(50), 40)
    assert (got.labels[QUESTIONED] == 0).all()
    assert (got.labels[REPEATED].max(axis=-1) > 0).all()


@pytest.mark.parametrize("n", [1, 2])
def test_the_token_that_begins_a_text_is_not_repeated(
    n: int, random_model: Maker, tracer: Make
) -> None:
    got = tracer(random_model(LLAMA).path, 8, REPEATED).capture(random_tokens(n), n)
    assert got.labels[REPEATED].shape == (2, 2, n)
    assert (got.labels[REPEATED] > 0).any() == (n > 1)
    with pytest.raises(ValueError, match="a trace of 0 tokens"):
        tracer(random_model(LLAMA).path, 8, REPEATED).capture([], 0)


@pytest.mark.parametrize("n", [PIECE, PIECE + 1, PIECE + 2])
def test_there_is_room_for_a_text_that_fills_its_pieces(
    n: int, random_model: Maker, tracer: Make
) -> None:
    """The first token begins the text, so that n - 1 are repeated."""
    llm = tracer(random_model(ModelShape("llama", n_layer=1)).path, n, *LABELS, written=3)
    llm.capture(random_tokens(n), n)
    instructions = [batch for at, batch in ends(llm) if 1 < len(batch) < 192 and at > n]
    n_pieces = -(-(n - 1) // PIECE)
    assert len(instructions) >= n_pieces + 1
    assert sum(map(len, llm.batches)) <= tokens_needed(n, LABELS, 3) <= llm.n_ctx()
    with pytest.raises(ValueError, match="does not fit"):
        llm.capture(random_tokens(n + 1), n)


def test_an_instruction_too_long_for_its_room_is_told(
    random_model: Maker, tracer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "_INSTRUCTION", 4)
    with pytest.raises(KVCacheError, match=r"takes \d+ tokens, more than the 4 there is room for"):
        tracer(random_model(LLAMA).path, 50, REPEATED).capture(random_tokens(50), 50)


def test_a_capture_does_not_depend_on_what_was_read_before(
    random_model: Maker, tracer: Make
) -> None:
    llm = tracer(random_model(LLAMA).path, 90, *LABELS)
    first = llm.capture(random_tokens(50), 20)
    llm.capture(random_tokens(90, seed=1), 30)
    again = llm.capture(random_tokens(50), 20)
    plain = tracer(llm.model_path, 90, block=llm.block).capture(random_tokens(50), 20)
    for name in LABELS:
        assert first.labels[name].tobytes() == again.labels[name].tobytes()
    for name in ("keys", "values", "sums", "tokens"):  # as without labels
        assert getattr(plain, name).tobytes() == getattr(first, name).tobytes()
    assert plain.labels == {}


@pytest.mark.parametrize("arch", ["gemma2", "gpt-oss", "mpt"])
def test_attention_that_is_more_than_a_softmax_is_refused(
    arch: str, tmp_path: Path, tracer: Make
) -> None:
    write_more_than_a_softmax(tmp_path / "model.gguf", arch)
    with pytest.raises(
        UnsupportedModelError,
        match=r"is more than softmax\(scale \* q.k\)\. Trace it with --future text or "
        r"--future greedy alone$",
    ):
        tracer(str(tmp_path / "model.gguf"), 50, REPEATED)


def test_a_model_looks_at_what_it_repeats_with_a_chat_template_and_without(
    bundled_model: str, bare: str, book: str, tracer: Make
) -> None:
    for path in (bundled_model, bare):
        llm = tracer(path, 300, REPEATED)
        text = llm.tokenize(book.encode())[:300]
        label = llm.capture(text, 200).labels[REPEATED].astype(np.float32)
        spoken = llm.detokenize(llm.batches[1], special=True).decode()
        assert "Repeat the text" in spoken
        assert ("User:" in spoken) == (path == bare)
        looked_at = (label[:, :, 1:].max(axis=(0, 1)) > 0.2).mean()
        assert looked_at > (0.1 if path == bare else 0.4)


def test_labels_count_in_the_size_of_a_file() -> None:
    from kvp_edge.binding.structs import CacheShape

    shape = CacheShape(n_layer=8, n_head_kv=2, head_size_k=32, head_size_v=32)
    none, two = (), (QUESTIONED, REPEATED)
    assert [smallest_block(shape, 1000, labels) for labels in (none, two, LABELS)] == [8, 16, 16]


# -- in files ------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the thing and the other, on and on. " * 60)
    return str(path)


def traced(path: str, text: str, out: Path, *future: str, **how: Any) -> TraceSet:
    how = {"length": 60, "n_traces": 3, "future_tokens": 6, **QUIET, **how}
    return TraceSet(capture_traces(path, [TextFile(text)], out, future=future, **how))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_traces_keep_their_labels_and_an_interruption_changes_no_byte(
    random_model: Maker, text: str, tmp_path: Path, tracer: Make
) -> None:
    path = random_model(LLAMA).path
    whole = traced(path, text, tmp_path / "whole", "repeat", "later", "questions")
    assert whole.manifest["format_version"] == 2
    llm = tracer(path, 60, *LABELS, written=6)
    for trace in whole:
        want = llm.capture(trace.tokens.tolist(), trace.n_prompt)
        for name in LABELS:
            np.testing.assert_array_equal(getattr(trace, name), want.labels[name])

    def stop(done: int, planned: int, n_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(path, text, tmp_path / "out", "questions", "repeat", "text", "later", progress=stop)
    traced(path, text, tmp_path / "out", "later", "repeat", "questions")
    assert bytes_of(tmp_path / "out") == bytes_of(whole.path)
    with pytest.raises(TraceError, match=r"another run \(labels .*repeated.* instead of"):
        traced(path, text, tmp_path / "out", "questions")


def test_traces_without_labels_are_as_before(
    random_model: Maker, text: str, tmp_path: Path
) -> None:
    traces = traced(random_model(LLAMA).path, text, tmp_path / "out", "text")
    assert traces.manifest["format_version"] == 1
    assert traces[0].repeated is None
    assert traces[0].questioned is None
    data = (tmp_path / "out" / "trace-00000.safetensors").read_bytes()
    assert "labels" not in metadata_of(data)


def test_what_is_wrong_with_labels_is_refused(
    random_model: Maker, text: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load, save

    traces = traced(random_model(LLAMA).path, text, tmp_path / "out", "repeat", n_traces=1)
    path = tmp_path / "out" / "trace-00000.safetensors"
    data = path.read_bytes()
    about, arrays = metadata_of(data), load(data)
    bad: list[tuple[Any, Any]] = [
        *((about | {"labels": value}, arrays) for value in (["keys"], "repeated", 3, [[]], None)),
        (about | {"labels": ["questioned"]}, arrays),
        (about, {k: v for k, v in arrays.items() if k != "repeated"}),
        (about, arrays | {"repeated": arrays["repeated"].astype(np.float32)}),
        (about, arrays | {"repeated": arrays["repeated"][:, :, 1:]}),
    ]
    for said, held in bad:
        path.write_bytes(save(held, {"kvp_trace": json.dumps(said)}))
        traces._entries[0]["bytes"] = path.stat().st_size
        with pytest.raises(TraceError, match="00000.*' is damaged"):
            traces[0]


@pytest.mark.parametrize(
    ("future", "says"),
    [
        ((), "must be one or several of text, greedy, later, repeat, questions"),
        (("sing",), "not 'sing'"),
        (("text", "greedy"), "either text, which the source has, or greedy"),
    ],
)
def test_a_future_that_is_none_is_refused(
    future: tuple[str, ...], says: str, random_model: Maker, text: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=says):
        traced(random_model(LLAMA).path, text, tmp_path / "out", *future)


def test_the_command_records_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["trace", "--out", str(tmp_path / "t"), "--tasks", "2", "--length", "200"]
    argv += ["--threads", "1", "--future-tokens", "4", "--future"]
    assert main([*argv, "greedy", "repeat", "questions"]) == 0
    for trace in TraceSet(tmp_path / "t"):
        assert trace.repeated is not None
        assert trace.questioned is not None
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*argv, "sing"])
    assert "must be text, greedy, later, repeat, questions, not 'sing'" in capsys.readouterr().err
