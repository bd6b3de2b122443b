"""A policy's network, run by the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvp_edge.arrays import FloatArray, TokenIndices
from kvp_edge.binding import structs
from kvp_edge.binding.library import call, create

if TYPE_CHECKING:
    from kvp_edge.policy_file import PolicyWeights


class NativePolicy:
    """A learned policy's network as ggml graphs (kvp_policy_create); holds a copy of the weights.

    Raises:
        ValueError: sizes that are not possible; the message names them.
    """

    def __init__(self, weights: PolicyWeights) -> None:
        # all f32 and contiguous, as PolicyWeights are read and made; a copy only where they are not
        arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in weights.arrays().items()}
        n_layer, n_networks, heads_each, hidden = arrays["out"].shape
        n_head_kv = n_networks * heads_each
        self._heads = (n_layer, n_head_kv)
        self._head_size_k = arrays["key"].shape[3] // heads_each
        self._head_size_v = arrays["value"].shape[3] // heads_each
        shape = structs.PolicyShape(
            n_layer=n_layer,
            n_head_kv=n_head_kv,
            head_size_k=self._head_size_k,
            head_size_v=self._head_size_v,
            hidden=hidden,
            context=arrays["conv"].shape[2],
            n_networks=n_networks,
        )
        of_heads = ("aggregate", "sensitivity", "ageing")  # which no score depends on
        named = {name: a for name, a in arrays.items() if name not in of_heads}
        copied = structs.PolicyWeights(shape=shape, **named)
        self.handle = create("kvp_policy", "kvp_policy_create", copied)

    def score(
        self, keys: FloatArray, values: FloatArray, indices: TokenIndices, *, threads: int = 1
    ) -> FloatArray:
        """Scores f32 [n_layer, n_head_kv, n] of tokens in memory; the arguments of Policy.score.

        Raises:
            ValueError: arrays of another shape than the policy's, or indices that do not ascend.
        """
        n = len(indices)
        for array, size in ((keys, self._head_size_k), (values, self._head_size_v)):
            if array.shape != (*self._heads, n, size):
                raise ValueError(
                    f"an array has the shape {array.shape} instead of {(*self._heads, n, size)}"
                )
        keys = np.ascontiguousarray(keys, np.float32)
        values = np.ascontiguousarray(values, np.float32)
        indices = np.ascontiguousarray(indices, np.int32)
        scores = np.empty((*self._heads, n), np.float32)
        call("kvp_policy_score", self.handle, keys, values, indices, n, threads, scores)
        return scores
