"""The model under evaluation: it reads texts, answers questions, and measures losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, TokenIds
from kvp_edge.cache.limits import CacheLimits
from kvp_edge.cache.manager import EvictionManager
from kvp_edge.cache.opening import check_policy
from kvp_edge.cache.table import Table
from kvp_edge.llama import Llama
from kvp_edge.llamacpp.context_shift import ContextShift
from kvp_edge.policies import Policy
from kvp_edge.text.chat_prompt import ends_reply, transcribe_without_template

_BATCH = 512


@dataclass(frozen=True)
class Bookmark:
    """A conversation of n tokens that was read without dropping any.

    Attributes:
        tokens: int32 [n].
        logits: f32 [n_vocab], after the last of them.
        table: of the cache.
        state: uint8, llama.cpp's.
    """

    tokens: TokenIds
    logits: FloatArray
    table: Table
    state: npt.NDArray[np.uint8]


class MeasuringLlama(Llama):
    """A bounded Llama that holds at most ``cells`` tokens, whatever their number.

    llama.cpp allocates cells in multiples of 256, so an evaluation in 1/8 of 1,024 tokens does not
    use all cells.

    Args:
        model_path: GGUF file.
        n_ctx: longest conversation, in tokens.
        cells: the most tokens kept at any time; n_ctx: nothing is dropped except by ``evict``.
        budget: tokens that stay after an eviction.
        engine: the other arguments of kvp_edge.Llama.
    """

    def __init__(self, model_path: str, n_ctx: int, cells: int, budget: int, **engine: Any) -> None:
        self._logits_then: FloatArray | None = None  # at the bookmark, until more is read
        bounded = cells < n_ctx
        super().__init__(
            model_path,
            n_ctx=n_ctx,
            kv_budget=budget,
            reserve=max(1, cells - budget),
            n_batch=min(_BATCH, cells - budget if bounded else n_ctx),
            **{"recall": "off", **engine},
        )
        transcribe_without_template(self)
        if bounded:
            self._manager.replace_limits(self._manager.limits.with_cells(cells))

    @property
    def _manager(self) -> EvictionManager:
        assert self.kv is not None  # there is always a budget
        return self.kv

    @classmethod
    def whole(cls, model_path: str, n_ctx: int, **engine: Any) -> MeasuringLlama:
        """One that drops nothing."""
        return MeasuringLlama(
            model_path, n_ctx, n_ctx, n_ctx, policy="recency", granularity="token", **engine
        )

    @property
    def policy(self) -> Policy:
        return self._manager.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        """Use another policy from now on. A policy by queries finds those that were logged: all of
        them, if this was made with such a policy and drops nothing by itself.

        Raises:
            PolicyError: see EvictionManager.replace_policy.
        """
        self._manager.replace_policy(policy)

    def check(self, policy: Policy) -> None:
        """Check that this policy fits the model.

        Raises:
            PolicyFileError: it was trained for another model.
        """
        architecture = self.metadata["general.architecture"]
        check_policy(policy, self._manager.cache.shape, architecture, self.model_path)

    def limit(self, budget: int) -> None:
        """Keep ``budget`` tokens after evictions from now on; the subject must drop nothing by
        itself.

        Raises:
            BudgetError: the budget leaves nothing to choose.
        """
        limits = self._manager.limits
        planned = CacheLimits.plan(
            n_ctx=limits.n_ctx,
            kv_budget=budget,
            sinks=self.options.sinks,
            recent=self.options.recent,
            reserve=max(1, limits.n_ctx - budget),
            n_batch=limits.n_batch,
            bytes_per_cell=0,  # the budget is in tokens
        )
        self._manager.replace_limits(planned)

    def scored(self, at: Bookmark) -> Bookmark:
        """The bookmark ``at``, where the subject is now, with all tokens scored by its policy, so
        that evictions to several budgets score only once."""
        self._manager.score()
        return replace(at, table=self._manager.snapshot())

    def bookmark(self) -> Bookmark:
        """A bookmark of what was read so far, for ``go_back``."""
        n = int(self.n_tokens)
        return Bookmark(
            self.input_ids[:n].copy(),
            self.newest_logits().copy(),
            self._manager.snapshot(),
            self._manager.cache.state(),
        )

    def go_back(self, to: Bookmark) -> None:
        """Restore the state at the bookmark, before anything was dropped. The subject must not have
        read another conversation since: queries logged after the bookmark are removed from the
        log."""
        with self._manager.restoring(to.table, to.state):
            self._manager.restore_counts(0, 0, 0.0, 0, 0, 0.0)
            self.take_over(to.tokens)
            self._logits_then = to.logits

    @property
    def held(self) -> int:
        """Tokens in the cache, in every head."""
        return self.kv_stats.kept

    @property
    def evictions(self) -> int:
        """How often tokens were dropped since the conversation began."""
        return self.kv_stats.evictions

    def protected(self, n: int) -> npt.NDArray[np.bool_]:
        """bool [n]: of the first ``n`` tokens, those that no eviction after them could drop."""
        limits, at = self._manager.limits, np.arange(n)
        return (at < limits.sinks) | (at >= n - limits.recent)

    def text_of(self, token: int) -> str:
        """A token as it is written; "" for special ones."""
        return str(self.detokenize([token]).decode(errors="replace"))

    def read(self, tokens: Sequence[int]) -> None:
        self.eval(tokens)

    def eval(self, tokens: Sequence[int]) -> None:
        super().eval(tokens)
        if len(tokens):
            self._logits_then = None

    def newest_logits(self) -> FloatArray:
        return super().newest_logits() if self._logits_then is None else self._logits_then

    def queries_to_log(self, policy: Policy, limits: CacheLimits) -> int:
        """The queries of all tokens if nothing is dropped except by ``evict``: ``go_back`` needs
        them."""
        if limits.cells >= limits.n_ctx:
            return limits.cells
        return super().queries_to_log(policy, limits)

    def forget(self) -> None:
        """Start a new conversation."""
        self.reset()

    def reply(self, most: int) -> list[int]:
        """The greedy reply to what was read, of at most ``most`` tokens; the model reads it,
        too."""
        tokens: list[int] = []
        while len(tokens) < most:
            token = self.likeliest()
            if ends_reply(self, token):
                break
            tokens.append(token)
            self.read([token])
        return tokens

    def converse(self, turns: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """The reply to what was read, then the replies to the turns, each read after the reply
        before."""
        replies = [self.reply(most)]
        for turn in turns:
            self.read(turn)
            replies.append(self.reply(most))
        return replies

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """``count`` tokens sampled at temperature 1; the model reads them, too. Tokens that end a
        reply are never drawn."""
        ends = [llama_cpp.llama_vocab_is_eog(self.vocab, t) for t in range(self.n_vocab())]
        tokens: list[int] = []
        while len(tokens) < count:
            logits = self.newest_logits().astype(np.float64)
            logits[ends] = -np.inf
            likely = np.exp(logits - logits.max()).cumsum()
            tokens.append(int(np.searchsorted(likely, rng.random() * likely[-1], side="right")))
            self.read(tokens[-1:])
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as they are written, without special ones."""
        return str(self.detokenize(tokens).decode(errors="replace"))

    def losses(self, ending: Sequence[int]) -> npt.NDArray[np.float64]:
        """The loss in nats of each token of ``ending`` (at least one) after what was read: f64 [n].
        The model reads them, too."""
        rows = [self.newest_logits()[None].copy()]
        with self.logits_to(lambda _, found: rows.append(found.copy())):
            self.read(ending)
        logits = np.concatenate(rows)[:-1].astype(np.float64)
        top = logits.max(1)
        total = np.log(np.exp(logits - top[:, None]).sum(1)) + top
        losses: npt.NDArray[np.float64] = total - logits[np.arange(len(ending)), np.asarray(ending)]
        return losses


class Shifted(MeasuringLlama):
    """The same model with llama.cpp's own rule for a full cache: drop the oldest half."""

    def __init__(self, model_path: str, n_ctx: int, cells: int, **engine: Any) -> None:
        super().__init__(
            model_path, n_ctx, n_ctx, n_ctx, policy="recency", granularity="token", **engine
        )
        self._shift = ContextShift(self, cells=cells)

    @property
    def evictions(self) -> int:
        return self._shift.shifts

    def forget(self) -> None:
        self._shift.reset()

    def read(self, tokens: Sequence[int]) -> None:
        self._shift.read(tokens)
