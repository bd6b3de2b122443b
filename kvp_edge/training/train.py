"""The training run: up to three phases (Settings.phases), each from the best of the one before.

"heads" trains the agents on traces. With the objectives kvp, foresight and regression heads (or
layers: the setting ``scope``) are separate agents, and each step trains a share (``effort``) of
them, drawn by what they still lose in validation. With the objective global all are trained
together. "rollouts" (foresight) and "distil" (global) continue in the model itself. "tokens" trains
only the heads' weights in a whole token's score, by the KVP objective on the importance summed over
heads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from kvp_edge.binding.fingerprint import model_fingerprint
from kvp_edge.errors import TrainingError
from kvp_edge.files import write_whole
from kvp_edge.policies.retention import log_future_use, log_total
from kvp_edge.traces.stream import TraceStream
from kvp_edge.training import checkpoint
from kvp_edge.training.agent import Agents, AgentShape
from kvp_edge.training.attention_baselines import ATTENTION_BASELINES
from kvp_edge.training.data import (
    Protected,
    Sampler,
    States,
    TraceLike,
    TraceSetLike,
    model_facts,
    standardisation,
)
from kvp_edge.training.foresight import GoldenEvictions
from kvp_edge.training.learner import Learner, Worker
from kvp_edge.training.phases import Distil, Gates, Heads, InModel, Phase, Texts, Tokens
from kvp_edge.training.rollouts import Rollouts
from kvp_edge.training.settings import PhaseName, Settings
from kvp_edge.training.supply import supply_of
from kvp_edge.training.twin import Twin
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

#: Policies that see what a bounded chat sees.
BASELINES = ("keydiff", "knorm", "recency", "random")


@dataclass(frozen=True)
class Result:
    """The result of a run. ``quality`` and ``baselines`` are measured on the validation states.
    ``loss_increase`` (rollouts) is the cost of evictions per token of the validation texts, in
    nats, before and after."""

    folder: Path
    quality: Quality
    baselines: dict[str, Quality]
    tokens_per_second: float
    loss_increase: tuple[float, float] | None = None


def train(
    traces: TraceSetLike | TraceStream,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    device: str | None = None,
    progress: bool = True,
    stop_after: int | None = None,
    model: str | os.PathLike[str] | None = None,
    engine: dict[str, Any] | None = None,
) -> Result:
    """Train a policy, or resume the run in ``out``.

    Args:
        traces: of one model: those of a folder, or a stream, which is read meanwhile
            (kvp_edge.training.supply).
        model: the traced GGUF file, in which rollouts evict.
        engine: llama_cpp.Llama's arguments for it.
        device: "cpu", "cuda" or None: CUDA where there is one.
        stop_after: stop after so many steps, with a checkpoint, as if interrupted.

    Raises:
        TrainingError: the traces or the folder cannot be used. Finished work is kept.
    """
    settings = settings or Settings()
    with _worker(device) as worker:
        run = _Run(traces, Path(out), settings, worker)
        with run.opened(model, engine or {}):
            return run.go(progress and worker.rank == 0, stop_after)


@contextmanager
def _worker(device: str | None) -> Iterator[Worker]:
    """This process; started by torchrun or alone."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Worker(torch.device(chosen))
        return
    if chosen == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if chosen == "cuda" else "gloo")
    try:
        yield Worker(torch.device(chosen), distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()


class _Run:
    def __init__(
        self, traces: TraceSetLike | TraceStream, out: Path, settings: Settings, worker: Worker
    ) -> None:
        self.facts = model_facts(traces)
        self.out, self.settings, self.worker = out, settings, worker
        s = settings
        self.protected = Protected(s.sinks, s.recent)
        self.supply = supply_of(traces, s)
        self.traces = self.supply.traces
        n_layer, n_head_kv, dk, dv = self.supply.shape
        together = s.objective == "global"
        ageing = s.objective == "regression"
        self.shape = AgentShape(
            n_layer, n_head_kv, dk, dv, s.hidden, s.context, together, s.scope, ageing
        )
        self.step = 0
        # another run's folder is refused before anything is read
        self.saved = self._find_saved()
        self.supply.advance(self.step)
        self.training, self.held_out = self.supply.training, self.supply.held_out
        self.states = choose_states(self.traces, self.held_out, self.protected, s.validation_states)
        agents = Agents(self.shape, s.seed)
        if self.saved is None:  # a saved run has its own
            every, each = np.arange(self.shape.n_agents), self.shape.heads_each
            mean, scale = standardisation(self.traces, self.training, every, heads_each=each)
            agents.mean.copy_(mean)
            agents.scale.copy_(scale)
        self.learner = Learner(agents, s, worker)
        self.golden: GoldenEvictions | None = None
        self.long: list[int] = []
        self.phases: dict[PhaseName, Phase] = {}
        self.best = math.inf
        self.seconds = 0.0

    @contextmanager
    def opened(
        self, model: str | os.PathLike[str] | None, engine: dict[str, Any]
    ) -> Iterator[None]:
        """Prepare all phases and their data.

        Raises:
            TrainingError: a phase needs a model and there is none, or it is not the traced one, or
                texts are too short.
        """
        s, supply, learner = self.settings, self.supply, self.learner
        sampler = self._sampler(self.training)
        counts = dict(s.phases)
        if any(counts.get(name) for name in ("rollouts", "distil")):
            model = self._traced(model)
        with ExitStack() as stack:
            if s.objective == "global":
                self.phases["heads"] = Gates(learner, sampler)
            else:
                golden = self._golden() if s.objective == "foresight" else sampler
                self.phases["heads"] = Heads(learner, golden)
                self.phases["tokens"] = Tokens(learner, sampler)
            if counts.get("distil"):
                texts, held_out = (Texts(supply, i, 1) for i in (supply.texts, self.held_out))
                twin = Twin.load(str(model), str(self.worker.device))
                self.phases["distil"] = Distil(learner, twin, texts, held_out)
            if counts.get("rollouts"):
                long = s.budget + 2 * s.every
                texts, held_out = (Texts(supply, i, long) for i in (supply.texts, self.held_out))
                longest = max(t[i].size for t in (texts, held_out) for i in t.indices)
                rollouts = Rollouts(str(model), longest, s, engine)
                stack.callback(rollouts.close)
                self.phases["rollouts"] = InModel(learner, rollouts, texts, held_out)
            yield

    def _golden(self) -> Sampler:
        s = self.settings
        self.golden = GoldenEvictions(s.budget, s.every, self.protected)
        self._find_long()
        return self._sampler(self.long, self.golden)

    def _find_long(self) -> None:
        """The traces long enough for an eviction; states of those that are gone are forgotten."""
        golden, s = self.golden, self.settings
        if golden is None:
            return
        golden.forget(but=self.training)
        self.long[:] = [i for i in self.training if golden.times(self.traces[i])]
        if not self.long:
            raise TrainingError(
                f"no trace is long enough for an eviction: with a budget of {s.budget} and "
                f"{s.every} tokens between evictions, more than {s.budget + s.every} are needed. "
                "Lower budget, or trace longer texts"
            )

    def _sampler(self, usable: list[int], states_of: States | None = None) -> Sampler:
        s = self.settings
        return Sampler(
            self.traces,
            usable,
            self.protected,
            s.context,
            s.states,
            s.tokens,
            states_of=states_of,
            heads_each=self.shape.heads_each,
        )

    def _traced(self, model: str | os.PathLike[str] | None) -> str:
        if model is None:
            raise TrainingError(
                "rollouts and distillation run the model itself: name the traced file with "
                "--model, or leave them out with --grpo-steps 0 and --distil-steps 0"
            )
        if not os.path.isfile(model):
            raise TrainingError(f"model file '{os.fspath(model)}' not found")
        if self.facts.get("fingerprint") not in (None, model_fingerprint(model)):
            raise TrainingError(
                f"'{os.fspath(model)}' is not the model that was traced: rollouts and distillation "
                "need the same file"
            )
        return os.fspath(model)

    # -- the folder --------------------------------------------------------------------------

    def _about(self, quality: Quality | None = None) -> checkpoint.About:
        settings = {**asdict(self.settings), **self.supply.about}
        return checkpoint.About(
            self.shape, settings, self.facts, self.step, plain(quality) if quality else {}
        )

    def _find_saved(self) -> dict[str, Tensor] | None:
        """What an earlier run has left to resume from, if any; ``step`` becomes its step.

        Raises:
            TrainingError: it had other settings or traces, or is finished, or damaged.
        """
        path = self.out / checkpoint.LAST
        if not path.exists():
            if (self.out / checkpoint.BEST).exists():
                raise TrainingError(
                    f"'{self.out}' already has a finished policy: choose another folder"
                )
            return None
        state, about = checkpoint.load(path)
        mine = self._about()
        theirs, ours = about.settings | about.model, mine.settings | mine.model
        other = [key for key in ours if theirs.get(key) != ours[key]]
        if other or about.shape != self.shape:
            key = other[0] if other else "shape"
            detail = f": {theirs.get(key)} instead of {ours[key]}" if other else ""
            raise TrainingError(
                f"'{self.out}' has a run with other settings ({key}{detail}): choose another "
                "folder, or use the same settings to resume it"
            )
        self.step = about.step
        return state

    def _resume(self) -> None:
        if self.saved is None:
            return
        state, self.saved = self.saved, None
        try:
            self.learner.load(state)
            for phase in self.phases.values():
                phase.load(state)
            self.best = float(state["best"])
            self.seconds = float(state["seconds"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:  # torch's and safetensors'
            raise TrainingError(
                f"the checkpoint '{self.out / checkpoint.LAST}' is damaged ({error}): choose "
                "another folder"
            ) from error

    def _save(self) -> None:
        if self.worker.rank:
            return
        tensors = self.learner.state()
        for phase in self.phases.values():
            tensors |= phase.state()
        tensors["best"] = torch.tensor(self.best, dtype=torch.float64)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        checkpoint.save(self.out / checkpoint.LAST, tensors, self._about())

    def _log(self, **what: Any) -> None:
        if self.worker.rank == 0:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **what}) + "\n")

    # -- the run -----------------------------------------------------------------------------

    def go(self, progress: bool, stop_after: int | None) -> Result:
        s = self.settings
        self.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        baselines = self._baselines()
        end = sum(steps for _, steps in s.phases)
        stop = end if stop_after is None else min(end, self.step + stop_after)
        bar = tqdm(total=end, initial=self.step, unit="step", disable=not progress)
        bar.set_description(_beside(baselines))
        with bar:
            while self.step < stop:
                if self.supply.advance(self.step):
                    self._find_long()
                name, first, last = self._phase()
                phase = self.phases[name]
                if self.step == first:
                    self._begin(phase)
                started = time.perf_counter()
                loss = phase.step(self.step, self._rate(phase, self.step - first, last - first))
                self.seconds += time.perf_counter() - started
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"training diverged at step {self.step}: lower lr ({phase.rate}). The "
                        f"checkpoints in '{self.out}' are older and intact"
                    )
                self.step += 1
                bar.update()
                if (self.step - first) % phase.eval_every == 0 or self.step in (last, stop):
                    bar.set_postfix_str(self._validate(name))
        agents, _ = checkpoint.load_agents(self.out)
        quality = self._measure(agents.to(self.worker.device))
        drawn = self.learner.drawn * self.worker.world
        in_model = self.phases.get("rollouts")
        increase = in_model.increase if isinstance(in_model, InModel) else None
        result = Result(self.out, quality, baselines, drawn / max(self.seconds, 1e-9), increase)
        if self.worker.rank == 0 and self.step == end:
            report = {
                "policy": plain(quality),
                **{name: plain(q) for name, q in baselines.items()},
                "tokens_per_second": result.tokens_per_second,
                "seconds": self.seconds,
                "loss_increase": increase,
            }
            write_whole(self.out / "report.json", json.dumps(report, indent=1))
        return result

    def _baselines(self) -> dict[str, Quality]:
        traces, states, protected = self.traces, self.states, self.protected
        found = {
            name: measure(heuristic_scorer(name), traces, states, protected) for name in BASELINES
        }
        if hasattr(traces[self.held_out[0]], "received"):
            for name, scorer in ATTENTION_BASELINES.items():
                found[name] = measure(scorer, traces, states, protected)
        equal = weighted(np.ones(self.shape.n_heads))
        found["oracle"] = measure(oracle_scorer(), traces, states, protected, equal)
        return found

    def _phase(self) -> tuple[PhaseName, int, int]:
        """The phase of the next step, and where it begins and ends."""
        first = 0
        for name, steps in self.settings.phases:
            if self.step < first + steps:
                return name, first, first + steps
            first += steps
        raise AssertionError("the run is over")

    def _begin(self, phase: Phase) -> None:
        if self.step:
            if self.worker.world > 1:
                distributed.barrier()
            best, _ = checkpoint.load_agents(self.out)
            self.learner.go_on_from(best)
        self.best = phase.begin()

    def _measure(self, agents: Agents) -> Quality:
        scorer, whole = scorer_of(agents, self.settings.horizon)
        return measure(scorer, self.traces, self.states, self.protected, whole)

    def _validate(self, name: PhaseName) -> str:
        """Measure the averaged agents, keep the best, and write a checkpoint for resuming."""
        quality = self._measure(self.learner.ema)
        at_stake, shown = self.phases[name].judge(quality)
        if at_stake < self.best or not (self.out / checkpoint.BEST).exists():
            self.best = at_stake
            if self.worker.rank == 0:
                tensors = self.learner.ema.state_dict()
                checkpoint.save(self.out / checkpoint.BEST, tensors, self._about(quality))
        self.learner.stakes = quality.lost.copy()
        self._log(**plain(quality), phase=name, at_stake=at_stake)
        self._save()
        return shown

    def _rate(self, phase: Phase, step: int, end: int) -> float:
        """Linear warm-up to the phase's highest rate, then a cosine to 0."""
        warm = min(self.settings.warmup, max(1, end // 4))
        if step < warm:
            return phase.rate * (step + 1) / warm
        return phase.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, end - warm)))


def scorer_of(agents: Agents, horizon: int) -> tuple[Scorer, Whole]:
    """The agents' scorers of tokens and of whole tokens, after n tokens; ``horizon`` is for
    gates."""
    score = agent_scorer(agents)
    if not agents.shape.shared_out:
        return score, weighted(agents.log_aggregate.detach().exp().cpu().numpy())

    def left(trace: TraceLike, n: int) -> npt.NDArray[np.float32]:
        return log_future_use(score(trace, n), n - trace.indices[:n], horizon)

    return left, log_total


def _tokens(quality: Quality) -> dict[str, float]:
    return {"token_cost": quality.token_cost, "token_lost": quality.token_lost}


def plain(quality: Quality) -> dict[str, Any]:
    """A value for JSON."""
    return {"cost": quality.cost.tolist(), "lost": quality.lost.tolist(), **_tokens(quality)}


def _beside(baselines: dict[str, Quality]) -> str:
    """The baselines' cost, for the progress bar."""
    return ", ".join(f"{name} {baselines[name].cost.mean():.1f}" for name in BASELINES)
