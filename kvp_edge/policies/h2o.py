"""H2O (Zhang et al., arXiv:2306.14048): keep the heavy hitters, much attended to so far."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.attention import ByAttention, Pays
from kvp_edge.policies.base import EVERY_QUERY


class H2O(ByAttention):
    """score = sum over all queries so far of the attention they paid to the token (section 4),
    mean over the group's query heads.

    Nothing is dropped between two evictions, so the queries since the last one saw exactly the
    tokens that are held: at each eviction their attention is added to the sums of before. A query
    counts once, with the tokens that were there in its time, as in the paper, which adds it up
    while it is computed. Older tokens have been seen by more queries; the recent window that the
    paper adds against that is the one that every policy has here.

    The sums belong to one conversation in one Llama. A conversation that is read from its start
    begins anew; one that goes back keeps what the withdrawn queries had paid before the last
    eviction to tokens that stay.
    """

    name = "h2o"
    queries = EVERY_QUERY

    def __init__(self) -> None:
        #: f32 [n_layer, n_head_kv, tokens of the conversation]
        self._paid: FloatArray = np.zeros((0, 0, 0), np.float32)

    def score_paid(self, pays: Pays, indices: IntArray) -> FloatArray:
        logged = self.logged()
        new = pays(logged) if len(logged) else np.zeros(indices.shape, np.float32)
        held = indices.astype(np.int64)
        self._make_room(held, first_new=int(logged.indices[0]) if len(logged) else None)
        score = np.take_along_axis(self._paid, held, axis=2) + new
        np.put_along_axis(self._paid, held, score, axis=2)
        if self.query_log is not None:
            self.query_log.clear()  # they have been counted
        return score

    def _make_room(self, held: npt.NDArray[np.int64], first_new: int | None) -> None:
        """Room for the tokens held; those from the first new query's on were not there before."""
        known = self._paid
        if known.shape[:2] != held.shape[:2]:
            known = np.zeros((*held.shape[:2], 0), np.float32)
        known = known[:, :, :first_new]
        missing = max(0, int(held.max(initial=-1)) + 1 - known.shape[2])
        self._paid = np.pad(known, ((0, 0), (0, 0), (0, missing)))
