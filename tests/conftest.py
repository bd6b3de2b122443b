"""Shared fixtures: real GGUF files, the bundled model, and texts."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Two BLAS threads on two cores that llama.cpp uses as well cost more than they give.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

import kvp_edge
from kvp_edge.processor import buffer_types
from kvp_edge.processor.repack import llama_library
from makers.devices import (
    CountingProxy,
    RpcServer,
    gpu_device,
    placed,
    rpc_device,
    rpc_supported,
)
from makers.gguf_models import ModelShape, write_model
from support import properties
from support.command_line import kvp, terminal  # noqa: F401  # fixtures
from support.reference import Reference
from support.server import server  # noqa: F401  # a fixture

pytest_plugins = ["support.skipped"]

# For scripts as packages (scripts.train_model). Last, so that the package that is installed is
# tested and not the one in the checkout, which has no native part.
sys.path.append(str(Path(__file__).parents[1]))

# In the background of a shell script SIGINT is ignored, under nohup SIGHUP, and children would
# inherit that: but what these do is tested on them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # not on Windows
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("kvp_edge", properties.PROFILE)
hypothesis.settings.load_profile("kvp_edge")

DATA = Path(__file__).parent / "data"

#: Texts and models that a development checkout may have beside it; never needed, only more of them.
BESIDE = Path(__file__).parents[2] / "shared"


def beside(path: str) -> Path:
    """A file of the development data; skips the test where it is absent."""
    found = BESIDE / path
    if not found.exists():
        pytest.skip(f"needs the development data {path}, which is not beside this checkout")
    return found


@pytest.fixture(scope="session")
def bundled_model() -> str:
    """The model that ships with the package: it can look things up in its context."""
    from kvp_edge.bundled import bundled_model as path

    return path()


@pytest.fixture(scope="session")
def bare(bundled_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model without its chat template: its key has another name."""
    path = tmp_path_factory.mktemp("bare") / "bare.gguf"
    data = Path(bundled_model).read_bytes()
    assert data.count(b"tokenizer.chat_template") == 1
    path.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.chat_renamed_"))
    return str(path)


@pytest.fixture(scope="session")
def book() -> str:
    return (DATA / "penelope_brandling.txt").read_text(encoding="utf-8-sig")


@pytest.fixture(scope="session")
def dialogues() -> list[list[dict[str, str]]]:
    lines = (DATA / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class RandomModel:
    """A random-weight GGUF file with the reference implementation of the same weights."""

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self.path = str(path)
        self.shape = shape
        self.reference = Reference(shape, write_model(path, shape))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelShape], RandomModel]:
    """random_model(shape) writes each shape once."""
    folder = tmp_path_factory.mktemp("gguf")
    made: dict[ModelShape, RandomModel] = {}

    def make(shape: ModelShape) -> RandomModel:
        if shape not in made:
            made[shape] = RandomModel(folder / f"{len(made)}.gguf", shape)
        return made[shape]

    return make


@pytest.fixture
def load() -> Iterator[Callable[..., kvp_edge.Llama]]:
    """load(path, **kwargs) -> Llama, quiet, on one thread and, unless asked otherwise, at token
    granularity, where one list of positions is all that is held, and without recall, so that
    what is held is what evictions left; closed after the test."""
    loaded: list[kvp_edge.Llama] = []

    def make(path: str, **kwargs: Any) -> kvp_edge.Llama:
        quiet = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
        kwargs = {**quiet, "granularity": "token", "recall": "off", **kwargs}
        loaded.append(kvp_edge.Llama(path, **kwargs))
        return loaded[-1]

    yield make
    for llm in loaded:
        llm.close()


@pytest.fixture(scope="session")
def amx_works() -> None:
    """Skips where AMX ends processes, and llama.cpp would use it: there a llama.cpp that works in
    all its parts takes another build. It is asked without kvp_edge's own trial."""
    fresh = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "fresh.py"))
    if "AMX" in buffer_types.extra_buffer_types(str(llama_library())) and fresh["broken_amx"](""):
        pytest.skip("AMX does not work here, and llama.cpp was compiled with it: scripts/fresh.py")


@pytest.fixture(scope="session")
def rpc() -> None:
    """Without llama.cpp's RPC backend: a skip, or a failure where KVP_EDGE_REQUIRE_RPC is set."""
    if not rpc_supported():
        sentence = (
            "needs a llama.cpp compiled with -DGGML_RPC=ON, as in a new environment of "
            "scripts/fresh.py test; this one has no RPC backend"
        )
        (pytest.fail if os.environ.get("KVP_EDGE_REQUIRE_RPC") else pytest.skip)(sentence)


# These two do not stop their servers: what a failed test leaves behind may be freed after them all.


@pytest.fixture(scope="session")
def rpc_devices(rpc: None) -> list[int]:
    """Two devices whose memory the host cannot touch (makers.devices)."""
    return [rpc_device(RpcServer().endpoint) for _ in range(2)]


@pytest.fixture(scope="session")
def rpc_wire(rpc: None) -> CountingProxy:
    """A third one, behind a counter of the bytes that go there and come back."""
    return CountingProxy(RpcServer().endpoint)


#: There is no "gpu" without a GPU, so that nothing is skipped for the want of one.
AWAY = ["rpc", "rpc2", *(["gpu"] if gpu_device() else [])]


@contextlib.contextmanager
def _at(request: pytest.FixtureRequest, place: str) -> Iterator[str]:
    if place == "gpu":
        gpu = gpu_device()
        assert gpu is not None
        devices = [gpu]
    else:
        n_devices = {"cpu": 0, "rpc": 1, "rpc2": 2}[place]
        devices = request.getfixturevalue("rpc_devices")[:n_devices] if n_devices else []
    with placed(devices):
        yield place


@pytest.fixture(params=["cpu", *AWAY])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the models that the test loads lie: on the CPU, on another device, with their layers
    split over two, or on the GPU. Some of these: parametrize("place", AWAY, indirect=True)."""
    with _at(request, request.param) as place:
        yield place


@pytest.fixture(params=["cpu", "rpc", "rpc2", "state"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How caches are packed where the test does not say: in one of the places, or as states. Not on
    a GPU, whose logits are other ones."""
    defaults: Any = kvp_edge.Llama.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "pack", "state" if request.param == "state" else "auto")
    with _at(request, "cpu" if request.param == "state" else request.param):
        yield request.param


def random_tokens(n: int, seed: int = 0) -> list[int]:
    """<s> and n - 1 ordinary tokens of the random models' vocabulary."""
    rng = np.random.default_rng(seed)
    return [0, *rng.integers(6, 270, n - 1).tolist()]
