"""The phases of a run: how a step of each learns, and how its agents are judged.

Every random number follows from (seed, step), so a resumed run repeats what an uninterrupted one
would have done.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvp_edge.errors import TrainingError
from kvp_edge.training import gates
from kvp_edge.training.agent import Agents, position_features, side_by_side
from kvp_edge.training.data import Batch, Sampler, TraceSetLike
from kvp_edge.training.distillation import distillation_loss
from kvp_edge.training.foresight import hinge_loss
from kvp_edge.training.grpo import advantages, grpo_loss
from kvp_edge.training.kvp import PADDING, surrogate_loss
from kvp_edge.training.learner import Learner, under
from kvp_edge.training.rollouts import Reading, Rollouts
from kvp_edge.training.settings import Settings
from kvp_edge.training.twin import Twin
from kvp_edge.training.validate import Quality

_TEXTS = 16  # read by a validation in the model
_EVAL_IN_MODEL = 10  # steps between two of these


class Phase(ABC):
    """Part of a run.

    Attributes:
        rate: highest learning rate.
        eval_every: steps between validations.
    """

    rate: float
    eval_every: int

    def begin(self) -> float:
        """Prepare; the learner has the best agents of the phase before. Returns the value to beat
        (see ``judge``)."""
        return math.inf

    @abstractmethod
    def step(self, step: int, rate: float) -> float:
        """Do one training step and return the loss. ``step`` counts all steps of the run."""

    @abstractmethod
    def judge(self, quality: Quality) -> tuple[float, str]:
        """The value that the best averaged agents minimise, and its text for the progress bar.
        ``quality`` is that of these agents on the validation states."""

    def state(self) -> dict[str, Tensor]:
        """The phase's own state for resuming, besides the learner's."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:  # noqa: B027 (most have nothing to load)
        """Resume from these, which include what ``state`` returned."""


class Heads(Phase):
    """Separate agents, on traces: rankings (kvp) or the order of golden evictions (foresight)."""

    def __init__(self, learner: Learner, sampler: Sampler) -> None:
        s = learner.settings
        self.rate, self.eval_every = s.lr, s.eval_every
        self._learner, self._sampler = learner, sampler

    def step(self, step: int, rate: float) -> float:
        learner, s = self._learner, self._learner.settings
        agents = self._choose(step)
        index = learner.on_device(agents)
        batch, generator = draw(learner, self._sampler, step, agents)
        scores = score(learner, batch, index)
        if s.objective == "foresight":
            loss = hinge_loss(scores, batch.importance, batch.present, s.margin, generator, s.pairs)
        else:
            competing = scores.masked_fill(~batch.present, PADDING)
            loss = kvp_loss(s, competing, batch.importance, generator)
        return learner.descend(loss.mean(-1).sum(), {"heads": index}, rate)

    def judge(self, quality: Quality) -> tuple[float, str]:
        # Attention lost rather than cost: a mean of cost ratios hides the few heads that matter.
        return float(quality.lost.mean()), f"cost {quality.cost.mean():.2f}"

    def _choose(self, step: int) -> npt.NDArray[np.intp]:
        """Draw a share of the agents without replacement, by what the heads of each still lose in
        validation."""
        learner, s = self._learner, self._learner.settings
        every = learner.every_agent
        n = max(1, math.ceil(s.effort * len(every)))
        if n == len(every):
            return every
        # half of the effort is spread evenly: an agent that looks done may be stuck
        stakes = learner.stakes.reshape(len(every), -1).sum(1)
        share = 0.5 / len(stakes) + 0.5 * stakes / max(stakes.sum(), 1e-12)
        rng = np.random.default_rng([s.seed, 2, step])  # the same on all ranks
        return np.sort(rng.choice(every, n, replace=False, p=share / share.sum()))


class Gates(Phase):
    """Gates of all heads together, on traces (global)."""

    def __init__(self, learner: Learner, sampler: Sampler) -> None:
        s = learner.settings
        self.rate, self.eval_every = s.lr, s.eval_every
        self._learner, self._sampler = learner, sampler

    def step(self, step: int, rate: float) -> float:
        learner, sampler, s = self._learner, self._sampler, self._learner.settings
        total = 0.0
        rng, each = learner.rng(0, step), learner.agents.shape.heads_each
        for _ in range(s.states):
            index = int(rng.choice(sampler.usable))
            trace = sampler.traces[index]
            found = gates.lesson(trace, index, s.importance, sampler.protected, rng, each)
            found = found.to(learner.worker.device)
            with learner.precision():
                scores = learner.agents(found.features)[:, 0]
            loss = gates.retention_loss(
                scores, found.wanted, found.times, sampler.protected, s.capacity, s.capacity_weight
            )
            (loss / s.states).backward()
            learner.drawn += scores.shape[1]
            total += float(loss.detach()) / s.states
        learner.move(together(learner), rate)
        return total

    def judge(self, quality: Quality) -> tuple[float, str]:
        # whole tokens as well: they are the purpose of a budget over all heads
        return quality.token_lost + float(quality.lost.mean()), f"cost {quality.cost.mean():.2f}"


class Texts:
    """The texts of traces, as tokens."""

    def __init__(self, traces: TraceSetLike, indices: list[int], longer_than: int) -> None:
        self._traces = traces
        self.indices = [i for i in indices if self[i].size > longer_than]
        if not self.indices:
            raise TrainingError(
                f"no text for training or validation has more than {longer_than} tokens: "
                "lower budget or trace longer texts"
            )

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        tokens: npt.NDArray[np.int32] | None = getattr(self._traces[index], "tokens", None)
        if tokens is None:
            raise TrainingError("the traces have no token ids: record them again")
        return tokens


class Distil(Phase):
    """Gates in the twin of the model, trained towards the full cache's predictions (global)."""

    def __init__(self, learner: Learner, twin: Twin, texts: Texts, held_out: Texts) -> None:
        s = learner.settings
        self.rate, self.eval_every = s.distil_lr, _EVAL_IN_MODEL
        self._learner, self._twin, self._texts, self._held_out = learner, twin, texts, held_out
        learner.add_optimiser("distil")

    def begin(self) -> float:
        return self._validation()

    def step(self, step: int, rate: float) -> float:
        learner, s = self._learner, self._learner.settings
        rng = learner.rng(4, step)
        total = 0.0
        for _ in range(s.texts):
            text = self._texts[int(rng.choice(self._texts.indices))]
            first = int(rng.integers(max(1, len(text) - s.distil_tokens + 1)))
            text = text[first : first + s.distil_tokens]
            loss = self._loss(learner.agents, text) / s.texts
            learner.drawn += len(text)
            loss.backward()
            total += float(loss.detach())
        moved = together(learner)
        learner.move({"distil": moved["heads"], "shared": moved["shared"]}, rate, memory=0.9)
        return total

    def judge(self, quality: Quality) -> tuple[float, str]:
        found = self._validation()
        return found, f"distilled {found:.3f}"

    def _validation(self) -> float:
        agents, n = self._learner.ema, self._learner.settings.distil_tokens
        with torch.no_grad():
            found = [
                float(self._loss(agents, self._held_out[i][:n]))
                for i in self._held_out.indices[:_TEXTS]
            ]
        return float(np.mean(found))

    def _loss(self, agents: Agents, tokens: npt.NDArray[np.int32]) -> Tensor:
        s, shape, device = self._learner.settings, agents.shape, self._learner.worker.device
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)[None]
        place = position_features(torch.arange(len(tokens), device=device))
        each = shape.heads_each

        def log_beta(layer: int, keys: Tensor, values: Tensor) -> Tensor:
            k, v = (side_by_side(rows[0], each) for rows in (keys, values))
            some = layer * len(k) + torch.arange(len(k), device=device)
            features = torch.cat((k, v, place.expand(len(k), -1, -1)), -1)[:, None]
            return gates.log_beta(agents(features, agents=some)[:, 0])[None]

        return distillation_loss(
            self._twin, log_beta, ids, s.capacity, capacity_weight=s.capacity_weight
        )


class InModel(Phase):
    """Agents that evict in the running model (foresight, GRPO).

    Attributes:
        increase: the cost of evictions per token of the validation texts, in nats, with the agents
            at the start of the phase and with the best.
    """

    def __init__(self, learner: Learner, rollouts: Rollouts, texts: Texts, held_out: Texts) -> None:
        self.rate, self.eval_every = learner.settings.grpo_lr, _EVAL_IN_MODEL
        self._learner, self._rollouts = learner, rollouts
        self._texts, self._held_out = texts, held_out
        self._start = Agents(learner.agents.shape).to(learner.worker.device)
        self._readings: dict[int, Reading] = {}
        self.increase = (math.nan, math.nan)
        learner.add_optimiser("rollouts")

    def begin(self) -> float:
        self._start.load_state_dict(self._learner.agents.state_dict())
        before = self._loss_increase()
        self.increase = before, before
        return before

    def step(self, step: int, rate: float) -> float:
        """Several rollouts of some texts, with a few passes over them."""
        learner, s = self._learner, self._learner.settings
        agents, indices = learner.agents, self._texts.indices
        rng = learner.rng(3, step)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        played = []
        for index in rng.choice(indices, s.texts, replace=len(indices) < s.texts).tolist():
            text, full = self._texts[index].tolist(), self._full(self._texts, index)
            group = [self._rollouts.roll(text, agents, generator) for _ in range(s.rollouts)]
            learner.drawn += s.rollouts * len(text)
            returns = np.stack([self._rollouts.returns(rollout, full) for rollout in group])
            gains = advantages(torch.from_numpy(returns).float().to(learner.worker.device))
            played += list(zip(group, gains, strict=True))
        with torch.no_grad():
            before = [r.log_probabilities(agents, s.temperature) for r, _ in played]
            start = [r.log_probabilities(self._start, s.temperature) for r, _ in played]
        every = learner.on_device(learner.every_agent)
        total = 0.0
        for _ in range(s.passes):
            total = 0.0
            for (rollout, gain), old, first in zip(played, before, start, strict=True):
                new = rollout.log_probabilities(agents, s.temperature)
                loss = grpo_loss(new, old, first, gain, s.clip, s.kl).sum() / len(played)
                loss.backward()
                total += float(loss.detach())
            learner.move({"rollouts": every}, rate, memory=0.9)
        return total

    def judge(self, quality: Quality) -> tuple[float, str]:
        found = self._loss_increase()
        self.increase = self.increase[0], min(found, self.increase[1])
        return found, f"loss +{found:.3f}"

    def state(self) -> dict[str, Tensor]:
        out = {"start." + k: v for k, v in self._start.state_dict().items()}
        return out | {"increase": torch.tensor(self.increase, dtype=torch.float64)}

    def load(self, state: dict[str, Tensor]) -> None:
        self._start.load_state_dict(under("start.", state))
        before, after = state["increase"].tolist()
        self.increase = before, after

    def _loss_increase(self) -> float:
        """The increase with the averaged agents, which drop the lowest scores."""
        rises = []
        for index in self._held_out.indices[:_TEXTS]:
            text, full = self._held_out[index].tolist(), self._full(self._held_out, index)
            rises.append(self._rollouts.roll(text, self._learner.ema, None).losses - full.losses)
        return float(np.concatenate(rises).mean())

    def _full(self, texts: Texts, index: int) -> Reading:
        if index not in self._readings:
            self._readings[index] = self._rollouts.full(texts[index].tolist())
        return self._readings[index]


class Tokens(Phase):
    """The heads' weights in whole tokens, on traces; the agents stay as they are."""

    def __init__(self, learner: Learner, sampler: Sampler) -> None:
        s = learner.settings
        self.rate, self.eval_every = s.token_lr, s.eval_every
        self._learner, self._sampler = learner, sampler

    def begin(self) -> float:
        # Heads start with equal weight: their scores are brought to one scale.
        spread = self._spread()
        for agents in (self._learner.agents, self._learner.ema):
            with torch.no_grad():
                agents.log_aggregate.copy_(-torch.log(spread * len(spread)))
        return super().begin()

    def step(self, step: int, rate: float) -> float:
        learner = self._learner
        batch, generator = draw(learner, self._sampler, step, learner.every_agent)
        with torch.no_grad():
            scores = score(learner, batch, None)
        whole = learner.agents.token_scores(scores).masked_fill(~batch.present[0], PADDING)
        importance = batch.importance.sum(0)
        loss = kvp_loss(learner.settings, whole[None], importance[None], generator)
        index = learner.on_device(learner.heads)
        return learner.descend(loss.mean(-1).sum(), {"token": index}, rate)

    def judge(self, quality: Quality) -> tuple[float, str]:
        return quality.token_lost, f"cost {quality.token_cost:.2f}"

    def _spread(self) -> Tensor:
        """Standard deviation of each head's scores in a state: f32 [N]."""
        learner = self._learner
        rng = np.random.default_rng([learner.settings.seed, 1])
        batch = self._sampler.draw(rng, learner.every_agent).to(learner.worker.device)
        with torch.no_grad():
            scores = score(learner, batch, None)
        inside = torch.where(batch.present, scores, torch.nan)
        mean = inside.nanmean(-1, keepdim=True)
        return (inside - mean).square().nanmean(-1).sqrt().mean(1).clamp_min(1e-6)


def draw(
    learner: Learner, sampler: Sampler, step: int, agents: npt.NDArray[np.intp]
) -> tuple[Batch, torch.Generator]:
    """A step's batch, and the source of its noise."""
    device = learner.worker.device
    batch = sampler.draw(learner.rng(0, step), agents).to(device)
    learner.drawn += batch.present[0].numel()
    seed = np.random.SeedSequence([learner.settings.seed, 0, step, learner.worker.rank])
    noise = int(seed.generate_state(1, np.uint64)[0] >> 1)
    return batch, torch.Generator(device).manual_seed(noise)


def score(learner: Learner, batch: Batch, agents: Tensor | None) -> Tensor:
    """f32 [n, B, m], of the agents' n heads."""
    with learner.precision():
        scores = learner.agents(batch.features, batch.known, agents)
    return scores.view(scores.shape[0], *batch.present.shape[1:])


def kvp_loss(s: Settings, scores: Tensor, importance: Tensor, generator: torch.Generator) -> Tensor:
    """The KVP objective with the run's settings: f32 [...]."""
    return surrogate_loss(
        scores,
        importance,
        s.rankings,
        weights=s.rank_weights,
        advantage=s.advantage,
        generator=generator,
    )


def together(learner: Learner) -> dict[str, Tensor]:
    """All agents, and the one projection that they share."""
    one = torch.zeros(1, dtype=torch.long, device=learner.worker.device)
    return {"heads": learner.on_device(learner.every_agent), "shared": one}
