"""Attention to a KV log, against the definition in numpy's doubles."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.binding.library import call
from kvp_edge.binding.log_scores import score_log
from kvp_edge.binding.queries import Queries
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.binding.structs import LogBlock, LogLayout, LogQueries
from kvp_edge.errors import UnsupportedModelError
from support.properties import examples

#: All types that llama.cpp offers for a cache.
TYPES = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0]
TYPES += [Type.IQ4_NL]


@dataclass
class Log:
    """A log of random rows, and its keys as the definition sees them.

    Attributes:
        keys: f64 [n_layer, n_head_kv, N, head_size], de-quantised; under the Hadamard rotation if
            there is one.
        at: [N], the tokens' indices.
        of: [N], the tokens' blocks.
        memory: the blocks' rows.
    """

    layout: LogLayout
    blocks: list[LogBlock]
    keys: np.ndarray
    at: np.ndarray
    of: np.ndarray
    memory: list[np.ndarray]


def stored(rng: np.random.Generator, kind: Type, n_rows: int, n_values: int) -> np.ndarray:
    """Random rows of a type, uint8 [n_rows, bytes]."""
    if kind is Type.IQ4_NL:  # which gguf does not write: a scale and 32 times four bits
        blocks = rng.integers(0, 256, (n_rows, n_values // 32, 18), np.uint8)
        scales = rng.normal(0, 0.02, (n_rows, n_values // 32, 1)).astype(np.float16)
        blocks[..., :2] = scales.view(np.uint8)
        return blocks.reshape(n_rows, -1)
    rows = rng.standard_normal((n_rows, n_values)).astype(np.float32)
    return gguf.quants.quantize(rows, kind).view(np.uint8)


def random_log(
    sizes: list[tuple[int, int]],
    *,
    kind: Type = Type.F32,
    n_layer: int = 2,
    n_head_kv: int = 2,
    head_size: int = 32,
    value_row: int = 20,
    hadamard: int = 0,
    off: int = 0,
    seed: int = 0,
) -> Log:
    """Blocks of (first token, number of tokens); their memory begins ``off`` bytes off."""
    rng = np.random.default_rng(seed)
    width = n_head_kv * head_size
    row = stored(rng, kind, 1, width).shape[1]
    layout = LogLayout(
        n_layer=n_layer,
        n_head_kv=n_head_kv,
        head_size_k=head_size,
        head_size_v=1,
        type_k=int(kind),
        type_v=int(Type.F32),
        k_hadamard_block=hadamard,
        v_hadamard_block=0,
        k_row=row,
        v_row=value_row,
        bytes_per_token=n_layer * (row + value_row),
    )
    blocks, memories, keys = [], [], [np.zeros((n_layer, n_head_kv, 0, head_size))]
    for first, n in sizes:
        memory = np.full(off + n * layout.bytes_per_token, 0xFF, np.uint8)[off:]
        memories.append(memory)
        rows = memory.reshape(n_layer, n * (row + value_row))
        for layer in rows:
            layer[: n * row] = stored(rng, kind, n, width).ravel()
        blocks.append(LogBlock(rows=memory, first=first, n=n, rope_first=first))
        plain = np.ascontiguousarray(rows[:, : n * row]).reshape(n_layer * n, row)
        if kind in (Type.F32, Type.F16):
            values = plain.view(np.float32 if kind is Type.F32 else np.float16)
        else:
            values = gguf.quants.dequantize(plain, kind)
        heads = values.astype(np.float64).reshape(n_layer, n, n_head_kv, head_size)
        keys.append(heads.swapaxes(1, 2))
    at = np.concatenate([np.arange(a, a + n) for a, n in sizes] or [np.zeros(0, int)])
    of = np.repeat(np.arange(len(sizes)), [n for _, n in sizes])
    return Log(layout, blocks, np.concatenate(keys, axis=2), at, of, memories)


def random_queries(log: Log, group: int, indices: list[int], seed: int = 1) -> Queries:
    rng = np.random.default_rng(seed)
    s = log.layout
    shape = (s.n_layer, s.n_head_kv * group, len(indices), s.head_size_k)
    queries = 2 * rng.standard_normal(shape).astype(np.float32)
    scale = rng.uniform(0.1, 0.4, s.n_layer).astype(np.float32)
    return Queries(queries, np.array(indices, np.int32), scale)


def hadamard_matrix(size: int, block: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(size // block), h / np.sqrt(block))


def logits_of(log: Log, queries: Queries, keys: np.ndarray) -> np.ndarray:
    """[n_layer, n_head_kv, group * m, N]; minus infinity where a query does not see a token."""
    n_layer, n_head_kv, _, size = keys.shape
    q = queries.queries.astype(np.float64).reshape(n_layer, n_head_kv, -1, size)
    logits = q @ keys.swapaxes(-1, -2) * queries.scale.astype(np.float64)[:, None, None, None]
    group = queries.queries.shape[1] // n_head_kv
    return np.where(log.at <= np.tile(queries.indices, group)[:, None], logits, -np.inf)


def reference(
    log: Log,
    queries: Queries,
    turn: np.ndarray | None = None,
    frequencies: KeyFrequencies | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    keys = log.keys
    if log.layout.k_hadamard_block:  # its own inverse
        keys = keys @ hadamard_matrix(log.layout.head_size_k, log.layout.k_hadamard_block)
    if turn is not None:
        assert frequencies is not None
        keys = turned(keys, frequencies, turn[log.of])
    logits = logits_of(log, queries, keys)
    if 0 in logits.shape:
        return np.zeros((*logits.shape[:2], len(log.at))), np.zeros(
            (*logits.shape[:2], len(log.at))
        )
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
    paid = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return paid.max(axis=2), paid.mean(axis=2)


def turned(keys: np.ndarray, frequencies: KeyFrequencies, by: np.ndarray) -> np.ndarray:
    """Keys [n_layer, n_head_kv, N, size] turned by so many positions each, [N]."""
    n_pairs = frequencies.radians.shape[1]
    out = keys.copy()
    for p in range(n_pairs):
        a, b = (p, p + n_pairs) if frequencies.neox else (2 * p, 2 * p + 1)
        angle = frequencies.radians[:, p, None, None] * by
        out[..., a] = keys[..., a] * np.cos(angle) - keys[..., b] * np.sin(angle)
        out[..., b] = keys[..., a] * np.sin(angle) + keys[..., b] * np.cos(angle)
    return out


def assert_as_defined(log: Log, queries: Queries, n_threads: int = 1, **turning: Any) -> None:
    largest, mean = score_log(log.layout, log.blocks, queries, n_threads, **turning)
    want = reference(log, queries, turning.get("turn"), turning.get("frequencies"))
    np.testing.assert_allclose(largest, want[0], rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(mean, want[1], rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("hadamard", [0, 32])
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_attention_is_that_of_the_definition_for_all_types_of_keys(
    kind: Type, hadamard: int
) -> None:
    log = random_log([(0, 130), (130, 70)], kind=kind, hadamard=hadamard, head_size=64)
    assert_as_defined(log, random_queries(log, 3, [180, 190, 195]))


@pytest.mark.parametrize("off", [1, 2, 3])
@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1])
def test_keys_may_lie_at_any_address(kind: Type, off: int) -> None:
    log = random_log([(0, 67), (67, 5)], kind=kind, off=off, value_row=7, head_size=64)
    assert_as_defined(log, random_queries(log, 2, [68, 80]))


def test_keys_may_lie_in_a_read_only_memory_map(tmp_path: Path) -> None:
    log = random_log([(0, 90)], kind=Type.F16)
    (tmp_path / "log").write_bytes(b"head" + log.memory[0].tobytes())
    with open(tmp_path / "log", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    rows = np.frombuffer(mapped, np.uint8)[4:]
    log.blocks = [LogBlock(rows=rows, first=0, n=90, rope_first=0)]
    assert_as_defined(log, random_queries(log, 2, [89]))


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("n_queries", [1, 16, 23])
def test_every_query_head_of_a_group_counts(group: int, n_queries: int) -> None:
    log = random_log([(0, 100)], n_head_kv=3)
    at = list(range(100 - n_queries, 100))
    assert_as_defined(log, random_queries(log, group, at), n_threads=2)


@pytest.mark.parametrize(
    "sizes",
    [
        [(0, 1)],
        [(0, 127)],
        [(0, 128)],
        [(0, 129)],
        [(7, 300)],
        [(i, 1) for i in range(70)],
        [(0, 128), (128, 128), (256, 128)],
        [(2, 5), (40, 1), (41, 129), (1000, 6)],
        [(0, 20), (20, 0), (20, 3)],
    ],
    ids=str,
)
def test_one_softmax_goes_over_all_blocks_and_gaps_do_not_count(sizes: list[Any]) -> None:
    log = random_log(sizes)
    end = sizes[-1][0] + sizes[-1][1]
    assert_as_defined(log, random_queries(log, 2, [end - 1, end, end + 50]))


@pytest.mark.parametrize("at", [[0], [127], [128, 129], [150, 171, 199], [99, 100, 101, 5000]])
def test_a_query_sees_its_own_token_and_those_before(at: list[int]) -> None:
    log = random_log([(0, 100), (101, 99)])
    queries = random_queries(log, 2, at)
    largest, mean = score_log(log.layout, log.blocks, queries, 1)
    assert_as_defined(log, queries)
    assert not largest[..., log.at > at[-1]].any()
    assert not mean[..., log.at > at[-1]].any()
    assert largest[..., log.at <= at[-1]].all()


def test_a_query_that_sees_no_token_pays_nothing() -> None:
    log = random_log([(50, 30)])
    largest, mean = score_log(log.layout, log.blocks, random_queries(log, 2, [3, 49]), 1)
    assert not largest.any()
    assert not mean.any()
    queries = random_queries(log, 2, [3, 49, 60])
    assert_as_defined(log, queries)
    _, mean = score_log(log.layout, log.blocks, queries, 1)
    np.testing.assert_allclose(mean.sum(axis=-1), 1 / 3, rtol=1e-5)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("hadamard", [0, 16])
def test_keys_of_a_block_count_as_turned(neox: bool, hadamard: int) -> None:
    log = random_log([(0, 70), (80, 70), (150, 9), (200, 5)], hadamard=hadamard)
    radians = np.random.default_rng(3).uniform(0, 1, (2, 12))
    frequencies = KeyFrequencies(radians, neox)
    turn = np.array([-1234.5, 17.0, 17.0, 0.25])
    queries = random_queries(log, 3, [30, 120, 203])
    assert_as_defined(log, queries, turn=turn, frequencies=frequencies)
    as_they_are = score_log(log.layout, log.blocks, queries, 1)
    none = score_log(log.layout, log.blocks, queries, 1, turn=np.zeros(4), frequencies=frequencies)
    np.testing.assert_array_equal(none, as_they_are)


@examples(60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 150)), min_size=1, max_size=5),
    at=st.lists(st.integers(0, 500), min_size=1, max_size=9, unique=True),
    n_layer=st.integers(1, 3),
    n_head_kv=st.integers(1, 4),
    group=st.integers(1, 5),
    head_size=st.integers(1, 70),
    n_threads=st.integers(1, 3),
)
def test_attention_is_that_of_the_definition(
    sizes: list[tuple[int, int]],
    at: list[int],
    n_layer: int,
    n_head_kv: int,
    group: int,
    head_size: int,
    n_threads: int,
) -> None:
    blocks, end = [], 0
    for gap, n in sizes:
        blocks.append((end + gap, n))
        end += gap + n
    log = random_log(blocks, n_layer=n_layer, n_head_kv=n_head_kv, head_size=head_size)
    assert_as_defined(log, random_queries(log, group, sorted(at)), n_threads=n_threads)


# 32 MiB hold the weights of 112 columns for 70,000 tokens; no more than 512 columns go at once
@pytest.mark.parametrize(("n", "group", "n_queries"), [(70_000, 13, 16), (300, 9, 60)])
def test_columns_that_are_scored_in_parts_are_worth_the_same(
    n: int, group: int, n_queries: int
) -> None:
    log = random_log([(0, n)], n_layer=1, n_head_kv=1, head_size=4)
    assert_as_defined(log, random_queries(log, group, list(range(n - n_queries - 50, n - 50))))


def test_the_number_of_threads_changes_nothing() -> None:
    log = random_log([(0, 200)], n_layer=3)
    queries = random_queries(log, 2, [150, 199])
    one = score_log(log.layout, log.blocks, queries, 1)
    for n_threads in (2, 6, 7, 100):
        np.testing.assert_array_equal(score_log(log.layout, log.blocks, queries, n_threads), one)


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_large_logits_give_probabilities(size: float) -> None:
    log = random_log([(0, 150)])
    queries = random_queries(log, 2, [120, 149])
    largest_logit = np.abs(queries.queries).max() * np.abs(log.keys).max()
    big = replace(queries, queries=(queries.queries * (size / largest_logit)).astype(np.float32))
    largest, mean = score_log(log.layout, log.blocks, big, 1)
    assert np.isfinite(largest).all()
    assert np.isfinite(mean).all()
    assert largest.min() >= 0
    assert largest.max() <= 1 + 1e-5
    np.testing.assert_allclose(mean.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spoils_only_itself(strange: float) -> None:
    log = random_log([(0, 100)], n_layer=1, n_head_kv=1)
    keys = log.memory[0][: 100 * log.layout.k_row].view(np.float32).reshape(100, -1)
    queries = random_queries(log, 2, [99])
    at_17, keys[17] = keys[17].copy(), strange
    largest, mean = score_log(log.layout, log.blocks, queries, 1)
    assert np.isfinite(largest).all()
    assert np.isfinite(mean).all()
    if np.isnan(strange):  # as if the token were not there
        log.keys, log.at = np.delete(log.keys, 17, axis=2), np.delete(log.at, 17)
        want = reference(log, queries)
        np.testing.assert_allclose(np.delete(largest, 17, axis=2), want[0], rtol=1e-4, atol=1e-7)
        assert largest[0, 0, 17] == mean[0, 0, 17] == 0
    keys[17] = at_17
    queries.queries[:] = strange
    largest, mean = score_log(log.layout, log.blocks, queries, 1)
    assert np.isfinite(largest).all()
    assert np.isfinite(mean).all()


def test_nothing_to_score_and_nobody_to_ask() -> None:
    empty, log = random_log([]), random_log([(0, 9)])
    assert score_log(empty.layout, [], random_queries(empty, 2, [5]), 1)[0].shape == (2, 2, 0)
    largest, mean = score_log(log.layout, log.blocks, random_queries(log, 2, []), 1)
    assert not largest.any()
    assert not mean.any()
    largest, mean = score_log(empty.layout, [], random_queries(empty, 2, []), 1)
    assert largest.size == mean.size == 0


def test_either_result_may_be_left_out() -> None:
    log = random_log([(0, 200)])
    queries = random_queries(log, 2, [150, 190])
    largest, mean = score_log(log.layout, log.blocks, queries, 1)
    alone, none = score_log(log.layout, log.blocks, queries, 1, mean=False)
    np.testing.assert_array_equal(alone, largest)
    assert none.shape == (2, 2, 0)
    asked = raw_queries(queries)
    only_mean = np.empty_like(mean)
    call("kvp_log_score", log.layout, log.blocks, 1, asked, 1, None, only_mean)
    np.testing.assert_array_equal(only_mean, mean)
    call("kvp_log_score", log.layout, log.blocks, 1, asked, 1, None, None)


# -- hostile arguments -----------------------------------------------------------------------------


def raw_queries(queries: Queries, **changes: Any) -> LogQueries:
    n_head, m = queries.queries.shape[1:3]
    fields = {"queries": queries.queries, "indices": queries.indices, "scale": queries.scale}
    return LogQueries(**{**fields, "n_head": n_head, "n_queries": m, **changes})


@pytest.fixture
def ready() -> tuple[Log, Queries, np.ndarray]:
    log = random_log([(0, 40), (40, 40)])
    return log, random_queries(log, 2, [60, 79]), np.empty((2, 2, 80), np.float32)


def score(log: Log, asked: Any, out: np.ndarray, n_threads: int = 1) -> None:
    call("kvp_log_score", log.layout, log.blocks, len(log.blocks), asked, n_threads, out, out)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n_layer", n) for n in (0, 1, 513, 2**32 - 1)),
        *(("n_head_kv", n) for n in (0, 1, 3, 2**32 - 1)),
        *(("head_size_k", n) for n in (0, 33, 2**32 - 1)),
        *(("type_k", n) for n in (-1, 4, 1, 10_000)),
        *(("k_hadamard_block", n) for n in (3, 64, 2**31)),
        *(("k_row", n) for n in (0, 255, 2**64 - 1)),
        *(("v_row", n) for n in (0, 2**64 - 1)),
        *(("bytes_per_token", n) for n in (0, 2**64 - 1)),
    ],
)
def test_layouts_that_are_not_possible_are_refused(
    field: str, value: int, ready: tuple[Log, Queries, np.ndarray]
) -> None:
    log, queries, out = ready
    setattr(log.layout, field, value)
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        score(log, raw_queries(queries), out)


def test_types_that_cannot_be_read_are_refused(ready: tuple[Log, Queries, np.ndarray]) -> None:
    log, queries, out = ready
    log.layout.type_k = int(Type.I32)
    with pytest.raises(UnsupportedModelError, match="keys of type i32 cannot be multiplied"):
        score(log, raw_queries(queries), out)
    log.layout.type_k = int(Type.Q4_K)
    with pytest.raises(UnsupportedModelError, match="a head of 32 values is no whole number"):
        score(log, raw_queries(queries), out)


@pytest.mark.parametrize(
    ("block", "field", "value", "message"),
    [
        (0, "first", -1, "block 0 holds tokens -1 to 38, but must begin at 0 or later"),
        (0, "n", 41, "block 1 holds tokens 40 to 79, but must begin at 41"),
        (1, "first", 39, "block 1 holds tokens 39 to 78, but must begin at 40"),
        (1, "first", 2**31 - 40, "end by 2147483647"),
        (1, "n", 2**32 - 1, "end by 2147483647"),
        (1, "_rows", None, "block 1 has 40 tokens, but no rows"),
    ],
)
def test_blocks_that_are_not_possible_are_refused(
    block: int, field: str, value: Any, message: str, ready: tuple[Log, Queries, np.ndarray]
) -> None:
    log, queries, out = ready
    setattr(log.blocks[block], field, value)
    if field == "first" and value == 2**31 - 40:
        log.blocks[1].n = 41
    with pytest.raises(ValueError, match=message):
        score(log, raw_queries(queries), out)


def test_the_last_token_that_an_index_can_name_is_scored() -> None:
    log = random_log([(0, 40), (2**31 - 40, 40)])
    assert_as_defined(log, random_queries(log, 2, [39, 2**31 - 2, 2**31 - 1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 0}, "0 query heads do not divide among 2 KV heads"),
        ({"n_head": 3}, "3 query heads"),
        ({"n_queries": 2**32 - 1, "n_head": 2**32 - 2}, "queries are more than memory can hold"),
        ({"indices": np.array([60, 60], np.int32)}, "ascend from 0 or more, but entry 1 is 60"),
        ({"indices": np.array([-1, 60], np.int32)}, "ascend from 0 or more, but entry 0 is -1"),
        ({"scale": np.array([1, np.nan], np.float32)}, "the scale of layer 1 is nan"),
        ({"turn": np.zeros(2)}, "cannot be turned by 0 pairs"),
        ({"turn": np.zeros(2), "n_pairs": 16}, "no frequencies"),
    ],
    ids=str,
)
def test_queries_that_are_not_possible_are_refused(
    changes: dict[str, Any], message: str, ready: tuple[Log, Queries, np.ndarray]
) -> None:
    log, queries, out = ready
    with pytest.raises(ValueError, match=message):
        score(log, raw_queries(queries, **changes), out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_pairs": 17}, "keys of 32 values cannot be turned by 17 pairs"),
        ({"n_pairs": 2**31 + 1}, "cannot be turned"),
        ({"neox": 2}, "cannot be turned"),
        ({"turn": np.array([0, np.inf])}, "block 1 is turned by inf positions"),
        ({"frequency": np.full((2, 16), np.nan)}, "frequency number 0 is nan"),
    ],
    ids=str,
)
def test_turns_that_are_not_possible_are_refused(
    changes: dict[str, Any], message: str, ready: tuple[Log, Queries, np.ndarray]
) -> None:
    log, queries, out = ready
    turning = {"turn": np.zeros(2), "frequency": np.zeros((2, 16)), "n_pairs": 16, "neox": 1}
    score(log, raw_queries(queries, **turning), out)
    with pytest.raises(ValueError, match=message):
        score(log, raw_queries(queries, **{**turning, **changes}), out)


def test_missing_arguments_are_refused(ready: tuple[Log, Queries, np.ndarray]) -> None:
    log, queries, out = ready
    asked = raw_queries(queries)
    for arguments in (
        (None, log.blocks, 2, asked, 1),
        (log.layout, None, 2, asked, 1),
        (log.layout, log.blocks, 2, None, 1),
        (log.layout, log.blocks, 2, LogQueries(n_head=4, n_queries=2), 1),
    ):
        with pytest.raises(ValueError, match="must not be NULL"):
            call("kvp_log_score", *arguments, out, out)
    for n_threads in (0, -3):
        with pytest.raises(ValueError, match=f"{n_threads} threads cannot score a log"):
            score(log, asked, out, n_threads)


def test_arrays_that_do_not_fit_each_other_are_refused(
    ready: tuple[Log, Queries, np.ndarray],
) -> None:
    log, queries, _ = ready
    frequencies = KeyFrequencies(np.zeros((2, 16)), True)
    with pytest.raises(ValueError, match="for a log of 2 layers and keys of 32 values"):
        score_log(log.layout, log.blocks, replace(queries, queries=queries.queries[:1]), 1)
    with pytest.raises(ValueError, match="queries .* of 1 tokens"):
        score_log(log.layout, log.blocks, replace(queries, indices=queries.indices[:1]), 1)
    with pytest.raises(ValueError, match="1 scales for 2 layers"):
        score_log(log.layout, log.blocks, replace(queries, scale=queries.scale[:1]), 1)
    with pytest.raises(ValueError, match="give them, or no turn"):
        score_log(log.layout, log.blocks, queries, 1, turn=np.zeros(2))
    with pytest.raises(ValueError, match=r"turn \(3,\) for 2 blocks"):
        score_log(log.layout, log.blocks, queries, 1, turn=np.zeros(3), frequencies=frequencies)
