"""From traces to batches of states: a cut point in a trace, and the tokens that compete there.

A state is what an eviction would see: the tokens before the cut, of which the first ``sinks`` and
the newest ``recent`` are protected and do not compete, and the attention that each competing token
receives after the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvp_edge.arrays import BoolArray, IntArray, TokenIndices
from kvp_edge.errors import TrainingError
from kvp_edge.training.agent import position_features

_MIN_COMPETING = 16  # fewer tokens than this are not worth ranking


class TraceLike(Protocol):
    """One text as a model saw it: L layers, H KV heads, T tokens."""

    @property
    def keys(self) -> npt.NDArray[np.float16]:
        """f16 [L, H, T, head_size_k], as cached (RoPE included)."""

    @property
    def values(self) -> npt.NDArray[np.float16]:
        """f16 [L, H, T, head_size_v]."""

    @property
    def indices(self) -> TokenIndices:
        """int32 [T]: each token's index in the conversation."""

    @property
    def splits(self) -> IntArray:
        """The numbers n <= T for which ``importance`` is exact, ascending."""

    def importance(self, n: int) -> npt.NDArray[np.float32]:
        """f32 [L, H, n]: attention that the first n tokens receive from the later ones; the maximum
        over a KV head's query group, then the sum over queries."""

    def peak(self, n: int) -> npt.NDArray[np.float32]:
        """f32 [L, H, n]: the same from the one block of later queries that attends most."""

    def payments(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Every block's first query b, and f32 [L, H, b]: the mean attention of the block's queries
        to the tokens before it."""


class TraceSetLike(Protocol):
    """Traces of one model. ``model``, if there, may tell any of its ``_FACTS``."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> TraceLike: ...


@dataclass(frozen=True)
class Protected:
    """The tokens that never compete."""

    sinks: int = 4
    recent: int = 32

    def competing(self, n: int) -> tuple[int, int]:
        """[first, end) of the tokens that compete when n tokens are in the cache."""
        return self.sinks, n - self.recent


def cut_points(trace: TraceLike, protected: Protected) -> IntArray:
    """The numbers of tokens n at which this trace can be cut; empty if it is too short.

    At least a few tokens must compete.
    """
    least = protected.sinks + protected.recent + _MIN_COMPETING
    cuts: IntArray = trace.splits[trace.splits >= least]
    return cuts


class States(Protocol):
    """Moments of eviction in a trace."""

    def of(self, trace: TraceLike, index: int, /) -> list[tuple[int, BoolArray]]:
        """The number n of tokens read, and which of them each head keeps: bool [N, n]."""


class InMemory:
    """Caches traces as long as they fit: reading one takes longer than training on it."""

    def __init__(self, traces: TraceSetLike, limit: int = 4 * 2**30) -> None:
        self._traces = traces
        self._kept: dict[int, TraceLike] = {}
        self._room = limit

    def __len__(self) -> int:
        return len(self._traces)

    def __getitem__(self, index: int, /) -> TraceLike:
        if index in self._kept:
            return self._kept[index]
        trace = self._traces[index]
        # attention takes about as many bytes as keys and values
        self._room -= 2 * (trace.keys.nbytes + trace.values.nbytes)
        if self._room > 0:
            self._kept[index] = trace
        return trace


def check_traces(
    traces: TraceSetLike, protected: Protected, indices: Sequence[int] | None = None
) -> tuple[list[int], tuple[int, ...]]:
    """Which traces can be used, and the shape (L, H, head_size_k, head_size_v) of all of them.

    Args:
        indices: of the traces that are looked at; None: all.

    Raises:
        TrainingError: none can be, or they are of different models.
    """
    usable: list[int] = []
    shape: tuple[int, ...] | None = None
    looked_at = range(len(traces)) if indices is None else indices
    for i in looked_at:
        trace = traces[i]
        found = (*trace.keys.shape[:2], trace.keys.shape[3], trace.values.shape[3])
        if trace.values.shape[:3] != trace.keys.shape[:3]:
            raise TrainingError(f"trace {i} is damaged: its keys and values do not fit together")
        if shape is not None and found != shape:
            raise TrainingError(
                f"trace {i} is from another model: {_words(found)} instead of {_words(shape)}"
            )
        shape = found
        if len(cut_points(trace, protected)):
            usable.append(i)
    if shape is None:
        raise TrainingError("no traces to train on: record some with kvp-edge trace")
    if not usable:
        raise TrainingError(
            f"all {len(looked_at)} traces are too short: besides {protected.sinks} sinks and "
            f"{protected.recent} recent tokens, they need {_MIN_COMPETING} more tokens and a "
            "block of later ones"
        )
    return usable, shape


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} layers x {shape[1]} KV heads x {shape[2]}+{shape[3]}"


_FACTS = ("architecture", "name", "fingerprint", "identity")


def model_facts(traces: Any) -> dict[str, str]:
    """What the traces know about their model: any of ``_FACTS``."""
    facts = getattr(traces, "model", None)
    if not isinstance(facts, Mapping):
        return {}
    return {key: str(facts[key]) for key in _FACTS if key in facts}


@dataclass(frozen=True)
class Batch:
    """B states of which up to C runs of S tokens compete; h is half the context width.

    Attributes:
        features: f32 [a, B * C, S + 2h, F] of a agents, which score n heads.
        known: bool [B * C, S + 2h]; False where there is no token to see.
        present: bool [n, B, C * S], or [1, B, C * S] if the same in all heads; the tokens that
            compete.
        importance: f32 [n, B, C * S], 0 where not present.
        ages: int64 [B, C * S], tokens read since, at least 1.
    """

    features: Tensor
    known: Tensor
    present: Tensor
    importance: Tensor
    ages: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.features.to(device),
            self.known.to(device),
            self.present.to(device),
            self.importance.to(device),
            self.ages.to(device),
        )


@dataclass(frozen=True)
class Sampler:
    """Draws states at random. In long ones only some runs of neighbouring tokens compete, drawn at
    random too, so that every batch has the same size however long the traces are.

    ``usable``, the traces to draw from, may change between two draws.
    """

    traces: TraceSetLike
    usable: list[int]
    protected: Protected
    context: int
    states: int  # B
    tokens: int  # C * S
    run: int = 64  # S
    states_of: States | None = None  # None: cuts of a trace, all tokens kept
    heads_each: int = 1  # of an agent (kvp_edge.training.agent)

    def draw(self, rng: np.random.Generator, agents: npt.NDArray[np.intp]) -> Batch:
        """A batch for these agents (indices into layers x KV heads, flattened; or into layers).

        Raises:
            TrainingError: a trace holds NaN or infinite numbers.
        """
        heads = heads_of(agents, self.heads_each)
        half = self.context // 2
        runs = max(1, self.tokens // self.run)
        features, known, present, importance, ages = [], [], [], [], []
        for _ in range(self.states):
            index = self.usable[int(rng.integers(len(self.usable)))]
            trace = self.traces[index]
            n, held = self._state(rng, trace, index)
            first, end = self.protected.competing(n)
            starts = self._starts(rng, first, end, runs, np.any(held, axis=0))
            at = starts[:, None] + np.arange(-half, self.run + half)
            inner = at[:, half : half + self.run].reshape(-1)
            there = (inner >= first) & (inner < end)
            known.append((at >= 0) & (at < n))
            held = held if len(held) == 1 else held[heads]
            there = there & held[:, inner.clip(0, n - 1)]
            present.append(there)
            inside = at.clip(0, n - 1).reshape(-1)
            found = gather(trace, inside, agents, index, self.heads_each)
            features.append(found.reshape(len(agents), *at.shape, -1))
            received = importance_of(trace, n, heads, index)[:, inner.clip(0, n - 1)]
            importance.append(np.where(there, received, 0.0))
            ages.append((n - inner).clip(1))
        return Batch(
            torch.from_numpy(np.concatenate(features, axis=1)),
            torch.from_numpy(np.concatenate(known)),
            torch.from_numpy(np.stack(present, axis=1)),
            torch.from_numpy(np.stack(importance, axis=1).astype(np.float32)),
            torch.from_numpy(np.stack(ages)),
        )

    def _state(
        self, rng: np.random.Generator, trace: TraceLike, index: int
    ) -> tuple[int, BoolArray]:
        """The number of tokens read, and which of them are kept: bool [N or 1, n]."""
        if self.states_of is None:
            cuts = cut_points(trace, self.protected)
            n = int(cuts[rng.integers(len(cuts))])
            return n, np.ones((1, n), np.bool_)
        states = self.states_of.of(trace, index)
        n, held = states[int(rng.integers(len(states)))]
        return n, held

    def _starts(
        self,
        rng: np.random.Generator,
        first: int,
        end: int,
        runs: int,
        held: BoolArray,
    ) -> npt.NDArray[np.intp]:
        """Where ``runs`` runs of tokens begin, ascending; those past ``end`` are empty."""
        if end - first <= runs * self.run:
            return first + self.run * np.arange(runs)
        # a grid with a random phase, or tokens would always compete in the same company
        grid = np.arange(first - int(rng.integers(self.run)), end, self.run)
        if self.states_of is None:
            return np.sort(rng.choice(grid, runs, replace=False))
        share = np.add.reduceat(held[:end].astype(float), grid.clip(0)) + 1e-3
        return np.sort(rng.choice(grid, runs, replace=False, p=share / share.sum()))


def heads_of(agents: npt.NDArray[np.intp], heads_each: int) -> npt.NDArray[np.intp]:
    """The heads that these agents score, as indices into layers x KV heads: intp [n]."""
    return (agents[:, None] * heads_each + np.arange(heads_each)).ravel()


def gather(
    trace: TraceLike,
    at: npt.NDArray[np.intp],
    agents: npt.NDArray[np.intp],
    index: int,
    heads_each: int = 1,
) -> npt.NDArray[np.float32]:
    """Features of some tokens for some agents: f32 [a, len(at), F], as docs/policy-format.md lists
    them, not standardised. ``index`` names the trace in errors."""
    layer, head = np.unravel_index(agents * heads_each, trace.keys.shape[:2])
    dk, dv = (heads_each * rows.shape[3] for rows in (trace.keys, trace.values))
    out = np.empty((len(agents), len(at), dk + dv + 4), np.float32)
    for i, (il, first) in enumerate(zip(layer, head, strict=True)):
        heads = slice(first, first + heads_each)
        for rows, to in ((trace.keys, out[i, :, :dk]), (trace.values, out[i, :, dk : dk + dv])):
            to[:] = rows[il, heads][:, at].swapaxes(0, 1).reshape(len(at), -1)
    out[:, :, dk + dv :] = position_features(torch.from_numpy(trace.indices[at])).numpy()
    if not np.isfinite(out).all():
        raise TrainingError(
            f"trace {index} has keys or values that are not finite (NaN or infinite): leave "
            "it out or record it again"
        )
    return out


def importance_of(
    trace: TraceLike, n: int, heads: npt.NDArray[np.intp], index: int
) -> npt.NDArray[np.float32]:
    """``trace.importance(n)`` of some heads: f32 [len(heads), n]."""
    received: npt.NDArray[np.float32] = trace.importance(n).reshape(-1, n)[heads]
    if not np.isfinite(received).all() or (received < 0).any():
        raise TrainingError(
            f"trace {index} has attention that is negative or not finite: record it again"
        )
    return received


def standardisation(
    traces: TraceSetLike,
    usable: list[int],
    agents: npt.NDArray[np.intp],
    sample: int = 32,
    heads_each: int = 1,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of every feature of every agent: f32 [a, F] each, from up to
    ``sample`` traces spread over the set."""
    chosen = [usable[i] for i in np.unique(np.linspace(0, len(usable) - 1, sample).astype(int))]
    total, squares, count = 0.0, 0.0, 0
    for index in chosen:
        trace = traces[index]
        at = np.arange(trace.keys.shape[2])
        x = gather(trace, at, agents, index, heads_each).astype(np.float64)
        total, squares, count = total + x.sum(1), squares + (x**2).sum(1), count + x.shape[1]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    # a constant feature carries nothing, and must not become large on other data
    scale = np.where(std > 1e-4, 1 / np.maximum(std, 1e-4), 0.0)
    return torch.from_numpy(np.float32(mean)), torch.from_numpy(np.float32(scale))
