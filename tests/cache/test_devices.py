"""Models whose weights and cache lie on a device that the host reaches by copies only.

RPC's compute as the CPU does (makers.devices), so without eviction logits are the CPU's own; with
it they are compared with the reference as in test_packing. A GPU has an arithmetic of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import AWAY, RandomModel, random_tokens
from kvp_edge import Llama, Policy
from makers import devices
from makers.devices import CountingProxy, RpcServer, placed
from makers.gguf_models import ModelShape
from support.closeness import EXACT, GPU, difference
from support.noise import CacheNoise, Noise
from support.paths import PYTHON_PATH
from support.watch import Watch

Maker = Callable[[ModelShape], RandomModel]
Loader = Callable[..., Llama]

LLAMA = ModelShape("llama", n_layer=3)
WINDOW = ModelShape("gemma3", head_dim=64, n_head_kv=2, n_layer=4, sliding_window=24)
SHAPES = pytest.mark.parametrize("shape", [LLAMA, WINDOW], ids=lambda shape: shape.arch)

BOUND: dict[str, Any] = {"n_ctx": 3000, "kv_budget": 100, "recent": 20, "reserve": 60}
F32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "logits_all": True}
SMALL = 1000
"""Bytes: a question to the device and its answer."""


def logits_of(llm: Llama, tokens: list[int]) -> NDArray[np.float32]:
    llm.eval(tokens)
    return np.array(llm.scores[: len(tokens)])


@SHAPES
@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("place", AWAY, indirect=True)
def test_a_device_gives_the_logits_of_the_cpu(
    random_model: Maker, load: Loader, place: str, shape: ModelShape, flash_attn: bool
) -> None:
    path, tokens = random_model(shape).path, random_tokens(200)
    options = {"n_ctx": 256, "logits_all": True, "flash_attn": flash_attn}
    got = logits_of(load(path, **options), tokens)
    with placed([]):
        want = logits_of(load(path, **options), tokens)
    if place == "gpu":
        assert difference(got, want) < GPU
    else:
        np.testing.assert_array_equal(got, want)


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
    heads = llm.kv_indices.reshape(-1, llm.kv_stats.kept)
    assert len({head.tobytes() for head in heads}) > 1
    got, want = llm.scores[: llm.n_tokens], watch.expected(model.reference)
    exact = 0.02 if shape.arch == "gemma3" else EXACT
    assert difference(got, want) < (GPU if place == "gpu" else exact)


@pytest.mark.parametrize("n_layer", [2, 3])
def test_every_byte_of_the_cache_lies_on_the_devices_and_a_state_moves_it_once(
    random_model: Maker, load: Loader, rpc_wire: CountingProxy, n_layer: int
) -> None:
    shape = ModelShape("llama", n_layer=n_layer)
    n_bytes = 200 * n_layer * shape.n_head_kv * shape.head_dim * 2 * 2  # K and V, f16
    with placed([rpc_wire.device]):
        # without flash attention every column of V is a message of its own
        llm = load(random_model(shape).path, n_ctx=256, flash_attn=True)
    llm.eval(random_tokens(200))
    rpc_wire.reset()
    assert rpc_wire.to_device < SMALL
    assert rpc_wire.to_host < SMALL
    state = llm.save_state()
    assert n_bytes < rpc_wire.to_host < n_bytes + n_layer * SMALL
    rpc_wire.reset()
    llm.load_state(state)
    assert n_bytes < rpc_wire.to_device < n_bytes + n_layer * SMALL
    assert rpc_wire.to_host < SMALL


@pytest.mark.parametrize(("n_layer", "here"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 3)])
def test_layers_are_split_over_two_devices(
    random_model: Maker,
    load: Loader,
    rpc_devices: list[int],
    rpc_wire: CountingProxy,
    n_layer: int,
    here: int,
) -> None:
    shape = ModelShape("llama", n_layer=n_layer)
    with placed([rpc_devices[0], rpc_wire.device]):
        llm = load(random_model(shape).path, n_ctx=256)
    llm.eval(random_tokens(200))
    rpc_wire.reset()
    llm.save_state()
    of_a_layer = 200 * shape.n_head_kv * shape.head_dim * 2 * 2
    assert rpc_wire.to_host // of_a_layer == here


def answers(endpoint: str) -> bool:
    host, port = endpoint.split(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionError:
        return False
    return True


@pytest.mark.usefixtures("rpc")
def test_a_killed_server_answers_no_more() -> None:
    server = RpcServer()
    assert answers(server.endpoint)
    server.kill()
    assert not answers(server.endpoint)


_KILLED = """
import os
from makers import devices
from makers.devices import RpcServer
print(RpcServer().endpoint, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.usefixtures("rpc")
def test_a_server_ends_with_the_process_that_started_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while answers(done.stdout.strip()):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.01)


@pytest.mark.usefixtures("rpc")
def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_SERVER", Path("absent.py"))
    with pytest.raises(RuntimeError, match="ended with 2:(?s:.*)absent.py"):
        RpcServer()


_SERVER_DIES = """
import sys
from kvp_edge import Llama
from makers.devices import RpcServer, placed, rpc_device
from support.noise import Noise

model, rescue, when, *tokens = sys.argv[1:]
server = RpcServer()

class DiesInside(Noise):
    def score(self, view):
        if when == "evicting":
            server.kill()
        return super().score(view)

with placed([rpc_device(server.endpoint)]):
    llm = Llama(model, n_ctx=3000, kv_budget=100, recent=20, reserve=60, policy=DiesInside(),
                pack="device", verbose=False)
llm.rescue_to(rescue, lambda: {"said": len(tokens)})
llm.eval([int(token) for token in tokens])
if when == "evicting":
    llm.evict()
else:
    server.kill()
    llm.eval([7])
print("it went on")
"""


@pytest.mark.usefixtures("rpc")
@pytest.mark.parametrize("when", ["evicting", "reading"])
def test_when_a_server_dies_the_text_is_rescued_and_can_be_read_again(
    random_model: Maker, load: Loader, tmp_path: Path, when: str
) -> None:
    path, rescue, tokens = random_model(LLAMA).path, tmp_path / "rescue.kvp", random_tokens(150)
    assert not rescue.exists()
    done = subprocess.run(
        [sys.executable, "-c", _SERVER_DIES, path, rescue, when, *map(str, tokens)],
        # "-c" puts the current folder first on the path: not the checkout's package
        cwd=tmp_path,
        env={
            **os.environ,
            "GGML_NO_BACKTRACE": "1",
            "PYTHONPATH": PYTHON_PATH,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGABRT
    assert "Remote RPC server crashed" in done.stderr
    assert done.stdout == ""
    # another cache on the CPU, where nothing of the lost device is left
    options: dict[str, Any] = {**BOUND, "policy": Noise(), "granularity": "head"}
    llm, direct = load(path, **options), load(path, **options)
    assert llm.load_session(rescue) == {"said": 150}
    direct.eval(tokens)
    np.testing.assert_array_equal(llm.input_ids[: llm.n_tokens], tokens)
    np.testing.assert_array_equal(llm.kv_indices, direct.kv_indices)
    assert next(iter(llm.generate([*tokens, 7], temp=0.0))) == next(
        iter(direct.generate([*tokens, 7], temp=0.0))
    )
