"""llama.cpp's own rule for a full cache: drop the oldest half and move the rest up.

The baseline of ``kvp-edge demo``. The rule is that of llama.cpp's server (``pre_decode`` in
tools/server/server-context.cpp), applied while reading as well as while writing; the server refuses
a prompt that is longer than its context.
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp

from kvp_edge.errors import KVCacheError, UnsupportedModelError


class ContextShift:
    """Reads into an ordinary llama_cpp.Llama without end, shifting its context when it is full.

    Use ``read`` and the model's own ``sample``, not ``generate``, which expects that a token's
    position is its index in the text.

    Args:
        llm: a model with ``n_ctx`` cells.
        n_keep: first tokens that are never dropped, besides the token that begins every text.
        cells: most tokens kept; None: as many as llama.cpp's cache has cells.

    Attributes:
        dropped: tokens dropped since the last ``reset``.
        shifts: how often tokens were dropped since then.
    """

    def __init__(self, llm: llama_cpp.Llama, n_keep: int = 0, cells: int | None = None) -> None:
        self._llm = llm
        self._memory = llama_cpp.llama_get_memory(llm.ctx)
        if not llama_cpp.llama_memory_can_shift(self._memory):
            raise UnsupportedModelError("the context of this model cannot be shifted")
        # the cells are asked for directly: a bounded Llama's n_ctx() is the logical context
        self._cells = cells or int(llama_cpp.llama_n_ctx(llm.ctx))
        adds_bos = bool(
            llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(llm.model))
        )
        self._n_keep = min(self._cells - 4, n_keep + adds_bos)
        self.dropped = 0
        self.shifts = 0

    def reset(self) -> None:
        """Forget the conversation."""
        self._llm.reset()
        self.dropped = 0
        self.shifts = 0

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens, shifting whenever one cell is left."""
        at = 0
        while at < len(tokens):
            room = self._cells - 1 - self._llm.n_tokens
            if room < 1:
                self._shift()
                continue
            self._llm.eval(tokens[at : at + room])
            at += room

    def _shift(self) -> None:
        llm, keep = self._llm, self._n_keep
        n = llm.n_tokens
        discard = (n - keep) // 2
        end = keep + discard
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, keep, end):
            raise KVCacheError("llama.cpp refused to remove the oldest half of the context")
        llama_cpp.llama_memory_seq_add(self._memory, 0, end, n, -discard)
        llm.input_ids[keep : n - discard] = llm.input_ids[end:n].copy()
        llm.n_tokens = n - discard
        self.dropped += discard
        self.shifts += 1
