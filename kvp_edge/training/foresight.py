"""Golden evictions and their imitation (ForesightKV, arXiv:2602.03203, section 3).

Golden eviction knows the rest of the text. Every ``every`` tokens, each head keeps the newest
tokens and those that one block of later queries attends to most. Its states are those of evictions
in a long generation, and it orders the tokens in them; a scorer learns that order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from kvp_edge.arrays import BoolArray
from kvp_edge.training.data import Protected, TraceLike, importance_of
from kvp_edge.training.settings import Pairs

_OTHERS = 16  # tokens that each token is compared with in a step


@dataclass
class GoldenEvictions:
    """The states of golden eviction, trace by trace.

    Attributes:
        budget: tokens that each head keeps, the protected ones included.
        every: tokens read between two evictions, rounded up to borders between a trace's blocks.
    """

    budget: int
    every: int
    protected: Protected
    _known: dict[int, list[tuple[int, npt.NDArray[np.uint8]]]] = field(default_factory=dict)

    def forget(self, *, but: Iterable[int]) -> None:
        """Forget the states of all traces ``but`` these."""
        self._known = {i: self._known[i] for i in but if i in self._known}

    def times(self, trace: TraceLike) -> list[int]:
        """How many tokens have been read at each eviction: borders between blocks."""
        found: list[int] = []
        for n in trace.splits.tolist():
            if n >= (found[-1] if found else self.budget) + self.every:
                found.append(n)
        return found

    def of(self, trace: TraceLike, index: int) -> list[tuple[int, BoolArray]]:
        """Every eviction: the number n of tokens read before it, and which of them each head still
        keeps, bool [N, n] for N = layers x KV heads. ``index`` names the trace."""
        if index not in self._known:
            self._known[index] = self._play(trace, index)
        return [(n, np.unpackbits(held, axis=1, count=n) > 0) for n, held in self._known[index]]

    def _play(self, trace: TraceLike, index: int) -> list[tuple[int, npt.NDArray[np.uint8]]]:
        n_heads = trace.keys.shape[0] * trace.keys.shape[1]
        held = np.ones((n_heads, 0), np.bool_)
        states = []
        for n in self.times(trace):
            held = np.concatenate((held, np.ones((n_heads, n - held.shape[1]), np.bool_)), axis=1)
            states.append((n, np.packbits(held, axis=1)))
            wanted = importance_of(trace, n, np.arange(n_heads), index)
            held = self._evict(held, wanted)
        return states

    def _evict(self, held: BoolArray, wanted: npt.NDArray[np.float32]) -> BoolArray:
        first, end = self.protected.competing(held.shape[1])
        rank = np.where(held, wanted, -1.0)
        rank[:, :first] = rank[:, end:] = np.inf
        newest_first = np.argsort(-rank[:, ::-1], axis=1, kind="stable")[:, : self.budget]
        kept = np.zeros_like(held)
        np.put_along_axis(kept, held.shape[1] - 1 - newest_first, True, axis=1)
        return kept


def hinge_loss(
    scores: Tensor,
    wanted: Tensor,
    present: Tensor,
    margin: float,
    generator: torch.Generator,
    pairs: Pairs = "order",
) -> Tensor:
    """Mean over pairs of max(0, margin - (score of the more important token - of the other)).

    Every token is compared with a few others, drawn anew at each call, which has the same mean as
    comparing with all (2602.03203, stage 1, which scores what to drop; here larger = keep).

    Args:
        scores, wanted: f32 [..., m].
        present: bool, broadcast to that; pairs with an absent token, or of equal importance, do not
            count.
        pairs: "order": equal weights (the paper). "cost": weighted by the difference in importance.

    Returns:
        f32 [...].
    """
    m = scores.shape[-1]
    present = present.expand(scores.shape)
    total, weight = torch.zeros_like(scores[..., 0]), torch.zeros_like(scores[..., 0])
    for shift in torch.randint(1, max(m, 2), (_OTHERS,), generator=generator).tolist():
        more = wanted - wanted.roll(shift, -1)
        order = torch.sign(more)
        counts = (present & present.roll(shift, -1)) * (order if pairs == "order" else more).abs()
        violated = F.relu(margin - order * (scores - scores.roll(shift, -1)))
        total = total + (counts * violated).sum(-1)
        weight = weight + counts.sum(-1)
    return total / weight.clamp_min(1e-12)
