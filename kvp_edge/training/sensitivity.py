"""How much of a model's loss hangs on what each attention head remembers.

A head is as sensitive as the loss of later text rises when this head alone evicts: it keeps the
protected tokens, and all other heads keep everything. Measured exactly, that is one forward pass
per head. The estimate is first-order in the head's output: a share s of the output comes from the
head that evicted, the rest from the one that did not, and the loss rises by d loss / d s at s = 0.
One forward and one backward pass give it for all heads. (The derivative by the log-weights of the
tokens that go would be smaller by the share of attention that stays, and so next to nothing for a
head that looks at nothing else.)

Needs torch: pip install 'kvp_edge[train]'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import BoolArray, FloatArray
from kvp_edge.sensitive_heads import heads_with_half
from kvp_edge.training.simulator import evicted_loss, simulated_loss

if TYPE_CHECKING:
    from kvp_edge.training.twin import Twin

#: Called with the number of steps that are done, and of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Eviction:
    """What a head that evicts keeps of the tokens before the border.

    Attributes:
        sinks, recent: first and newest tokens, all of which stay.
        share: of the tokens between them, those that stay: 0 to 1, evenly spaced.
    """

    sinks: int = 4
    recent: int = 32
    share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {self.share}")

    def kept(self, border: int) -> BoolArray:
        """bool [border]."""
        keep = np.ones(border, np.bool_)
        between = keep[self.sinks : max(self.sinks, border - self.recent)]
        between[:] = np.diff(np.floor(np.arange(len(between) + 1) * self.share)) > 0
        return keep


@dataclass(frozen=True)
class Sensitivity:
    """Of every (layer of the base cache, KV head).

    Attributes:
        rise: f64 [n_layer, n_head_kv], nats per later token, mean over texts. Below 0 where a head
            is better off without.
    """

    rise: npt.NDArray[np.float64]

    @property
    def weights(self) -> FloatArray:
        """f32 [n_layer, n_head_kv], at least 0, with mean 1: shares of the loss. All 1 if no head
        carries anything."""
        carried = np.maximum(self.rise, 0)
        mean = carried.mean()
        return (carried / mean if mean > 0 else np.ones_like(carried)).astype(np.float32)

    def heads_with_half(self) -> int:
        """How many heads, the heaviest first, carry half of the loss together."""
        return heads_with_half(self.weights)


def head_sensitivity(
    twin: Twin,
    texts: Sequence[Sequence[int]],
    eviction: Eviction = Eviction(),
    *,
    exact: bool = False,
    progress: Progress = lambda done, of: None,
) -> Sensitivity:
    """Measure every head on texts of token ids. The first half of each is read before the eviction,
    the second is the later text whose loss counts.

    Args:
        exact: one pass per head and text, instead of the estimate by one forward and one backward
            pass per text.

    Raises:
        ValueError: no text, or one of fewer than two tokens.
    """
    if not texts or min(map(len, texts)) < 2:
        raise ValueError("at least one text is needed, and each must have two tokens or more")
    one = _measured if exact else _estimated
    steps = twin.n_layer * twin.n_head_kv + 1 if exact else 1
    rises = []
    for i, tokens in enumerate(texts):

        def told(done: int, before: int = i * steps) -> None:
            progress(before + done, len(texts) * steps)

        rises.append(one(twin, tokens, eviction, told))
    return Sensitivity(np.mean(rises, axis=0))


def _keeping(
    twin: Twin, tokens: Sequence[int], eviction: Eviction
) -> tuple[int, BoolArray, BoolArray]:
    """The border, what every head keeps that keeps everything, and what every one that evicts."""
    border = len(tokens) // 2
    shape = (twin.n_layer, twin.n_head_kv, border)
    return border, np.ones(shape, np.bool_), np.broadcast_to(eviction.kept(border), shape)


def _measured(
    twin: Twin, tokens: Sequence[int], eviction: Eviction, told: Callable[[int], None]
) -> npt.NDArray[np.float64]:
    border, everything, evicted = _keeping(twin, tokens, eviction)
    full = simulated_loss(twin, tokens, border, everything)
    told(1)
    rise = np.zeros(everything.shape[:2])
    for done, head in enumerate(np.ndindex(*rise.shape), 2):
        keep = everything.copy()
        keep[head] = evicted[head]
        rise[head] = simulated_loss(twin, tokens, border, keep) - full
        told(done)
    return rise


def _estimated(
    twin: Twin, tokens: Sequence[int], eviction: Eviction, told: Callable[[int], None]
) -> npt.NDArray[np.float64]:
    import torch  # noqa: PLC0415

    border, _, evicted = _keeping(twin, tokens, eviction)
    share = torch.zeros(twin.n_layer, twin.n_head_kv, device=twin.embedding.device)
    share.requires_grad_()
    (slope,) = torch.autograd.grad(evicted_loss(twin, tokens, border, evicted, share), share)
    told(1)
    return np.asarray(slope.double().cpu().numpy())
