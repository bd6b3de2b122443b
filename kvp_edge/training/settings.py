"""The settings of a training run. No PyTorch here: the command line shows them without it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kvp_edge.errors import TrainingError
from kvp_edge.policy_file import Scope

#: "kvp": rankings of one moment, rewarded over all budgets (Learning to Evict from Key-Value
#: Cache, arXiv:2602.10238). "foresight": golden evictions, imitated, then improved by evicting in
#: the model itself (ForesightKV, arXiv:2602.03203). "global": retention gates under one capacity of
#: all heads (Make Each Token Count, arXiv:2605.09649).
#: "regression": the logarithm of importance, predicted.
Objective = Literal["kvp", "foresight", "global", "regression"]

#: Weight of a pair of tokens in the imitation of golden eviction: "order": equal (the paper);
#: "cost": their difference in importance, so that a mistake costs what it loses.
Pairs = Literal["order", "cost"]

#: Which tokens' loss increases are a rollout's penalty (2602.03203, section 4): "all"; those of the
#: "low" entropy, where the full cache was sure; or of these, those whose loss rose a lot.
Reward = Literal["all", "low", "low-large"]

#: Phases of a run: the agents on traces; the agents in the model, by its predictions (gates) or by
#: the cost of evictions; the weights with which heads add up to tokens.
PhaseName = Literal["heads", "distil", "rollouts", "tokens"]

#: "i-1": the sum over the budgets 1 .. m - 1 (the paper's section 3.1.1). "i": the budget 0 as well
#: (the released code); every ranking then costs the same constant more.
RankWeights = Literal["i-1", "i"]

#: "loo": r_k minus the mean of the other rankings' rewards (the paper): an unbiased gradient.
#: "zscore": divided by their standard deviation as well and clamped (the released code): easy and
#: hard states count alike.
Advantage = Literal["loo", "zscore"]

#: "sum": attention of all later queries (KVP). "peak": that of the one block of later queries with
#: the most attention to the token (as in ForesightKV's labels, arXiv:2602.03203). "later",
#: "repeated", "questioned": labels of the traces (kvp_edge.traces.labels), each times the norm of
#: the token's value, since what a query receives is attention times value. Several, joined by "+":
#: each divided by its mean over the head's competing tokens, then added.
Importance = Literal["sum", "peak", "later", "repeated", "questioned"]

#: Importance that not every trace has -> what kvp-edge trace --future records it.
LABELLED: dict[str, str] = {"later": "later", "repeated": "repeat", "questioned": "questions"}


def importance_parts(importance: str) -> tuple[str, ...]:
    """The importances that one like "peak+repeated" is made of.

    Raises:
        TrainingError: it is none.
    """
    parts = tuple(importance.split("+"))
    if len(set(parts)) < len(parts) or not set(parts) <= set(get_args(Importance)):
        raise TrainingError(
            f"importance must be {' or '.join(get_args(Importance))}, or several of them joined by "
            f"+, not '{importance}'"
        )
    return parts


#: Of each objective: what these settings are unless they are given.
OWN: dict[str, dict[str, Any]] = {
    "kvp": {"scope": "head", "importance": "peak", "steps": 2000},
    "foresight": {"scope": "head", "importance": "peak", "steps": 2000},
    "global": {"scope": "head", "importance": "peak", "steps": 2000},
    "regression": {"scope": "layer", "importance": "later", "steps": 400},
}


@dataclass(frozen=True)
class Settings:
    """What a run depends on, beside its traces. docs/training-policies.md says why these defaults.

    ``scope``, ``importance`` and ``steps`` that are not given are the objective's OWN.

    Attributes:
        scope: what an agent scores, and sees: "head", one KV head; "layer", all of a layer.
        steps, token_steps: of the agents, and of the token weights after them.
        lr, token_lr: highest learning rates; ``warmup`` steps up to them, then a cosine to 0.
        states: B per step: cut texts, or (global) whole ones.
        tokens: of a state that compete, at most.
        rankings: K, sampled per state.
        effort: share of the agents in a step.
        eval_every: steps between validations; each writes a checkpoint.
        validation: share of the traces kept out for it, and at most so many states.
        importance: one of Importance, or several of them joined by "+".
        precision: "f32" or "bf16" (autocast).
        budget, every: (foresight) tokens that each head keeps after an eviction, and tokens read
            between two evictions (L).
        margin, pairs: (foresight) margin between a token's score and that of one needed less, and
            the weight of a pair: see Pairs.
        grpo_steps, grpo_lr: (foresight) of the rollouts in the model.
        texts: (foresight, global) texts per step of the phases in the model.
        rollouts: (foresight) of each text (G).
        passes: (foresight) passes over the rollouts of a step.
        temperature: (foresight) of the draws in rollouts.
        clip, kl: (foresight) bound of the probability ratio; weight of the distance to the start.
        reward, low_entropy, large: (foresight) see Reward; the share of tokens with the lowest
            entropy, and the rise, in nats, that is large.
        capacity, capacity_weight: (global) tokens per head that all gates together may retain, and
            the weight of the penalty beyond it.
        distil_steps, distil_lr, distil_tokens: (global) of the distillation in the model's twin;
            tokens of a text in it.
        horizon: (global) number of future tokens over which a token's use is summed.
    """

    objective: Objective = "regression"
    scope: Scope = ""  # type: ignore[assignment]
    hidden: int = 64
    context: int = 9
    steps: int = 0
    token_steps: int = 200
    lr: float = 3e-3
    token_lr: float = 2e-2
    warmup: int = 100
    weight_decay: float = 1e-3
    ema: float = 0.99
    states: int = 4
    tokens: int = 512
    rankings: int = 8
    importance: str = ""
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
    budget: int = 128
    every: int = 32
    margin: float = 0.1
    pairs: Pairs = "cost"
    grpo_steps: int = 60
    grpo_lr: float = 3e-4
    texts: int = 4
    rollouts: int = 8
    passes: int = 2
    temperature: float = 0.1
    clip: float = 0.2
    kl: float = 0.05
    reward: Reward = "low-large"
    low_entropy: float = 0.8
    large: float = 1.5
    capacity: int = 96
    capacity_weight: float = 4.0
    horizon: int = 1024
    distil_steps: int = 0
    distil_lr: float = 3e-4
    distil_tokens: int = 512

    def __post_init__(self) -> None:
        for name, own in OWN.get(self.objective, {}).items():
            if not getattr(self, name):
                object.__setattr__(self, name, own)
        for name, known in (
            ("objective", Objective),
            ("scope", Scope),
            ("rank_weights", RankWeights),
            ("advantage", Advantage),
            ("pairs", Pairs),
            ("reward", Reward),
        ):
            if getattr(self, name) not in get_args(known):
                raise TrainingError(
                    f"{name} must be {' or '.join(get_args(known))}, not '{getattr(self, name)}'"
                )
        importance_parts(self.importance)
        self._refuse_settings_of_others()
        if self.objective == "global" and self.importance not in ("sum", "peak"):
            raise TrainingError(
                "objective global learns when attention is paid, which labels do not say: its "
                f"importance must be sum or peak, not '{self.importance}'. Choose objective kvp "
                "or foresight for it"
            )
        if self.rankings < 2:
            raise TrainingError("the baseline needs at least 2 rankings of a state")
        if min(self.steps, self.states, self.tokens, self.eval_every) < 1:
            raise TrainingError("steps, states, tokens and eval_every must be at least 1")
        if min(self.budget, self.every, self.texts, self.passes) < 1:
            raise TrainingError("budget, every, texts and passes must be at least 1")
        if min(self.capacity, self.horizon, self.distil_tokens) < 1:
            raise TrainingError("capacity, horizon and distil_tokens must be at least 1")
        if self.rollouts < 2:
            raise TrainingError("a group needs at least 2 rollouts of a text to compare")
        if min(self.temperature, self.margin, self.clip, self.capacity_weight) <= 0:
            raise TrainingError("temperature, margin, clip and capacity_weight must be above 0")
        if not 0 < self.low_entropy <= 1:
            raise TrainingError(
                "low_entropy must be a fraction of the tokens (above 0, at most 1), not "
                f"{self.low_entropy}"
            )
        if self.objective == "foresight" and self.budget <= self.sinks + self.recent:
            raise TrainingError(
                f"budget ({self.budget}) must be larger than sinks + recent ({self.sinks} + "
                f"{self.recent}): raise it, or lower recent"
            )
        if not 0 < self.effort <= 1:
            raise TrainingError(
                f"effort must be a fraction of the agents (above 0, at most 1), not {self.effort}"
            )
        if not 0 < self.validation < 1:
            raise TrainingError(
                "validation must be a fraction of the traces (between 0 and 1), not "
                f"{self.validation}"
            )
        if self.recent < self.context // 2:
            raise TrainingError(
                f"recent ({self.recent}) must be at least half of the context width "
                f"({self.context}), because a score is final only after that many tokens"
            )
        if self.objective == "foresight" and self.recent < self.context - 1:
            raise TrainingError(
                f"recent ({self.recent}) must be at least {self.context - 1} for rollouts, "
                f"because a score uses {self.context} tokens that all heads must still keep"
            )
        if self.precision not in ("f32", "bf16"):
            raise TrainingError(f"precision must be f32 or bf16, not '{self.precision}'")

    def _refuse_settings_of_others(self) -> None:
        for field in fields(self):
            used_by = _USED_BY.get(field.name)
            own = OWN[self.objective].get(field.name, field.default)
            changed = getattr(self, field.name) not in (field.default, own)
            if used_by and changed and self.objective not in used_by:
                raise TrainingError(
                    f"{field.name} belongs to objective {' or '.join(used_by)}, not "
                    f"{self.objective}: leave it out"
                )

    @property
    def phases(self) -> tuple[tuple[PhaseName, int], ...]:
        """The phases of a run, with their steps, in order."""
        steps: dict[PhaseName, int] = {"heads": self.steps}
        if self.objective == "global":  # its heads need no weights
            steps["distil"] = self.distil_steps
        else:
            steps["rollouts"] = self.grpo_steps if self.objective == "foresight" else 0
            steps["tokens"] = self.token_steps
        return tuple((name, count) for name, count in steps.items() if count)


#: Settings that only some objectives use.
_USED_BY = {
    **dict.fromkeys(
        ("token_steps", "token_lr", "rankings", "rank_weights", "advantage", "effort", "tokens"),
        ("kvp", "foresight", "regression"),
    ),
    **dict.fromkeys(
        (
            *("budget", "every", "margin", "pairs", "grpo_steps", "grpo_lr", "rollouts", "passes"),
            *("temperature", "clip", "kl", "reward", "low_entropy", "large"),
        ),
        ("foresight",),
    ),
    **dict.fromkeys(
        (
            *("capacity", "capacity_weight", "horizon"),
            *("distil_steps", "distil_lr", "distil_tokens"),
        ),
        ("global",),
    ),
    "texts": ("foresight", "global"),
}
