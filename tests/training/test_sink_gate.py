"""The gate of low-rank attention with sinks, against its formula, number by number."""

from __future__ import annotations

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")

from kvp_edge.training.agent import Agents, AgentShape  # noqa: E402
from kvp_edge.training.sink_gate import SinkGate, SinkGateShape  # noqa: E402


def random_gate(shape: SinkGateShape) -> SinkGate:
    gate = SinkGate(shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in gate.state_dict().values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return gate


def by_formula(gate: SinkGate, features: np.ndarray) -> np.ndarray:
    """Every token, head and query on its own, in f64."""
    w = {name: tensor.double().numpy() for name, tensor in gate.state_dict().items()}
    s = gate.shape

    def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + 1e-6) * scale

    scores = np.zeros((s.n_head_kv, len(features)))
    for t, token in enumerate((features - w["mean"]) * w["scale"]):
        queries = (w["w_q"] @ token + w["b_q"]).reshape(s.n_head_kv, s.queries, s.rank)
        keys = (w["w_k"] @ token).reshape(s.n_head_kv, s.rank)
        for h in range(s.n_head_kv):
            k = rms_norm(keys[h], w["norm_k"])
            for g in range(s.queries):
                q = rms_norm(queries[h, g], w["norm_q"])
                own = k @ q / np.sqrt(s.rank) + w["bias"][h, g]
                others = sum(np.exp(sink @ q / np.sqrt(s.rank) - own) for sink in w["sinks"][h])
                scores[h, t] += 1 / (1 + others) / s.queries
    return scores


@pytest.mark.parametrize(
    "shape", [SinkGateShape(20, 3, 2), SinkGateShape(7, 1, 1, rank=4, sinks=1)]
)
def test_scores_are_those_of_the_formula(shape: SinkGateShape) -> None:
    gate = random_gate(shape)
    features = np.random.default_rng(0).normal(size=(9, shape.n_features)).astype(np.float32)
    with torch.no_grad():
        got = gate(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(got, by_formula(gate, features), atol=1e-6)
    assert ((got > 0) & (got < 1)).all()


def test_batches_have_the_scores_of_their_texts_and_logits_of_any_size_are_finite() -> None:
    gate = random_gate(SinkGateShape(20, 3, 2))
    features = torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(gate(features)[2], gate(features[2]))
        gate.sinks *= 1e4
        assert torch.isfinite(gate(features)).all()
    assert gate(features[:, :0]).shape == (4, 3, 0)


def test_its_size_beside_an_agent_s_of_a_layer() -> None:
    """Qwen2.5-0.5B: 2 KV heads of 64 with 7 query heads each."""
    layer = AgentShape(1, 2, 64, 64, hidden=64, context=9, scope="layer")
    ours = sum(p.numel() for name, p in Agents(layer).named_parameters() if name != "log_aggregate")
    gate = SinkGate(SinkGateShape(layer.n_features, 2, 7))
    assert gate.n_parameters == sum(p.numel() for p in gate.parameters())
    assert (ours, gate.n_parameters) == (21_568, 67_342)


def test_a_gate_without_sinks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one feature, head, query, rank and sink"):
        SinkGateShape(4, 2, 1, sinks=0)
