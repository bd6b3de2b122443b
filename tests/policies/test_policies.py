"""The four policies against their formulas, written down here once more and independently."""

from __future__ import annotations

import numpy as np
import pytest

from kvp_edge.policies import POLICIES, ArrayView, KeyDiff, KNorm, Random, Recency, get_policy


@pytest.fixture
def keys() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 3, 50, 32)).astype(np.float32)


NONE = np.empty((2, 3, 50, 0), np.float32)
POSITIONS = np.arange(100, 150, dtype=np.int32)


def test_knorm_is_minus_the_length_of_the_key(keys: np.ndarray) -> None:
    got = KNorm().score(ArrayView(keys, NONE, POSITIONS))
    np.testing.assert_allclose(got[1, 2, 7], -np.sqrt((keys[1, 2, 7] ** 2).sum()), rtol=1e-6)
    assert got.shape == (2, 3, 50)


def test_keydiff_is_minus_the_cosine_with_the_mean_direction(keys: np.ndarray) -> None:
    got = KeyDiff().score(ArrayView(keys, NONE, POSITIONS))
    head = keys[1, 0].astype(np.float64)
    directions = [k / np.linalg.norm(k) for k in head]
    anchor = sum(directions) / len(directions)
    want = [-(k @ anchor) / (np.linalg.norm(k) * np.linalg.norm(anchor)) for k in head]
    np.testing.assert_allclose(got[1, 0], want, atol=1e-6)


def test_a_zero_key_gives_finite_scores(keys: np.ndarray) -> None:
    keys[0, 0, 0] = 0.0
    assert np.isfinite(KeyDiff().score(ArrayView(keys, NONE, POSITIONS))).all()
    assert np.isfinite(KeyDiff().score(ArrayView(np.zeros_like(keys), NONE, POSITIONS))).all()


def test_recency_prefers_later_positions() -> None:
    got = Recency().score(ArrayView(NONE, NONE, POSITIONS))
    assert (np.diff(got, axis=2) > 0).all()


def test_random_depends_on_seed_and_position_only() -> None:
    first = Random(seed=3).score(ArrayView(NONE, NONE, POSITIONS))
    again = Random(seed=3).score(ArrayView(NONE[:, :, :10], NONE[:, :, :10], POSITIONS[20:30]))
    np.testing.assert_array_equal(first[:, :, 20:30], again)
    assert not np.array_equal(first, Random(seed=4).score(ArrayView(NONE, NONE, POSITIONS)))


def test_random_is_uniform_and_without_trend() -> None:
    n = 20_000
    none = np.empty((1, 1, n, 0), np.float32)
    scores = Random(0).score(ArrayView(none, none, np.arange(n, dtype=np.int32)))[0, 0]
    counts, _ = np.histogram(scores, bins=10, range=(0, 1))
    assert abs(counts - n / 10).max() < 5 * np.sqrt(n / 10)
    assert abs(np.corrcoef(scores, np.arange(n))[0, 1]) < 0.03


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match="'none'.*keydiff, knorm, recency, random"):
        get_policy("none")


def test_a_policy_is_found_by_its_own_name() -> None:
    assert all(get_policy(name).name == name for name in POLICIES)
    mine = Random(seed=7)
    assert get_policy(mine) is mine
