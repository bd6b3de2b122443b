"""LagKV (Liang et al., arXiv:2504.04704): tokens unlike those read right after them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.base import Policy

if TYPE_CHECKING:
    from kvp_edge.binding.cache import NativeCache

_TINY = 1e-12  # a channel in which all reference tokens agree has no range


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
    inputs = "keys+values"
    scope = "cache"

    def __init__(self, lag: int = 128, sinks: int = 4) -> None:
        self.lag = lag
        self.sinks = sinks

    def identity(self) -> str:
        return f"{self.name}(lag={self.lag}, sinks={self.sinks})"

    def score(self, keys: FloatArray, values: FloatArray, indices: IntArray) -> FloatArray:
        n_layer, n_head_kv, n = keys.shape[:3]
        n_parts = self._parts(n)
        if n_parts < 2:
            return self._newest(n_layer, n_head_kv, n)
        end = self.sinks + n_parts * self.lag
        size = (n_parts, self.lag)
        of_keys, of_values = (
            standing_out(x[:, :, self.sinks : end].reshape(n_layer, n_head_kv, *size, -1))
            for x in (keys, values)
        )
        mean: FloatArray = (of_keys + of_values) / np.float32(2)
        return self._ranked(mean, n)

    def score_in_place(self, cache: NativeCache, p0: int, p1: int, indices: IntArray) -> FloatArray:
        n = indices.shape[-1]
        n_parts = self._parts(n)
        if n_parts < 2:
            return self._newest(cache.shape.n_layer, cache.shape.n_head_kv, n)
        return self._ranked(cache.score_lag(p0, p1, n, self.sinks, self.lag, n_parts), n)

    def _parts(self, n: int) -> int:
        return (n - self.sinks) // self.lag

    def _newest(self, n_layer: int, n_head_kv: int, n: int) -> FloatArray:
        score = np.ones((n_layer, n_head_kv, n), np.float32)
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
