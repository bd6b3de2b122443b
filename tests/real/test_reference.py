"""Evictions on real weights against the numpy reference, which sees exactly what each head holds.

The models run with their own weights as f32, so that what is left of a difference is the cache's
rounding. Logits are compared by their largest difference over the standard deviation of all logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvp_edge import Llama, Policy, UnsupportedModelError
from kvp_edge.policies import CacheView, KeyDiff
from makers.gguf_models import ModelShape
from support.cache_types import CACHE_TYPES
from support.closeness import difference
from support.real_models import (
    ALL,
    GEMMA,
    PLAIN,
    QWEN,
    newest_logits,
    read_reference,
    tokens_of,
)
from support.reference import Reference
from support.watch import Watch

pytestmark = pytest.mark.real

# Rounding to q4_0 moves logits further than wrong tokens do (0.057 against 0.008 in KL divergence),
# so they cannot tell; test_packing compares the bytes of such caches, test_caches what they lose.
TOLERANCE = {  # by the cache's type; measured with SmolLM2:
    "f32": 1e-3,  # 2.8e-5
    "f32-fa": 0.02,  # 0.008: attends in f16
    "f16": 0.02,  # 0.005
    "f16-fa": 0.02,  # 0.008
    "q8_0-fa": 0.2,  # 0.08
}
TRAINED = 300
"""The trained length that the compacting models believe in."""
BOUND: dict[str, Any] = {"n_ctx": 4000, "kv_budget": 160, "recent": 20, "reserve": 96}
#: The window of gemma-3's other layers is 512 tokens.
WIDE: dict[str, Any] = {"n_ctx": 4000, "kv_budget": 512, "recent": 64, "reserve": 256}


class Drawn(Policy):
    """Scores drawn for every head and token, the same at every eviction."""

    name = "drawn"
    scope = "cache"

    def score(self, view: CacheView) -> Any:
        heads = view.shape[:2]
        drawn = np.random.default_rng(0).random((*heads, BOUND["n_ctx"]), np.float32)
        at = np.broadcast_to(view.indices, view.shape)
        return np.take_along_axis(drawn, at, axis=-1)


@dataclass(frozen=True)
class History:
    """A text that was read with evictions.

    Attributes:
        stops: tokens after which logits were taken.
        logits: f32 [stop, n_vocab], by llama.cpp.
        held: the tokens that each head held in the end.
        newest: llama.cpp's position of the newest token.
        want: the reference's logits.
        wrong: the same if every head held what the head of the next layer did.
    """

    stops: list[int]
    logits: NDArray[np.float32]
    held: NDArray[np.int32]
    newest: int
    want: NDArray[np.float32] | None = None
    wrong: NDArray[np.float32] | None = None


def read(
    path: str,
    text: str,
    types: str,
    reference: Reference | None = None,
    policy: Policy | None = None,
    **options: Any,
) -> History:
    """Read a text past two evictions, a part of it token by token."""
    type_k, type_v, flash_attn = CACHE_TYPES[types]
    kind = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}
    given = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, **kind, **options}
    llm = Llama(path, **given, policy=policy or Drawn())
    try:
        watch = Watch(llm, reference.shape if reference else ModelShape())
        cells = llm.kv_stats.cells
        stops = [cells + 3, cells + 12, 2 * cells - given["kv_budget"] + 5]
        tokens = tokens_of(llm, text, stops[-1] + 1)
        got = []
        for start, stop in zip([-1, *stops], stops, strict=False):
            alone = 9 if stop == stops[1] else 0
            llm.eval(tokens[start + 1 : stop + 1 - alone])
            for token in tokens[stop + 1 - alone : stop + 1]:
                llm.eval([token])
            got.append(newest_logits(llm))
        assert llm.kv_stats.evictions == 2
        assert llm.kv is not None
        newest = llm.kv.cache.newest_position()
        done = History(stops, np.stack(got), llm.kv_indices, newest)
        if reference is None:
            return done
        seen, positions, key_positions = watch.visible()
    finally:
        llm.close()
    if options.get("positions") == "compact":
        want = reference.forward(tokens, seen, positions, key_positions, rows=stops).logits
        return replace(done, want=want)
    base = [il for il in range(len(seen)) if not reference.shape.is_local(il)]
    other = np.array(seen)
    other[base] = seen[np.roll(base, 1)]
    want, wrong = (reference.forward(tokens, s, rows=stops).logits for s in (seen, other))
    return replace(done, want=want, wrong=wrong)


class Reader:
    """Reads the same text again in other ways; what the reference says is computed once."""

    def __init__(self, path: str, text: str) -> None:
        self._path, self._text = path, text
        self._reference = read_reference(path)
        self._known: dict[str, History] = {}

    def reference_for(self, policy: Policy | None = None, **options: Any) -> History:
        key = repr((type(policy), sorted(options.items())))
        if key not in self._known:
            self._known[key] = read(
                self._path, self._text, "f32", self._reference, policy, **options
            )
        return self._known[key]

    def read(self, types: str, **options: Any) -> History:
        return read(self._path, self._text, types, **options)


@pytest.fixture(scope="module")
def reader(exact_model: Callable[[str], str], book: str) -> Callable[[str], Reader]:
    """reader("smollm2"), one model's at a time: in float64 they take gigabytes."""
    made: dict[str, Reader] = {}

    def make(name: str) -> Reader:
        if name not in made:
            path = exact_model(name)
            made.clear()
            made[name] = Reader(path, book)
        return made[name]

    return make


def tolerance(name: str, types: str) -> float:
    """ggml looks GELU, which gemma3 uses, up in an f16 table."""
    return max(TOLERANCE[types], 0.02 if name == GEMMA else 0.0)


def leaning(got: Any, want: Any, wrong: Any) -> float:
    """Where logits lie between those wanted, 0, and wrong ones, 1. Rounding is as likely to push
    them one way as the other, even where it is as large as what parts the two."""
    apart = (wrong - want).astype(np.float64)
    return float(((got - want) * apart).sum() / np.square(apart).sum())


def options_of(name: str) -> dict[str, Any]:
    return WIDE if name == GEMMA else BOUND


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("policy", [Drawn, KeyDiff])
def test_logits_are_those_of_exactly_the_tokens_that_each_head_holds(
    name: str, policy: type[Policy], reader: Callable[[str], Reader]
) -> None:
    done = reader(name).reference_for(policy(), **options_of(name))
    assert done.want is not None
    assert done.wrong is not None
    held = done.held.reshape(-1, done.held.shape[-1])
    assert len(np.unique(held, axis=0)) == len(held)  # every head holds others
    limit = tolerance(name, "f32")
    # of gemma-3's 18 layers three choose: the wrong tokens move its logits by 0.08 and 0.14
    apart = 3 if name == GEMMA else 10
    for got, want, wrong in zip(done.logits, done.want, done.wrong, strict=True):
        assert difference(got, want) < limit
        assert difference(got, wrong) > apart * limit
        assert abs(leaning(got, want, wrong)) < 0.1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("types", [t for t in TOLERANCE if t != "f32"])
def test_other_caches_differ_by_their_rounding_alone(
    name: str, types: str, reader: Callable[[str], Reader]
) -> None:
    exact = reader(name).reference_for(Drawn(), **options_of(name))
    done = reader(name).read(types, **options_of(name))
    assert exact.want is not None
    assert exact.wrong is not None
    np.testing.assert_array_equal(done.held, exact.held)
    for got, want, wrong in zip(done.logits, exact.want, exact.wrong, strict=True):
        assert difference(got, want) < tolerance(name, types)
        assert abs(leaning(got, want, wrong)) < 0.3


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("granularity", "types"),
    [("head", "f32"), ("head", "f16"), ("head", "q8_0-fa"), ("token", "f32")],
)
def test_compacted_logits_are_those_of_the_keys_at_their_new_positions(
    name: str, types: str, granularity: str, reader: Callable[[str], Reader]
) -> None:
    arch = "qwen2" if name == QWEN else "llama"
    short = {"kv_overrides": {f"{arch}.context_length": TRAINED}, "positions": "compact"}
    options = {**BOUND, **short, "granularity": granularity}
    exact = reader(name).reference_for(Drawn(), **options)
    done = reader(name).read(types, **options)
    assert exact.want is not None
    assert done.newest < TRAINED < done.stops[-1]
    np.testing.assert_array_equal(done.held, exact.held)
    for got, want in zip(done.logits, exact.want, strict=True):
        assert difference(got, want) < tolerance(name, types)
    if granularity == "head":  # other logits than with the same tokens where they were read
        unmoved = reader(name).reference_for(Drawn(), **BOUND).want
        assert unmoved is not None
        assert difference(exact.want[-1], unmoved[-1]) > 0.05
        assert abs(leaning(done.logits[-1], exact.want[-1], unmoved[-1])) < 0.3


@pytest.mark.slow
def test_heads_of_a_model_with_a_window_are_not_compacted(real_model: Callable[[str], str]) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding-window .* granularity='token'"):
        Llama(real_model(GEMMA), **WIDE, positions="compact", verbose=False)
