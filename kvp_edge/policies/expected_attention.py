"""Expected Attention (Devoto et al., arXiv:2510.00636): what queries to come would attend to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray, RopePositions
from kvp_edge.binding import rules
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.errors import PolicyError
from kvp_edge.policies.base import EVERY_QUERY, Policy
from kvp_edge.policies.query_attention import softmax
from kvp_edge.policies.view import CacheView


@dataclass(frozen=True)
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
    scope = "cache"
    n_queries = EVERY_QUERY
    needs_frequencies = True
    future: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.future < 1 or self.sinks < 0:
            raise PolicyError(
                "ExpectedAttention needs future >= 1 and sinks >= 0, not "
                f"{self.future}, {self.sinks}"
            )

    def score(self, view: CacheView) -> FloatArray:
        sink = np.broadcast_to(view.indices < self.sinks, view.shape)
        logged = view.queries(self.n_queries)
        logged = logged[int(np.searchsorted(logged.indices, self.sinks)) :]
        if len(logged) == 0:
            return np.zeros(view.shape, np.float32)
        frequencies = view.frequencies
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
        expected = rules.Expected(mean, covariance, logged.scale, sink)
        score = view.apply(expected, lambda view: _score(view, expected))
        score[sink] = score.max(initial=0) + 1
        return score


def _score(view: CacheView, expected: rules.Expected) -> FloatArray:
    keys, values = view.keys_and_values()
    n_layer, n_head_kv, _, size = keys.shape
    score = np.zeros(view.shape, np.float32)
    for layer in range(n_layer):
        k, s = keys[layer, :, None], float(expected.scale[layer])
        m = expected.means[layer].reshape(n_head_kv, -1, 1, size)
        c = expected.covariances[layer].reshape(n_head_kv, -1, size, size)
        logits = s * (k * m).sum(-1) + s * s / 2 * ((k @ c) * k).sum(-1)
        score[layer] = softmax(logits, ~expected.left_out[layer][:, None]).mean(axis=1)
    score *= np.linalg.norm(values, axis=-1)
    return score


def mean_rotated(
    frequencies: KeyFrequencies, x: FloatArray, positions: RopePositions
) -> FloatArray:
    """[n_layer, ..., head_size] times the mean of RoPE's rotations to ``positions``: the mean of a
    pair's rotations is a rotation and a shrinking."""
    factor = np.exp(1j * frequencies.radians[..., None] * positions).mean(axis=-1)
    return frequencies.multiplied(x, factor)
