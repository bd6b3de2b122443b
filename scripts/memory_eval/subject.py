"""A model that reads a text in a cache of so many bytes, and loses what it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvp_edge.cache.kv_log import Logged
from kvp_edge.cache.limits import CELL_UNIT, CacheLimits, round_up
from kvp_edge.cache.manager import EvictionManager
from kvp_edge.cache.recall import RecallSettings
from kvp_edge.cache.table import Table
from kvp_edge.cache.types import KVTypes
from kvp_edge.measuring import MeasuringLlama
from memory_eval.settings import Setting, limits_in

#: With ``one_shot`` a text is cut so many tokens before its end: these ask for what was dropped.
ASKING = 32


class Subject(MeasuringLlama):
    """A model whose cache has these types.

    Args:
        longest: tokens of a text, with all that follows it.
        kv_log_type: of the log.
        engine: the other arguments of kvp_edge.Llama.
    """

    def __init__(
        self,
        model_path: str,
        types: KVTypes,
        longest: int,
        *,
        policy: str,
        kv_log_type: str,
        **engine: Any,
    ) -> None:
        cells = round_up(longest)
        super().__init__(
            model_path,
            # more than fits into the cells, or there would be no log
            cells + CELL_UNIT,
            cells,
            cells // 2,  # half of them for a batch
            policy=policy,
            granularity="head",
            recall="reply",
            kv_log_type=kv_log_type,
            recent=1,
            type_k=types.keys,
            type_v=types.values,
            flash_attn=types.quantised_values,  # as kv_type does
            verbose=False,
            **engine,
        )
        self._planned = self._kept.limits
        self._read_whole: list[int] = []  # with ``one_shot``

    @property
    def _kept(self) -> EvictionManager:
        assert self.kv is not None  # there is always a budget
        return self.kv

    @property
    def bytes_per_cell(self) -> int:
        return int(self._kept.cache.shape.bytes_per_cell)

    @property
    def cells(self) -> int:
        return self._kept.limits.cells

    @property
    def budget(self) -> int:
        return self._kept.limits.budget

    @property
    def policy_identity(self) -> str:
        return self._kept.policy.identity()

    def begin(self, context: Sequence[int], setting: Setting, n_bytes: int) -> None:
        """Read a text from an empty cache, and remember where it ended.

        Args:
            setting: of this subject's types and log.
            n_bytes: of all cells, unless the setting's share is 1.
        """
        limits = self._planned
        if setting.share > 1:
            cells = min(n_bytes // self.bytes_per_cell, limits.cells)
            budget, reserve = limits_in(cells)
            limits = replace(
                limits, cells=cells, budget=budget, n_batch=min(limits.n_batch, reserve)
            )
        recent = max(1, min(256, limits.budget // setting.recent))
        limits = replace(limits, recent=recent, sinks=setting.sinks)
        if setting.one_shot:
            # nothing is dropped after the cut
            room = replace(self._planned, budget=limits.budget, recent=recent, sinks=limits.sinks)
            self._cut(list(context[:-ASKING]), room)
            self.read(context[-ASKING:])
        else:
            self._kept.replace_limits(limits)
            self._kept.protect_prefix(setting.sinks)
            self.forget()
            self.read(context)
        self._context = list(context)
        self._logits = self.newest_logits().copy()
        self._snapshot = self._state()

    def _cut(self, tokens: list[int], limits: CacheLimits) -> None:
        """Read a text into cells for all of it, if it was not the last one, and evict once."""
        self._kept.replace_limits(self._planned)
        if tokens != self._read_whole:
            self.forget()
            self.read(tokens)
            assert self._kept.complete
            self._read_whole, self._whole = tokens, self._state()
        self._go_to(tokens, self._whole)
        self._kept.replace_limits(limits)
        self._kept.protect_prefix(limits.sinks)
        self.evict()

    def _state(self) -> tuple[Table, npt.NDArray[np.uint8], Logged]:
        """Of the cache and the log."""
        assert self._kept.log is not None
        return self._kept.snapshot(), self._kept.cache.state(), self._kept.log.held

    def _go_to(self, tokens: list[int], state: tuple[Table, npt.NDArray[np.uint8], Logged]) -> None:
        """Be where these tokens were read, and the cache was in this state."""
        table, cells, logged = state
        with self._kept.restoring(table, cells):
            self.take_over(tokens)
        self._kept.restore(table, logged)

    def return_to_context(self) -> None:
        """Be where ``begin`` ended."""
        self._go_to(self._context, self._snapshot)
        self._logits_then = self._logits

    def loss(
        self, question: Sequence[int], reply: Sequence[int], recall: RecallSettings | None
    ) -> float:
        """Nats per token of a reply, read after the context and a question, which may be empty.

        Args:
            recall: None: nothing is recalled.
        """
        self.return_to_context()
        if question:
            self.read(question)
        if recall is not None:
            self._kept.recall_settings = recall
            if self.recall() is not None:
                self._logits_then = None  # its newest tokens were read again
        return float(self.losses(reply).mean())
