"""The cache worked on where it lies: on the CPU, on a device the host cannot touch, on two of them.

The state path is the reference: it hands the cache out and back in, whatever holds it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import RandomModel, random_tokens
from kvp_edge import Eviction, Llama, UnsupportedModelError
from kvp_edge.binding import rules
from kvp_edge.binding.cache import NativeCache, NotInPlace
from kvp_edge.binding.policy import NativePolicy
from kvp_edge.binding.queries import Queries
from kvp_edge.policies import POLICIES, ArrayView, KeyDiff, KNorm, Policy, ValueRange
from kvp_edge.policies.lagkv import standing_out
from kvp_edge.policies.query_attention import total_attention
from kvp_edge.policy_file import PolicyInfo, Scope
from makers import blobs
from makers.devices import CountingProxy, placed
from makers.gguf_models import ModelShape
from makers.policies import random_weights
from support import failing_call
from support.closeness import EXACT, GPU, HALF, difference
from support.noise import CacheNoise, Noise
from support.properties import examples
from support.watch import Watch

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama", n_layer=3, n_head_kv=2, head_dim=64)
SMALL_HEADS = ModelShape("llama", n_layer=2, n_head_kv=2, head_dim=32)
WINDOW = ModelShape("gemma3", head_dim=64, n_head_kv=2, n_layer=4, sliding_window=24)
BOUND: dict[str, Any] = {"n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 60}
SAME = 2e-5
"""Of the largest score: sums in another order."""
HALF_PRODUCTS = 2e-3
"""Where a GPU rounds the factors of matrix products to f16; measured once on llvmpipe: 4e-4."""
TYPES = {
    name: int(gguf.GGMLQuantizationType[name])
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
}


def cache_of(llm: Llama) -> NativeCache:
    assert llm.kv is not None
    return llm.kv.cache


def held(llm: Llama) -> list[blobs.Cache]:
    """What llama.cpp's own state says, in order of positions."""
    caches = blobs.read(blobs.saved(llm.ctx))
    for cache in caches:
        order = np.argsort(cache.positions)
        cache.positions = cache.positions[order]
        cache.keys, cache.values = cache.keys[:, order], cache.values[:, order]
    return caches


def newest(cache: blobs.Cache, n: int = 24) -> blobs.Cache:
    return replace(
        cache,
        positions=cache.positions[-n:],
        keys=cache.keys[:, -n:],
        values=cache.values[:, -n:],
    )


def assert_same_cache(a: Llama, b: Llama) -> None:
    (base_a, *window_a), (base_b, *window_b) = held(a), held(b)
    compared = [(base_a, base_b)]
    if window_a:  # no token sees more of it than the newest ones
        compared.append((newest(window_a[0]), newest(window_b[0])))
    for x, y in compared:
        np.testing.assert_array_equal(x.positions, y.positions)
        np.testing.assert_array_equal(x.keys, y.keys)
        np.testing.assert_array_equal(x.values, y.values)


def cells_are_followed(llm: Llama) -> bool:
    """Whether they are known; they are then llama.cpp's, or this raises."""
    assert llm.kv is not None
    return cache_of(llm).check_cells(llm.kv.snapshot().llama_positions())


# -- packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LLAMA, WINDOW], ids=lambda s: s.arch)
@pytest.mark.parametrize(
    ("type_k", "type_v", "flash_attn"),
    [
        ("F16", "F16", False),
        ("F32", "F16", False),
        ("F16", "F32", True),
        ("BF16", "BF16", False),
        ("Q8_0", "F16", False),
        ("Q8_0", "Q8_0", True),
        ("Q4_0", "Q5_1", True),
        ("IQ4_NL", "Q4_1", True),
    ],
)
def test_in_place_and_state_leave_the_same_bytes(
    random_model: Maker,
    load: Loader,
    place: str,
    shape: ModelShape,
    type_k: str,
    type_v: str,
    flash_attn: bool,
) -> None:
    options = {"type_k": TYPES[type_k], "type_v": TYPES[type_v], "flash_attn": flash_attn}
    in_place, state = (
        load(
            random_model(shape).path,
            **BOUND,
            **options,
            policy=Noise(),
            granularity="head",
            pack=pack,
        )
        for pack in ("device", "state")
    )
    text = random_tokens(103)  # a few tokens more than the budget: below, one eviction of those
    for llm in (in_place, state):
        llm.eval(text)
        llm.evict()
    assert_same_cache(in_place, state)
    # From here on the two read keys and values from other cells and may round otherwise, so what is
    # stored now differs in the last bits: it is packed from one and the same state.
    for _ in range(3):
        for llm in (in_place, state):
            llm.eval(random_tokens(40, seed=2)[1:])
        shared = cache_of(state).state()
        for llm in (in_place, state):
            assert llm.kv is not None
            with llm.kv.restoring(state.kv.snapshot(), shared):  # type: ignore[union-attr]
                pass
            llm.evict()
        np.testing.assert_array_equal(in_place.kv_indices, state.kv_indices)
        assert_same_cache(in_place, state)
        assert cells_are_followed(in_place)
    assert cache_of(in_place).location.packed_in_place == 4
    assert cache_of(in_place).location.packed_as_state == 0
    assert cache_of(state).location.packed_in_place == 0
    assert in_place.kv_stats.pack == "device"
    assert state.kv_stats.pack == "state"
    where = in_place.kv_stats.where or ""
    assert where.count("CPU") == (place == "cpu"), where
    assert where.count(", ") == (place == "rpc2"), where
    assert cache_of(in_place).location.on_device == (place != "cpu")


@pytest.mark.parametrize("shape", [LLAMA, SMALL_HEADS], ids=lambda s: str(s.head_dim))
@pytest.mark.parametrize("flash_attn", [False, True])
def test_an_evicted_cache_has_no_holes_so_logits_are_those_of_the_state_to_the_last_bit(
    random_model: Maker, load: Loader, place: str, shape: ModelShape, flash_attn: bool
) -> None:
    """The order of sums over cells is the same only if every token is in the same cell. But where
    transposed values lie on a device holes are left."""
    logits = []
    for pack in ("device", "state"):
        llm = load(
            random_model(shape).path,
            **BOUND,
            policy=CacheNoise(),
            granularity="head",
            flash_attn=flash_attn,
            logits_all=True,
            pack=pack,
        )
        for step in range(5):
            llm.eval(random_tokens(90, seed=step)[1:])
            llm.n_tokens -= 7  # goes back among the newest tokens, also right after an eviction
            llm.eval([11, 12])
        for token in random_tokens(90, seed=9)[1:]:
            llm.eval([token])
        assert llm.kv_stats.evictions > 3
        logits.append(np.array(llm.scores[: llm.n_tokens]))
        llm.close()
    if place == "cpu" or flash_attn:
        np.testing.assert_array_equal(*logits)
    else:
        assert difference(*logits) < HALF


def test_with_nothing_to_move_nothing_is_moved(
    random_model: Maker, load: Loader, place: str
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, policy=Noise(), granularity="head", pack="device")
    llm.eval(random_tokens(100))
    llm.evict()  # exactly the budget
    assert llm.kv_stats.evictions == 0
    before = held(llm)
    cache = cache_of(llm)
    present = np.arange(100, dtype=np.int32)
    rows = np.broadcast_to(present, (3, 2, 100))
    cache.pack(present, rows, present)
    np.testing.assert_array_equal(held(llm)[0].keys, before[0].keys)
    newest = rows[..., 1:]  # every row that stays is where it shall be
    cache.pack(present, newest, present[1:])
    np.testing.assert_array_equal(held(llm)[0].keys, before[0].keys[:, 1:])
    np.testing.assert_array_equal(held(llm)[0].positions, present[1:])
    assert cache.location.packed_in_place == 2


@pytest.mark.parametrize("flash_attn", [False, True])
@examples(40)
@given(data=st.data())
def test_any_plan_gives_every_head_the_rows_that_numpy_does(
    random_model: Maker, load: Loader, place: str, flash_attn: bool, data: st.DataObject
) -> None:
    n = 40
    options = {**BOUND, "policy": Noise(), "granularity": "head", "flash_attn": flash_attn}
    llm = load(random_model(LLAMA).path, **options, pack="device")
    llm.eval(random_tokens(n))
    cache, present = cache_of(llm), np.arange(n, dtype=np.int32)
    before = held(llm)[0]
    for _ in range(2):  # the second time in cells of another order
        n = len(present)
        n_keep = data.draw(st.integers(1, n))
        rows = [data.draw(st.permutations(range(n))) for _ in range(6)]
        keep = np.sort(np.array(rows, np.int32)[:, :n_keep]).reshape(3, 2, n_keep)
        older = data.draw(st.permutations(present[:-1].tolist()))[: n_keep - 1]
        positions = np.array([*sorted(older), present[-1]], np.int32)
        cache.pack(present, keep, positions)
        after = held(llm)[0]
        np.testing.assert_array_equal(after.positions, positions)
        for got, all_rows in zip(
            (after.keys, after.values), before.by_head(n_head_kv=2), strict=True
        ):
            np.testing.assert_array_equal(got, blobs.take_rows(all_rows, keep))
        before, present = after, positions
        assert cache.check_cells(present)
    llm.close()


@pytest.mark.parametrize("cache_type", ["F16", "Q8_0"])
def test_newest_rows_whose_cells_are_not_in_their_order_close_up_and_are_followed(
    random_model: Maker, load: Loader, place: str, cache_type: str
) -> None:
    options = {**BOUND, "granularity": "head", "flash_attn": True}
    options |= {"type_k": TYPES[cache_type], "type_v": TYPES[cache_type]}
    llm = load(random_model(LLAMA).path, **options, pack="device")
    llm.eval(random_tokens(40))
    present = np.arange(40, dtype=np.int32)
    # First the newest closes up to cell 0 or, quantised on a device, leaves one hole; then row 5 in
    # cell 5 is behind it, and there are so many holes that both close up everywhere.
    for kept in (present[1:], present[[5, 39]]):
        before = held(llm)[0]
        keep = np.searchsorted(present, kept).astype(np.int32)
        cache_of(llm).pack(present, np.broadcast_to(keep, (3, 2, len(keep))), kept)
        after, present = held(llm)[0], kept
        np.testing.assert_array_equal(after.positions, kept)
        np.testing.assert_array_equal(after.keys, before.keys[:, keep])
        np.testing.assert_array_equal(after.values, before.values[:, keep])
        assert cache_of(llm).check_cells(kept)


def test_one_row_may_take_the_place_of_all(random_model: Maker, load: Loader, place: str) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, granularity="head", pack="device")
    llm.eval(random_tokens(50))
    before = held(llm)[0]
    present = np.arange(50, dtype=np.int32)
    oldest = np.zeros((3, 2, 1), np.int32)
    cache_of(llm).pack(present, oldest, present[-1:])
    after = held(llm)[0]
    np.testing.assert_array_equal(after.positions, [49])
    np.testing.assert_array_equal(after.keys, before.keys[:, :1])
    np.testing.assert_array_equal(after.values, before.values[:, :1])


def test_heads_that_are_no_whole_words_on_a_device_go_through_the_state(
    random_model: Maker, load: Loader, rpc_devices: list[int]
) -> None:
    path = random_model(SMALL_HEADS).path
    q8 = {"type_k": TYPES["Q8_0"], "flash_attn": True, "granularity": "head"}  # 34 bytes a head
    with placed(rpc_devices[:1]):
        llm = load(path, **BOUND, **q8, policy=Noise())
        with pytest.raises(
            UnsupportedModelError, match="not a multiple of 4 with this cache type on RPC"
        ):
            load(path, **BOUND, **q8, pack="device")
        token = load(path, **BOUND, **{**q8, "granularity": "token"}, pack="device")
    assert llm.kv_stats.pack == "state"
    llm.eval(random_tokens(400))
    assert cache_of(llm).location.packed_as_state == llm.kv_stats.evictions > 0
    token.eval(random_tokens(400))
    assert token.kv_stats.pack == "device"
    here = load(path, **BOUND, **q8, pack="device")  # in host memory bytes are enough
    here.eval(random_tokens(400))
    assert cache_of(here).location.packed_as_state == 0


# -- scores ----------------------------------------------------------------------------------


SCORED = pytest.mark.parametrize(
    "types",
    [("F16", "F16", False), ("F32", "F32", True), ("Q8_0", "Q8_0", True), ("Q4_0", "F16", False)],
    ids=lambda types: "-".join(map(str, types)),
)


def evicted(load: Loader, path: str, type_k: str, type_v: str, flash_attn: bool) -> Llama:
    """Tokens with gaps between them, in cells all over."""
    options = {"type_k": TYPES[type_k], "type_v": TYPES[type_v], "flash_attn": flash_attn}
    llm = load(path, **BOUND, **options, granularity="token", pack="device")
    llm.eval(random_tokens(300))
    assert llm.kv_stats.evictions > 0
    return llm


@pytest.mark.parametrize(
    "shape", [LLAMA, SMALL_HEADS, WINDOW], ids=lambda s: f"{s.arch}{s.head_dim}"
)
@SCORED
def test_scores_in_place_are_those_of_the_state_and_of_numpy(
    random_model: Maker,
    load: Loader,
    place: str,
    shape: ModelShape,
    types: tuple[str, str, bool],
) -> None:
    llm = evicted(load, random_model(shape).path, *types)
    assert llm.kv is not None
    cache, present = cache_of(llm), llm.kv.snapshot().llama_positions()
    tokens = llm.kv_indices
    s = cache.shape
    info = PolicyInfo("llama", s.n_layer, s.n_head_kv, s.head_size_k, s.head_size_v, 8, 5)
    networks = {
        scope: NativePolicy(random_weights(replace(info, scope=scope))) for scope in get_args(Scope)
    }
    p0, p1, n = int(present[0]), int(present[-1]) + 1, len(present)
    bytes_transferred = cache.location.bytes_transferred
    by_network = {scope: rules.Network(one, tokens) for scope, one in networks.items()}
    in_place = {
        "keydiff": scored(cache, rules.KeyDiff(), p0, p1, n),
        "knorm": scored(cache, rules.KNorm(), p0, p1, n),
    }
    for scope, rule in by_network.items():
        scored(cache, rule, p0, p1, n)
        in_place[scope] = scored(cache, rule, p0, p1, n)
    if place == "cpu":
        assert cache.location.bytes_transferred == bytes_transferred
    cache.forget_cells()
    assert not cells_are_followed(llm)
    before = cache.location.bytes_transferred
    _, keys, values = cache.read(p0, p1, n)
    assert values is not None
    assert cache.location.bytes_transferred > before  # a state was taken
    heuristics: dict[str, tuple[rules.Rule, Policy]] = {
        "keydiff": (rules.KeyDiff(), KeyDiff()),
        "knorm": (rules.KNorm(), KNorm()),
    }
    for name, (rule, policy) in heuristics.items():
        assert_close(in_place[name], scored(cache, rule, p0, p1, n))
        assert_close(in_place[name], policy.score(ArrayView(keys, values, tokens)))
    limit = HALF_PRODUCTS if place == "gpu" else SAME
    for scope, network in networks.items():
        assert_close(in_place[scope], scored(cache, by_network[scope], p0, p1, n), limit)
        assert_close(in_place[scope], network.score(keys, values, tokens), limit)


def scored(cache: NativeCache, rule: rules.Rule, p0: int, p1: int, n: int) -> NDArray[np.float32]:
    found = cache.score(rule, p0, p1, n)
    assert not isinstance(found, NotInPlace)
    return found


def assert_close(got: NDArray[np.float32], want: NDArray[np.float32], limit: float = SAME) -> None:
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() < limit * max(1.0, float(np.abs(want).max()))


def queries_at(cache: NativeCache, positions: list[int], seed: int = 0) -> Queries:
    """Queries of LLAMA's four heads that nobody asked."""
    s = cache.shape
    rng = np.random.default_rng(seed)
    asked = rng.normal(size=(s.n_layer, 4, len(positions), s.head_size_k)).astype(np.float32)
    scale = rng.uniform(0.05, 0.2, s.n_layer).astype(np.float32)
    return Queries(asked, np.array(positions, np.int32), scale)


@pytest.mark.parametrize("shape", [LLAMA, WINDOW], ids=lambda s: s.arch)
@SCORED
def test_what_rules_look_at_is_the_same_in_place_and_in_numpy(
    random_model: Maker,
    load: Loader,
    place: str,
    shape: ModelShape,
    types: tuple[str, str, bool],
) -> None:
    llm = evicted(load, random_model(shape).path, *types)
    assert llm.kv is not None
    cache, present = cache_of(llm), llm.kv.snapshot().llama_positions()
    s, n = cache.shape, len(present)
    p0, p1 = int(present[0]), int(present[-1]) + 1
    rng = np.random.default_rng(1)
    # as at head granularity: other tokens in every head
    held = rng.permuted(np.broadcast_to(np.arange(2, 300), (s.n_layer, 2, 298)), axis=-1)
    held = np.sort(held[..., :n]).astype(np.int32)
    asked = queries_at(cache, [1, 2, 40, 150, 299])  # the first sees nothing, the last all
    square = rng.normal(size=(s.n_layer, 4, s.head_size_k, s.head_size_k)) / s.head_size_k
    expected = (
        rng.normal(size=(s.n_layer, 4, s.head_size_k)).astype(np.float32),
        (square @ square.swapaxes(-1, -2)).astype(np.float32),
        asked.scale,
    )
    left_out = held < 30
    bytes_transferred = cache.location.bytes_transferred
    looked_at = [
        rules.Range(),
        rules.Lag(first=4, lag=20, n_parts=4),
        rules.Attention(asked, held),
        rules.Expected(*expected, left_out),
    ]
    in_place = [scored(cache, rule, p0, p1, n) for rule in looked_at]
    assert (cache.location.bytes_transferred == bytes_transferred) == (place == "cpu")

    cache.forget_cells()
    for rule in looked_at:
        refused = cache.score(rule, p0, p1, n)
        assert isinstance(refused, NotInPlace)
        assert "not known where the tokens" in refused.reason
    _, keys, values = cache.read(p0, p1, n)
    assert values is not None
    parts = [x[:, :, 4:84].reshape(s.n_layer, 2, 4, 20, -1) for x in (keys, values)]
    numpy = [
        ValueRange().score(ArrayView(keys, values, present)),
        sum(standing_out(x) for x in parts) / 2,
        total_attention(asked, keys, held),
        expected_attention(keys, values, *expected, left_out),
    ]
    limit = HALF_PRODUCTS if place == "gpu" else SAME
    for got, want in zip(in_place, numpy, strict=True):
        assert_close(got, want, limit)
    assert (in_place[2].sum(axis=-1) < 5 - 0.999).all()  # nothing of the query that sees nothing
    assert (in_place[3][left_out] == 0).all()


def expected_attention(
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    means: NDArray[np.float32],
    covariances: NDArray[np.float32],
    scale: NDArray[np.float32],
    left_out: NDArray[np.bool_],
) -> NDArray[np.float32]:
    score = np.zeros(left_out.shape)
    for layer, head in np.ndindex(means.shape[:2]):
        kv, s = head // 2, float(scale[layer])
        k = keys[layer, kv].astype(float)
        logits = s * k @ means[layer, head]
        logits += s * s / 2 * np.einsum("nd,de,ne->n", k, covariances[layer, head].astype(float), k)
        e = np.where(left_out[layer, kv], 0, np.exp(logits))
        score[layer, kv] += e / e.sum() / 2
    score *= np.linalg.norm(values.astype(float), axis=-1)
    return score.astype(np.float32)


def test_more_queries_than_one_graph_holds_pay_the_same(random_model: Maker, load: Loader) -> None:
    bound = {"n_ctx": 4000, "kv_budget": 3000, "recent": 20, "reserve": 60}
    llm = load(random_model(LLAMA).path, **bound, granularity="token", pack="device")
    n = 2800  # 2^24 logits are 1498 queries of four heads
    llm.eval(random_tokens(n))
    cache = cache_of(llm)
    held = np.broadcast_to(np.arange(n, dtype=np.int32), (3, 2, n))
    asked = queries_at(cache, list(range(n - 1600, n)))
    _, keys, _ = cache.read(0, n, n, values=False)
    got = scored(cache, rules.Attention(asked, held), 0, n, n)
    assert_close(got, total_attention(asked, keys, held))
    assert got.sum(axis=-1) == pytest.approx(np.full((3, 2), 1600), rel=1e-4)


@pytest.mark.parametrize("first", [(40, 1, 5), (1, 0, 5), (1, 10, 1), (101, 1, 2)])
def test_partitions_that_do_not_fit_are_refused(
    random_model: Maker, load: Loader, first: tuple[int, int, int]
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, pack="device")
    llm.eval(random_tokens(44))
    with pytest.raises(ValueError, match="partitions of"):
        cache_of(llm).score(rules.Lag(*first), 0, 44, 44)


def test_query_heads_that_do_not_divide_among_kv_heads_are_refused(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, pack="device")
    llm.eval(random_tokens(10))
    asked = Queries(
        np.zeros((3, 3, 1, 64), np.float32), np.zeros(1, np.int32), np.ones(3, np.float32)
    )
    rule = rules.Attention(asked, np.zeros((3, 2, 10), np.int32))
    with pytest.raises(ValueError, match="3 query heads do not divide among 2 KV heads"):
        cache_of(llm).score(rule, 0, 10, 10)


@pytest.mark.parametrize("place", ["cpu", "rpc"], indirect=True)
@pytest.mark.parametrize("policy", ["auto", *POLICIES])
def test_a_chat_keeps_the_same_tokens_in_place_and_through_states(
    load: Loader, bundled_model: str, place: str, policy: str
) -> None:
    bound = {"n_ctx": 4096, "kv_budget": 192, "recent": 32, "reserve": 64, "granularity": "head"}
    kept = []
    for pack in ("device", "state"):
        llm = load(bundled_model, **bound, policy=policy, pack=pack)
        text = b"My dog is called Ralph. " * 60 + b"What is my dog called?"
        llm.eval(llm.tokenize(text))
        assert llm.kv_stats.evictions > 1
        kept.append(llm.kv_indices)
    # Scores differ in the last bits, so a tie may fall the other way.
    same = [
        np.isin(a, b).mean()
        for a, b in zip(*(k.reshape(-1, k.shape[-1]) for k in kept), strict=True)
    ]
    assert min(same) > 0.97


# -- following cells -------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_cells_are_followed_through_eviction_rewind_and_clearing(
    random_model: Maker, load: Loader, place: str, granularity: str
) -> None:
    llm = load(
        random_model(LLAMA).path,
        **BOUND,
        policy=CacheNoise() if granularity == "head" else Noise(),
        granularity=granularity,
        pack="device",
    )
    for step in range(6):
        llm.eval(random_tokens(90, seed=step)[1:])
        assert cells_are_followed(llm)
        llm.n_tokens -= 7
        llm.eval([11, 12])
        assert cells_are_followed(llm)
    assert llm.kv_stats.evictions > 2
    assert cache_of(llm).location.packed_as_state == 0
    llm.reset()
    llm.eval(random_tokens(30))
    assert cells_are_followed(llm)
    assert llm.kv_stats.kept == 30


@pytest.mark.parametrize("loses", [False, True])
def test_a_state_brings_its_cells_along_and_lost_ones_are_found_by_the_next_eviction(
    random_model: Maker, load: Loader, place: str, loses: bool
) -> None:
    told: list[Eviction] = []
    llm = load(
        random_model(LLAMA).path,
        **BOUND,
        policy=Noise(),
        granularity="head",
        on_evict=told.append,
        logits_all=True,
    )
    llm.eval(random_tokens(300))
    state = llm.save_state()
    llm.eval(random_tokens(20, seed=1))
    llm.load_state(state)
    assert cells_are_followed(llm)
    if loses:
        cache_of(llm).forget_cells()
        assert not cells_are_followed(llm)
    llm.eval(random_tokens(200, seed=2))
    assert cells_are_followed(llm)
    assert [e.pack for e in told].count("state") == loses
    assert told[-1].pack == "device"


def test_a_session_brings_its_cells_along(
    random_model: Maker, load: Loader, place: str, tmp_path: Any
) -> None:
    options = {**BOUND, "policy": Noise(), "granularity": "head", "pack": "device"}
    llm = load(random_model(LLAMA).path, **options)
    llm.eval(random_tokens(300))
    llm.save_session(tmp_path / "chat.kvp")
    other = load(random_model(LLAMA).path, **options)
    other.load_session(tmp_path / "chat.kvp")
    assert cells_are_followed(other)
    assert_same_cache(llm, other)
    for chat in (llm, other):
        chat.eval(random_tokens(200, seed=1))
    np.testing.assert_array_equal(llm.kv_indices, other.kv_indices)
    assert cache_of(other).location.packed_as_state == 0


@pytest.mark.parametrize("granularity", ["token", "head"])
def test_compacted_positions_are_followed(
    random_model: Maker, load: Loader, place: str, granularity: str
) -> None:
    options: dict[str, Any] = {**BOUND, "kv_budget": 100, "n_ctx": 4000, "positions": "compact"}
    shape = ModelShape("llama", n_layer=3, n_head_kv=2, head_dim=64, n_ctx_train=256)
    llm = load(random_model(shape).path, **options, policy=Noise(), granularity=granularity)
    for step in range(8):
        llm.eval(random_tokens(90, seed=step)[1:])
        assert cells_are_followed(llm)
    assert llm.kv is not None
    assert llm.kv.shift > 0
    # turned keys go through the state at head granularity; llama.cpp turns them itself at the other
    assert (cache_of(llm).location.packed_as_state > 0) == (granularity == "head")


# -- what crosses ----------------------------------------------------------------------------


@pytest.mark.skipif(
    "LD_PRELOAD" in os.environ, reason="this build checks all cells at each eviction"
)
@pytest.mark.parametrize(
    ("policy", "cache_type"),
    [
        *((name, "F16") for name in ("keydiff", "knorm", "value-range", "lagkv", "snapkv", "tova")),
        ("keydiff", "Q8_0"),
    ],
)
def test_only_cell_numbers_and_scores_cross(
    random_model: Maker, load: Loader, rpc_wire: CountingProxy, policy: str, cache_type: str
) -> None:
    """Two models that differ in the size of their heads put the same bytes on the wire; but where a
    policy looks at queries, these cross too, as they are logged on the host."""
    n_queries = POLICIES[policy]().n_queries
    bytes_transferred = []
    for head_dim in (64, 256):
        shape = ModelShape("llama", n_layer=3, n_embd=64, n_head=2, n_head_kv=2, head_dim=head_dim)
        with placed([rpc_wire.device]):
            llm = load(
                random_model(shape).path,
                **{**BOUND, "kv_budget": 400, "reserve": 200},
                policy=policy,
                type_k=TYPES[cache_type],
                type_v=TYPES[cache_type],
                granularity="head",
                flash_attn=True,
                pack="device",
            )
        llm.eval(random_tokens(590))
        assert llm.kv_stats.evictions == 0
        stats_before = llm.kv_stats.transferred_bytes
        rpc_wire.reset()
        llm.evict()
        wire = rpc_wire.to_device + rpc_wire.to_host
        own = llm.kv_stats.transferred_bytes - stats_before
        n, n_keep, heads = 590, 400, 3 * 2
        numbers = 4 * n + 4 * heads * n_keep + 8 * n_keep  # cells to score, to take and to fill
        if n_queries:
            asked = n_queries * 4 * heads * head_dim
            own -= asked
            wire -= asked
            numbers += 4 * heads * n + 4 * n_queries  # the tokens held and those that ask
        assert 4 * heads * (n if policy != "lagkv" else 3 * 128) <= own <= numbers + 4 * heads * n
        cache_bytes = cache_of(llm).shape.bytes_per_cell * n_keep
        graphs = 120_000 if policy == "lagkv" else 75_000  # as many bytes whatever the cache holds
        assert own <= wire < own + graphs
        bytes_transferred.append((own, wire, cache_bytes))
        llm.close()
    (own, wire, small), (own_large, wire_large, large) = bytes_transferred
    assert large == 4 * small
    assert abs(own_large - own) <= 5 * (4 * heads + 8)  # a few rows more may be where they shall be
    assert abs(wire_large - wire) < 5_000 < small / 60


def test_nothing_crosses_in_host_memory(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, policy="keydiff", granularity="head")
    llm.eval(random_tokens(400))
    assert llm.kv_stats.evictions > 1
    assert llm.kv_stats.transferred_bytes == 0
    assert llm.kv_stats.where == "CPU"


# -- choosing --------------------------------------------------------------------------------


def test_logits_are_the_references_whichever_way_is_chosen(
    random_model: Maker, load: Loader, place: str
) -> None:
    model = random_model(LLAMA)
    f32 = {"type_k": TYPES["F32"], "type_v": TYPES["F32"], "logits_all": True}
    for pack in ("auto", "device", "state"):
        llm = load(model.path, **BOUND, **f32, granularity="head", policy=Noise(), pack=pack)
        watch = Watch(llm, LLAMA)
        llm.eval(random_tokens(400))
        limit = GPU if place == "gpu" else EXACT
        assert difference(llm.scores[:400], watch.expected(model.reference)) < limit
        assert llm.kv_stats.pack == ("state" if pack == "state" else "device")
        llm.close()


def test_a_policy_that_looks_at_queries_is_watched_as_well(
    random_model: Maker, load: Loader, place: str
) -> None:
    llm = load(
        random_model(LLAMA).path, **BOUND, policy="snapkv", granularity="head", pack="device"
    )
    llm.eval(random_tokens(400))
    assert llm.kv_stats.evictions > 0
    assert cells_are_followed(llm)


def test_another_way_is_refused(bundled_model: str) -> None:
    with pytest.raises(ValueError, match="pack must be 'auto', 'device' or 'state', not 'gpu'"):
        Llama(bundled_model, kv_budget=512, pack="gpu")


# -- failing ---------------------------------------------------------------------------------


_FAILING = """
#include <dlfcn.h>
#include <stdlib.h>
/* Stands in for ggml's own function, which runs the graphs of kvp_edge, and lets one call fail. */
typedef int compute(void * backend, void * graph);
int ggml_backend_graph_compute(void * backend, void * graph) {
    static int calls = 0;
    void * ggml = dlopen(getenv("LLAMA_LIBRARY"), RTLD_NOW | RTLD_NOLOAD);
    compute * real = (compute *) dlsym(ggml, "ggml_backend_graph_compute");
    return ++calls == atoi(getenv("FAIL_AT")) ? -1 /* GGML_STATUS_FAILED */ : real(backend, graph);
}
"""

_SURVIVOR = f"""
import os, sys
del os.environ["LD_PRELOAD"]  # the servers shall not fail
from kvp_edge import Llama
from makers.devices import RpcServer, placed, rpc_device
from support.noise import Noise
bound = dict(n_ctx=3000, kv_budget=100, recent=20, reserve=60, verbose=False)
bound["policy"] = Noise()  # no graphs of its own: the first one packs
with placed([rpc_device(RpcServer().endpoint) for _ in range(2)]):
    llm = Llama(sys.argv[1], **bound, pack="device")
fresh = Llama(sys.argv[1], **bound)
failed = "the device RPC"
{failing_call.READ_AGAIN}
assert llm.kv.cache.check_cells(llm.kv.snapshot().llama_positions())
print("survived")
"""


@failing_call.possible
@pytest.mark.usefixtures("rpc")
@pytest.mark.parametrize("fail_at", [1, 2, 3])  # either device, and in the second eviction
def test_a_device_that_fails_in_the_middle_leaves_an_empty_cache_and_is_read_again(
    random_model: Maker, tmp_path: Path, fail_at: int
) -> None:
    path = random_model(LLAMA).path
    out, err = failing_call.run(tmp_path, _FAILING, _SURVIVOR, path, FAIL_AT=str(fail_at))
    assert out == "survived\n", err


_LACKING = """
#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
/* Stands in for ggml's own function, and denies one operation. */
typedef bool supports(void * backend, const void * node);
typedef const char * describe(const void * node);
bool ggml_backend_supports_op(void * backend, const void * node) {
    void *     ggml = dlopen(getenv("LLAMA_LIBRARY"), RTLD_NOW | RTLD_NOLOAD);
    supports * real = (supports *) dlsym(ggml, "ggml_backend_supports_op");
    describe * name = (describe *) dlsym(ggml, "ggml_op_desc");
    return strcmp(name(node), getenv("LACKS")) != 0 && real(backend, node);
}
"""

_ROWS_READ = """
import os, sys
import numpy as np
from kvp_edge import Llama
from kvp_edge.binding.cache import NativeCache
del os.environ["LD_PRELOAD"]
read, kept = [], []
was = NativeCache.read
NativeCache.read = lambda self, *a, **k: read.append(a) or was(self, *a, **k)
bound = dict(n_ctx=3000, kv_budget=400, recent=20, reserve=60, verbose=False)
for pack in ("device", "state"):
    llm = Llama(sys.argv[1], **bound, policy=sys.argv[2], pack=pack)
    read.clear()
    llm.eval([0, *(6 + i * 7 % 200 for i in range(600))])
    assert len(read) == llm.kv_stats.evictions > 1, (pack, len(read))
    kept.append(llm.kv_indices)
assert (kept[0] == kept[1]).all()
print("read")
"""


@failing_call.possible
@pytest.mark.parametrize(
    ("policy", "lacks"), [("lagkv", "POOL_2D"), ("value-range", "POOL_2D"), ("snapkv", "STEP")]
)
def test_where_an_operation_is_lacking_rows_are_read(
    random_model: Maker, tmp_path: Path, policy: str, lacks: str
) -> None:
    path = random_model(LLAMA).path
    out, err = failing_call.run(tmp_path, _LACKING, _ROWS_READ, path, policy, LACKS=lacks)
    assert out == "read\n", err


_NO_MEMORY = """
#include <errno.h>
#include <stddef.h>
/* Stands in for glibc's own functions, and denies large pieces while fail_from says so. */
void * __libc_malloc(size_t);
void * __libc_memalign(size_t, size_t);
size_t fail_from = 0;
int    denied    = 0;
static int denies(size_t n) {
    const int denied_now = fail_from > 0 && n >= fail_from;
    denied += denied_now;
    return denied_now;
}
void * malloc(size_t n) { return denies(n) ? NULL : __libc_malloc(n); }
int posix_memalign(void ** p, size_t alignment, size_t n) {
    *p = denies(n) ? NULL : __libc_memalign(alignment, n);
    return *p ? 0 : ENOMEM;
}
"""

_GOES_ON = """
import ctypes, os, sys
import numpy as np
from kvp_edge import Llama
from kvp_edge.binding import cache as module
stand_in = ctypes.CDLL(os.environ.pop("LD_PRELOAD"))
fail_from, denied = (kind.in_dll(stand_in, name) for kind, name in
                     ((ctypes.c_size_t, "fail_from"), (ctypes.c_int, "denied")))
tokens = [0, *(6 + i * 7 % 200 for i in range(600))]
real, short = module.in_place, False
def in_place(name, *args):
    # the descriptions of a graph, and nothing smaller before them
    fail_from.value = 40_000 if short and name == "kvp_cache_score" else 0
    try:
        return real(name, *args)
    finally:
        fail_from.value = 0
module.in_place = in_place
kept = []
for short in (False, True):
    bound = dict(n_ctx=3000, kv_budget=300, recent=20, reserve=212, n_threads=1, verbose=False)
    llm = Llama(sys.argv[1], **bound, policy=sys.argv[2])
    try:
        llm.eval(tokens)
    except MemoryError:  # where the state is read in one piece there is no smaller way
        assert sys.argv[2] == "keydiff"
        n, short = llm.n_tokens, False
        llm.eval(tokens[n:])
    assert llm.kv_stats.evictions == 1
    kept.append(llm.kv_indices)
assert denied.value > 0
assert (kept[0] == kept[1]).mean() > 0.95  # numpy rounds otherwise
print("went on")
"""


@failing_call.possible
@pytest.mark.parametrize("policy", ["keydiff", "lagkv", "value-range", "snapkv", "tova", "h2o"])
def test_where_memory_is_short_an_eviction_does_not_end_the_process(
    random_model: Maker, tmp_path: Path, policy: str
) -> None:
    """ggml_init() itself would: rows are read and scored in numpy, or there is a MemoryError."""
    path = random_model(LLAMA).path
    out, err = failing_call.run(tmp_path, _NO_MEMORY, _GOES_ON, path, policy)
    assert out == "went on\n", err
