"""Labels of tokens that may be asked for: the most attention that a later use of the text pays.

A token's label is the largest attention that any position of this use pays to it, with any query
head of the KV head's group:

- ``later``: the rest of the text. It asks in pieces of ``NEAR`` tokens, of which each has its own
  label of every token, so that the rest may begin at any of them.
- ``repeated``: the model repeats the text, word for word (KVzip, arXiv:2505.23416: the text is fed
  again, in pieces, each after the instruction to repeat). What a repetition looks at, any later
  request may need.
- ``questioned``: the model writes questions about the text, with their answers, greedily.

In the last two the model itself goes on to use the text, of which what follows asks for little.
Only the positions of the repetition, or of what the model writes, ask; those of the instructions do
not. All is read one after the other in the same context: a cache with a sliding window cannot go
back. Each position's softmax goes over all tokens that it sees, also those after the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvp_edge.arrays import FloatArray, HalfArray
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.log_scores import score_log
from kvp_edge.binding.queries import Queries, QueryLog
from kvp_edge.binding.structs import LogBlock
from kvp_edge.errors import KVCacheError
from kvp_edge.text.chat_prompt import ends_reply, next_turn

if TYPE_CHECKING:
    from kvp_edge.binding.cache import NativeCache
    from kvp_edge.binding.observer import Observer
    from kvp_edge.llama import Llama

LATER, REPEATED, QUESTIONED = "later", "repeated", "questioned"
#: All labels. Questions come before the repetition, so that they are not about that.
LABELS = (LATER, QUESTIONED, REPEATED)

#: Tokens of a piece (LATER).
NEAR = 32

#: Tokens that are repeated after one instruction.
PIECE = 512
#: Tokens before a piece that its instruction names.
_REMINDER = 8
#: Most tokens of an instruction, with what the chat template writes around it.
_INSTRUCTION = 192

_REPEAT = "Repeat the text from its beginning, exactly as it is."
_GO_ON = "Go on repeating the text exactly as it is, starting after: {reminder}"
_QUESTIONS = "Write questions about the text, each with a short answer."


def label_size(label: str, n: int) -> int:
    """Numbers of a label of a text of ``n`` tokens, per head."""
    return Blocks(NEAR, NEAR).n_sums(n) if label == LATER else n


def tokens_needed(length: int, labels: Sequence[str], written: int) -> int:
    """The most tokens that a text of ``length`` and the uses that make its ``labels`` take.

    Args:
        written: most tokens of the questions.
    """
    needed = length
    if QUESTIONED in labels:
        needed += _INSTRUCTION + written
    if REPEATED in labels:
        needed += length + _INSTRUCTION * -(-length // PIECE)
    return needed


class Labeller:
    """Lets a model use the texts that it has read.

    Args:
        observer: of the model's context.
        labels: those wanted, of LABELS.
        written: most tokens of the questions.
    """

    def __init__(self, observer: Observer, labels: Sequence[str], written: int) -> None:
        self._log = QueryLog(observer)
        self._labels, self._written = labels, written
        self._blocks: list[LogBlock] = []

    def start(self, llm: Llama, cache: NativeCache) -> None:
        """Find the model's queries.

        Args:
            llm: the model; its context is empty, and has room for ``tokens_needed``.
            cache: the context's.

        Raises:
            UnsupportedModelError: they are not found, or attention is more than softmax(scale q.k).
        """
        self._llm, self._cache = llm, cache
        self._layout = cache.log_layout()
        instead = "Trace it with --future text or --future greedy alone"
        self._log.start(llm.ctx, cache, llm.n_batch, instead)
        self._log.watch(False)

    def begin(self) -> None:
        """The model is about to read a text, from an empty cache."""
        self._pieces: list[FloatArray] = []
        self._blocks = []
        self._log.clear()
        self._log.watch(LATER in self._labels)

    def follow(self) -> None:
        """The model has read more of the text, at most a batch."""
        first = self._remembered
        self._remember()
        end = self._remembered
        if LATER not in self._labels or end == first:
            return
        self._log.append(first, end - first)
        asked = self._log.read(end - first)
        # pieces are of the text, not of the batch, so that labels do not depend on how it was read
        for begin in range(first - first % NEAR, end, NEAR):
            stop = min(begin + NEAR, end)
            paid = self._paid(asked[max(begin, first) - first : stop - first])[:, :, :stop]
            if begin < first:
                before = self._pieces.pop()
                np.maximum(paid[:, :, : before.shape[2]], before, out=paid[:, :, : before.shape[2]])
            self._pieces.append(paid)

    def labels(self) -> dict[str, HalfArray]:
        """The labels of the text that the model has read: float16 [n_layer, n_head_kv, T] each, but
        LATER [n_layer, n_head_kv, P]: one piece after the other, each with the tokens until its end
        (those of Blocks(NEAR, NEAR)).

        The model has read more afterwards.

        Raises:
            KVCacheError: an instruction in the model's chat template is too long.
        """
        self._n_text = int(self._llm.n_tokens)
        self._log.clear()
        self._log.watch(False)
        uses: dict[str, Callable[[], None]] = {QUESTIONED: self._ask, REPEATED: self._repeat}
        found = {}
        if LATER in self._labels:
            found[LATER] = np.concatenate(self._pieces, axis=2, dtype=np.float16)
        for name in (name for name in uses if name in self._labels):
            shape = self._cache.shape
            self._largest = np.zeros((shape.n_layer, shape.n_head_kv, self._n_text), np.float32)
            uses[name]()
            found[name] = self._largest.astype(np.float16)
        return found

    def _ask(self) -> None:
        """The model writes questions and answers, until it ends its reply."""
        self._instruct(_QUESTIONS)
        self._log.watch(True)
        end = self._llm.n_tokens + self._written
        while self._llm.n_tokens < end:
            token = self._llm.likeliest()
            if ends_reply(self._llm, token):
                break
            self._llm.eval([token])
            if self._llm.n_tokens - self._remembered == self._llm.n_batch:
                self._pay()
        self._pay()
        self._log.watch(False)

    def _repeat(self) -> None:
        """The text again, without the token that begins it."""
        text = [int(token) for token in self._llm.input_ids[: self._n_text]]
        first = 1 if text[0] == self._llm.token_bos() else 0
        batch = self._llm.n_batch
        for begin in range(first, len(text), PIECE):
            if begin == first:
                self._instruct(_REPEAT)
            else:
                before = self._llm.detokenize(text[max(first, begin - _REMINDER) : begin])
                reminder = before.decode(errors="ignore").strip()
                self._instruct(_GO_ON.format(reminder=reminder))
            self._log.watch(True)
            piece = text[begin : begin + PIECE]
            for at in range(0, len(piece), batch):
                self._llm.eval(piece[at : at + batch])
                self._pay()
            self._log.watch(False)

    def _instruct(self, text: str) -> None:
        tokens = next_turn(self._llm, text)
        if len(tokens) > _INSTRUCTION:
            raise KVCacheError(
                f"in this model's chat template an instruction takes {len(tokens)} tokens, more "
                f"than the {_INSTRUCTION} there is room for: trace it with --future text or "
                "--future greedy alone"
            )
        self._llm.eval(tokens)
        self._remember()

    @property
    def _remembered(self) -> int:
        """Tokens whose keys there are a copy of."""
        return sum(int(block.n) for block in self._blocks)

    def _remember(self) -> None:
        """Copy the keys of what was read since the last call."""
        first, end = self._remembered, int(self._llm.n_tokens)
        if end > first:
            rows = self._cache.log_rows(self._layout, first, end, end - first)
            self._blocks.append(LogBlock(rows, first, end - first, first))

    def _pay(self) -> None:
        """The tokens read since the last call ask; at most a batch of them."""
        first = self._remembered
        self._remember()
        n = self._remembered - first
        if n == 0:
            return
        self._log.append(first, n)
        paid = self._paid(self._log.read(n))
        np.maximum(self._largest, paid[:, :, : self._n_text], out=self._largest)

    def _paid(self, asked: Queries) -> FloatArray:
        """The largest attention that they pay to every token whose keys there are a copy of."""
        found: FloatArray = score_log(
            self._layout, self._blocks, asked, self._llm.n_threads, mean=False
        )[0]
        return found
