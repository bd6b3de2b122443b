"""One-shot eviction simulated in the PyTorch twin of a model, where heads may keep unequal numbers.

All heads share llama.cpp's cells, so every head keeps the same number of tokens. The value of a
global budget over layers and heads (Ada-KV, arXiv:2407.11550; DBTrimKV, 2605.09649) can therefore
only be simulated: evicted tokens are hidden from the attention of a full pass.

Needs torch: pip install 'kvp_edge[train]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvp_edge.arrays import BoolArray, FloatArray
from kvp_edge.binding.ranking import choose_rows

if TYPE_CHECKING:
    from torch import Tensor

    from kvp_edge.training.twin import Twin


def simulated_loss(twin: Twin, tokens: Sequence[int], border: int, keep: BoolArray) -> float:
    """Mean loss in nats of ``tokens[border:]`` after an eviction at ``border``.

    Tokens before the border see everything, since they are read before the eviction. So does the
    prediction of the first token after it.

    Args:
        border: tokens read before the eviction, at least 1 and fewer than there are.
        keep: bool [n_layer, n_head_kv, border]: what each head keeps of them.

    Raises:
        ValueError: a border outside the text, or ``keep`` of another shape.
    """
    import torch  # noqa: PLC0415 (evaluating in llama.cpp does without it)

    with torch.no_grad():
        return float(evicted_loss(twin, tokens, border, keep))


def evicted_loss(
    twin: Twin,
    tokens: Sequence[int],
    border: int,
    keep: BoolArray,
    share: Tensor | None = None,
) -> Tensor:
    """``simulated_loss`` as a tensor, f32 [], with a gradient for ``share``.

    Args:
        share: f32 [n_layer, n_head_kv]; a head puts out this share of what it would after the
            eviction, and the rest of what it would without. None: all 1.
    """
    import torch  # noqa: PLC0415
    from torch.nn import functional as F  # noqa: PLC0415

    n = len(tokens)
    if not 1 <= border < n:
        raise ValueError(f"the border must be from 1 to {n - 1} in a text of {n}, not {border}")
    wanted = (twin.n_layer, twin.n_head_kv, border)
    if keep.shape != wanted:
        raise ValueError(f"keep has the shape {keep.shape} instead of {wanted}")
    device = twin.embedding.device
    dropped = torch.from_numpy(~keep).to(device)

    def hide(layer: int, keys: Tensor, values: Tensor) -> Tensor:
        added = keys.new_zeros(1, twin.n_head_kv, n, n)
        added[0, :, border:, :border].masked_fill_(dropped[layer][:, None], -torch.inf)
        return added

    ids = torch.tensor([list(tokens)], device=device)
    logits = twin(ids, hide, share)[0, border - 1 : -1]
    return F.cross_entropy(logits, ids[0, border:])


def equal_counts(scores: FloatArray, protected: BoolArray, budget: int) -> BoolArray:
    """The same number of tokens in every head, each head's best: as kvp_edge evicts at head
    granularity (kvp_edge.binding.ranking.choose_rows).

    Args:
        scores: f32 [n_layer, n_head_kv, n], larger = keep; what is not finite is dropped first.
        protected: bool [n]: kept by every head.
        budget: tokens per head; more stay only if more are protected.

    Returns:
        bool [n_layer, n_head_kv, n]. Equal scores favour the newer token.
    """
    n = scores.shape[2]
    n_keep = min(n, max(budget, int(protected.sum())))
    each = np.broadcast_to(np.arange(n, dtype=np.int32), scores.shape)
    rows = choose_rows(scores, each, np.broadcast_to(protected, scores.shape), n_keep)
    keep = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(keep, rows, True, axis=2)
    return keep


def ragged_counts(scores: FloatArray, protected: BoolArray, budget: int) -> BoolArray:
    """The best ``budget`` * n_layer * n_head_kv tokens of all heads together, every head's
    protected ones among them (DBTrimKV, arXiv:2605.09649).

    Scores are compared across heads as they are. Arguments and result are those of
    ``equal_counts``; on average over heads as many tokens stay.
    """
    return _best(scores, np.broadcast_to(protected, scores.shape), budget, protected)


def layer_counts(
    scores: FloatArray, protected: BoolArray, budget: int, floor: float = 0.2
) -> BoolArray:
    """The same layer by layer: the best ``budget`` * n_head_kv tokens of a layer's heads, but of
    every head at least its own best ``floor`` (Ada-KV, arXiv:2407.11550).

    The paper adds a floor and a share of each head's part in the layer, and rounds; here as in
    kvpress a head's floor is kept first and the rest competes, so that the numbers are exact.
    Arguments and result are those of ``equal_counts``; on average over a layer's heads as many
    tokens stay.

    Args:
        floor: share of the unprotected budget. 1: equal counts.
    """
    n_protected = int(protected.sum())
    room = min(scores.shape[2], max(budget, n_protected)) - n_protected
    first = equal_counts(scores, protected, n_protected + int(floor * room))
    layers = zip(scores, first, strict=True)
    return np.stack([_best(layer, own, budget, protected) for layer, own in layers])


def _best(scores: FloatArray, first: BoolArray, budget: int, protected: BoolArray) -> BoolArray:
    """What is ``first``, and of the rest the best, of all heads together: as many as ``budget`` of
    each on average, or as are protected. bool [..., n]"""
    n = scores.shape[-1]
    n_keep = scores.size // n * min(n, max(budget, int(protected.sum())))
    score = np.where(np.isfinite(scores), scores, -np.inf).ravel()
    newest = np.broadcast_to(np.arange(n), scores.shape).ravel()
    best = np.lexsort((-newest, -score, ~first.ravel()))[:n_keep]  # the last key decides first
    keep = np.zeros(scores.size, np.bool_)
    keep[best] = True
    return keep.reshape(scores.shape)
