"""One definition, four executors: numpy, PyTorch, ggml and ONNX score alike, whether a network sees
one KV head or all heads of a layer, also where tokens between two are missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.binding.policy import NativePolicy  # noqa: E402
from kvp_edge.errors import PolicyFileError  # noqa: E402
from kvp_edge.export import export, policy_of  # noqa: E402
from kvp_edge.export.onnx_graph import write_onnx  # noqa: E402
from kvp_edge.policies import ArrayView, Learned, get_policy  # noqa: E402
from kvp_edge.policies.learned import with_gaps  # noqa: E402
from kvp_edge.policies.onnx import Onnx  # noqa: E402
from kvp_edge.policy_file import read_policy, write_policy  # noqa: E402
from kvp_edge.training import checkpoint  # noqa: E402
from kvp_edge.training.agent import (  # noqa: E402
    Agents,
    AgentShape,
    position_features,
    side_by_side,
)
from kvp_edge.training.train import Settings, train  # noqa: E402
from makers.policies import random_sensitivity  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402

ABOUT: dict[str, Any] = {"architecture": "llama", "name": "Tiny", "fingerprint": "f00d"}
CLOSE = 2e-5


def random_agents(shape: AgentShape) -> Agents:
    """Agents of which nothing is as it was at the start."""
    agents = Agents(shape, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in agents.state_dict().items():
            if name != "fc1":
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        if shape.context == 1:  # there is no convolution
            agents.conv.fill_(1)
    return agents


def random_tokens(shape: AgentShape, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and the tokens' indices, of which many are missing."""
    rng = np.random.default_rng(5)
    heads = (shape.n_layer, shape.n_head_kv, n)
    keys = rng.normal(size=(*heads, shape.head_size_k)).astype(np.float32)
    values = rng.normal(size=(*heads, shape.head_size_v)).astype(np.float32)
    return keys, values, np.cumsum(rng.choice([1, 1, 1, 2, 40], n)).astype(np.int32)


def in_torch(
    agents: Agents, keys: np.ndarray, values: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Scores of one run in which tokens are missing."""
    shape, half = agents.shape, agents.shape.context // 2
    at = np.pad(with_gaps(indices, half), half, constant_values=-1)
    place = position_features(torch.from_numpy(indices))
    k, v = (
        side_by_side(torch.from_numpy(rows), shape.heads_each).flatten(0, 1)
        for rows in (keys, values)
    )
    features = torch.cat((k, v, place.expand(len(k), -1, -1)), -1)[:, at]
    with torch.no_grad():
        scores = agents(features[:, None], torch.from_numpy(at >= 0)[None])[:, 0]
    inner = at[half : len(at) - half] >= 0
    return np.asarray(scores[:, inner].reshape(keys.shape[:3]).numpy())


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("context", [1, 9])
@pytest.mark.parametrize("n_head_kv", [1, 2, 3, 8])
def test_all_executors_score_alike(
    tmp_path: Path, n_head_kv: int, context: int, scope: Any
) -> None:
    shape = AgentShape(2, n_head_kv, 24, 16, hidden=12, context=context, scope=scope)
    agents = random_agents(shape)
    info, weights = policy_of(agents, checkpoint.About(shape, {}, ABOUT, 0))
    assert (info.scope, info.n_networks) == (scope, 1 if scope == "layer" else n_head_kv)
    tokens = random_tokens(shape, 90)
    wanted = in_torch(agents, *tokens)
    write_policy(tmp_path / "p.gguf", info, weights, "f32")
    numpy = Learned(tmp_path / "p.gguf", native=False)
    np.testing.assert_allclose(numpy.score(ArrayView(*tokens)), wanted, atol=CLOSE)
    native = NativePolicy(read_policy(tmp_path / "p.gguf")[1])
    np.testing.assert_allclose(native.score(*tokens), wanted, atol=CLOSE)
    needs("onnxruntime", "onnx")
    needs("onnx", "onnx")
    write_onnx(tmp_path / "p.onnx", info, weights)
    onnx = get_policy(tmp_path / "p.onnx")
    assert onnx.info == info
    np.testing.assert_allclose(onnx.score(ArrayView(*tokens)), wanted, atol=CLOSE)


def test_one_head_of_its_own_is_a_layer_with_one_head() -> None:
    shape = AgentShape(2, 1, 24, 16, hidden=12, context=9)
    agents, whole = random_agents(shape), random_agents(replace(shape, scope="layer"))
    tokens = random_tokens(shape, 30)
    np.testing.assert_array_equal(in_torch(agents, *tokens), in_torch(whole, *tokens))


def test_a_layer_s_score_depends_on_all_of_its_heads_and_on_no_other_layer() -> None:
    keys, values, indices = random_tokens(shape := AgentShape(2, 3, 24, 16, hidden=12), 20)
    changed = keys.copy()
    changed[1, 2, 10] += 1
    for scope, moved in (("head", [2]), ("layer", [0, 1, 2])):
        agents = random_agents(replace(shape, scope=scope))
        apart = in_torch(agents, changed, values, indices) != in_torch(
            agents, keys, values, indices
        )
        assert not apart[0].any()
        assert np.flatnonzero(apart[1, :, 10]).tolist() == moved


@pytest.mark.parametrize("objective", ["kvp", "global"])
def test_a_trained_layer_s_policy_is_exported_and_checked(tmp_path: Path, objective: Any) -> None:
    """``global`` shares the last projection: row h of every layer (arXiv:2605.09649)."""
    needs("onnxruntime", "onnx")
    needs("onnx", "onnx")
    small = {"steps": 8, "eval_every": 4, "states": 2, "hidden": 8}
    if objective == "kvp":
        small |= {"token_steps": 2, "tokens": 64}
    traces = SyntheticTraces(4, shape=(2, 3, 16, 8))
    train(traces, tmp_path, Settings(objective=objective, scope="layer", **small), progress=False)
    agents, about = checkpoint.load_agents(tmp_path)
    assert about.settings["scope"] == "layer"
    assert agents.out.shape == (1 if objective == "global" else 2, 3 * 8)
    for given in (traces, None):
        done = export(tmp_path, outtype="f32", onnx=True, traces=given)
        assert done.parity is not None
        assert done.parity.onnx is not None
        assert done.parity.onnx < 1e-4
        assert done.parity.executor < 1e-4
    kind = "" if objective == "kvp" else "-global"
    assert done.gguf.name == f"kvp-synthetic{kind}-layer-w9-F32.gguf"
    assert done.info.scope == "layer"


def test_onnx_says_how_sensitive_heads_are_and_old_files_say_nothing_of_a_scope(
    tmp_path: Path,
) -> None:
    needs("onnxruntime", "onnx")
    onnx = needs("onnx", "onnx")
    shape = AgentShape(2, 3, 8, 8, hidden=4)
    info, weights = policy_of(random_agents(shape), checkpoint.About(shape, {}, ABOUT, 0))
    path, found = tmp_path / "p.onnx", random_sensitivity(info)
    write_onnx(path, info, weights)
    assert Onnx(path).sensitivity is None
    write_onnx(path, info, replace(weights, sensitivity=found))
    sensitivity = Onnx(path).sensitivity
    assert sensitivity is not None
    np.testing.assert_allclose(sensitivity, found, rtol=1e-6)
    model = onnx.load(path)
    about = {one.key: one.value for one in model.metadata_props}

    def rewritten(**changed: str) -> Path:
        onnx.helper.set_model_props(model, about | {f"kvp.{k}": v for k, v in changed.items()})
        onnx.save(model, path)
        return path

    old = {k: v for k, v in json.loads(about["kvp.info"]).items() if k != "scope"}
    assert get_policy(rewritten(info=json.dumps(old))).info == info
    for wrong in ("[[1]]", "[[-1, 1, 1], [1, 1, 3]]", "[[2, 2, 2], [2, 2, 2]]", '["a"]'):
        with pytest.raises(PolicyFileError, match="it has heads' sens|heads' sens|is damaged"):
            get_policy(rewritten(sensitivity=wrong))
    with pytest.raises(PolicyFileError, match="kvp.scope 'token'"):
        get_policy(rewritten(info=json.dumps({**old, "scope": "token"})))
