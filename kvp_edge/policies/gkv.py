"""G-KV (arXiv:2512.00504): keep what any window of queries attended to, and no key twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvp_edge.arrays import BoolArray, FloatArray, IntArray
from kvp_edge.errors import PolicyError
from kvp_edge.policies.base import Policy
from kvp_edge.policies.query_attention import largest_attention
from kvp_edge.policies.view import CacheView

_ROWS = 1024  # of a matrix of cosines that are held at once

_SCORE, _GLOBAL = 0, 1  # of the numbers that a token has


@dataclass(frozen=True)
class GKV(Policy):
    """SnapKV's window forgets what earlier windows wanted. Here it fades instead:

        local  = mean over the newest ``window`` queries of the largest attention of the group's
                 query heads, divided by its largest in the head
        global = max(decay * global of the eviction before, local)
        score  = balance * global - (1 - balance) * redundancy

    The redundancy is R-KV's (arXiv:2505.24133): a token's mean cosine with all keys of its head,
    itself counted as 0; a softmax over tokens; divided by its largest, so that only
    exp(mean - largest mean) is left. Of the keys that are more alike to a key than ``alike`` the
    newest counts as 0, so that repeated text stays once, where it came last.

    The window's own tokens score above all others, and their global score begins at the next
    eviction. A window may reach back over the last eviction, as SnapKV's does. Without any query
    since (right after going back, or after positions were compacted) nothing fades.

    What the papers and their code leave open or do differently:

    - The paper evicts every 128 tokens that are written; here whenever the cells are full
      (``reserve``), while reading, too. So ``decay`` is per eviction, and per recall that moves
      rows, not per token.
    - ``memory="max"`` is the paper's choice, "sum" its way to write H2O: decay 1 adds up every
      window. Its third, a moving average, is left out.
    - R-KV writes a mean over the group's heads or their maximum; G-KV's code has the maximum, after
      the softmax. R-KV also pools over neighbours, which is off in G-KV by default.
    - Where no key is alike, R-KV's code spares token 0; here none. G-KV's faster kernel spares the
      last alike key only once per head; here it is R-KV's own matrix.
    - Cosines are of keys as cached, RoPE included, in both. All pairs of a head's tokens are
      compared at every eviction, so its time grows with the square of what is held.

    Args:
        window: queries.
        decay: 0: the newest window alone; 1: nothing fades.
        balance: 1: attention alone; 0: redundancy alone.
        alike: cosine.
    """

    name = "gkv"
    scope = "history"
    score_shape = (2,)
    window: int = 16
    decay: float = 0.8
    balance: float = 0.5
    alike: float = 0.5
    memory: Literal["max", "sum"] = "max"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise PolicyError(f"G-KV needs window >= 1, not {self.window}")
        for name in ("decay", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise PolicyError(f"G-KV's {name} is from 0 to 1, not {getattr(self, name)}")
        if self.memory not in ("max", "sum"):
            raise PolicyError(f"G-KV's memory is max or sum, not {self.memory!r}")

    @property
    def n_queries(self) -> int:
        return self.window

    def score(self, view: CacheView) -> FloatArray:
        remembered = view.noted(self.score_shape)[..., _GLOBAL]
        queries = view.queries(self.window)
        held = np.broadcast_to(view.indices, view.shape)
        outside = np.ones(view.shape, np.bool_)
        if len(queries):
            local = np.zeros(view.shape, np.float32)
            for layer, _, paid in largest_attention(queries, view.keys(), view.indices):
                local[layer] += paid.sum(axis=1) / np.float32(len(queries))
            outside = held < queries.indices[0]
            local[~outside] = 0
            local /= np.maximum(local.max(axis=-1, keepdims=True), np.float32(1e-30))
            remembered *= np.float32(self.decay)
            if self.memory == "max":
                np.maximum(remembered, local, out=remembered)
            else:
                remembered += local
        score = np.float32(self.balance) * remembered
        if self.balance < 1:
            score -= np.float32(1 - self.balance) * redundancy(view.keys(), self.alike, outside)
        newest = score.max(initial=0, where=outside) + 1
        return np.stack((np.where(outside, score, newest), remembered), axis=-1)

    def worth(self, scores: FloatArray, ages: IntArray) -> FloatArray:
        return scores[..., _SCORE]


def redundancy(keys: FloatArray, alike: float, counted: BoolArray) -> FloatArray:
    """How much a token's key says what others of its head say; 1 is the most.

    Args:
        keys: f32 [n_layer, n_head_kv, n, head_size_k].
        alike: of the keys whose cosine with a key is more than this, the newest counts as 0.
        counted: bool [n_layer, n_head_kv, n], among which the most is looked for.

    Returns:
        f32 [n_layer, n_head_kv, n]
    """
    mean = np.empty(keys.shape[:3], np.float32)
    for head in np.ndindex(keys.shape[:2]):
        mean[head] = _mean_cosine(keys[head], alike)
    most = mean.max(axis=-1, keepdims=True, initial=-1, where=counted)
    found: FloatArray = np.exp(mean - most)
    return found


def _mean_cosine(keys: FloatArray, alike: float) -> FloatArray:
    """f32 [n]: every key's mean cosine with all n keys, of which some count as 0."""
    n = len(keys)
    unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), np.float32(1e-8))
    total = np.zeros(n, np.float32)
    for start in range(0, n, _ROWS):
        cosine = unit[start : start + _ROWS] @ unit.T
        row = np.arange(len(cosine))
        cosine[row, start + row] = 0
        similar = cosine > alike
        newest = n - 1 - np.argmax(similar[:, ::-1], axis=1)
        some = similar.any(axis=1)
        cosine[row[some], newest[some]] = 0
        total += cosine.sum(axis=0)
    return total / np.float32(n)
