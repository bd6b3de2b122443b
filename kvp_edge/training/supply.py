"""Which traces a run learns from: all of a folder, or those that it reads meanwhile.

A run that reads holds its validation traces throughout, and as many others as the buffer has room
for. It begins when the buffer is full. Then reading and training alternate, evenly over the steps:
each new trace replaces the oldest. What is held follows from the step alone, so that a resumed run
reads again what it held, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvp_edge.arrays import TokenIds
from kvp_edge.errors import TrainingError
from kvp_edge.traces.stream import TraceStream
from kvp_edge.training.data import (
    InMemory,
    Protected,
    TraceSetLike,
    check_traces,
    cut_points,
)
from kvp_edge.training.importance import Judged
from kvp_edge.training.settings import Settings


class Supply(Protocol):
    """The traces of a run.

    Attributes:
        traces: by the importance of the run; those of ``held_out`` and ``training`` can be had.
        shape: layers, KV heads, head_size_k, head_size_v.
        held_out: for validation.
        training: to learn from now. The list itself changes (``advance``).
        texts: those whose ``text`` training may use, whether or not they can be had.
        about: what a resumed run must have in common with this one.
    """

    traces: TraceSetLike
    shape: tuple[int, ...]
    held_out: list[int]
    training: list[int]
    texts: list[int]
    about: dict[str, Any]

    def advance(self, step: int) -> bool:
        """Have what step number ``step`` learns from. Returns whether anything has changed.

        Raises:
            TrainingError: there is none.
        """

    def text(self, index: int) -> TokenIds:
        """int32, the tokens of a trace."""


def supply_of(traces: TraceSetLike | TraceStream, settings: Settings) -> Supply:
    return Read(traces, settings) if isinstance(traces, TraceStream) else Stored(traces, settings)


def held_out_of(usable: list[int], settings: Settings) -> list[int]:
    """Every n-th trace; a single one does both."""
    apart = max(2, round(1 / settings.validation))
    held_out = usable[apart // 2 :: apart] if len(usable) >= 2 else usable
    return held_out or usable[-1:]


def read_for_validation(n_traces: int, settings: Settings) -> list[int]:
    """Those of a stream's traces that are held throughout: no more than there are states."""
    found = held_out_of(list(range(n_traces)), settings)
    if len(found) > settings.validation_states:
        spread = np.linspace(0, len(found) - 1, settings.validation_states).astype(int)
        found = [found[i] for i in spread]
    return found


def _judged(traces: TraceSetLike, s: Settings, protected: Protected) -> TraceSetLike:
    return traces if s.importance == "sum" else Judged(traces, s.importance, protected)


class Stored:
    """All traces of a folder."""

    def __init__(self, traces: TraceSetLike, s: Settings) -> None:
        protected = Protected(s.sinks, s.recent)
        self.traces: TraceSetLike = InMemory(_judged(traces, s, protected))
        usable, self.shape = check_traces(self.traces, protected)
        self.held_out = held_out_of(usable, s)
        self.training = [i for i in usable if i not in set(self.held_out)] or usable
        self.texts = self.training
        self.about: dict[str, Any] = {"n_traces": len(traces)}

    def advance(self, step: int) -> bool:
        return False

    def text(self, index: int) -> TokenIds:
        tokens: TokenIds | None = getattr(self.traces[index], "tokens", None)
        if tokens is None:
            raise TrainingError("the traces have no token ids: record them again")
        return tokens


@dataclass
class Windows:
    """Which of n traces, in the order in which they are read, are held at a step.

    Attributes:
        sizes: their bytes, each at most ``room``.
        room: bytes that may be held.
        steps: after which all were read.
    """

    sizes: list[int]
    room: int
    steps: int
    _ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._ends = [0, *np.cumsum(self.sizes).tolist()]

    def at(self, step: int) -> range:
        """From the oldest to the newest. The buffer is full before step 0, and the last trace is
        there at the last step."""
        n, last = len(self.sizes), max(1, self.steps - 1)
        full = int(np.searchsorted(self._ends, self.room, side="right")) - 1
        end = full + math.ceil((n - full) * min(step, last) / last)
        begin = int(np.searchsorted(self._ends, self._ends[end] - self.room))
        return range(begin, end)


class Read:
    """Traces that are read while a run learns."""

    def __init__(self, stream: TraceStream, s: Settings) -> None:
        self._stream = stream
        self._protected = Protected(s.sinks, s.recent)
        self.traces: TraceSetLike = _judged(stream, s, self._protected)
        self.shape: tuple[int, ...] = stream.head_shape
        self.held_out = read_for_validation(len(stream), s)
        self._kept = list(self.held_out)
        others = sorted({*range(len(stream))} - {*self._kept}) or list(self._kept)
        # sources come one after the other
        self._order: list[int] = np.random.default_rng([s.seed, 5]).permutation(others).tolist()
        self.texts = others
        self.training: list[int] = []
        self._window: range | None = None
        kept, sizes = sum(map(stream.size, self._kept)), [stream.size(i) for i in self._order]
        if kept + max(sizes) > stream.buffer:
            raise TrainingError(
                f"a buffer of {_mib(stream.buffer)} is too small: the {len(self._kept)} traces "
                f"for validation take {_mib(kept)}, and one more takes {_mib(max(sizes))}. Raise "
                "--buffer, or lower --length"
            )
        self._windows = Windows(sizes, stream.buffer - kept, dict(s.phases)["heads"])
        self.about: dict[str, Any] = {
            "n_traces": len(stream),
            "buffer": stream.buffer,
            "reading": stream.run,
        }

    def advance(self, step: int) -> bool:
        window = self._windows.at(step)
        if window == self._window:
            return False
        if self._window is None:
            self._stream.hold(self._kept)
            self.held_out, _ = check_traces(self.traces, self._protected, self._kept)
        wanted = [self._order[i] for i in window]
        self._stream.hold([*self._kept, *wanted])
        self._window = window
        self.training[:] = [
            i for i in wanted if len(cut_points(self.traces[i], self._protected))
        ] or self.held_out
        return True

    def text(self, index: int) -> TokenIds:
        return self._stream.text(index)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
