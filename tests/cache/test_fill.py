"""Rows go out of a cache to a KV log and come back into its cells, head by head.

The reference is llama.cpp's own state, read by numpy (makers.blobs): what a head shall hold is
taken from it row by row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import AWAY, RandomModel, random_tokens
from kvp_edge import Llama, UnsupportedModelError
from kvp_edge.binding.cache import NativeCache, RopeShift
from kvp_edge.binding.library import call
from kvp_edge.binding.structs import CacheShape, LogBlock, LogLayout
from makers import blobs
from makers.gguf_models import ModelShape
from support.cache_types import BF16, CACHE_TYPES, F16, F32, Q4_0, Q5_1, Q8_0
from support.closeness import HALF, difference
from support.noise import Noise
from support.properties import examples

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

LLAMA = ModelShape("llama", n_layer=3, head_dim=64)
SHAPES = {
    "llama-32": ModelShape("llama"),
    "qwen2-64": ModelShape("qwen2", n_embd=256, head_dim=64),
    "qwen3-128": ModelShape("qwen3", head_dim=128),
    "gemma3-window": ModelShape("gemma3", head_dim=64, n_layer=4, sliding_window=24),
    "phi3-32": ModelShape("phi3"),
}
WINDOW = SHAPES["gemma3-window"]
BOUND: dict[str, Any] = {
    "n_ctx": 3000,
    "kv_budget": 100,
    "recent": 20,
    "reserve": 60,
    "granularity": "head",
    "policy": Noise(),
    "logits_all": True,
}
N = 90


def kind(types: str) -> dict[str, Any]:
    type_k, type_v, flash_attn = CACHE_TYPES[types]
    return {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}


def cache_of(llm: Llama) -> NativeCache:
    assert llm.kv is not None
    return llm.kv.cache


def held(llm: Llama) -> blobs.Cache:
    """What llama.cpp's own state says of the base cache, in order of positions."""
    base = blobs.read(blobs.saved(llm.ctx))[0]
    order = np.argsort(base.positions)
    base.positions = base.positions[order]
    base.keys, base.values = base.keys[:, order], base.values[:, order]
    return base


def assert_same(a: blobs.Cache, b: blobs.Cache) -> None:
    np.testing.assert_array_equal(a.positions, b.positions)
    np.testing.assert_array_equal(a.keys, b.keys)
    np.testing.assert_array_equal(a.values, b.values)


def split(layout: LogLayout, block: Bytes) -> tuple[Bytes, Bytes]:
    """The keys and values of a block, [n_layer, n, bytes]."""
    n = len(block) // layout.bytes_per_token
    layers = block.reshape(layout.n_layer, -1)
    keys = layers[:, : n * layout.k_row].reshape(layout.n_layer, n, layout.k_row)
    values = layers[:, n * layout.k_row :].reshape(layout.n_layer, n, layout.v_row)
    return keys, values


def logged(cache: NativeCache, layout: LogLayout, borders: list[int]) -> list[LogBlock]:
    """Blocks of tokens [borders[0], borders[1]), ... that lie at positions of the same numbers."""
    return [
        LogBlock(cache.log_rows(layout, p0, p1, p1 - p0), p0, p1 - p0, p0)
        for p0, p1 in itertools.pairwise(borders)
    ]


def heads_of(shape: CacheShape) -> tuple[int, int]:
    return shape.n_layer, shape.n_head_kv


def few(shape: CacheShape, n: int, seed: int = 0) -> tuple[Ints, Ints]:
    """4 sinks, 8 tokens that differ from head to head, and the newest 10: rows, and positions for
    them that are present ones."""
    rng = np.random.default_rng(seed)
    middle = np.tile(np.arange(4, n - 10, dtype=np.int32), (*heads_of(shape), 1))
    middle = np.sort(rng.permuted(middle, axis=-1)[..., :8])
    ends = [np.broadcast_to(x, (*heads_of(shape), len(x))) for x in (range(4), range(n - 10, n))]
    rows = np.concatenate([ends[0], middle, ends[1]], axis=-1).astype(np.int32)
    return rows, np.r_[:12, n - 10 : n].astype(np.int32)


def all_of(rows: Ints, n: int) -> Ints:
    """The sources of tokens 0 to n - 1, of which heads hold `rows` and the log has all."""
    source = np.broadcast_to(~np.arange(n, dtype=np.int32), (*rows.shape[:2], n)).copy()
    here = np.broadcast_to(np.arange(rows.shape[2], dtype=np.int32), rows.shape)
    np.put_along_axis(source, rows.astype(np.intp), here, axis=-1)
    return source


def next_logits(llm: Llama, token: int, position: int) -> NDArray[np.float32]:
    """Behind the manager's back."""
    llm._batch.set_batch(batch=[token], n_past=position, logits_all=False)
    llm._ctx.decode(llm._batch)
    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(logits, (llm.n_vocab(),)).copy()


# -- out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-32", "qwen2-64", "gemma3-window"])
@pytest.mark.parametrize("types", CACHE_TYPES)
@pytest.mark.parametrize("pack", ["auto", "state"])
def test_logged_rows_are_the_bytes_of_llama_cpps_own_state(
    random_model: Maker, load: Loader, name: str, types: str, pack: str
) -> None:
    llm = load(random_model(SHAPES[name]).path, **BOUND, **kind(types), pack=pack)
    llm.eval(random_tokens(70))
    rows, positions = few(cache_of(llm).shape, 70)
    cache_of(llm).pack(np.arange(70), rows, positions)  # so that rows and positions differ
    cache, want = cache_of(llm), held(llm)
    layout = cache.log_layout()
    for first, last in ((0, 22), (3, 17), (21, 22)):
        p0, p1 = int(positions[first]), int(positions[last - 1]) + 1
        block = cache.log_rows(layout, p0, p1, last - first)
        keys, values = split(layout, block)
        np.testing.assert_array_equal(keys, want.keys[:, first:last])
        np.testing.assert_array_equal(values, want.values[:, first:last])
    assert_same(held(llm), want)


@pytest.mark.parametrize("place", AWAY, indirect=True)
@pytest.mark.parametrize("flash_attn", [False, True])
def test_only_the_rows_logged_leave_a_device(
    random_model: Maker, load: Loader, place: str, flash_attn: bool
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, flash_attn=flash_attn)
    llm.eval(random_tokens(N))
    cache, want = cache_of(llm), held(llm)
    layout, before = cache.log_layout(), cache.location.bytes_transferred
    block = cache.log_rows(layout, 30, 50, 20)
    moved = cache.location.bytes_transferred - before
    assert 20 * layout.bytes_per_token < moved < 20 * layout.bytes_per_token + 20 * 12 + 200
    for got, rows in zip(split(layout, block), (want.keys, want.values), strict=True):
        np.testing.assert_array_equal(got, rows[:, 30:50])


def test_rows_are_logged_into_memory_that_is_given(
    random_model: Maker, load: Loader, tmp_path: Path
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(20))
    cache = cache_of(llm)
    layout = cache.log_layout()
    file: Any = np.memmap(tmp_path / "log", np.uint8, "w+", shape=(5 * layout.bytes_per_token,))
    assert cache.log_rows(layout, 2, 7, 5, out=file) is file
    np.testing.assert_array_equal(file, cache.log_rows(layout, 2, 7, 5))
    file.flush()
    read: Any = np.memmap(tmp_path / "log", np.uint8, "r")
    with pytest.raises(ValueError, match="a writeable array"):
        cache.log_rows(layout, 2, 7, 5, out=read)
    with pytest.raises(ValueError, match="a writeable array of"):
        cache.log_rows(layout, 2, 7, 5, out=file[:-1])
    assert len(cache.log_rows(layout, 9, 9, 0)) == 0
    before = held(llm)
    block = LogBlock(read, 2, 5, 2)  # read-only memory will do
    source = np.broadcast_to(np.arange(20, dtype=np.int32), (3, 2, 20)).copy()
    source[..., 2:7] = ~source[..., 2:7]
    cache.fill(np.arange(20), layout, [block], source, np.arange(20))
    assert_same(held(llm), before)


@pytest.mark.parametrize("pack", ["auto", "state"])
def test_positions_that_hold_another_number_of_tokens_are_not_logged(
    random_model: Maker, load: Loader, pack: str
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, pack=pack)
    llm.eval(random_tokens(20))
    layout = cache_of(llm).log_layout()
    for p0, p1, n in ((0, 20, 19), (0, 20, 21), (15, 25, 10), (5, 5, 1), (0, 3, 0)):
        with pytest.raises(ValueError, match="hold .* tokens, not the"):
            cache_of(llm).log_rows(layout, p0, p1, n)
    for p0, p1 in ((-1, 3), (7, 3)):
        with pytest.raises(ValueError, match="a position range must be"):
            cache_of(llm).log_rows(layout, p0, p1, 3)


def test_layouts_that_cannot_be_are_refused(random_model: Maker, load: Loader) -> None:
    small = load(random_model(ModelShape("llama", n_embd=64, n_head=4, head_dim=16)).path, **BOUND)
    assert cache_of(small).log_layout(F16).k_row == 2 * 16 * 2
    with pytest.raises(UnsupportedModelError, match="16 values of K are not, in type q8_0"):
        cache_of(small).log_layout(Q8_0)
    llm = load(random_model(LLAMA).path, **BOUND)
    q4_k = int(gguf.GGMLQuantizationType.Q4_K)
    with pytest.raises(UnsupportedModelError, match="64 values of K are not, in type q4_K"):
        cache_of(llm).log_layout(q4_k)
    wide = load(random_model(ModelShape("llama", head_dim=256)).path, **BOUND)
    with pytest.raises(UnsupportedModelError, match="converted to type q4_K"):
        cache_of(wide).log_layout(q4_k)
    for wrong in (-2, 4, 10**6, -(2**31)):  # 4 was Q4_2 once
        with pytest.raises(ValueError, match=f"{wrong} is no type"):
            cache_of(llm).log_layout(wrong)


# -- and back --------------------------------------------------------------------------------


def come_back(llm: Llama, log_type: int | None = None) -> tuple[blobs.Cache, blobs.Cache]:
    """All but a few tokens leave every head, and return. What was held before, and afterwards."""
    cache, present = cache_of(llm), np.arange(N, dtype=np.int32)
    before = held(llm)
    layout = cache.log_layout(log_type)
    blocks = logged(cache, layout, [0, 31, 32, N])
    rows, positions = few(cache.shape, N)
    cache.pack(present, rows, positions)
    cache.fill(positions, layout, blocks, all_of(rows, N), present)
    return before, held(llm)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("types", CACHE_TYPES)
@pytest.mark.parametrize("pack", ["auto", "state"])
def test_a_cache_that_gets_all_rows_back_is_as_if_none_had_left(
    random_model: Maker, load: Loader, name: str, types: str, pack: str
) -> None:
    llm = load(random_model(SHAPES[name]).path, **BOUND, **kind(types), pack=pack)
    llm.eval(random_tokens(N))
    llm.eval([7])
    want = np.array(llm.scores[N])
    llm.n_tokens = N
    llm.sync()
    assert_same(*come_back(llm))
    if pack == "auto":
        assert cache_of(llm).check_cells(np.arange(N, dtype=np.int32))
    llm.eval([7])
    got = np.array(llm.scores[N])
    if name == "gemma3-window":  # the window's rows lie in other cells: another order of sums
        assert difference(got, want) < (0.06 if "q" in types else HALF)
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("place", AWAY, indirect=True)
@pytest.mark.parametrize("shape", [LLAMA, WINDOW], ids=lambda s: s.arch)
@pytest.mark.parametrize("types", ["f32", "f16", "f16-fa", "q8_0-f16", "q4_0-fa"])
def test_rows_come_back_to_a_device(
    random_model: Maker, load: Loader, place: str, shape: ModelShape, types: str
) -> None:
    llm = load(random_model(shape).path, **BOUND, **kind(types))
    llm.eval(random_tokens(N))
    llm.eval([7])
    want = np.array(llm.scores[N])
    llm.n_tokens = N
    llm.sync()
    assert cache_of(llm).location.on_device
    assert_same(*come_back(llm))
    assert cache_of(llm).check_cells(np.arange(N, dtype=np.int32))
    llm.eval([7])
    assert difference(np.array(llm.scores[N]), want) < (0.06 if "q" in types else HALF)


def some_sources(
    data: st.DataObject, shape: CacheShape, n: int, n_logged: Ints, n_new: int
) -> Ints:
    """Any rows and logged tokens, in any order, all different within a head."""
    every = np.r_[np.arange(n), ~n_logged].astype(np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    source = rng.permuted(np.tile(every, (*heads_of(shape), 1)), axis=-1)[..., :n_new]
    if n == n_new and data.draw(st.booleans()):  # most rows stay, as they do where a few come back
        own = np.arange(n, dtype=np.int32)
        stays = rng.random(source.shape) < 0.9
        taken = np.where(stays, own, np.where(source < 0, source, own))
        source = np.where((taken == own) | (taken < 0), taken, own)
    return source


@pytest.mark.parametrize("types", ["f32-fa", "f16", "f16-fa", "q8_0-f16", "q4_0-fa"])
@examples(40)
@given(data=st.data())
def test_any_plan_gives_every_head_the_rows_that_numpy_does(
    random_model: Maker, load: Loader, types: str, data: st.DataObject
) -> None:
    pack = data.draw(st.sampled_from(["auto", "state"]))
    llm = load(random_model(LLAMA).path, **BOUND, **kind(types), pack=pack)
    llm.eval(random_tokens(40))
    cache, present = cache_of(llm), np.arange(40, dtype=np.int32)
    layout = cache.log_layout()
    blocks = logged(cache, layout, [0, 7, 19, 40])
    del blocks[1]  # a gap
    tokens = np.r_[:7, 19:40].astype(np.int32)
    log = [x.swapaxes(0, 1) for x in (held(llm).keys, held(llm).values)]
    for _ in range(2):  # the second time from rows in other cells, that differ from head to head
        n, before = len(present), held(llm)
        n_new = data.draw(st.one_of(st.just(n), st.integers(1, n + len(tokens))))
        source = some_sources(data, cache.shape, n, tokens, n_new)
        if n == n_new and data.draw(st.booleans()):
            positions = present
        else:
            steps = data.draw(st.lists(st.integers(1, 3), min_size=n_new, max_size=n_new))
            positions = (np.cumsum(steps) - 1).astype(np.int32)
        cache.fill(present, layout, blocks, source, positions)
        after = held(llm)
        np.testing.assert_array_equal(after.positions, positions)
        rows = np.where(source < 0, n + ~source, source).astype(np.int32)
        for got, here, gone in zip(
            (after.keys, after.values), (before.keys, before.values), log, strict=True
        ):
            both = np.concatenate([here, gone.swapaxes(0, 1)], axis=1)
            by_head = both.reshape(*both.shape[:2], 2, -1).swapaxes(1, 2)
            np.testing.assert_array_equal(got, blobs.take_rows(by_head, rows))
        present = positions
        if pack == "auto":
            assert cache.check_cells(present)
    llm.close()


@pytest.mark.parametrize("shape", [LLAMA, WINDOW], ids=lambda s: s.arch)
@pytest.mark.parametrize("types", CACHE_TYPES)
@pytest.mark.parametrize("log_type", [None, Q8_0, F16])
def test_rows_written_in_place_and_a_new_state_leave_the_same_bytes(
    random_model: Maker, load: Loader, shape: ModelShape, types: str, log_type: int | None
) -> None:
    caches, logits, moved = [], [], []
    for pack in ("auto", "state"):
        llm = load(random_model(shape).path, **BOUND, **kind(types), pack=pack)
        llm.eval(random_tokens(N))
        cache, present = cache_of(llm), np.arange(N, dtype=np.int32)
        layout = cache.log_layout(log_type)
        blocks = logged(cache, layout, [0, 31, 32, N])
        rng = np.random.default_rng(3)
        source = np.tile(present, (*heads_of(cache.shape), 1))
        for head in source.reshape(-1, N):
            some = rng.permutation(N)[:40]
            head[some[:20]] = head[some[rng.permutation(20)]]  # these change places
            head[some[20:]] = ~some[rng.permutation(20)]
        before = cache.location.bytes_transferred
        cache.fill(present, layout, blocks, source, present)
        moved.append(cache.location.bytes_transferred - before)
        caches.append(held(llm))
        if pack == "auto":
            assert cache.check_cells(present)
        llm.eval([7])
        logits.append(np.array(llm.scores[N]))
    assert_same(*caches)
    assert moved[0] == 0 < moved[1]
    assert difference(*logits) < (1e-9 if shape is LLAMA else HALF)


def test_rows_that_stay_where_they_are_are_not_touched(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(N))
    cache, before, present = cache_of(llm), held(llm), np.arange(N, dtype=np.int32)
    own = np.tile(present, (*heads_of(cache.shape), 1))
    cache.fill(present, cache.log_layout(), [], own, present)
    assert_same(held(llm), before)
    assert cache.check_cells(present)


@pytest.mark.parametrize("name", ["llama-32", "gemma3-window"])
@pytest.mark.parametrize("types", ["f32", "f16-fa"])
def test_a_conversation_that_goes_back_ends_at_its_newest_row(
    random_model: Maker, load: Loader, name: str, types: str
) -> None:
    path, end = random_model(SHAPES[name]).path, 80
    llm, fresh = (load(path, **BOUND, **kind(types)) for _ in range(2))
    llm.eval(random_tokens(N))
    fresh.eval(random_tokens(N)[:end])
    cache, present = cache_of(llm), np.arange(N, dtype=np.int32)
    layout = cache.log_layout()
    blocks = logged(cache, layout, [0, N])
    rows = np.tile(present, (*heads_of(cache.shape), 1))
    rows = np.random.default_rng(1).permuted(rows, axis=-1)
    cache.fill(present, layout, blocks, rows, present)  # in place, so that the window stays
    source = np.argsort(rows, axis=-1)[..., :end].astype(np.int32)  # where tokens are now
    source[..., ::2] = ~present[:end:2]
    assert cache.can_continue_at(end)
    cache.fill(present, layout, blocks, source, present[:end])
    assert cache.newest_position() == end - 1
    assert all(window.positions.max() == end - 1 for window in blobs.read(blobs.saved(llm.ctx)))
    got, want = (next_logits(of, 7, end) for of in (llm, fresh))
    assert difference(got, want) < HALF


@pytest.mark.parametrize("types", ["f32", "f16", "q8_0-fa"])
def test_an_empty_cache_is_filled_from_the_log_alone(
    random_model: Maker, load: Loader, types: str
) -> None:
    path = random_model(LLAMA).path
    full, empty = (load(path, **BOUND, **kind(types)) for _ in range(2))
    full.eval(random_tokens(N))
    layout = cache_of(full).log_layout()
    blocks = logged(cache_of(full), layout, [0, 40, N])
    present = np.arange(N, dtype=np.int32)
    source = np.tile(~present, (*heads_of(cache_of(full).shape), 1))
    cache_of(empty).fill(present[:0], layout, blocks, source, present)
    assert_same(held(empty), held(full))
    assert cache_of(empty).check_cells(present)
    np.testing.assert_array_equal(*(next_logits(of, 7, N) for of in (empty, full)))


def test_windows_that_do_not_hold_the_newest_row_are_refused(
    random_model: Maker, load: Loader
) -> None:
    llm, empty = (load(random_model(WINDOW).path, **BOUND) for _ in range(2))
    llm.eval(random_tokens(N))
    cache, present = cache_of(llm), np.arange(N, dtype=np.int32)
    layout = cache.log_layout()
    blocks = logged(cache, layout, [0, N])
    rows, positions = few(cache.shape, N)
    cache.pack(present, rows, positions)  # the window loses what is out of sight
    before = blobs.saved(llm.ctx)
    source = all_of(rows, N)
    for n_new, last in ((20, 19), (N, N)):
        new = np.r_[: n_new - 1, last].astype(np.int32)
        with pytest.raises(UnsupportedModelError, match=f"a token behind position {last} sees"):
            cache.fill(positions, layout, blocks, source[..., :n_new], new)
    shift = RopeShift(np.ones((cache.shape.n_layer, 32)), np.ones_like(source), neox=True)
    with pytest.raises(UnsupportedModelError, match="sliding-window layers cannot be turned"):
        cache.fill(positions, layout, blocks, source, present, shift)
    assert blobs.saved(llm.ctx) == before
    alone = np.tile(~present, (*heads_of(cache.shape), 1))
    with pytest.raises(UnsupportedModelError, match="do not hold what a token behind"):
        cache_of(empty).fill(present[:0], layout, blocks, alone, present)
    assert cache_of(empty).newest_position() == -1


def test_a_cache_is_filled_to_its_last_cell_and_no_further(
    random_model: Maker, load: Loader
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(40))
    cache, present = cache_of(llm), np.arange(40, dtype=np.int32)
    layout, n_cells = cache.log_layout(), llama_cpp.llama_n_ctx(llm.ctx)
    rows = cache.log_rows(layout, 0, 40, 40)
    blocks = [LogBlock(rows, first, 40, first) for first in range(0, n_cells + 40, 40)]
    new = np.arange(n_cells + 1, dtype=np.int32)
    source = np.tile(~new, (*heads_of(cache.shape), 1))
    before = held(llm)
    with pytest.raises(ValueError, match=f"{n_cells + 1} rows do not fit into the .* {n_cells} ce"):
        cache.fill(present, layout, blocks, source, new)
    assert_same(held(llm), before)
    cache.fill(present, layout, blocks, source[..., :-1], new[:-1])
    after = held(llm)
    np.testing.assert_array_equal(after.positions, new[:-1])
    np.testing.assert_array_equal(after.keys, before.keys[:, new[:-1] % 40])
    np.testing.assert_array_equal(after.values, before.values[:, new[:-1] % 40])


# -- logs of another type ------------------------------------------------------------------------

IQ4_NL = int(gguf.GGMLQuantizationType.IQ4_NL)
ROUNDING = {
    F32: 0.0,
    F16: 2**-11,
    BF16: 2**-8,
    Q8_0: 0.5 / 127 + 2**-11,
    Q5_1: 1 / 31 + 2**-9,  # half of a step of (largest - smallest) / 31
    Q4_0: 1 / 8 + 2**-10,  # it has 7 steps on one side and 8 on the other
    IQ4_NL: 0.15,
}
"""The largest error of a value, over the largest magnitude in its block."""


def floats(rows: Bytes, of_type: int) -> NDArray[np.float32]:
    """[..., bytes] -> [..., values], by gguf's own arithmetic."""
    kind = gguf.GGMLQuantizationType(of_type)
    return gguf.quants.dequantize(np.ascontiguousarray(rows), kind).astype(np.float32)


def assert_near(got: NDArray[np.float32], want: NDArray[np.float32], of_type: int) -> None:
    got, want = (x.reshape(*x.shape[:-1], -1, 32) for x in (got, want))
    limit = ROUNDING[of_type] * np.abs(want).max(axis=-1, keepdims=True)
    assert (np.abs(got - want) <= limit + 1e-7).all()


@pytest.mark.parametrize(
    ("types", "log_type"),
    [
        *(("f32", log_type) for log_type in ROUNDING),
        ("f16", Q4_0),
        ("f16-fa", Q8_0),
        ("bf16", F32),
        ("q8_0-fa", Q4_0),
        ("q8_0-f16", Q8_0),
        ("q4_1-f16-fa", F16),
        ("q5_1-q8_0-fa", BF16),
    ],
)
@pytest.mark.parametrize("pack", ["auto", "state"])
def test_rows_pass_through_a_log_of_another_type_as_its_rounding_lets_them(
    random_model: Maker, load: Loader, types: str, log_type: int, pack: str
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, **kind(types), pack=pack)
    llm.eval(random_tokens(N))
    cache, before, present = cache_of(llm), held(llm), np.arange(N, dtype=np.int32)
    layout = cache.log_layout(log_type)
    assert (layout.k_hadamard_block, layout.v_hadamard_block) == (
        cache.shape.k_hadamard_block,
        cache.shape.v_hadamard_block,
    )
    assert layout.bytes_per_token == layout.n_layer * (layout.k_row + layout.v_row)
    block = logged(cache, layout, [10, 60])
    stored = [floats(x, log_type) for x in split(layout, block[0].rows)]
    exact = floats(before.keys, before.type_k), floats(before.values, before.type_v)
    for got, want in zip(stored, exact, strict=True):
        assert_near(got, want[:, 10:60], log_type)

    source = np.tile(present, (*heads_of(cache.shape), 1))
    source[..., 20:50] = ~source[..., 20:50]
    cache.fill(present, layout, block, source, present)
    after = held(llm)
    for here, was, log, of_type in (
        (after.keys, before.keys, stored[0], before.type_k),
        (after.values, before.values, stored[1], before.type_v),
    ):
        np.testing.assert_array_equal(here[:, :20], was[:, :20])
        np.testing.assert_array_equal(here[:, 50:], was[:, 50:])
        got, want = floats(here[:, 20:50], of_type), log[:, 10:40]
        if of_type in (log_type, F32):
            np.testing.assert_array_equal(got, want)
        elif of_type == F16:
            np.testing.assert_array_equal(got, want.astype(np.float16).astype(np.float32))
        elif of_type in ROUNDING:
            assert_near(got, want, of_type)


# -- keys turned on the way ----------------------------------------------------------------------


def unhadamard(x: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (x.reshape(*x.shape[:-1], -1, block) @ matrix / np.sqrt(block)).reshape(x.shape)


@pytest.mark.parametrize("types", ["f32", "f16", "q8_0-fa", "q4_0-fa"])
@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("pack", ["auto", "state"])
def test_keys_of_either_origin_are_turned_as_numpy_turns_them(
    random_model: Maker, load: Loader, types: str, neox: bool, pack: str
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, **kind(types), pack=pack)
    llm.eval(random_tokens(N))
    cache, before, present = cache_of(llm), held(llm), np.arange(N, dtype=np.int32)
    layout, rng = cache.log_layout(), np.random.default_rng(5)
    blocks = logged(cache, layout, [0, N])
    source = rng.permuted(np.tile(present, (*heads_of(cache.shape), 1)), axis=-1)
    source = np.where(rng.random(source.shape) < 0.5, source, ~source)
    n_pairs = 24  # the rest of a head of 64 is not turned
    frequency = rng.uniform(0, 2, (cache.shape.n_layer, n_pairs))
    distance = rng.integers(-500, 500, source.shape).astype(np.int32)
    distance[..., ::9] = 0
    cache.fill(present, layout, blocks, source, present, RopeShift(frequency, distance, neox))
    after = held(llm)

    token = np.where(source < 0, ~source, source)
    keys, values = before.by_head(2)
    np.testing.assert_array_equal(after.values, blobs.take_rows(values, token))
    moved = np.take_along_axis(keys, token[..., None].astype(np.intp), axis=2)
    got = after.by_head(2)[0]
    np.testing.assert_array_equal(got[..., ::9, :], moved[..., ::9, :])

    block = cache.shape.k_hadamard_block
    plain = [floats(x, before.type_k).astype(np.float64) for x in (moved, got)]
    if block:
        plain = [unhadamard(x, block) for x in plain]
    want = plain[0].copy()
    a, b = (np.arange(n_pairs), np.arange(n_pairs) + n_pairs) if neox else (None, None)
    if a is None or b is None:
        a, b = np.arange(n_pairs) * 2, np.arange(n_pairs) * 2 + 1
    angle = distance[..., None] * frequency[:, None, None]
    x, y = want[..., a].copy(), want[..., b].copy()
    want[..., a] = x * np.cos(angle) - y * np.sin(angle)
    want[..., b] = x * np.sin(angle) + y * np.cos(angle)
    error = np.linalg.norm(plain[1] - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < {"f32": 1e-6, "f16": 5e-4, "q8_0-fa": 0.01, "q4_0-fa": 0.15}[types]


# -- what does not fit ----------------------------------------------------------------------------


class Plan:
    """Arguments of a fill that is possible: 40 rows present, 20 of them and 20 logged ones stay."""

    def __init__(self, llm: Llama) -> None:
        self.cache = cache_of(llm)
        self.layout = self.cache.log_layout()
        self.blocks = logged(self.cache, self.layout, [0, 10, 30])
        self.present = np.arange(40, dtype=np.int32)
        self.positions = self.present.copy()
        self.source = np.tile(self.present, (*heads_of(self.cache.shape), 1))
        self.source[..., :20] = ~self.source[..., :20]
        self.shift: RopeShift | None = None

    def block(self, at: int, **changes: Any) -> None:
        old = self.blocks[at]
        fields = {"rows": old.rows, "first": old.first, "n": old.n, "rope_first": 0, **changes}
        self.blocks[at] = LogBlock(**fields)

    def fill(self) -> None:
        rows = self.source, self.positions, self.shift
        self.cache.fill(self.present, self.layout, self.blocks, *rows)


def put(name: str, at: Any, value: Any) -> Callable[[Plan], None]:
    return lambda plan: getattr(plan, name).__setitem__(at, value)


def shifted(n_pairs: int) -> Callable[[Plan], None]:
    def change(plan: Plan) -> None:
        plan.shift = RopeShift(np.ones((3, n_pairs)), np.ones_like(plan.source), neox=True)

    return change


HOSTILE: dict[str, tuple[Callable[[Plan], None], str]] = {
    "row behind the last": (put("source", (2, 1, 30), 40), "takes row 40, which is none of"),
    "row far behind": (put("source", (0, 0, 0), 2**31 - 1), "takes row 2147483647, which is none"),
    "row twice": (put("source", (2, 1, 30), 31), "layer 2, KV head 1 takes row 31.* named twice"),
    "token twice": (put("source", (1, 0, 5), ~4), "logged row of token 5|4, which is named twice"),
    "token in no block": (put("source", (1, 0, 5), ~30), "token 30, which is in none"),
    "token far away": (put("source", (0, 0, 39), -(2**31)), "token 2147483647, which is in none"),
    "position twice": (put("positions", 7, 6), "must ascend from 0, but entry 7 is 6"),
    "negative position": (put("positions", 0, -1), "must ascend from 0, but entry 0 is -1"),
    "position far away": (
        put("positions", 39, 2**24),
        "below 16777216, but the newest is 16777216",
    ),
    "newest elsewhere": (put("present", 39, 41), "newest token is at position 39, not 41"),
    "one present less": (lambda p: setattr(p, "present", p.present[:-1]), "row 39, which is none"),
    "oldest unnamed": (lambda p: setattr(p, "present", p.present[1:]), "row 39, which is none of"),
    "present in disorder": (put("present", [3, 4], [4, 3]), "out of date"),
    "nothing present": (lambda p: setattr(p, "present", p.present[:0]), "takes row 20, which is"),
    "fewer positions": (lambda p: setattr(p, "positions", p.positions[:-1]), "for 39 positions"),
    "blocks overlap": (lambda p: p.block(1, first=9), "block 1 .* does not follow"),
    "blocks descend": (lambda p: p.blocks.reverse(), "block 1 .* does not follow"),
    "block below 0": (lambda p: p.block(0, first=-1), "block 0 .* does not follow"),
    "block too long": (lambda p: p.block(1, first=2**31 - 15), "block 1 .* has no rows, or"),
    "block of nothing": (lambda p: p.block(0, n=0, rows=np.empty(0, np.uint8)), "has no rows"),
    "block too short": (lambda p: p.block(0, n=11), "11 logged tokens .* bytes, not"),
    "no block": (lambda p: p.blocks.clear(), "token 0, which is in none of the log's blocks"),
    "pairs too many": (shifted(33), "33 pairs cannot be turned in keys of 64 values"),
    "no pairs": (shifted(0), "at least one pair"),
}
ALL_FIELDS = [name for name, _ in LogLayout._fields_]  # type: ignore[misc]


@pytest.mark.parametrize("pack", ["auto", "state"])
def test_what_does_not_fit_is_refused_and_the_cache_stays_as_it_was(
    random_model: Maker, load: Loader, pack: str
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND, pack=pack)
    llm.eval(random_tokens(40))
    before = blobs.saved(llm.ctx)
    Plan(llm).fill()  # it is possible
    assert blobs.saved(llm.ctx) == before
    for name, (change, sentence) in HOSTILE.items():
        plan = Plan(llm)
        change(plan)
        with pytest.raises(ValueError, match=sentence):
            plan.fill()
        assert blobs.saved(llm.ctx) == before, name
    for field in ALL_FIELDS:
        for by in (1, -1, 7):
            plan = Plan(llm)
            setattr(plan.layout, field, getattr(plan.layout, field) + by)
            out = np.empty(10**6, np.uint8)
            raw = plan.cache._handle, plan.layout
            with pytest.raises((ValueError, UnsupportedModelError)):
                call("kvp_cache_log_rows", *raw, 0, 40, 40, out)
            log = plan.layout, plan.blocks, len(plan.blocks), plan.source, plan.positions, 40
            with pytest.raises((ValueError, UnsupportedModelError)):
                call("kvp_cache_fill", plan.cache._handle, plan.present, 40, *log, None)
    assert blobs.saved(llm.ctx) == before
    llm.eval([7])
    assert llm.n_tokens == 41


@examples(80)
@given(data=st.data())
def test_any_numbers_are_refused_or_give_the_rows_they_name(
    random_model: Maker, load: Loader, data: st.DataObject
) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(40))
    plan, before = Plan(llm), held(llm)
    edge = st.sampled_from([-(2**31), -41, -31, -30, -1, 0, 39, 40, 2**31 - 1])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 39)))
        plan.source[at] = data.draw(st.one_of(edge, st.integers(-35, 45)))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, 39))
        plan.positions[at] = data.draw(st.one_of(edge, st.integers(0, 2**24)))
    sound = all(
        len(set(head)) == 40 and all(-31 < r < 40 for r in head)
        for head in plan.source.reshape(-1, 40).tolist()
    )
    sound = sound and bool((np.diff(plan.positions) > 0).all() and plan.positions[0] >= 0)
    after = before
    if sound:
        plan.fill()
        after = held(llm)
        token = np.where(plan.source < 0, ~plan.source, plan.source).astype(np.int32)
        for got, rows in zip((after.keys, after.values), before.by_head(2), strict=True):
            np.testing.assert_array_equal(got, blobs.take_rows(rows, token))
    else:
        with pytest.raises(ValueError, match="takes|new positions"):
            plan.fill()
        assert_same(held(llm), before)
    llm.close()


def test_null_pointers_are_refused(random_model: Maker, load: Loader) -> None:
    llm = load(random_model(LLAMA).path, **BOUND)
    llm.eval(random_tokens(40))
    plan = Plan(llm)
    handle = plan.cache._handle
    log = plan.layout, plan.blocks, len(plan.blocks)
    good: list[Any] = [handle, plan.present, 40, *log, plan.source, plan.positions, 40, None]
    for at in (0, 1, 3, 4, 6, 7):
        with pytest.raises(ValueError, match="must not be NULL"):
            call("kvp_cache_fill", *(None if i == at else x for i, x in enumerate(good)))
    with pytest.raises(ValueError, match="no rows at all"):
        call("kvp_cache_fill", *good[:8], 0, None)
    rows = np.empty(40 * plan.layout.bytes_per_token, np.uint8)
    good = [handle, plan.layout, 0, 40, 40, rows]
    for at in (0, 1, 5):
        with pytest.raises(ValueError, match="must not be NULL"):
            call("kvp_cache_log_rows", *(None if i == at else x for i, x in enumerate(good)))
    for cache, layout in ((None, plan.layout), (handle, None)):
        with pytest.raises(ValueError, match="must not be NULL"):
            call("kvp_cache_log_layout", cache, -1, layout)
