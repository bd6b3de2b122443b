"""A model that reads a text in a cache of so many bytes, and loses what it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvp_edge.cache.limits import CELL_UNIT, round_up
from kvp_edge.cache.manager import EvictionManager
from kvp_edge.cache.types import KVTypes
from kvp_edge.measuring import MeasuringLlama
from memory_eval.settings import Setting, limits_in


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
        self._kept.replace_limits(replace(limits, recent=recent, sinks=setting.sinks))
        self._kept.protect_prefix(setting.sinks)
        self.forget()
        self.read(context)
        self._context = list(context)
        self._logits = self.newest_logits().copy()
        assert self._kept.log is not None
        self._snapshot = self._kept.snapshot(), self._kept.cache.state(), self._kept.log.held

    def return_to_context(self) -> None:
        """Be where ``begin`` ended."""
        table, state, logged = self._snapshot
        with self._kept.restoring(table, state):
            self.take_over(self._context)
            self._logits_then = self._logits
        self._kept.restore(table, logged)

    def loss(self, question: Sequence[int], reply: Sequence[int], recall: bool) -> float:
        """Nats per token of a reply, read after the context and a question, which may be empty."""
        self.return_to_context()
        if question:
            self.read(question)
        if recall and self.recall() is not None:
            self._logits_then = None  # its newest tokens were read again
        return float(self.losses(reply).mean())
