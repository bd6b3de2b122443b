"""Runs that learn from traces while these are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from conftest import RandomModel  # noqa: E402
from kvp_edge.errors import TraceError, TrainingError  # noqa: E402
from kvp_edge.traces.format import TraceSet  # noqa: E402
from kvp_edge.traces.sources import TextFile  # noqa: E402
from kvp_edge.traces.stream import TraceStream, open_stream  # noqa: E402
from kvp_edge.traces.writer import capture_traces  # noqa: E402
from kvp_edge.training import checkpoint  # noqa: E402
from kvp_edge.training.data import Sampler  # noqa: E402
from kvp_edge.training.settings import Settings  # noqa: E402
from kvp_edge.training.supply import Read, Windows, read_for_validation  # noqa: E402
from kvp_edge.training.train import train  # noqa: E402
from makers.gguf_models import ModelShape  # noqa: E402
from support.properties import examples  # noqa: E402

QUIET = {"n_threads": 1, "n_threads_batch": 1}
HOW: dict[str, Any] = {"length": 100, "future_tokens": 20, **QUIET}
TINY: dict[str, Any] = {
    "objective": "kvp",
    "hidden": 8,
    "context": 3,
    "steps": 12,
    "token_steps": 4,
    "states": 2,
    "tokens": 64,
    "eval_every": 4,
    "validation_states": 3,
    "validation": 0.2,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def path(random_model: Callable[[ModelShape], RandomModel]) -> str:
    return random_model(ModelShape("llama")).path


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} things and {i * i} others, on and on. " for i in range(90)))
    return str(path)


class Watched(TraceStream):
    """Remembers what was read, and the most bytes held."""

    read: list[int]
    most = 0

    @classmethod
    def open(cls, path: str, text: str, n_held: float, **how: Any) -> Watched:
        """A stream of 15 traces with room for ``n_held`` of them."""
        stream = open_stream(path, [TextFile(text)], buffer=0, **{"n_traces": 15, **HOW, **how})
        stream.__class__ = cls
        assert isinstance(stream, Watched)
        stream.buffer = int(n_held * stream.size(0))
        stream.read = []
        return stream

    def hold(self, indices: Any) -> None:
        wanted = list(indices)
        before = set(self._held)

        def count() -> None:
            self.most = max(self.most, self.held_bytes)

        self.on_read = count
        super().hold(wanted)
        self.read += [i for i in dict.fromkeys(wanted) if i not in before]


def trained(stream: TraceStream, out: Path, **how: Any) -> Any:
    return train(stream, out, Settings(**{**TINY, **how}), progress=False)


def interrupted(stream: TraceStream, out: Path, steps: int, **how: Any) -> None:
    """Ctrl-C after so many steps: what the last validation saved is what there is."""
    drawn, draw = 0, Sampler.draw

    def stop(self: Sampler, *args: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn > steps:
            raise KeyboardInterrupt
        return draw(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "draw", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(stream, out, **how)


def checkpoint_step(stops: tuple[int, ...]) -> int:
    """Of the last checkpoint, where one is written every 4 steps."""
    step = 0
    for stop in stops:
        step = (step + stop) // 4 * 4
    return step


def weights(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / checkpoint.BEST)[0]


def same(a: Path, b: Path) -> bool:
    mine, theirs = weights(a), weights(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@examples(200)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(50, 400),
    st.integers(1, 60),
)
def test_windows_fill_the_room_and_reach_every_trace(
    sizes: list[int], room: int, steps: int
) -> None:
    windows = Windows(sizes, room, steps)
    before = windows.at(0)
    assert before.start == 0
    for step in range(steps + 3):
        now = windows.at(step)
        assert sum(sizes[i] for i in now) <= room
        assert len(now) > 0
        # one more, older or newer, would not fit
        assert now.start == 0 or sum(sizes[i] for i in now) + sizes[now.start - 1] > room
        assert now.start >= before.start
        assert now.stop >= before.stop
        before = now
    assert before.stop == len(sizes) or steps == 1
    if sum(sizes) <= room:
        assert windows.at(0) == range(len(sizes))
    if steps > 1:
        assert windows.at(steps - 1).stop == len(sizes)


@pytest.mark.parametrize(
    "how", [{}, {"objective": "foresight", "grpo_steps": 0, "budget": 44, "every": 10}]
)
@pytest.mark.parametrize("stops", [(5,), (3, 8)])
def test_a_run_that_reads_ends_like_one_that_was_not_interrupted(
    stops: tuple[int, ...], how: dict[str, Any], path: str, text: str, tmp_path: Path
) -> None:
    whole = Watched.open(path, text, 6.5)
    trained(whole, tmp_path / "whole", **how)
    assert sorted(whole.read) == list(range(15))  # each of them once
    assert 5 * whole.size(0) < whole.most <= whole.buffer  # 3 for validation, 3 others
    whole.close()
    for stop in stops:
        stream = Watched.open(path, text, 6.5)
        interrupted(stream, tmp_path / "parts", stop, **how)
        stream.close()
    last = Watched.open(path, text, 6.5)
    trained(last, tmp_path / "parts", **how)
    # those for validation, three that were held at the checkpoint, and what followed
    held = read_for_validation(15, Settings(**{**TINY, **how}))
    assert last.read[:3] == held == whole.read[:3]
    assert last.read[3:] == whole.read[-len(last.read) + 3 :]
    step = checkpoint_step(stops)
    assert len(last.read) == 6 + 9 - math.ceil(9 * step / 11)
    assert last.most <= last.buffer
    last.close()
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_buffer_with_room_for_all_learns_as_from_a_folder(
    path: str, text: str, tmp_path: Path
) -> None:
    folder = capture_traces(path, [TextFile(text)], tmp_path / "traces", n_traces=15, **HOW)
    stored = TraceSet(folder)
    stream = Watched.open(path, text, 15)
    supply = Read(stream, Settings(**TINY))
    assert supply.advance(0)
    assert sorted([*supply.training, *supply.held_out]) == list(range(15))
    assert not supply.advance(11)
    for i, trace in enumerate(stored):
        for name in ("keys", "values", "attention", "tokens"):
            assert getattr(trace, name).tobytes() == getattr(stream[i], name).tobytes()
        assert stream[i].nbytes == stream.size(i) == trace.nbytes
        assert supply.text(i).tolist() == trace.tokens.tolist()
        assert stream[i].source == trace.source
    assert stream.held_bytes == stream.most == stream.buffer
    stream.close()


def test_the_smallest_buffer_holds_the_validation_and_one_trace(
    path: str, text: str, tmp_path: Path
) -> None:
    stream = Watched.open(path, text, 4)
    trained(stream, tmp_path / "run", steps=4)
    assert stream.most == stream.buffer
    stream.buffer -= 1
    with pytest.raises(TrainingError, match=r"buffer of .* is too small: the 3 traces for .*Raise"):
        Read(stream, Settings(**TINY))
    stream.close()


def test_one_trace_is_learned_from_and_measured(path: str, text: str, tmp_path: Path) -> None:
    stream = Watched.open(path, text, 2, n_traces=1)
    trained(stream, tmp_path / "run", steps=2)
    assert stream.read == [0]
    assert stream.measure() > 0
    stream.close()


def test_another_buffer_or_another_plan_is_refused_before_anything_is_read(
    path: str, text: str, tmp_path: Path
) -> None:
    stream = Watched.open(path, text, 6)
    interrupted(stream, tmp_path / "run", 5)
    stream.close()
    for n_held, how, says in ((7, {}, "buffer"), (6, {"seed": 1}, "reading")):
        other = Watched.open(path, text, n_held, **how)
        with pytest.raises(TrainingError, match=f"run with other settings \\({says}"):
            trained(other, tmp_path / "run")
        assert other.read == []
        other.close()


def test_the_folder_of_another_reading_is_refused(path: str, text: str, tmp_path: Path) -> None:
    sources = [TextFile(text)]
    open_stream(path, sources, buffer=1, folder=tmp_path / "out", **HOW).close()
    open_stream(path, sources, buffer=1, folder=tmp_path / "out", **HOW).close()
    with pytest.raises(TraceError, match=r"another run \(seed 0 instead of 1\)"):
        open_stream(path, sources, buffer=1, folder=tmp_path / "out", seed=1, **HOW)
