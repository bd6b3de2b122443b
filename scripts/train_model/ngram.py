"""Interpolated Kneser-Ney n-gram model: the baseline a neural model of prose has to beat.

Formulas: S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling" (1999), interpolated Kneser-Ney with one discount per order, D = n1 / (n1 + 2 n2).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """Counts of one order; a gram is packed into one integer, `base` values per token."""

    grams: np.ndarray  # uint64 [n], sorted
    counts: np.ndarray  # int64 [n]
    contexts: np.ndarray  # uint64 [m], sorted: the grams without their last token
    totals: np.ndarray  # int64 [m], sum of the counts after a context
    kinds: np.ndarray  # int64 [m], number of different tokens after a context
    discount: float


def _find(sorted_values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, found) of every wanted value."""
    index = np.searchsorted(sorted_values, wanted)
    index[index == len(sorted_values)] = 0
    return index, sorted_values[index] == wanted


def _pack(ids: np.ndarray, length: int, base: int) -> np.ndarray:
    """Every run of `length` tokens as one integer, uint64 [n - length + 1]."""
    packed = np.zeros(len(ids) - length + 1, np.uint64)
    for offset in range(length):
        packed = packed * np.uint64(base) + ids[offset : offset + len(packed)].astype(np.uint64)
    return packed


class KneserNey:
    """Trained on token ids (uint16 [n]); orders 1 to `order`."""

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int = 4) -> None:
        self.vocab_size, self.orders = vocab_size, []
        grams, counts = np.unique(_pack(ids, order, vocab_size), return_counts=True)
        for length in range(order, 0, -1):
            self.orders.insert(0, self._order(grams, counts))
            # Lower orders count in how many different contexts a gram was seen.
            shorter = grams % np.uint64(vocab_size ** (length - 1))
            grams, counts = np.unique(shorter, return_counts=True)

    def _order(self, grams: np.ndarray, counts: np.ndarray) -> _Order:
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = float(once / max(1, once + 2 * twice)) or 0.5
        # Grams are sorted, so those with one context stand together.
        contexts, starts = np.unique(grams // np.uint64(self.vocab_size), return_index=True)
        totals = np.add.reduceat(counts, starts)
        kinds = np.diff(np.append(starts, len(grams)))
        return _Order(grams, counts, contexts, totals, kinds, discount)

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """Probability of every token given those before it, float64 [n]."""
        result = np.full(len(ids), 1.0 / self.vocab_size)
        for length, order in enumerate(self.orders, start=1):
            if len(ids) < length:
                break
            grams = _pack(ids, length, self.vocab_size)
            at, known = _find(order.contexts, grams // np.uint64(self.vocab_size))
            gram, seen = _find(order.grams, grams)
            counts = np.where(seen, order.counts[gram], 0)
            own = np.maximum(counts - order.discount, 0) / order.totals[at]
            rest = order.discount * order.kinds[at] / order.totals[at]
            lower = result[length - 1 :]
            result[length - 1 :] = np.where(known, own + rest * lower, lower)
        return result

    def perplexity(self, ids: np.ndarray) -> float:
        return float(np.exp(-np.log(self.probabilities(ids)).mean()))
