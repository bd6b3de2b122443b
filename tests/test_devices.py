"""Models whose weights and cache lie on a device that the host reaches by copies only.

The device computes as the CPU does (support.devices), so logits are those of the CPU, and
evictions are compared with the reference exactly as in test_packing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import RandomModel, random_tokens
from kvp_edge import Llama, Policy
from support.devices import CountingProxy, RpcServer, placed
from support.gguf_models import ModelShape
from support.watch import Watch
from test_packing import EXACT, CacheNoise, Noise, difference

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama", n_layer=3)
WINDOW = ModelShape("gemma3", head_dim=64, n_head_kv=2, n_layer=4, sliding_window=24)
SHAPES = pytest.mark.parametrize("shape", [LLAMA, WINDOW], ids=lambda shape: shape.arch)
AWAY = pytest.mark.parametrize("place", ["rpc", "rpc2"], indirect=True)

BOUND: dict[str, Any] = {"n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 60}
F32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "logits_all": True}


def logits_of(llm: Llama, tokens: list[int]) -> NDArray[np.float32]:
    llm.eval(tokens)
    return np.array(llm.scores[: len(tokens)])


@SHAPES
@pytest.mark.parametrize("flash_attn", [False, True])
@AWAY
def test_a_device_gives_the_logits_of_the_cpu(
    random_model: Maker, load: Loader, place: str, shape: ModelShape, flash_attn: bool
) -> None:
    path, tokens = random_model(shape).path, random_tokens(200)
    options = {"n_ctx": 256, "logits_all": True, "flash_attn": flash_attn}
    got = logits_of(load(path, **options), tokens)
    with placed([]):
        want = logits_of(load(path, **options), tokens)
    assert difference(got, want) < 1e-5


@SHAPES
@pytest.mark.parametrize("policy", [Noise, CacheNoise])
def test_logits_equal_attention_over_exactly_the_rows_each_head_kept(
    random_model: Maker, load: Loader, place: str, shape: ModelShape, policy: type[Policy]
) -> None:
    model = random_model(shape)
    llm = load(model.path, **BOUND, **F32, granularity="head", policy=policy())
    watch = Watch(llm, shape)
    llm.eval(random_tokens(230))
    for token in random_tokens(90, seed=1)[1:]:
        llm.eval([token])
    llm.eval(random_tokens(100, seed=2)[1:])
    assert llm.kv_stats.evictions >= 2
    heads = llm.kv_positions.reshape(-1, llm.kv_stats.kept)
    assert len({head.tobytes() for head in heads}) > 1
    got, want = llm.scores[: llm.n_tokens], watch.expected(model.reference)
    assert difference(got, want) < (0.02 if shape.arch == "gemma3" else EXACT)


def test_every_byte_of_a_state_passes_the_wire_once(
    random_model: Maker, load: Loader, rpc_wire: CountingProxy
) -> None:
    with placed([rpc_wire.device]):
        llm = load(random_model(LLAMA).path, n_ctx=256)
    llm.eval(random_tokens(200))
    n_bytes = 200 * LLAMA.n_layer * LLAMA.n_head_kv * LLAMA.head_dim * 2 * 2  # K and V in f16
    rpc_wire.reset()
    state = llm.save_state()
    assert n_bytes < state.llama_state_size
    assert n_bytes < rpc_wire.to_host < 1.5 * n_bytes
    assert rpc_wire.to_device < 0.5 * n_bytes
    rpc_wire.reset()
    llm.load_state(state)
    assert n_bytes < rpc_wire.to_device < 1.5 * n_bytes
    assert rpc_wire.to_host < 1000


def test_an_eviction_by_head_moves_the_rows_it_keeps(
    random_model: Maker, load: Loader, rpc_wire: CountingProxy
) -> None:
    pass


_ORPHAN = """
import os
from support.devices import RpcServer
print(RpcServer()._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_server_ends_with_the_process_that_started_it() -> None:
    pass


def test_a_server_that_cannot_start_says_why() -> None:
    pass
