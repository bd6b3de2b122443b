"""Rollouts: the model reads a text while agents evict, which shows what each eviction costs.

This is the Markov decision process of ForesightKV (arXiv:2602.03203, section 4): the state is the
cache, an action drops tokens from every head, and the reward comes from the loss of the tokens that
follow. The language model runs in llama.cpp, through the bounded cache that chats use, and is
never differentiated: a rollout remembers keys, values and draws, from which their probabilities are
computed again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvp_edge.arrays import FloatArray
from kvp_edge.measuring import MeasuringLlama
from kvp_edge.policies import CacheView, Policy
from kvp_edge.text.spans import Span
from kvp_edge.training.agent import Agents, position_features, side_by_side
from kvp_edge.training.data import Protected
from kvp_edge.training.grpo import draw, log_probabilities
from kvp_edge.training.settings import Settings

_KEEP = 1e9  # the score of a token that is not up for eviction


@dataclass(frozen=True)
class Eviction:
    """One action. N heads.

    Attributes:
        seen: tokens read before it.
        candidates: int64 [N, w], the tokens that could be drawn, as indices in the text.
        drawn: int64 [N, k], which of them were dropped, in the order of the draws.
    """

    seen: int
    candidates: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class Rollout:
    """One reading of a text of T tokens.

    Attributes:
        features: f32 [A, 1, T, F], those of the agents, of every token when it came in.
        evictions: in order.
        losses: f32 [T - 1], of every token but the first, in nats.
    """

    features: Tensor
    evictions: list[Eviction]
    losses: FloatArray

    def log_probabilities(self, agents: Agents, temperature: float) -> Tensor:
        """Of every draw, under these agents: f32 [N, K, k]."""
        device = agents.mean.device
        scores = agents(self.features.to(device))[:, 0]
        per_eviction = [
            log_probabilities(
                scores.gather(1, e.candidates.to(device)), e.drawn.to(device), temperature
            )
            for e in self.evictions
        ]
        return torch.stack(per_eviction, dim=1)


@dataclass(frozen=True)
class Reading:
    """A text read with a full cache.

    Attributes:
        losses: f32 [T - 1], of every token but the first, in nats.
        entropies: f32 [T - 1], of what the model expected in their place, in nats.
    """

    losses: FloatArray
    entropies: FloatArray


class _Reader(MeasuringLlama):
    """A subject that returns the loss of every token of a text. It treats template markers like
    other tokens, so that an action is exactly what was drawn."""

    def find_spans(self, start: int, end: int) -> list[Span]:
        return []

    def follow(self, tokens: Sequence[int]) -> Reading:
        """Read a text, at least 2 tokens, from the beginning."""
        self._text = np.asarray(tokens)
        self._losses: list[FloatArray] = []
        self._entropies: list[FloatArray] = []
        self.forget()
        assert self.kv is not None
        budget = self.kv.limits.budget
        with self.logits_to(self._see):
            # the budget first, so that the first eviction drops as many tokens as later ones
            self.read(tokens[:budget])
            self.read(tokens[budget:])
        found = np.concatenate(self._losses), np.concatenate(self._entropies)
        return Reading(*(x.astype(np.float32) for x in found))

    def _see(self, start: int, logits: FloatArray) -> None:
        following = self._text[start + 1 : start + 1 + len(logits)]
        x = logits[: len(following)].astype(np.float64)
        x -= x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        self._losses.append(-log_p[np.arange(len(following)), following])
        self._entropies.append(-(np.exp(log_p) * log_p).sum(1))


class _Drawing(Policy):
    """Agents in PyTorch. They score every token once, when the tokens after it are known, and draw
    what is dropped.

    Args:
        generator: draws; None: the tokens that score lowest are dropped, as in a chat.
    """

    name = "agents"
    scope = "cache"

    def __init__(
        self,
        agents: Agents,
        n_tokens: int,
        budget: int,
        protected: Protected,
        temperature: float,
        generator: torch.Generator | None,
    ) -> None:
        shape = agents.shape
        self._agents, self._budget, self._protected = agents, budget, protected
        self._temperature, self._generator = temperature, generator
        self._half = shape.context // 2
        self.features = torch.zeros(shape.n_agents, n_tokens, shape.n_features)
        self._scores = torch.zeros(shape.n_heads, n_tokens)
        self._final = 0  # tokens whose scores will not change any more
        self.evictions: list[Eviction] = []

    def score(self, view: CacheView) -> FloatArray:
        seen = int(view.indices.max()) + 1
        self._read(*view.keys_and_values(), seen)
        held = torch.from_numpy(
            np.broadcast_to(view.indices, view.shape).reshape(len(self._scores), -1).astype(int)
        )
        scores = self._scores.gather(1, held)
        if self._generator is not None:
            scores = self._draw(scores, held, seen)
        out: FloatArray = scores.numpy().reshape(view.shape)
        return out

    def _read(self, keys: FloatArray, values: FloatArray, seen: int) -> None:
        """Bring features and scores up to date. All tokens that came in since the last eviction,
        and the recent ones before them, are held by every head, in the last rows."""
        start = max(0, self._final - self._half)
        n = seen - start
        each = self._agents.shape.heads_each
        k, v = (
            side_by_side(torch.from_numpy(rows[:, :, -n:]), each).flatten(0, 1)
            for rows in (keys, values)
        )
        place = position_features(torch.arange(start, seen)).expand(len(k), -1, -1)
        new = self.features[:, start:seen] = torch.cat((k, v, place), -1)
        with torch.no_grad():
            scores = self._agents(new[:, None].to(self._agents.mean.device))[:, 0].cpu()
        self._scores[:, self._final : seen] = scores[:, self._final - start :]
        self._final = max(self._final, seen - self._half)

    def _draw(self, scores: Tensor, held: Tensor, seen: int) -> Tensor:
        n = held.shape[1]
        first, end = self._protected.competing(seen)
        competing = (held >= first) & (held < end)
        # the same number in all heads: protected tokens are held by all of them
        rows = competing.nonzero()[:, 1].view(len(held), -1)
        assert self._generator is not None
        candidates, drawn = draw(
            scores.gather(1, rows), n - self._budget, self._temperature, self._generator
        )
        rows = rows.gather(1, candidates)
        self.evictions.append(Eviction(seen, held.gather(1, rows), drawn))
        dropped = rows.gather(1, drawn)
        # earlier draws go first, should fewer be dropped
        order = torch.arange(dropped.shape[1], dtype=torch.float32).expand(dropped.shape)
        return torch.full_like(scores, _KEEP).scatter(1, dropped, order)


@dataclass
class Rollouts:
    """Reads texts with full and with small caches.

    Args:
        model: GGUF file.
        n_ctx: tokens of the longest text.
        settings: budget, every, sinks, recent, temperature and what is a penalty.
        engine: arguments of llama_cpp.Llama.
        policy: the default policy of ``read``.
    """

    model: str | os.PathLike[str]
    n_ctx: int
    settings: Settings
    engine: dict[str, Any] = field(default_factory=dict)
    policy: str = "recency"

    def __post_init__(self) -> None:
        s, path = self.settings, os.fspath(self.model)
        how: dict[str, Any] = {"verbose": False, **self.engine}
        n = self.n_ctx
        self._full = _Reader(path, n, n, n, policy="recency", granularity="token", **how)
        self._small = _Reader(
            path,
            self.n_ctx,
            min(s.budget + s.every, self.n_ctx),
            s.budget,
            policy=self.policy,
            sinks=s.sinks,
            recent=s.recent,
            **how,
        )

    def close(self) -> None:
        self._full.close()
        self._small.close()

    def full(self, tokens: Sequence[int]) -> Reading:
        """The text with nothing evicted."""
        return self._full.follow(tokens)

    def read(self, tokens: Sequence[int], policy: Policy | None = None) -> FloatArray:
        """The losses with a policy's evictions, by default those of ``self.policy``: f32 [T - 1],
        in nats."""
        if policy is not None:
            self._small.policy = policy
        return self._small.follow(tokens).losses

    def roll(
        self, tokens: Sequence[int], agents: Agents, generator: torch.Generator | None
    ) -> Rollout:
        """The text with the agents' evictions: drawn, or the lowest scores without a generator."""
        s = self.settings
        protected = Protected(s.sinks, s.recent)
        policy = _Drawing(agents, len(tokens), s.budget, protected, s.temperature, generator)
        losses = self.read(tokens, policy)
        return Rollout(policy.features[:, None], policy.evictions, losses)

    def penalties(self, losses: FloatArray, full: Reading) -> FloatArray:
        """The penalty of every token's loss increase: f32 [T - 1], squared nats (2602.03203, eq.
        8)."""
        s = self.settings
        rise = losses - full.losses
        counts = np.ones(len(rise), np.bool_)
        if s.reward != "all":
            counts = full.entropies <= np.quantile(full.entropies, s.low_entropy)
        if s.reward == "low-large":
            counts &= rise > s.large
        out: FloatArray = np.where(counts, np.maximum(rise, 0) ** 2, 0.0).astype(np.float32)
        return out

    def returns(self, rollout: Rollout, full: Reading) -> FloatArray:
        """The return of each eviction, f32 [K]: minus the penalties of all tokens predicted after
        it."""
        later = np.cumsum(self.penalties(rollout.losses, full)[::-1])[::-1]
        return np.array([-later[e.seen] if e.seen < len(later) else 0 for e in rollout.evictions])
