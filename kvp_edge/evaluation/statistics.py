"""Means, differences and ratios over items, with 95 % intervals.

Items are drawn at random, tasks are not. A mean over tasks is the mean of the tasks' means, and its
interval shows the spread over other items of the *same* tasks. So the bootstrap resamples the items
of each task separately (stratified). All policies have the same items (paired), so that an item's
difficulty cancels out of differences.

Each resample draws n - 1 of a task's n items: with n, the spread of a mean would be too small by
the factor sqrt((n - 1) / n), 5 % with ten items (J. N. K. Rao and C. F. J. Wu, "Resampling
inference with complex survey data", JASA 83, 1988). Intervals are the percentiles 2.5 and 97.5 of
the resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Identifies an item of a task: its seed and its number.
ItemId: TypeAlias = tuple[int, int]

#: Scores of one policy in one setting: of each task, of each item.
Scores: TypeAlias = Mapping[str, Mapping[ItemId, float]]

RESAMPLES = 10_000
GATE = 0.8
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval.

    Attributes:
        value: the number.
        low, high: the interval; NaN if there are too few items (one in a task).
        n: items, of all tasks together.
    """

    value: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside the interval; False where there is none."""
        return value < self.low or value > self.high


@dataclass(frozen=True)
class Comparison:
    """A policy against others on the same items.

    Attributes:
        policy: its name.
        best: the best of the others.
        against: for each of the others, the mean of ``policy`` minus its own.
        items: for each of the others, the share of the policy's items that it has, too; less than 1
            if an evaluation is incomplete.
    """

    policy: str
    best: str
    against: dict[str, Estimate]
    items: dict[str, float]


def wilson(right: float, n: int) -> Estimate:
    """A share of n answers, each right or wrong, with the interval of E. B. Wilson (JASA 22, 1927),
    which is not empty for 5 of 5."""
    share = right / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # where all or none are right, the exact end of the interval is the value; rounding misses it
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == n else middle + half
    return Estimate(share, low, high, n)


def mean(scores: Scores, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean over tasks of the tasks' means.

    Wilson's interval for one task whose answers are right or wrong, and where all answers of all
    tasks are the same (resamples of them would not differ); the bootstrap's otherwise.

    Raises:
        ValueError: no items.
    """
    tasks = _arrays(scores)
    together = np.concatenate(tasks)
    binary = bool(np.isin(together, (0, 1)).all())
    if binary and (len(tasks) == 1 or np.ptp(together) == 0):
        return wilson(float(together.sum()), len(together))
    drawn = resampled([task[:, None] for task in tasks], resamples, seed)[:, 0]
    return _estimate(point(scores), drawn, tasks)


def point(scores: Scores) -> float:
    """The mean over tasks of the tasks' means, without an interval.

    Raises:
        ValueError: no items.
    """
    return float(np.mean([task.mean() for task in _arrays(scores)]))


def difference(
    first: Scores, second: Scores, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of ``first`` minus mean of ``second``, over the items that both have (paired).

    Raises:
        ValueError: no items in common.
    """
    tasks = [pairs[:, 0] - pairs[:, 1] for pairs in paired(first, second).values()]
    drawn = resampled([task[:, None] for task in tasks], resamples, seed)[:, 0]
    return _estimate(float(np.mean([task.mean() for task in tasks])), drawn, tasks)


def ratio(first: Scores, second: Scores, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of ``first`` over mean of ``second`` (both over tasks), over the items that both have.
    Against the full cache it is the retained share. NaN if the second mean is 0.

    Raises:
        ValueError: no items in common.
    """
    tasks = list(paired(first, second).values())
    above, below = np.mean([task.mean(0) for task in tasks], 0)
    if below == 0:
        return Estimate(math.nan, math.nan, math.nan, sum(map(len, tasks)))
    drawn = resampled(tasks, resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have a mean of 0
        return _estimate(float(above / below), drawn[:, 0] / drawn[:, 1], tasks)


def compare(
    policy: str,
    scores: Mapping[str, Scores],
    *,
    better: Literal["higher", "lower"] = "higher",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison | None:
    """``policy`` against each of the others in ``scores``, and which of these is the best.

    The best has the best mean over the items it shares with ``policy``; in an incomplete
    evaluation, among those that share the most. It is chosen by its result, which may be partly
    luck; that works against ``policy``. None if there is nothing to compare.
    """
    if policy not in scores:
        return None
    against, items = {}, {}
    mine = {(task, item) for task, found in scores[policy].items() for item in found}
    for name, other in scores.items():
        if name == policy or not paired_items(scores[policy], other):
            continue
        against[name] = difference(scores[policy], other, resamples, seed)
        items[name] = against[name].n / len(mine)
    if not against:
        return None
    sign = 1 if better == "higher" else -1
    # On the same items the best mean is the one that leaves the smallest difference.
    best = min(against, key=lambda name: (-items[name], sign * against[name].value))
    return Comparison(policy, best, against, items)


def gate(full: Scores, threshold: float = GATE) -> tuple[list[str], list[str]]:
    """Tasks whose mean with the full cache is at least ``threshold``, and the others: a task that
    fails with all tokens says nothing about which to keep."""
    passed: list[str] = []
    failed: list[str] = []
    for task, found in full.items():
        score = float(np.mean(list(found.values())))
        # 0.8 as the mean of ten scores may come out as 0.7999999999999999
        (passed if score >= threshold - 1e-9 else failed).append(task)
    return passed, failed


def paired_items(first: Scores, second: Scores) -> dict[str, list[ItemId]]:
    """The items that both have, by task, in the order of ``first``; no empty tasks."""
    common = {
        task: [item for item in found if item in second[task]]
        for task, found in first.items()
        if task in second
    }
    return {task: items for task, items in common.items() if items}


def paired(first: Scores, second: Scores) -> dict[str, FloatArray]:
    """For each task of both: f64 [n, 2], the scores of the n items of both.

    Raises:
        ValueError: no items in common.
    """
    common = paired_items(first, second)
    if not common:
        raise ValueError("there is no item that both have")
    return {
        task: np.array([[first[task][i], second[task][i]] for i in items], np.float64)
        for task, items in common.items()
    }


def resampled(tasks: Sequence[FloatArray], resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """Means over tasks of ``resamples`` bootstrap samples.

    Args:
        tasks: for each task f64 [n, k]: k scores of each of its n items, which stay together.

    Returns:
        f64 [resamples, k].
    """
    total = np.zeros((resamples, tasks[0].shape[1]))
    for stratum, scores in enumerate(tasks):
        middle = scores.mean(0)
        counts = _counts(len(scores), stratum, resamples, seed)
        # taken around the mean, equal scores give exactly that
        total += middle + counts @ (scores - middle) / max(1, len(scores) - 1)
    return total / len(tasks)


# A report takes hundreds of means over the same tasks, with the same resamples, and drawing them
# takes most of the time. f32 represents the counts exactly; 16 x 4 MB with 100 items a task.
@lru_cache(maxsize=16)
def _counts(n: int, stratum: int, resamples: int, seed: int) -> npt.NDArray[np.float32]:
    """How often each of n items is in each resample: f32 [resamples, n], rows sum to n - 1."""
    if n == 1:
        return np.ones((resamples, 1), np.float32)  # no interval comes of it: see _estimate
    drawn = np.random.default_rng([seed, stratum]).integers(n, size=(resamples, n - 1))
    drawn += n * np.arange(resamples)[:, None]
    found = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    counts: npt.NDArray[np.float32] = found.astype(np.float32)
    counts.flags.writeable = False
    return counts


def _arrays(scores: Scores) -> list[FloatArray]:
    """The scores of each task that has items: f64 [n]."""
    tasks = [np.array(list(found.values()), np.float64) for found in scores.values() if found]
    if not tasks:
        raise ValueError("there are no items")
    return tasks


def _estimate(value: float, drawn: FloatArray, tasks: Sequence[FloatArray]) -> Estimate:
    """The estimate with the interval of the resamples ``drawn`` [resamples]; no interval if a task
    has only one item."""
    n = sum(map(len, tasks))
    if min(map(len, tasks)) < 2 or not np.isfinite(drawn).all():
        return Estimate(value, math.nan, math.nan, n)
    # Sums of thirds that are 0 may come out as 1e-17, and would then exclude 0.
    value, low, high = np.round([value, *np.quantile(drawn, (0.025, 0.975))], 12) + 0.0
    return Estimate(float(value), float(low), float(high), n)
