"""The retention gates' loss against the numpy reference and direct summation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")

from conftest import RandomModel, random_tokens  # noqa: E402
from kvp_edge.training.distillation import distillation_loss  # noqa: E402
from kvp_edge.training.twin import Twin  # noqa: E402
from makers.gguf_models import ModelShape  # noqa: E402

Maker = Callable[[ModelShape], RandomModel]

SHAPE = ModelShape("qwen3", n_head=4, n_head_kv=2)
N = 24
TEXTS = [random_tokens(N), random_tokens(N, seed=1)]
TOKENS = torch.tensor(TEXTS)


@pytest.fixture(scope="module")
def model(random_model: Maker) -> RandomModel:
    return random_model(SHAPE)


@pytest.fixture(scope="module")
def twin(model: RandomModel) -> Twin:
    return Twin.load(model.path)


def log_betas(seed: int = 0) -> Any:
    """f32 [layer, text, head, token] <= 0: from tokens kept for good to such that fade at once."""
    drawn = torch.rand(2, 2, 2, N, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 0.3, 0.0, -3 * drawn)


def loss_of(twin: Twin, log_beta: Any, capacity: float, weight: float = 1.0) -> float:
    gates = lambda layer, keys, values: log_beta[layer]  # noqa: E731
    with torch.no_grad():
        return float(distillation_loss(twin, gates, TOKENS, capacity, capacity_weight=weight))


def log_softmax(logits: Any) -> Any:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cross_entropy(log_p: Any, text: list[int]) -> float:
    return -float(np.mean([log_p[t, text[t + 1]] for t in range(N - 1)]))


def too_much(log_beta: Any, capacity: float) -> float:
    """The capacity term, one retained token after the other."""
    beta = log_beta.exp().double().numpy()
    n_layer, n_text, n_head, _ = beta.shape
    total = 0.0
    for text in range(n_text):
        for t in range(1, N + 1):  # 1-based, as are the tokens in the paper
            retained = 0.0
            for layer in range(n_layer):
                for head in range(n_head):
                    for i in range(1, t + 1):
                        retained += beta[layer, text, head, i - 1] ** (t - i)
            heads = n_layer * n_head
            total += max(0.0, retained - capacity * heads) / (t * heads)
    return total / (n_text * N)


def test_without_gates_there_is_only_the_full_cache_s_cross_entropy(
    model: RandomModel, twin: Twin
) -> None:
    """Exactly at the limit: all is retained, and there is room for all."""
    want = [cross_entropy(log_softmax(model.reference.logits(text)), text) for text in TEXTS]
    got = loss_of(twin, torch.zeros(2, 2, 2, N), capacity=N)
    assert got == pytest.approx(np.mean(want), rel=1e-5)


def test_divergence_and_cross_entropy_are_those_of_faded_attention(
    model: RandomModel, twin: Twin
) -> None:
    """Against the model's own attention, faded by hand."""
    log_beta = log_betas()
    want = []
    for k, text in enumerate(TEXTS):
        full = log_softmax(model.reference.logits(text))

        def bias(layer: int, keys: Any, values: Any, k: int = k) -> Any:
            added = torch.zeros(1, 2, N, N)
            for t in range(N):
                for i in range(t + 1):
                    added[0, :, t, i] = (t - i) * log_beta[layer, k, :, i]
            return added

        with torch.no_grad():
            gated = log_softmax(twin(torch.tensor([text]), bias)[0].numpy())
        divergence = (np.exp(full) * (full - gated)).sum(-1).mean()
        assert divergence > 0.1
        want.append(divergence + cross_entropy(gated, text))
    got = loss_of(twin, log_beta, capacity=0, weight=0)
    assert got == pytest.approx(np.mean(want), rel=1e-4)


@pytest.mark.parametrize("capacity", [0, 1, 5.5, N])
def test_the_capacity_term_is_the_global_hinge_summed_by_hand(twin: Twin, capacity: float) -> None:
    log_beta = log_betas()
    got = loss_of(twin, log_beta, capacity, 2.0) - loss_of(twin, log_beta, capacity, 0.0)
    assert got == pytest.approx(2 * too_much(log_beta, capacity), abs=2e-5)


def test_heads_share_the_capacity(twin: Twin) -> None:
    """One head that retains all and others that retain next to nothing are not too much."""
    log_beta = torch.full((2, 2, 2, N), -50.0)
    log_beta[0, :, 0] = 0
    mean = (N + 3) / 4
    assert loss_of(twin, log_beta, mean) == pytest.approx(loss_of(twin, log_beta, 0, 0.0))
    assert loss_of(twin, log_beta, mean - 1) > loss_of(twin, log_beta, mean) + 0.002


def test_a_text_of_one_token_is_refused(twin: Twin) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        distillation_loss(twin, lambda *_: torch.zeros(2, 2, 1), TOKENS[:, :1], 4)


def test_two_tokens_are_enough(twin: Twin) -> None:
    gates = lambda layer, keys, values: keys.new_zeros(keys.shape[:3])  # noqa: E731
    assert torch.isfinite(distillation_loss(twin, gates, TOKENS[:, :2], 4))


def test_adam_lowers_the_loss_and_every_head_learns(twin: Twin) -> None:
    """Gates that see keys and values, by Adam."""
    torch.manual_seed(0)
    size = twin.head_size_k + twin.head_size_v
    weight = (0.01 * torch.randn(twin.n_layer, twin.n_head_kv, size)).requires_grad_()
    bias = torch.full((twin.n_layer, twin.n_head_kv, 1), 3.0, requires_grad=True)

    def gates(layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        seen = torch.cat((keys, values), -1)
        score = torch.einsum("bhtd,hd->bht", seen, weight[layer]) + bias[layer]
        return torch.nn.functional.logsigmoid(score)

    optimiser = torch.optim.Adam([weight, bias], lr=0.05)
    losses = []
    for _ in range(25):
        loss = distillation_loss(twin, gates, TOKENS, 4, capacity_weight=4.0)
        optimiser.zero_grad()
        loss.backward()
        assert weight.grad is not None
        assert torch.isfinite(weight.grad).all()
        assert (weight.grad.abs().amax(-1) > 0).all()  # every head learns
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_layers_with_a_window_have_no_gates(random_model: Maker) -> None:
    shape = ModelShape("gemma3", n_layer=4, sliding_window=8)
    twin, asked = Twin.load(random_model(shape).path), []

    def gates(layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        asked.append(layer)
        return keys.new_zeros(keys.shape[:3])

    with torch.no_grad():
        over = distillation_loss(twin, gates, TOKENS, 0, capacity_weight=1.0)
        room = distillation_loss(twin, gates, TOKENS, N, capacity_weight=1.0)
    assert asked == [0, 1, 0, 1]
    assert float(over - room) == pytest.approx(1.0, abs=1e-4)  # all retained, none allowed
