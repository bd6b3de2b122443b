"""The settings of a training run. No PyTorch here: the command line shows them without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kvp_edge.errors import TrainingError

#: "i-1": the sum over the budgets 1 .. m - 1 (the paper's section 3.1.1). "i": the budget 0 as well
#: (the released code); every ranking then costs the same constant more.
RankWeights = Literal["i-1", "i"]

#: "loo": r_k minus the mean of the other rankings' rewards (the paper): an unbiased gradient.
#: "zscore": divided by their standard deviation as well and clamped (the released code): easy and
#: hard states count alike.
Advantage = Literal["loo", "zscore"]

#: "sum": attention of all later queries (KVP). "peak": that of the one block of later queries that
#: wants a token most (ForesightKV's labels, arXiv:2602.03203): one answer counts like a chapter.
Importance = Literal["sum", "peak"]


@dataclass(frozen=True)
class Settings:
    """What a run depends on, beside its traces. docs/training-policies.md says why these defaults.

    Attributes:
        steps, token_steps: of the agents, and of the token weights after them.
        lr, token_lr: highest learning rates; ``warmup`` steps up to them, then a cosine to 0.
        states, tokens: B states per step with up to so many competing tokens each.
        rankings: K, sampled per state.
        effort: share of the heads in a step.
        eval_every: steps between validations; each writes a checkpoint.
        validation: share of the traces kept out for it, and at most so many states.
        precision: "f32" or "bf16" (autocast).
    """

    objective: str = "kvp"
    hidden: int = 64
    context: int = 9
    steps: int = 2000
    token_steps: int = 200
    lr: float = 2e-3
    token_lr: float = 2e-2
    warmup: int = 100
    weight_decay: float = 1e-3
    ema: float = 0.99
    states: int = 8
    tokens: int = 512
    rankings: int = 8
    importance: Importance = "peak"
    rank_weights: RankWeights = "i-1"
    advantage: Advantage = "zscore"
    effort: float = 1.0
    sinks: int = 4
    recent: int = 32
    eval_every: int = 200
    validation: float = 0.1
    validation_states: int = 24
    seed: int = 0
    precision: str = "f32"

    def __post_init__(self) -> None:
        if self.objective != "kvp":
            raise TrainingError(f"there is no objective '{self.objective}'; there is kvp")
        for name, known in (
            ("importance", Importance),
            ("rank_weights", RankWeights),
            ("advantage", Advantage),
        ):
            if getattr(self, name) not in get_args(known):
                raise TrainingError(
                    f"{name} is {' or '.join(get_args(known))}, not '{getattr(self, name)}'"
                )
        if self.rankings < 2:
            raise TrainingError("the baseline needs at least 2 rankings of a state")
        if min(self.steps, self.states, self.tokens, self.eval_every) < 1:
            raise TrainingError("steps, states, tokens and eval_every must be at least 1")
        if not 0 < self.effort <= 1:
            raise TrainingError(f"effort is a share of the heads, at most 1: {self.effort}")
        if not 0 < self.validation < 1:
            raise TrainingError(f"validation is a share of the traces: {self.validation}")
        if self.recent < self.context // 2:
            raise TrainingError(
                f"recent ({self.recent}) must cover half of the context width ({self.context}): a "
                "token's score is final only when it has seen that far ahead"
            )
        if self.precision not in ("f32", "bf16"):
            raise TrainingError(f"precision is f32 or bf16, not '{self.precision}'")
