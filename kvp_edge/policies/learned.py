"""A learned policy, from a file: a small network per KV head, as in KVP (arXiv:2602.10238), or one
per layer that sees all of its heads."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, IntArray, TokenIndices
from kvp_edge.binding import rules
from kvp_edge.binding.policy import NativePolicy
from kvp_edge.errors import PolicyFileError
from kvp_edge.policies.ageing import faded
from kvp_edge.policies.base import Policy
from kvp_edge.policies.retention import log_future_use, log_total
from kvp_edge.policies.view import CacheView
from kvp_edge.policy_file import PolicyInfo, PolicyWeights, read_policy


class FromFile(Policy):
    """A policy that was trained, whatever computes its scores. Those of gates (objective "global")
    say how fast a token's worth decays.

    Attributes:
        path: the file.
        head_weights: f32 [n_layer, n_head_kv], of the heads in the worth of a whole token.
        ageing: f32 [n_layer, n_head_kv], the heads' rates (kvp_edge.policies.ageing), or None.
        sensitivity: f32 [n_layer, n_head_kv], how much the model suffers when a head loses its
            rows, relative to the others (mean 1); None: the file does not say.
    """

    path: str
    head_weights: FloatArray
    ageing: FloatArray | None = None
    sensitivity: FloatArray | None
    _info: PolicyInfo

    @property
    def info(self) -> PolicyInfo:
        """What the file says of itself."""
        return self._info

    @property
    def context(self) -> int:
        """Half the context width. A token's score is final once this many tokens after it are
        known; before that it is what it would be if the conversation ended there."""
        return self._info.context // 2

    def worth(self, scores: FloatArray, ages: IntArray) -> FloatArray:
        if self.info.objective == "global":
            return log_future_use(scores, ages, self.info.horizon)
        if self.ageing is not None:
            return faded(scores, ages, self.ageing)
        return super().worth(scores, ages)

    def whole_tokens(self, worth: FloatArray) -> FloatArray | None:
        if self.info.objective == "global":
            return log_total(worth)
        total: FloatArray = np.einsum("lhn,lh->n", worth, self.head_weights)
        return total


class Learned(FromFile):
    """Runs a policy file: natively on a cache, and on arrays in numpy, the definition that all
    executors are tested by.

    Attributes:
        network: what runs it natively; None: numpy does on a cache, too.
    """

    name = "learned"

    def __init__(self, path: str | os.PathLike[str], *, native: bool = True) -> None:
        """Read the file.

        Args:
            native: False to run in numpy on a cache, too.

        Raises:
            PolicyFileError: missing, damaged, or not a policy file.
        """
        self.path = os.fspath(path)
        self._info, self.weights = read_policy(path)
        self.head_weights = self.weights.aggregate
        self.ageing = self.weights.ageing
        self.sensitivity = self.weights.sensitivity
        self.network = NativePolicy(self.weights) if native else None

    def identity(self) -> str:
        digest = hashlib.sha256()
        # no score depends on how sensitive heads are: a file that learns it goes on with sessions
        for array in replace(self.weights, sensitivity=None).arrays().values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"{self.info.name}({digest.hexdigest()[:16]})"

    def score(self, view: CacheView) -> FloatArray:
        if self.network is None:
            return self._in_numpy(view)
        return view.apply(rules.Network(self.network, view.indices), self._in_numpy)

    def _in_numpy(self, view: CacheView) -> FloatArray:
        keys, values = view.keys_and_values()
        check_arrays(self.info, keys, values)
        at = with_gaps(view.indices, self.context)
        return forward(self.weights, keys, values, view.indices, at)


def check_arrays(info: PolicyInfo, keys: FloatArray, values: FloatArray) -> None:
    """Raises:
    PolicyFileError: the arrays are not those of the policy's model.
    """
    found = (*keys.shape[:2], keys.shape[3], values.shape[3])
    wanted = (info.n_layer, info.n_head_kv, info.head_size_k, info.head_size_v)
    if found != wanted:
        raise PolicyFileError(
            f"the policy '{info.name}' is for another model: it scores {wanted[0]} layers x "
            f"{wanted[1]} KV heads x {wanted[2]}+{wanted[3]}, but the cache has {found[0]} x "
            f"{found[1]} x {found[2]}+{found[3]}"
        )


def with_gaps(indices: TokenIndices, half: int) -> npt.NDArray[np.intp]:
    """Where each token stands in conversation order, with -1 where tokens are missing between them.

    Between two tokens that are not neighbours come as many -1 as are missing, but no more than
    ``half``, which is how far the convolution sees.

    Returns:
        intp [n']: indices into ``indices``, or -1.
    """
    missing = np.minimum(np.diff(indices) - 1, half)
    n = len(indices)
    at = np.full(n + int(missing.sum()), -1, np.intp)
    at[np.arange(n) + np.concatenate(([0], np.cumsum(missing))).astype(np.intp)[:n]] = np.arange(n)
    return at


def position_features(indices: TokenIndices) -> FloatArray:
    """f32 [..., 4] from tokens' indices in the conversation."""
    p = np.maximum(indices, 0).astype(np.float32)
    log = np.log2(1 + p)
    return np.stack((log / 16, np.sin(log), np.cos(log), 1 / (1 + p)), -1)


def side_by_side(rows: FloatArray, n_networks: int) -> FloatArray:
    """What each of a layer's G networks sees: f32 [n_layer, G, n, H/G * size] from rows
    [n_layer, H, n, size], head by head."""
    n_layer, n_head_kv, n, size = rows.shape
    if n_networks == n_head_kv:
        return rows
    split = rows.reshape(n_layer, n_networks, -1, n, size)
    return split.swapaxes(2, 3).reshape(n_layer, n_networks, n, -1)


def silu(x: FloatArray) -> FloatArray:
    # tanh does not overflow where exp would
    y: FloatArray = x * (0.5 + 0.5 * np.tanh(0.5 * x))
    return y


def forward(
    w: PolicyWeights,
    keys: FloatArray,
    values: FloatArray,
    indices: TokenIndices,
    at: npt.NDArray[np.intp],
) -> FloatArray:
    """The network of docs/policy-format.md: f32 [n_layer, n_head_kv, n] of all n tokens."""
    n_networks = w.key.shape[1]
    x: FloatArray = side_by_side(keys, n_networks) @ w.key.swapaxes(2, 3)
    x += side_by_side(values, n_networks) @ w.value.swapaxes(2, 3)
    x += position_features(indices) @ w.position.swapaxes(2, 3)
    x += w.fc1_bias[:, :, None]
    width = w.conv.shape[2]
    if width > 1:
        half = width // 2
        there = at >= 0
        spread = np.zeros((*x.shape[:2], len(at) + 2 * half, x.shape[3]), np.float32)
        spread[:, :, half : half + len(at)][:, :, there] = x
        mixed = np.zeros((*x.shape[:2], len(at), x.shape[3]), np.float32)
        for tap in range(width):
            mixed += w.conv[:, :, tap, None] * spread[:, :, tap : tap + len(at)]
        x = mixed[:, :, there]
    x = silu(x)
    x = silu(x @ w.fc2.swapaxes(2, 3) + w.fc2_bias[:, :, None])
    scores: FloatArray = x @ w.out.swapaxes(2, 3)  # [n_layer, G, n, H/G]
    return scores.swapaxes(2, 3).reshape(keys.shape[:3])
