"""LagKV (Liang et al., arXiv:2504.04704): tokens unlike those read right after them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.binding import rules
from kvp_edge.errors import PolicyError
from kvp_edge.policies.base import Policy
from kvp_edge.policies.view import CacheView

_TINY = 1e-12  # a channel in which all reference tokens agree has no range


@dataclass(frozen=True)
class LagKV(Policy):
    """The tokens held, without the first ``sinks``, are cut into partitions of ``lag`` tokens; each
    is measured by the next one, its reference (section 2.2):

        z = (x - min_ref) / (max_ref - min_ref), channel by channel, for keys x and for values x
        s = softmax over the partition's tokens of std over channels of z
        score = rank of (s_keys + s_values) / 2 within the partition, as a share of ``lag``

    Scores of different partitions compare as ranks do, so every partition loses about the same
    number of tokens. The sinks, the last whole partition and what follows it have no reference and
    score 1, above all others. With fewer than two partitions there is none at all, and the newest
    tokens stay.

    Partitions are taken from the tokens held, so an eviction moves their borders: the originals'
    blocks of the text are these at the first eviction.
    """

    name = "lagkv"
    scope = "cache"
    lag: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.lag < 1 or self.sinks < 0:
            raise PolicyError(f"LagKV needs lag >= 1 and sinks >= 0, not {self.lag}, {self.sinks}")

    def score(self, view: CacheView) -> FloatArray:
        n = view.shape[2]
        n_parts = (n - self.sinks) // self.lag
        if n_parts < 2:
            return self._newest(view.shape)
        rule = rules.Lag(self.sinks, self.lag, n_parts)
        return self._ranked(view.apply(rule, lambda view: _score(view, rule)), n)

    def _newest(self, shape: tuple[int, int, int]) -> FloatArray:
        n = shape[2]
        score = np.ones(shape, np.float32)
        score[:, :, self.sinks :] = np.arange(max(0, n - self.sinks)) / max(1, n)
        return score

    def _ranked(self, mean: FloatArray, n: int) -> FloatArray:
        """The score of all n tokens from s of those in partitions that have a reference."""
        n_layer, n_head_kv = mean.shape[:2]
        score = np.ones((n_layer, n_head_kv, n), np.float32)
        # of equal tokens the newer one ranks higher
        rank = np.argsort(np.argsort(mean, axis=-1, kind="stable"), axis=-1)
        ranked = rank.reshape(n_layer, n_head_kv, -1) / self.lag
        score[:, :, self.sinks : self.sinks + ranked.shape[-1]] = ranked
        return score


def _score(view: CacheView, rule: rules.Lag) -> FloatArray:
    """s of the tokens in partitions that have a reference: the mean of the keys' and the
    values'."""
    n_layer, n_head_kv, _ = view.shape
    inside = slice(rule.first, rule.first + rule.n_parts * rule.lag)
    of_keys, of_values = (
        standing_out(x[:, :, inside].reshape(n_layer, n_head_kv, rule.n_parts, rule.lag, -1))
        for x in view.keys_and_values()
    )
    mean: FloatArray = (of_keys + of_values) / np.float32(2)
    return mean


def standing_out(x: FloatArray) -> FloatArray:
    """f32 [..., parts - 1, lag] from [..., parts, lag, channels]: s of every part but the last."""
    reference = x[..., 1:, :, :]
    low = reference.min(axis=-2, keepdims=True)
    high = reference.max(axis=-2, keepdims=True)
    z = (x[..., :-1, :, :] - low) / np.maximum(high - low, _TINY)
    spread = z.std(axis=-1, ddof=1)
    e = np.exp(spread - spread.max(axis=-1, keepdims=True))
    share: FloatArray = e / e.sum(axis=-1, keepdims=True)
    return share
