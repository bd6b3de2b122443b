"""A learned policy run natively, against the definition in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvp_edge.binding import rules
from kvp_edge.binding.model import read_model_shape
from kvp_edge.binding.policy import NativePolicy
from kvp_edge.policies.learned import Learned, forward, with_gaps
from kvp_edge.policy_file import PolicyInfo, PolicyWeights, Scope, weight_shapes, write_policy
from makers.gguf_models import ModelShape
from makers.policies import random_weights
from support.properties import examples

INFO = PolicyInfo("llama", 2, 3, 32, 64, 16, 5)
SCOPES = pytest.mark.parametrize("scope", ["head", "layer"])


def random_tokens(info: PolicyInfo, n: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Keys, values and the tokens' indices, of which every third or so is missing."""
    rng = np.random.default_rng(seed)
    heads = (info.n_layer, info.n_head_kv, n)
    keys = rng.standard_normal((*heads, info.head_size_k)).astype(np.float32)
    values = rng.standard_normal((*heads, info.head_size_v)).astype(np.float32)
    tokens = np.cumsum(rng.choice([1, 1, 1, 2, 40], n)).astype(np.int32)
    return keys, values, tokens


def assert_as_defined(info: PolicyInfo, n: int, threads: int = 1) -> None:
    weights = random_weights(info)
    keys, values, tokens = random_tokens(info, n)
    got = NativePolicy(weights).score(keys, values, tokens, threads=threads)
    want = forward(weights, keys, values, tokens, with_gaps(tokens, info.context // 2))
    np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, np.abs(want).max(initial=0)))


# 512 slots, tokens and missing ones, go through the network at once
@pytest.mark.parametrize("n", [1, 2, 300, 511, 512, 513, 1300])
@pytest.mark.parametrize("context", [1, 5, 33])
@SCOPES
def test_scores_are_those_of_the_definition_across_chunks(
    context: int, n: int, scope: Scope
) -> None:
    assert_as_defined(replace(INFO, context=context, scope=scope), n, threads=2)


@examples(40)
@given(
    n_layer=st.integers(1, 3),
    n_head_kv=st.integers(1, 5),
    head_size_k=st.integers(1, 80),
    head_size_v=st.integers(1, 80),
    hidden=st.integers(1, 70),
    half=st.integers(0, 6),
    n=st.integers(1, 60),
    scope=st.sampled_from(["head", "layer"]),
)
def test_scores_are_those_of_the_definition_for_every_shape(
    n_layer: int,
    n_head_kv: int,
    head_size_k: int,
    head_size_v: int,
    hidden: int,
    half: int,
    n: int,
    scope: Scope,
) -> None:
    sizes = (n_layer, n_head_kv, head_size_k, head_size_v, hidden, 2 * half + 1)
    assert_as_defined(PolicyInfo("llama", *sizes, scope=scope), n)


def test_no_tokens_have_no_scores() -> None:
    keys, values, tokens = random_tokens(INFO, 0)
    assert NativePolicy(random_weights(INFO)).score(keys, values, tokens).shape == (2, 3, 0)


def test_impossible_sizes_and_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="a context of 4 is not possible"):
        NativePolicy(random_weights(replace(INFO, context=4)))
    with pytest.raises(ValueError, match="a context of 35 is not possible"):
        NativePolicy(random_weights(replace(INFO, context=35)))
    with pytest.raises(ValueError, match="a layer of 4 KV heads has a network for each .* not 2"):
        NativePolicy(PolicyWeights(**{k: np.zeros(s, "f") for k, s in two_of_four_heads().items()}))
    policy = NativePolicy(random_weights(INFO))
    keys, values, tokens = random_tokens(INFO, 4)
    with pytest.raises(ValueError, match=r"the shape \(2, 3, 4, 64\) instead of \(2, 3, 4, 32\)"):
        policy.score(values, values, tokens)
    for wrong in ([0, 1, 1, 2], [-1, 0, 1, 2]):
        with pytest.raises(ValueError, match="tokens must ascend"):
            policy.score(keys, values, np.array(wrong, np.int32))


def two_of_four_heads() -> dict[str, tuple[int, ...]]:
    """Shapes of networks that see two of a layer's four heads each."""
    shapes = weight_shapes(PolicyInfo("llama", 1, 2, 16, 16, 8, 1))
    return {**shapes, "out": (1, 2, 2, 8), "aggregate": (1, 4)}


def test_another_model_s_cache_is_refused(
    random_model: Callable[..., Any], load: Callable[..., Any]
) -> None:
    llm = load(random_model(ModelShape("llama", head_dim=32)).path, kv_budget=400, n_ctx=512)
    llm.eval(list(range(3, 20)))
    rule = rules.Network(NativePolicy(random_weights(INFO)), np.arange(17))
    with pytest.raises(ValueError, match=r"the policy scores 2 layers x 3 KV heads x 32\+64"):
        llm.kv.cache.score(rule, 0, 17, 17)


@SCOPES
@pytest.mark.parametrize("granularity", ["token", "head"])
@pytest.mark.parametrize("cache_type", [llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0])
def test_a_chat_keeps_the_same_tokens_natively_and_in_numpy(
    bundled_model: str,
    tmp_path: Path,
    load: Callable[..., Any],
    granularity: str,
    cache_type: int,
    scope: Scope,
) -> None:
    """The cache's rows reach the network with RoPE, without rotation, and in order, also where
    tokens between them are gone."""
    shape = read_model_shape(bundled_model)
    sizes = (shape.n_layer, shape.n_head_kv[0], shape.head_size_k, shape.head_size_v)
    info = PolicyInfo(shape.architecture, *sizes, hidden=8, context=9, scope=scope)
    write_policy(tmp_path / "p.gguf", info, random_weights(info), "f32")
    held = []
    for native in (True, False):
        policy = Learned(tmp_path / "p.gguf", native=native)
        assert (policy.network is not None) == native
        llm = load(
            bundled_model,
            policy=policy,
            granularity=granularity,
            n_ctx=2048,
            kv_budget=96,
            recent=16,
            reserve=64,
            n_batch=64,
            type_k=cache_type,
            type_v=cache_type,
            flash_attn=True,
        )
        llm.eval([1, *np.random.default_rng(0).integers(300, 2000, 700).tolist()])
        assert llm.kv_stats.evictions > 3
        held.append(llm.kv.indices)
    # Rounding may put two equal scores in the other order, and what is kept decides what follows.
    assert np.mean(held[0] == held[1]) > 0.98
