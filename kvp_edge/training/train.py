"""The training run: up to three phases (Settings.phases), each from the best of the one before.

"heads" trains the agents on traces. With the objectives kvp and foresight heads are separate
agents, and a share (``effort``) of them takes part in each step, drawn by what they still lose in
validation: most heads have little to lose. With the objective global all of them are trained
together. "rollouts" (foresight) goes on in the model itself. "tokens" trains only the heads'
weights in a whole token's score, by the KVP objective on the importance summed over heads.

Every random number follows from (seed, step), so a resumed run repeats what an uninterrupted one
would have done.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from kvp_edge.errors import TrainingError
from kvp_edge.fingerprint import model_fingerprint
from kvp_edge.retention import log_future_use, log_total
from kvp_edge.training import checkpoint, gates
from kvp_edge.training.agent import Agents, AgentShape
from kvp_edge.training.attention_baselines import ATTENTION_BASELINES
from kvp_edge.training.data import (
    Batch,
    InMemory,
    Peaks,
    Protected,
    Sampler,
    TraceLike,
    TraceSetLike,
    check_traces,
    model_facts,
    standardisation,
)
from kvp_edge.training.foresight import GoldenEvictions, hinge_loss
from kvp_edge.training.grpo import advantages, grpo_loss
from kvp_edge.training.head_adamw import HeadAdamW
from kvp_edge.training.kvp import PADDING, surrogate_loss
from kvp_edge.training.rollouts import Reading, Rollouts
from kvp_edge.training.settings import Phase, Settings
from kvp_edge.training.validate import (
    Quality,
    Scorer,
    Whole,
    agent_scorer,
    choose_states,
    heuristic_scorer,
    measure,
    oracle_scorer,
    weighted,
)

#: Steps of rollouts between validations, and texts that these read.
_ROLLOUT_EVAL = 10
_ROLLOUT_TEXTS = 16

#: Policies that see what a bounded chat sees.
BASELINES = ("keydiff", "knorm", "recency", "random")


@dataclass(frozen=True)
class Result:
    """What a run found. ``quality`` and ``baselines`` are of the validation states;
    ``loss_increase``, of rollouts, is what evictions cost a token of the validation's texts, in
    nats: before and after."""

    folder: Path
    quality: Quality
    baselines: dict[str, Quality]
    tokens_per_second: float
    loss_increase: tuple[float, float] | None = None


def train(
    traces: TraceSetLike,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    device: str | None = None,
    progress: bool = True,
    stop_after: int | None = None,
    model: str | os.PathLike[str] | None = None,
    engine: dict[str, Any] | None = None,
) -> Result:
    """Train a policy, or go on with the run that lies in ``out``.

    Args:
        model: the traced GGUF file, in which rollouts evict.
        engine: llama_cpp.Llama's arguments for it.
        device: "cpu", "cuda" or None: CUDA where there is one.
        stop_after: stop after so many steps, with a checkpoint, as if interrupted.

    Raises:
        TrainingError: traces or folder that cannot be used. What was finished is kept.
    """
    settings = settings or Settings()
    with _workers(device) as (torch_device, rank, world):
        run = _Run(traces, Path(out), settings, torch_device, rank, world)
        with run.rolling(model, engine or {}):
            return run.go(progress and rank == 0, stop_after)


@contextmanager
def _workers(device: str | None) -> Iterator[tuple[torch.device, int, int]]:
    """This process's device, rank and the number of processes; started by torchrun or alone."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield torch.device(chosen), 0, 1
        return
    if chosen == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if chosen == "cuda" else "gloo")
    try:
        yield torch.device(chosen), distributed.get_rank(), world
    finally:
        distributed.destroy_process_group()


class _Run:
    def __init__(
        self,
        traces: TraceSetLike,
        out: Path,
        settings: Settings,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self.facts = model_facts(traces)
        traces = InMemory(Peaks(traces) if settings.importance == "peak" else traces)
        self.traces, self.out, self.settings = traces, out, settings
        self.device, self.rank, self.world = device, rank, world
        s = settings
        self.protected = Protected(s.sinks, s.recent)
        usable, (n_layer, n_head_kv, dk, dv) = check_traces(traces, self.protected)
        # every so manieth trace validates; with a single one it does both
        apart = max(2, round(1 / s.validation))
        held_out = usable[apart // 2 :: apart] if len(usable) >= 2 else usable
        held_out = held_out or usable[-1:]
        training = [i for i in usable if i not in set(held_out)] or usable
        self.states = choose_states(traces, held_out, self.protected, s.validation_states)
        together = s.objective == "global"
        self.shape = AgentShape(n_layer, n_head_kv, dk, dv, s.hidden, s.context, together)
        self.sampler = Sampler(traces, training, self.protected, s.context, s.states, s.tokens)
        self.golden: Sampler | None = None
        if s.objective == "foresight":
            self.golden = self._golden_sampler(training)
        self.texts, self.held_out_texts = training, held_out
        self.all_heads = np.arange(self.shape.n_heads)

        self.agents = Agents(self.shape, s.seed)
        mean, scale = standardisation(traces, training, self.all_heads)
        self.agents.mean.copy_(mean)
        self.agents.scale.copy_(scale)
        self.agents.to(device)
        self.ema = Agents(self.shape).to(device)
        self.ema.load_state_dict(self.agents.state_dict())
        #: The supervised agents from which rollouts start.
        self.start = Agents(self.shape).to(device)
        parameters = {k: p for k, p in self.agents.named_parameters() if p.requires_grad}
        tokens = {"log_aggregate": parameters.pop("log_aggregate")}
        self.optimisers = {"token": HeadAdamW(tokens, 0.0)}
        if together:
            self.optimisers["shared"] = HeadAdamW({"out": parameters.pop("out")}, 0.0)
        self.optimisers["heads"] = HeadAdamW(parameters, s.weight_decay)
        if s.objective == "foresight":
            self.optimisers["rollouts"] = HeadAdamW(parameters, 0.0)
        self.rollouts: Rollouts | None = None
        self.readings: dict[int, Reading] = {}
        self.increase: tuple[float, float] | None = None
        self.step = 0
        self.best = math.inf
        self.stakes = np.ones(self.shape.n_heads)
        self.seconds = 0.0

    def _golden_sampler(self, training: list[int]) -> Sampler:
        s = self.settings
        golden = GoldenEvictions(s.budget, s.every, self.protected)
        long = [i for i in training if golden.times(self.traces[i])]
        if not long:
            raise TrainingError(
                f"no trace is long enough for an eviction: with a budget of {s.budget} and "
                f"{s.every} tokens between evictions, more than {s.budget + s.every} are needed. "
                "Lower budget, or trace longer texts"
            )
        return Sampler(
            self.traces, long, self.protected, s.context, s.states, s.tokens, states_of=golden
        )

    @contextmanager
    def rolling(
        self, model: str | os.PathLike[str] | None, engine: dict[str, Any]
    ) -> Iterator[None]:
        """Open the model if there will be rollouts.

        Raises:
            TrainingError: no model, not the traced one, or texts that are too short.
        """
        s = self.settings
        if dict(s.phases).get("rollouts", 0) == 0:
            yield
            return
        if model is None:
            raise TrainingError(
                "rollouts evict in the model itself: name the traced file with --model, or leave "
                "them out with --grpo-steps 0"
            )
        if self.facts.get("fingerprint") not in (None, model_fingerprint(model)):
            raise TrainingError(
                f"'{os.fspath(model)}' is not the model that was traced: rollouts need the same "
                "file"
            )
        long = s.budget + 2 * s.every
        self.texts = [i for i in self.texts if self._text(i).size > long]
        self.held_out_texts = [i for i in self.held_out_texts if self._text(i).size > long]
        if not self.texts or not self.held_out_texts:
            raise TrainingError(
                f"rollouts need texts of more than {long} tokens to train on and to validate with: "
                "lower budget, or trace longer texts"
            )
        self.held_out_texts = self.held_out_texts[:_ROLLOUT_TEXTS]
        longest = max(self._text(i).size for i in (*self.texts, *self.held_out_texts))
        self.rollouts = Rollouts(model, longest, s, engine)
        try:
            yield
        finally:
            self.rollouts.close()

    def _text(self, index: int) -> npt.NDArray[np.int32]:
        tokens: npt.NDArray[np.int32] | None = getattr(self.traces[index], "tokens", None)
        if tokens is None:
            raise TrainingError("the traces do not say which tokens they are of: trace again")
        return tokens

    # -- what lies in the folder -------------------------------------------------------------

    def _about(self, quality: Quality | None = None) -> checkpoint.About:
        settings = {**asdict(self.settings), "n_traces": len(self.traces)}
        return checkpoint.About(
            self.shape, settings, self.facts, self.step, plain(quality) if quality else {}
        )

    def _resume(self) -> None:
        path = self.out / checkpoint.LAST
        if not path.exists():
            if (self.out / checkpoint.BEST).exists():
                raise TrainingError(f"'{self.out}' holds a finished policy: choose another folder")
            return
        state, about = checkpoint.load(path)
        mine = self._about()
        theirs, ours = about.settings | about.model, mine.settings | mine.model
        other = [key for key in ours if theirs.get(key) != ours[key]]
        if other or about.shape != self.shape:
            key = other[0] if other else "shape"
            detail = f": {theirs.get(key)} instead of {ours[key]}" if other else ""
            raise TrainingError(
                f"'{self.out}' holds a run of other settings ({key}{detail}): choose another "
                "folder, or the same settings to go on with it"
            )
        self.agents.load_state_dict(_under("agents.", state))
        self.ema.load_state_dict(_under("ema.", state))
        self.start.load_state_dict(_under("start.", state))
        for name, optimiser in self.optimisers.items():
            optimiser.load(_under(name + ".", state))
        if "increase" in state:
            before, after = state["increase"].tolist()
            self.increase = before, after
        self.stakes = state["stakes"].numpy()
        self.best = float(state["best"])
        self.seconds = float(state["seconds"])
        self.step = about.step

    def _save(self) -> None:
        if self.rank:
            return
        tensors = {"agents." + k: v for k, v in self.agents.state_dict().items()}
        tensors |= {"ema." + k: v for k, v in self.ema.state_dict().items()}
        tensors |= {"start." + k: v for k, v in self.start.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            tensors |= {f"{name}.{k}": v for k, v in optimiser.state().items()}
        if self.increase:
            tensors["increase"] = torch.tensor(self.increase, dtype=torch.float64)
        tensors["stakes"] = torch.from_numpy(self.stakes)
        tensors["best"] = torch.tensor(self.best, dtype=torch.float64)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        checkpoint.save(self.out / checkpoint.LAST, tensors, self._about())

    def _log(self, **what: Any) -> None:
        if self.rank == 0:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **what}) + "\n")

    # -- the run -----------------------------------------------------------------------------

    def go(self, progress: bool, stop_after: int | None) -> Result:
        s = self.settings
        self.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        baselines = {
            name: measure(heuristic_scorer(name), self.traces, self.states, self.protected)
            for name in BASELINES
        }
        if hasattr(self.traces[0], "received"):
            for name, scorer in ATTENTION_BASELINES.items():
                baselines[name] = measure(scorer, self.traces, self.states, self.protected)
        equal = weighted(np.ones(self.shape.n_heads))
        baselines["oracle"] = measure(
            oracle_scorer(), self.traces, self.states, self.protected, equal
        )
        end = sum(steps for _, steps in s.phases)
        stop = end if stop_after is None else min(end, self.step + stop_after)
        bar = tqdm(total=end, initial=self.step, unit="step", disable=not progress)
        bar.set_description(_beside(baselines))
        with bar:
            while self.step < stop:
                phase, first, last = self._phase()
                if self.step == first and phase != "heads":
                    self._begin(phase)
                started = time.perf_counter()
                rate = self._lr(self.step - first, last - first, _PEAKS[phase])
                loss = self._step_of(phase, rate)
                self.seconds += time.perf_counter() - started
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"training diverged at step {self.step}: lower lr ({s.lr}). The "
                        f"checkpoints in '{self.out}' are from before that"
                    )
                self.step += 1
                bar.update()
                every = _ROLLOUT_EVAL if phase == "rollouts" else s.eval_every
                if (self.step - first) % every == 0 or self.step in (last, stop):
                    bar.set_postfix_str(self._validate(phase))
        agents, _ = checkpoint.load_agents(self.out)
        quality = self._measure(agents.to(self.device))
        drawn = self.step * s.states * s.tokens * self.world
        result = Result(
            self.out, quality, baselines, drawn / max(self.seconds, 1e-9), self.increase
        )
        if self.rank == 0 and self.step == end:
            report = {
                "policy": plain(quality),
                **{name: plain(q) for name, q in baselines.items()},
                "tokens_per_second": result.tokens_per_second,
                "seconds": self.seconds,
                "loss_increase": self.increase,
            }
            (self.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        return result

    def _phase(self) -> tuple[Phase, int, int]:
        """The phase that the next step is of, and where it begins and ends."""
        first = 0
        for phase, steps in self.settings.phases:
            if self.step < first + steps:
                return phase, first, first + steps
            first += steps
        raise AssertionError("the run is over")

    def _begin(self, phase: Phase) -> None:
        """Go on from the best agents, and judge from now on by what the phase is about."""
        if self.world > 1:
            distributed.barrier()
        best, _ = checkpoint.load_agents(self.out)
        self.agents.load_state_dict(best.state_dict())
        if phase == "rollouts":
            self.start.load_state_dict(best.state_dict())
            before = self._loss_increase(self.agents)
            self.increase = before, before
            self.best = before
        else:
            # Heads start with equal say: their scores are brought to one scale.
            spread = self._spread()
            with torch.no_grad():
                self.agents.log_aggregate.copy_(-torch.log(spread * len(spread)))
            self.best = math.inf
        self.ema.load_state_dict(self.agents.state_dict())

    def _step_of(self, phase: Phase, rate: float) -> float:
        if phase == "rollouts":
            return self._rollout_step(rate)
        if phase == "tokens":
            return self._token_step(rate)
        return self._gates_step(rate) if self.shape.shared_out else self._heads_step(rate)

    def _measure(self, agents: Agents) -> Quality:
        scorer, whole = scorer_of(agents, self.settings.horizon)
        return measure(scorer, self.traces, self.states, self.protected, whole)

    def _validate(self, phase: Phase) -> str:
        """Measure the averaged agents; keep the best; write a checkpoint to go on from."""
        quality = self._measure(self.ema)
        shown = f"cost {quality.cost.mean():.2f}"
        # Attention lost rather than cost: a mean of cost ratios hides the few heads that matter.
        at_stake = quality.token_lost if phase == "tokens" else float(quality.lost.mean())
        if phase == "rollouts":
            at_stake = self._loss_increase(self.ema)
            shown = f"loss +{at_stake:.3f}"
        if at_stake < self.best or not (self.out / checkpoint.BEST).exists():
            self.best = at_stake
            if phase == "rollouts" and self.increase:
                self.increase = self.increase[0], at_stake
            if self.rank == 0:
                tensors = self.ema.state_dict()
                checkpoint.save(self.out / checkpoint.BEST, tensors, self._about(quality))
        self.stakes = quality.lost.copy()
        more = {"loss_increase": at_stake} if phase == "rollouts" else {}
        self._log(**plain(quality), **more)
        self._save()
        return shown

    def _loss_increase(self, agents: Agents) -> float:
        """What evictions cost a token of the validation's texts, in nats; the best actions."""
        assert self.rollouts is not None
        rises = []
        for index in self.held_out_texts:
            text, full = self._text(index).tolist(), self._full(index)
            rises.append(self.rollouts.roll(text, agents, None).losses - full.losses)
        return float(np.concatenate(rises).mean())

    def _full(self, index: int) -> Reading:
        assert self.rollouts is not None
        if index not in self.readings:
            self.readings[index] = self.rollouts.full(self._text(index).tolist())
        return self.readings[index]

    def _spread(self) -> Tensor:
        """Standard deviation of each head's scores in a state: f32 [N]."""
        batch = self.sampler.draw(np.random.default_rng([self.settings.seed, 1]), self.all_heads)
        with torch.no_grad():
            scores, _ = self._score(batch.to(self.device), None)
        mask = batch.present.to(self.device)
        inside = torch.where(mask, scores, torch.nan)
        mean = inside.nanmean(-1, keepdim=True)
        return (inside - mean).square().nanmean(-1).sqrt().mean(1).clamp_min(1e-6)

    def _batch(
        self, sampler: Sampler, heads: npt.NDArray[np.intp]
    ) -> tuple[Batch, torch.Generator]:
        seed = [self.settings.seed, 0, self.step, self.rank]
        batch = sampler.draw(np.random.default_rng(seed), heads).to(self.device)
        noise = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        return batch, torch.Generator(self.device).manual_seed(noise)

    def _score(self, batch: Batch, heads: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores [n, B, m] of a batch, and the same with PADDING where nothing competes."""
        with self._autocast():
            scores = self.agents(batch.features, batch.known, heads)
        scores = scores.view(scores.shape[0], *batch.present.shape[1:])
        return scores, scores.masked_fill(~batch.present, PADDING)

    def _autocast(self) -> torch.autocast:
        bf16 = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def _heads_step(self, rate: float) -> float:
        s, heads = self.settings, self._choose_heads()
        index = torch.from_numpy(heads).to(self.device)
        if self.golden is None:
            batch, generator = self._batch(self.sampler, heads)
            _, scores = self._score(batch, index)
            loss = self._kvp(scores, batch.importance, generator)
        else:
            batch, generator = self._batch(self.golden, heads)
            scores, _ = self._score(batch, index)
            loss = hinge_loss(scores, batch.importance, batch.present, s.margin, generator)
        return self._descend(loss.mean(-1).sum(), {"heads": index}, rate)

    def _gates_step(self, rate: float) -> float:
        s = self.settings
        total = 0.0
        rng = np.random.default_rng([s.seed, 0, self.step, self.rank])
        for _ in range(s.states):
            index = int(rng.choice(self.sampler.usable))
            found = gates.lesson(self.traces[index], index, s.importance, self.protected, rng)
            found = found.to(self.device)
            with self._autocast():
                scores = self.agents(found.features)[:, 0]
            loss = gates.retention_loss(
                scores, found.wanted, found.times, self.protected, s.capacity, s.capacity_weight
            )
            (loss / s.states).backward()
            total += float(loss.detach()) / s.states
        one = torch.zeros(1, dtype=torch.long, device=self.device)
        index_all = torch.from_numpy(self.all_heads).to(self.device)
        self._move({"heads": index_all, "shared": one}, rate)
        return total

    def _rollout_step(self, rate: float) -> float:
        """Several rollouts of some texts, learned from a few times."""
        s, rollouts = self.settings, self.rollouts
        assert rollouts is not None
        seed = [s.seed, 3, self.step, self.rank]
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        played = []
        for index in rng.choice(self.texts, s.texts, replace=len(self.texts) < s.texts).tolist():
            text, full = self._text(index).tolist(), self._full(index)
            group = [rollouts.roll(text, self.agents, generator) for _ in range(s.rollouts)]
            returns = np.stack([rollouts.returns(rollout, full) for rollout in group])
            gains = advantages(torch.from_numpy(returns).float().to(self.device))
            played += list(zip(group, gains, strict=True))
        with torch.no_grad():
            before = [r.log_probabilities(self.agents, s.temperature) for r, _ in played]
            start = [r.log_probabilities(self.start, s.temperature) for r, _ in played]
        heads = torch.from_numpy(self.all_heads).to(self.device)
        total = 0.0
        for _ in range(s.passes):
            total = 0.0
            for (rollout, gain), old, first in zip(played, before, start, strict=True):
                new = rollout.log_probabilities(self.agents, s.temperature)
                loss = grpo_loss(new, old, first, gain, s.clip, s.kl).sum() / len(played)
                loss.backward()
                total += float(loss.detach())
            self._move({"rollouts": heads}, rate, memory=0.9)
        return total

    def _token_step(self, rate: float) -> float:
        batch, generator = self._batch(self.sampler, self.all_heads)
        with torch.no_grad():
            scores, _ = self._score(batch, None)
        whole = self.agents.token_scores(scores).masked_fill(~batch.present[0], PADDING)
        index = torch.from_numpy(self.all_heads).to(self.device)
        loss = self._kvp(whole[None], batch.importance.sum(0)[None], generator)
        return self._descend(loss.mean(-1).sum(), {"token": index}, rate)

    def _kvp(self, scores: Tensor, importance: Tensor, generator: torch.Generator) -> Tensor:
        s = self.settings
        return surrogate_loss(
            scores,
            importance,
            s.rankings,
            weights=s.rank_weights,
            advantage=s.advantage,
            generator=generator,
        )

    def _descend(self, total: Tensor, heads: dict[str, Tensor], rate: float) -> float:
        """``total`` is a sum over heads, which keeps separate agents separate."""
        total.backward()
        self._move(heads, rate)
        return float(total.detach())

    def _move(self, heads: dict[str, Tensor], rate: float, memory: float | None = None) -> None:
        """Step the optimisers by the gradients that have been gathered, each with its heads."""
        for name, index in heads.items():
            if self.world > 1:
                for parameter in self.optimisers[name].parameters.values():
                    if parameter.grad is not None:
                        distributed.all_reduce(parameter.grad)
                        parameter.grad /= self.world
            self.optimisers[name].step(index, rate)
        self._average(self.settings.ema if memory is None else memory)

    def _lr(self, step: int, end: int, peak: str) -> float:
        """Linear warm-up to the setting ``peak``, then a cosine to 0."""
        top: float = getattr(self.settings, peak)
        warm = min(self.settings.warmup, max(1, end // 4))
        if step < warm:
            return top * (step + 1) / warm
        return top * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, end - warm)))

    def _choose_heads(self) -> npt.NDArray[np.intp]:
        """A share of the heads without replacement, by what each still loses in validation."""
        n = max(1, math.ceil(self.settings.effort * self.shape.n_heads))
        if n == self.shape.n_heads:
            return self.all_heads
        # half of the effort is spread evenly: a head that looks done may be stuck
        share = 0.5 / len(self.stakes) + 0.5 * self.stakes / max(self.stakes.sum(), 1e-12)
        rng = np.random.default_rng([self.settings.seed, 2, self.step])  # the same on all ranks
        return np.sort(rng.choice(self.all_heads, n, replace=False, p=share / share.sum()))

    def _average(self, memory: float) -> None:
        # a short memory at first, or the average would long remember the random start
        decay = min(memory, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(self.ema.parameters(), self.agents.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)


#: Which setting is the highest learning rate of a phase.
_PEAKS: dict[Phase, str] = {"heads": "lr", "rollouts": "grpo_lr", "tokens": "token_lr"}


def scorer_of(agents: Agents, horizon: int) -> tuple[Scorer, Whole]:
    """What agents say of tokens, and of whole tokens, when n of them were read; ``horizon`` of
    gates."""
    score = agent_scorer(agents)
    if not agents.shape.shared_out:
        return score, weighted(agents.log_aggregate.detach().exp().cpu().numpy())

    def left(trace: TraceLike, n: int) -> npt.NDArray[np.float32]:
        return log_future_use(score(trace, n), n - trace.positions[:n], horizon)

    return left, log_total


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def _tokens(quality: Quality) -> dict[str, float]:
    return {"token_cost": quality.token_cost, "token_lost": quality.token_lost}


def plain(quality: Quality) -> dict[str, Any]:
    """As JSON has it."""
    return {"cost": quality.cost.tolist(), "lost": quality.lost.tolist(), **_tokens(quality)}


def _beside(baselines: dict[str, Quality]) -> str:
    """The baselines' cost, to stand beside the policy's in the progress bar."""
    return ", ".join(f"{name} {baselines[name].cost.mean():.1f}" for name in BASELINES)
