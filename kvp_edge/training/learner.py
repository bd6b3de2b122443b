"""The agents of a run and their updates: optimisers, averages, several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn

from kvp_edge.training.agent import Agents
from kvp_edge.training.head_adamw import HeadAdamW
from kvp_edge.training.settings import Settings


@dataclass(frozen=True)
class Worker:
    """One process of a run: its device, its rank, and how many there are."""

    device: torch.device
    rank: int = 0
    world: int = 1


class Learner:
    """Agents in training, and their exponential average, which is the policy.

    Attributes:
        agents, ema: of the same shape.
        optimisers: "heads" for the agents' own weights, "token" for the heads' weights in whole
            tokens, "shared" for a last projection that all agents share. ``add_optimiser`` adds one
            with moments of its own, for a phase.
        heads, every_agent: intp [N], [A], all of them.
        stakes: f64 [N], the attention that each still loses in validation.
        drawn: tokens learned from so far, by this process.
    """

    def __init__(self, agents: Agents, settings: Settings, worker: Worker) -> None:
        self.settings, self.worker = settings, worker
        self.agents = agents.to(worker.device)
        self.ema = Agents(agents.shape).to(worker.device)
        self.ema.load_state_dict(agents.state_dict())
        self.heads: npt.NDArray[np.intp] = np.arange(agents.shape.n_heads)
        self.every_agent: npt.NDArray[np.intp] = np.arange(agents.shape.n_agents)
        self.stakes = np.ones(len(self.heads))
        self.drawn = 0
        self._own = {k: p for k, p in agents.named_parameters() if p.requires_grad}
        tokens = {"log_aggregate": self._own.pop("log_aggregate")}
        self.optimisers = {"token": HeadAdamW(tokens, 0.0)}
        if agents.shape.shared_out:
            self.optimisers["shared"] = HeadAdamW({"out": self._own.pop("out")}, 0.0)
        self.optimisers["heads"] = HeadAdamW(self._own, settings.weight_decay)

    def add_optimiser(self, name: str) -> None:
        """Add another optimiser of the agents' own weights."""
        self.optimisers[name] = HeadAdamW(self._own, 0.0)

    @contextmanager
    def precision(self) -> Iterator[None]:
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.worker.device.type, torch.bfloat16, enabled=bf16):
            yield

    def rng(self, *key: int) -> np.random.Generator:
        """A random generator that depends only on the run's seed, the key and the process."""
        return np.random.default_rng([self.settings.seed, *key, self.worker.rank])

    def on_device(self, numbers: npt.NDArray[np.intp]) -> Tensor:
        return torch.from_numpy(numbers).to(self.worker.device)

    def descend(self, total: Tensor, moved: dict[str, Tensor], rate: float) -> float:
        """``total`` is a sum over heads, which keeps separate agents separate."""
        total.backward()
        self.move(moved, rate)
        return float(total.detach())

    def move(self, moved: dict[str, Tensor], rate: float, memory: float | None = None) -> None:
        """Step the optimisers, each with its agents or heads, by the accumulated gradients.

        Args:
            memory: of the average; None: the setting ``ema``.
        """
        for name, index in moved.items():
            if self.worker.world > 1:
                for parameter in self.optimisers[name].parameters.values():
                    if parameter.grad is not None:
                        distributed.all_reduce(parameter.grad)
                        parameter.grad /= self.worker.world
            self.optimisers[name].step(index, rate)
        self._average(self.settings.ema if memory is None else memory)

    def _average(self, memory: float) -> None:
        # a short memory at first, so that the average forgets the random start
        moves = float(self.optimisers["heads"].steps.max())
        decay = min(memory, (1 + moves) / (10 + moves))
        with torch.no_grad():
            for mean, now in zip(self.ema.parameters(), self.agents.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)

    def go_on_from(self, agents: nn.Module) -> None:
        """Load other weights, also into the average."""
        self.agents.load_state_dict(agents.state_dict())
        self.ema.load_state_dict(agents.state_dict())

    def state(self) -> dict[str, Tensor]:
        """Everything that a later run needs to resume exactly here."""
        out = {"agents." + k: v for k, v in self.agents.state_dict().items()}
        out |= {"ema." + k: v for k, v in self.ema.state_dict().items()}
        out["stakes"] = torch.from_numpy(self.stakes)
        out["drawn"] = torch.tensor(self.drawn)
        for name, optimiser in self.optimisers.items():
            out |= {f"{name}.{k}": v for k, v in optimiser.state().items()}
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        self.agents.load_state_dict(under("agents.", state))
        self.ema.load_state_dict(under("ema.", state))
        self.stakes = state["stakes"].numpy()
        self.drawn = int(state["drawn"])
        for name, optimiser in self.optimisers.items():
            optimiser.load(under(name + ".", state))


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names have this prefix, with the prefix removed."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
