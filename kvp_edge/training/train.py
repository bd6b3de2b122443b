"""The training run: all heads at once, then the weights that add heads up to tokens.

Steps 0 .. steps - 1 train the agents by the KVP objective, each head on its own importance. A share
(``effort``) of the heads takes part in each of them, drawn by what they still lose in validation:
most heads have little to lose. The ``token_steps`` after that train, with the agents as
they were at their best, only the heads' weights in a whole token's score, by the same objective on
the importance summed over heads.

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
from kvp_edge.training import checkpoint
from kvp_edge.training.agent import Agents, AgentShape
from kvp_edge.training.attention_baselines import ATTENTION_BASELINES
from kvp_edge.training.data import (
    Batch,
    InMemory,
    Peaks,
    Protected,
    Sampler,
    TraceSetLike,
    check_traces,
    model_facts,
    standardisation,
)
from kvp_edge.training.head_adamw import HeadAdamW
from kvp_edge.training.objective import PADDING, surrogate_loss
from kvp_edge.training.settings import Settings
from kvp_edge.training.validate import (
    Quality,
    agent_scorer,
    choose_states,
    heuristic_scorer,
    measure,
    oracle_scorer,
)

#: Policies that see what a bounded chat sees.
BASELINES = ("keydiff", "knorm", "recency", "random")


@dataclass(frozen=True)
class Result:
    """What a run found. ``quality`` and ``baselines`` are of the validation states."""

    folder: Path
    quality: Quality
    baselines: dict[str, Quality]
    tokens_per_second: float


def train(
    traces: TraceSetLike,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    device: str | None = None,
    progress: bool = True,
    stop_after: int | None = None,
) -> Result:
    """Train a policy, or go on with the run that lies in ``out``.

    Args:
        device: "cpu", "cuda" or None: CUDA where there is one.
        stop_after: stop after so many steps, with a checkpoint, as if interrupted.

    Raises:
        TrainingError: traces or folder that cannot be used. What was finished is kept.
    """
    settings = settings or Settings()
    with _workers(device) as (torch_device, rank, world):
        run = _Run(traces, Path(out), settings, torch_device, rank, world)
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
        self.shape = AgentShape(n_layer, n_head_kv, dk, dv, s.hidden, s.context)
        self.sampler = Sampler(traces, training, self.protected, s.context, s.states, s.tokens)
        self.all_heads = np.arange(self.shape.n_heads)

        self.agents = Agents(self.shape, s.seed)
        mean, scale = standardisation(traces, training, self.all_heads)
        self.agents.mean.copy_(mean)
        self.agents.scale.copy_(scale)
        self.agents.to(device)
        parameters = {k: p for k, p in self.agents.named_parameters() if p.requires_grad}
        token_parameters = {"log_aggregate": parameters.pop("log_aggregate")}
        self.optimiser = HeadAdamW(parameters, s.weight_decay)
        self.token_optimiser = HeadAdamW(token_parameters, 0.0)
        self.ema = Agents(self.shape).to(device)
        self.ema.load_state_dict(self.agents.state_dict())
        self.step = 0
        self.best = math.inf
        self.stakes = np.ones(self.shape.n_heads)
        self.seconds = 0.0

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
        self.optimiser.load(_under("heads.", state))
        self.token_optimiser.load(_under("token.", state))
        self.stakes = state["stakes"].numpy()
        self.best = float(state["best"])
        self.seconds = float(state["seconds"])
        self.step = about.step

    def _save(self) -> None:
        if self.rank:
            return
        tensors = {"agents." + k: v for k, v in self.agents.state_dict().items()}
        tensors |= {"ema." + k: v for k, v in self.ema.state_dict().items()}
        tensors |= {"heads." + k: v for k, v in self.optimiser.state().items()}
        tensors |= {"token." + k: v for k, v in self.token_optimiser.state().items()}
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
        baselines["oracle"] = measure(
            oracle_scorer(), self.traces, self.states, self.protected, np.ones(self.shape.n_heads)
        )
        end = s.steps + s.token_steps
        stop = end if stop_after is None else min(end, self.step + stop_after)
        bar = tqdm(total=end, initial=self.step, unit="step", disable=not progress)
        bar.set_description(_beside(baselines))
        with bar:
            while self.step < stop:
                started = time.perf_counter()
                loss = self._heads_step() if self.step < s.steps else self._token_step()
                self.seconds += time.perf_counter() - started
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"training diverged at step {self.step}: lower lr ({s.lr}). The "
                        f"checkpoints in '{self.out}' are from before that"
                    )
                self.step += 1
                bar.update()
                if self.step % s.eval_every == 0 or self.step in (s.steps, stop):
                    quality = self._validate()
                    bar.set_postfix_str(f"cost {quality.cost.mean():.2f}")
        agents, _ = checkpoint.load_agents(self.out)
        quality = self._measure(agents.to(self.device))
        drawn = self.step * s.states * s.tokens * self.world
        result = Result(self.out, quality, baselines, drawn / max(self.seconds, 1e-9))
        if self.rank == 0 and self.step == end:
            report = {
                "policy": plain(quality),
                **{name: plain(q) for name, q in baselines.items()},
                "tokens_per_second": result.tokens_per_second,
                "seconds": self.seconds,
            }
            (self.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        return result

    def _measure(self, agents: Agents) -> Quality:
        weights = agents.log_aggregate.detach().exp().cpu().numpy()
        scorer = agent_scorer(agents)
        return measure(scorer, self.traces, self.states, self.protected, weights)

    def _validate(self) -> Quality:
        """Measure the averaged agents; keep the best; write a checkpoint to go on from."""
        s = self.settings
        quality = self._measure(self.ema)
        # Attention lost rather than cost: a mean of cost ratios hides the few heads that matter.
        at_stake = quality.token_lost if self.step > s.steps else float(quality.lost.mean())
        if at_stake < self.best or not (self.out / checkpoint.BEST).exists():
            self.best = at_stake
            if self.rank == 0:
                tensors = self.ema.state_dict()
                checkpoint.save(self.out / checkpoint.BEST, tensors, self._about(quality))
        self.stakes = quality.lost.copy()
        if self.step == s.steps and s.token_steps:
            self._begin_token_steps()
        self._log(cost=quality.cost.tolist(), lost=quality.lost.tolist(), **_tokens(quality))
        self._save()
        return quality

    def _begin_token_steps(self) -> None:
        """Go on from the best agents, and judge from now on by whole tokens."""
        if self.world > 1:
            distributed.barrier()
        best, _ = checkpoint.load_agents(self.out)
        self.agents.load_state_dict(best.state_dict())
        # Heads start with equal say: their scores are brought to one scale.
        spread = self._spread()
        with torch.no_grad():
            self.agents.log_aggregate.copy_(-torch.log(spread * len(spread)))
        self.ema.load_state_dict(self.agents.state_dict())
        self.best = math.inf

    def _spread(self) -> Tensor:
        """Standard deviation of each head's scores in a state: f32 [N]."""
        batch = self.sampler.draw(np.random.default_rng([self.settings.seed, 1]), self.all_heads)
        with torch.no_grad():
            scores, _ = self._score(batch.to(self.device), None)
        mask = batch.present.to(self.device)
        inside = torch.where(mask, scores, torch.nan)
        mean = inside.nanmean(-1, keepdim=True)
        return (inside - mean).square().nanmean(-1).sqrt().mean(1).clamp_min(1e-6)

    def _batch(self, heads: npt.NDArray[np.intp]) -> tuple[Batch, torch.Generator]:
        seed = [self.settings.seed, 0, self.step, self.rank]
        batch = self.sampler.draw(np.random.default_rng(seed), heads).to(self.device)
        noise = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
        return batch, torch.Generator(self.device).manual_seed(noise)

    def _score(self, batch: Batch, heads: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores [n, B, m] of a batch, and the same with PADDING where nothing competes."""
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            scores = self.agents(batch.features, batch.known, heads)
        scores = scores.view(scores.shape[0], *batch.present.shape)
        return scores, scores.masked_fill(~batch.present, PADDING)

    def _heads_step(self) -> float:
        heads = self._choose_heads()
        batch, generator = self._batch(heads)
        index = torch.from_numpy(heads).to(self.device)
        _, scores = self._score(batch, index)
        return self._improve(self.optimiser, index, scores, batch.importance, generator, 0)

    def _token_step(self) -> float:
        batch, generator = self._batch(self.all_heads)
        with torch.no_grad():
            scores, _ = self._score(batch, None)
        whole = self.agents.token_scores(scores).masked_fill(~batch.present, PADDING)
        index = torch.from_numpy(self.all_heads).to(self.device)
        importance = batch.importance.sum(0)
        return self._improve(
            self.token_optimiser, index, whole[None], importance[None], generator, 1
        )

    def _improve(
        self,
        optimiser: HeadAdamW,
        heads: Tensor,
        scores: Tensor,
        importance: Tensor,
        generator: torch.Generator,
        phase: int,
    ) -> float:
        s = self.settings
        loss = surrogate_loss(
            scores,
            importance,
            s.rankings,
            weights=s.rank_weights,
            advantage=s.advantage,
            generator=generator,
        )
        total = loss.mean(-1).sum()  # heads are separate agents: a sum keeps them so
        total.backward()
        if self.world > 1:
            for parameter in optimiser.parameters.values():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.world
        optimiser.step(heads, self._lr(phase))
        self._average()
        return float(total.detach())

    def _lr(self, phase: int) -> float:
        s = self.settings
        step, end, peak = self.step, s.steps, s.lr
        if phase:
            step, end, peak = self.step - s.steps, s.token_steps, s.token_lr
        warm = min(s.warmup, max(1, end // 4))
        if step < warm:
            return peak * (step + 1) / warm
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, end - warm)))

    def _choose_heads(self) -> npt.NDArray[np.intp]:
        """A share of the heads without replacement, by what each still loses in validation."""
        n = max(1, math.ceil(self.settings.effort * self.shape.n_heads))
        if n == self.shape.n_heads:
            return self.all_heads
        # half of the effort is spread evenly: a head that looks done may be stuck
        share = 0.5 / len(self.stakes) + 0.5 * self.stakes / max(self.stakes.sum(), 1e-12)
        rng = np.random.default_rng([self.settings.seed, 2, self.step])  # the same on all ranks
        return np.sort(rng.choice(self.all_heads, n, replace=False, p=share / share.sum()))

    def _average(self) -> None:
        # a short memory at first, or the average would long remember the random start
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(self.ema.parameters(), self.agents.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)


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
