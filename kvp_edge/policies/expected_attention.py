"""Expected Attention (Devoto et al., arXiv:2510.00636): what queries to come would attend to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.policies.attention import softmax
from kvp_edge.policies.base import EVERY_QUERY, Policy

if TYPE_CHECKING:
    from kvp_edge.binding.cache import NativeCache


class ExpectedAttention(Policy):
    """Queries to come are taken to be normal, with the mean m and the covariance C of the queries
    so far, both without RoPE, then turned by the mean rotation R of the next ``future`` positions
    (section 3):

        a = softmax_i(s k_i.Rm + s^2 k_i.(R C R^T)k_i / 2), the expectation of exp(s q.k_i)
        score = (mean over the group's query heads of a) * ||v_i||

    s is what the model scales q.k by, 1 / sqrt(head size). The first ``sinks`` tokens are left out
    of the statistics and of the softmax and score above all others.

    Logged queries have RoPE in them; it is taken off with the frequencies measured at load
    (kvp_edge.binding.rope), so a model that turns its keys in another way is refused there.
    """

    name = "expected-attention"
    inputs = "keys+values"
    scope = "cache"
    queries = EVERY_QUERY
    needs_frequencies = True

    def __init__(self, future: int = 512, sinks: int = 4) -> None:
        self.future = future
        self.sinks = sinks

    def identity(self) -> str:
        return f"{self.name}(future={self.future}, sinks={self.sinks})"

    def score(self, keys: FloatArray, values: FloatArray, indices: IntArray) -> FloatArray:
        score = np.zeros(keys.shape[:3], np.float32)
        expected = self._queries_to_come()
        if expected is None:
            return score
        n_layer, n_head_kv, _, size = keys.shape
        sink = np.broadcast_to(indices < self.sinks, score.shape)
        for layer in range(n_layer):
            k, s = keys[layer, :, None], float(expected.scale[layer])
            m = expected.means[layer].reshape(n_head_kv, -1, 1, size)
            c = expected.covariances[layer].reshape(n_head_kv, -1, size, size)
            logits = s * (k * m).sum(-1) + s * s / 2 * ((k @ c) * k).sum(-1)
            score[layer] = softmax(logits, ~sink[layer][:, None]).mean(axis=1)
        score *= np.linalg.norm(values, axis=-1)
        return _sinks_first(score, sink)

    def score_in_place(self, cache: NativeCache, p0: int, p1: int, indices: IntArray) -> FloatArray:
        s = cache.shape
        sink = np.broadcast_to(indices < self.sinks, (s.n_layer, s.n_head_kv, indices.shape[-1]))
        expected = self._queries_to_come()
        if expected is None:
            return np.zeros(sink.shape, np.float32)
        return _sinks_first(cache.score_expected(p0, p1, *expected, sink), sink)

    def _queries_to_come(self) -> _Expected | None:
        """None without a query that was not a sink's."""
        logged = self.logged()
        logged = logged[int(np.searchsorted(logged.indices, self.sinks)) :]
        if len(logged) == 0:
            return None
        assert self.query_log is not None
        frequencies = self.query_log.frequencies
        assert frequencies is not None
        # Positions are counted in the conversation throughout, also where llama.cpp's are smaller
        # by a constant: turning a query back from p and forward to p' depends on p' - p alone.
        plain = frequencies.shifted(logged.queries, -logged.indices)
        mean = plain.mean(axis=2)
        centred = plain - mean[:, :, None]
        covariance = centred.swapaxes(-1, -2) @ centred / np.float32(len(logged))
        ahead = int(logged.indices[-1]) + 1 + np.arange(self.future, dtype=np.int32)
        mean = mean_rotated(frequencies, mean, ahead)
        for _ in range(2):  # R C, then R (R C)^T = R C^T R^T, and C is symmetric
            covariance = mean_rotated(frequencies, covariance.swapaxes(-1, -2), ahead)
        return _Expected(mean, covariance, logged.scale)


class _Expected(NamedTuple):
    means: FloatArray  # [n_layer, n_head, head_size]
    covariances: FloatArray  # [n_layer, n_head, head_size, head_size]
    scale: FloatArray  # [n_layer]


def _sinks_first(score: FloatArray, sink: npt.NDArray[np.bool_]) -> FloatArray:
    score[sink] = score.max(initial=0) + 1
    return score


def mean_rotated(frequencies: KeyFrequencies, x: FloatArray, positions: IntArray) -> FloatArray:
    """[n_layer, ..., head_size] times the mean of RoPE's rotations to ``positions``: the mean of a
    pair's rotations is a rotation and a shrinking."""
    factor = np.exp(1j * frequencies.radians[..., None] * positions).mean(axis=-1)
    return frequencies.multiplied(x, factor)
