"""Do the exported files score like PyTorch? On traces, or on random tokens where there are none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kvp_edge.arrays import FloatArray
from kvp_edge.binding.policy import NativePolicy
from kvp_edge.policies import ArrayView, Policy
from kvp_edge.policy_file import PolicyWeights, read_policy
from kvp_edge.training.agent import Agents, AgentShape
from kvp_edge.training.data import TraceSetLike
from kvp_edge.training.validate import agent_scorer

Counts = npt.NDArray[np.float64]

TOLERANCE = 1e-4  # of scores, relative to the largest one where that is above 1
KEPT = 0.999  # share of kept tokens that must agree, at every budget
_TRACES = 8
_RANDOM_TOKENS = 1024


@dataclass
class Parity:
    """How far two ways to compute the same scores are apart.

    Attributes:
        checked: what was scored.
        onnx: largest difference of ONNX (in onnxruntime) from PyTorch; None: not exported or
            onnxruntime is not installed.
        executor: largest difference of the native executor from PyTorch with the file's weights.
        kept: share of kept tokens in which these two agree, at the worst budget.
        rounding: largest difference of the file's weights from the checkpoint's, in scores.
        rounding_kept: share of kept tokens in which these agree, mean over budgets.
        failures: what is out of bounds, as sentences.
    """

    checked: str
    onnx: float | None = None
    onnx_kept: float | None = None
    executor: float = 0.0
    kept: float = 1.0
    rounding: float = 0.0
    rounding_kept: float = 1.0
    failures: list[str] = field(default_factory=list)


@dataclass
class _Tokens:
    """A piece of a trace, or random tokens in the shape of one."""

    keys: npt.NDArray[np.float16]
    values: npt.NDArray[np.float16]
    indices: npt.NDArray[np.int32]


def check_parity(
    agents: Agents,
    gguf: Path,
    stored: PolicyWeights,
    onnx: Path | None,
    traces: TraceSetLike | None,
) -> Parity:
    """Compare PyTorch with both files.

    The file's executor is compared with PyTorch running the file's own weights, so that the
    rounding of ``--outtype`` hides no error; what the rounding itself changes is reported apart.
    """
    samples = _samples(agents, traces)
    if traces is None:
        parity = Parity(f"{len(samples)} x {_RANDOM_TOKENS} random tokens")
    else:
        parity = Parity(f"{len(samples)} traces, {sum(len(s.indices) for s in samples)} tokens")
    exact = [_torch_scores(agents, sample) for sample in samples]
    rounded = [_torch_scores(_with_weights(agents, stored), sample) for sample in samples]
    native = NativePolicy(read_policy(gguf)[1])
    ran = [_policy_scores(native, sample) for sample in samples]
    parity.executor = _difference(rounded, ran)
    common, kept = common_tokens(rounded, ran)
    parity.kept = float((common / kept).min())
    parity.rounding = _difference(exact, rounded)
    parity.rounding_kept = float(np.divide(*common_tokens(exact, rounded)).mean())
    if parity.executor > TOLERANCE:
        parity.failures.append(f"its scores differ by up to {parity.executor:.1e}")
    if _too_few(common, kept):
        parity.failures.append(f"at some budget only {parity.kept:.2%} of the kept tokens agree")
    if onnx is not None:
        _check_onnx(parity, onnx, exact, samples)
    return parity


def _check_onnx(
    parity: Parity, path: Path, exact: list[FloatArray], samples: list[_Tokens]
) -> None:
    try:
        from kvp_edge.policies.onnx import Onnx  # noqa: PLC0415

        policy = Onnx(path)
    except ImportError:
        return  # the ONNX checker has seen it; running it needs the extra onnx
    ran = [_policy_scores(policy, sample) for sample in samples]
    parity.onnx = _difference(exact, ran)
    common, kept = common_tokens(exact, ran)
    parity.onnx_kept = float((common / kept).min())
    if parity.onnx > TOLERANCE:
        parity.failures.append(f"the ONNX scores differ by up to {parity.onnx:.1e}")
    if _too_few(common, kept):
        parity.failures.append(
            f"at some budget only {parity.onnx_kept:.2%} of the tokens kept by ONNX agree"
        )


def _samples(agents: Agents, traces: TraceSetLike | None) -> list[_Tokens]:
    if traces is not None:
        chosen = (traces[i] for i in range(min(_TRACES, len(traces))))
        return [_Tokens(t.keys[:], t.values[:], t.indices[:]) for t in chosen]
    shape = agents.shape
    # as the training data were: f16 cannot hold what never varied, so that part is its mean
    mean = agents.mean.cpu().numpy()[:, None]
    scale = agents.scale.cpu().numpy()[:, None]
    std = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        noise = rng.standard_normal((shape.n_agents, _RANDOM_TOKENS, shape.n_features))
        x = (mean + std * noise).astype(np.float16)
        dk, dv = shape.heads_each * shape.head_size_k, shape.heads_each * shape.head_size_v
        keys, values = _by_head(x[..., :dk], shape), _by_head(x[..., dk : dk + dv], shape)
        samples.append(_Tokens(keys, values, np.arange(_RANDOM_TOKENS, dtype=np.int32)))
    return samples


def _by_head(rows: npt.NDArray[np.float16], shape: AgentShape) -> npt.NDArray[np.float16]:
    """[L, H, n, size] from what agents see, [A, n, heads_each * size]."""
    n_agents, n, _ = rows.shape
    split = rows.reshape(n_agents, n, shape.heads_each, -1).swapaxes(1, 2)
    return split.reshape(shape.n_layer, shape.n_head_kv, n, -1)


def _torch_scores(agents: Agents, sample: _Tokens) -> FloatArray:
    return agent_scorer(agents)(sample, len(sample.indices))  # type: ignore[arg-type]


def _policy_scores(policy: Policy | NativePolicy, sample: _Tokens) -> FloatArray:
    keys, values = sample.keys.astype(np.float32), sample.values.astype(np.float32)
    if isinstance(policy, Policy):
        scores = policy.score(ArrayView(keys, values, sample.indices))
    else:
        scores = policy.score(keys, values, sample.indices)
    return scores.reshape(-1, len(sample.indices))


def _with_weights(agents: Agents, w: PolicyWeights) -> Agents:
    """Agents with a file's weights; the standardisation is inside them."""
    n = agents.shape.n_agents

    def each(array: FloatArray) -> torch.Tensor:
        return torch.from_numpy(array.reshape(n, *array.shape[2:]).copy())

    # a file holds one last projection per network; ages are not part of scores
    out = Agents(replace(agents.shape, shared_out=False, ageing=False))
    first = np.concatenate([w.key, w.value, w.position], axis=-1)
    out.load_state_dict(
        {
            "mean": torch.zeros_like(out.mean),
            "scale": torch.ones_like(out.scale),
            "fc1": each(first).transpose(1, 2),
            "fc1_bias": each(w.fc1_bias),
            "conv": each(w.conv).transpose(1, 2),
            "fc2": each(w.fc2).transpose(1, 2),
            "fc2_bias": each(w.fc2_bias),
            "out": each(w.out).flatten(1),
            "log_aggregate": torch.from_numpy(w.aggregate.flatten()).log(),
        }
    )
    out.eval()
    return out


def _difference(a: list[FloatArray], b: list[FloatArray]) -> float:
    return max(
        float(np.abs(x - y).max() / max(1.0, np.abs(x).max())) for x, y in zip(a, b, strict=True)
    )


def _too_few(common: Counts, kept: Counts) -> bool:
    # One token more or less is two equal scores that rounding put in the other order.
    return bool((kept - common > np.maximum(1, (1 - KEPT) * kept)).any())


def common_tokens(a: list[FloatArray], b: list[FloatArray]) -> tuple[Counts, Counts]:
    """How many kept tokens two scorers have in common, and how many they keep, at every budget.

    Args:
        a, b: f32 [N, n] of each sample.

    Returns:
        f64 [largest n - 1] each: at budgets 1, 2, ...; heads and samples counted together.
    """
    longest = max(x.shape[1] for x in a)
    common, kept = np.zeros(longest - 1), np.zeros(longest - 1)
    budgets = np.arange(1, longest)
    for x, y in zip(a, b, strict=True):
        n = x.shape[1]
        # a token is in both kept sets from the budget on that reaches its worse rank
        from_budget = np.maximum(_ranks(x), _ranks(y)).ravel()
        both = np.cumsum(np.bincount(from_budget, minlength=n))[: n - 1]
        common[: n - 1] += both
        kept[: n - 1] += len(x) * budgets[: n - 1]
    return common, kept


def _ranks(scores: FloatArray) -> npt.NDArray[np.intp]:
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None], axis=1)
    return ranks
