"""Rows go out of a cache to a KV log and come back into its cells, head by head.

The reference is llama.cpp's own state, read by numpy (makers.blobs): what a head shall hold is taken
from it row by row.
"""

from __future__ import annotations

import ctypes
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
from kvp_edge import KVCacheError, Llama, UnsupportedModelError
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
    """Blocks of tokens [borders[0], borders[1]), ... that lie at the positions of the same names."""
    return [
        LogBlock(cache.log_rows(layout, p0, p1, p1 - p0), p0, p1 - p0, p0)
        for p0, p1 in zip(borders, borders[1:], strict=False)
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
