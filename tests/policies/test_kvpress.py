"""The published policies against kvpress (extra ``kvpress``), on the same keys, values and queries.

kvpress scores once, after a prompt that its own attention module has read. So the module here is
one of transformers' with random weights, and what it makes of random hidden states is what our
policies find in the log. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.packages import needs

torch = needs("torch", "kvpress")
kvpress = needs("kvpress", "kvpress")

from kvp_edge.binding.queries import Queries  # noqa: E402
from kvp_edge.binding.rope import KeyFrequencies  # noqa: E402
from kvp_edge.policies import (  # noqa: E402
    H2O,
    TOVA,
    ArrayView,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    LagKV,
    Policy,
    Recency,
    SnapKV,
)

H, GROUP, N, D = 2, 3, 300, 16
POSITIONS = np.arange(N, dtype=np.int32)


@dataclass
class Prompt:
    """What one layer made of a prompt, for both sides."""

    module: Any
    hidden: Any  # [1, N, hidden size]
    keys: Any  # [1, H, N, D], RoPE included
    values: Any
    queries: Any  # [1, H * GROUP, N, D], RoPE included
    rope: tuple[Any, Any]
    radians: NDArray[np.float64]

    def press(self, press: Any, attentions: Any = None) -> NDArray[np.float32]:
        """kvpress's scores f32 [H, N]."""
        with torch.no_grad():
            scores = press.score(
                self.module, self.hidden, self.keys, self.values, attentions,
                {"position_embeddings": self.rope},
            )  # fmt: skip
        return np.asarray(scores[0].float())

    def ours(self, policy: Policy) -> NDArray[np.float32]:
        """Our policy's scores f32 [H, N]; the prompt is a model of one layer."""
        scale = np.full(1, D**-0.5, np.float32)
        logged = Queries(self.queries.numpy(), POSITIONS, scale)
        frequencies = KeyFrequencies(self.radians, neox=True)
        keys, values = self.keys.numpy(), self.values.numpy()
        view = ArrayView(keys, values, POSITIONS, queries=logged, frequencies=frequencies)
        return policy.score(view)[0]

    def attention(self) -> Any:
        """Causal attention [1, H * GROUP, N, N]."""
        keys = self.keys.repeat_interleave(GROUP, dim=1)
        logits = self.queries @ keys.transpose(2, 3) * D**-0.5
        return logits.masked_fill(torch.ones(N, N).triu(1).bool(), -np.inf).softmax(-1)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaAttention,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=H * GROUP, num_key_value_heads=H, head_dim=D,
        num_hidden_layers=1, vocab_size=32,
    )  # fmt: skip
    module = LlamaAttention(config, layer_idx=0).eval()
    module.rotary_emb = LlamaRotaryEmbedding(config)
    hidden = torch.randn(1, N, 64) + torch.randn(64)  # so that queries have a mean
    with torch.no_grad():
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            projection.weight.normal_(std=0.25)
        shape = (1, N, -1, D)
        q = module.q_proj(hidden).view(shape).transpose(1, 2)
        k = module.k_proj(hidden).view(shape).transpose(1, 2)
        v = module.v_proj(hidden).view(shape).transpose(1, 2).contiguous()
        rope = module.rotary_emb(hidden, torch.arange(N)[None])
        q, k = apply_rotary_pos_emb(q, k, *rope)
    radians = np.asarray(module.rotary_emb.inv_freq, np.float64)[None]
    return Prompt(module, hidden, k.contiguous(), v, q.contiguous(), rope, radians)


def test_knorm_equals_kvpress(prompt: Prompt) -> None:
    want = prompt.press(kvpress.KnormPress())
    np.testing.assert_allclose(prompt.ours(KNorm()), want, rtol=1e-5)


def test_keydiff_equals_kvpress(prompt: Prompt) -> None:
    want = prompt.press(kvpress.KeyDiffPress())
    np.testing.assert_allclose(prompt.ours(KeyDiff()), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lag", [128, 40, 148, 149])  # 148: just two partitions; 149: none
def test_lagkv_equals_kvpress(lag: int, prompt: Prompt) -> None:
    want = prompt.press(kvpress.LagKVPress(lag_size=lag, n_sink=4))
    got = prompt.ours(LagKV(lag, sinks=4))
    if lag == 149:  # where all are kept or the newest are, only the order counts
        np.testing.assert_array_equal(got[:, 4:].argsort(), want[:, 4:].argsort())
        assert (got[:, :4] == 1).all()
        return
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert len(np.unique(got)) == lag + 1


@pytest.mark.parametrize("window", [32, 64])
def test_snapkv_equals_kvpress(window: int, prompt: Prompt) -> None:
    """The window's own tokens score above the others on both sides, by a number of its own."""
    want = prompt.press(kvpress.SnapKVPress(window_size=window, kernel_size=5))
    got = prompt.ours(SnapKV(window, kernel=5))
    np.testing.assert_allclose(got[:, :-window], want[:, :-window], rtol=1e-4, atol=1e-7)
    assert (got[:, -window:].min() > got[:, :-window].max()).all()


def test_tova_equals_kvpress(prompt: Prompt) -> None:
    """kvpress keeps the newest token whatever its score; here the recent window does that."""
    want = prompt.press(kvpress.TOVAPress())
    np.testing.assert_allclose(prompt.ours(TOVA())[:, :-1], want[:, :-1], rtol=1e-4, atol=1e-7)


def test_h2o_is_kvpresss_observed_attention_times_the_queries_that_could_see(
    prompt: Prompt,
) -> None:
    """kvpress divides every sum by the number of queries that saw the token; the paper does not."""
    want = prompt.press(kvpress.ObservedAttentionPress(), prompt.attention())
    could_see = N - POSITIONS
    np.testing.assert_allclose(prompt.ours(H2O()) / could_see, want, rtol=1e-4, atol=1e-6)


def test_expected_attention_equals_kvpress(prompt: Prompt) -> None:
    """Sinks score above the others on both sides, by a number of its own."""
    press = kvpress.ExpectedAttentionPress(n_future_positions=512, n_sink=4)
    want, got = prompt.press(press), prompt.ours(ExpectedAttention(512, sinks=4))
    np.testing.assert_allclose(got[:, 4:], want[:, 4:], rtol=2e-3, atol=1e-7)
    assert got[:, :4].min() > got[:, 4:].max()


def test_recency_with_protected_sinks_is_kvpresss_streaming_llm(prompt: Prompt) -> None:
    """kvpress drops so many tokens behind the sinks; here sinks are protected and ranks decide."""
    want = prompt.press(kvpress.StreamingLLMPress(compression_ratio=0.5, n_sink=4))
    got = prompt.ours(Recency()).copy()
    got[:, :4] = N
    best = np.argsort(-got, axis=1)[:, : N // 2]
    np.testing.assert_array_equal(np.take_along_axis(want, best, axis=1), 1)
