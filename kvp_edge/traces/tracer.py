"""Read a text with a GGUF model and record the attention of later tokens to earlier ones.

Attention is captured from llama.cpp as it is computed (native/observe/capture.cpp) or, with flash
attention, computed from its queries and keys. Keys and values come from the cache at the end. So a
trace includes the model's quantisation and peculiarities, and needs no other implementation of the
model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import HalfArray, TokenIds, TokenIndices
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.capture import AttentionAsComputed
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.structs import CacheShape
from kvp_edge.cache.limits import CELL_UNIT, round_up
from kvp_edge.cache.types import PLAIN_TYPES
from kvp_edge.errors import KVCacheError
from kvp_edge.llama import Llama
from kvp_edge.text.chat_prompt import ends_reply, transcribe_without_template
from kvp_edge.traces.attention_from_queries import AttentionFromQueries
from kvp_edge.traces.format import Trace
from kvp_edge.traces.labels import Labeller, label_size, tokens_needed

#: Bytes of a trace file beside its arrays of numbers per head: header, and 8 for every token.
_FILE_OVERHEAD = 1024
_BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class Captured:
    """The capture of one text: L layers, H KV heads, T tokens, P = blocks.n_sums(T)."""

    tokens: TokenIds
    """int32 [T]"""
    indices: TokenIndices
    """int32 [T], ascending"""
    keys: HalfArray
    """float16 [L, H, T, head_size_k], RoPE included"""
    values: HalfArray
    """float16 [L, H, T, head_size_v]"""
    sums: HalfArray
    """float16 [L, H, P], times blocks.scale: see kvp_capture_end in native/kvp_edge.h"""
    blocks: Blocks
    labels: dict[str, HalfArray]
    """float16 [L, H, T] each, LATER [L, H, P']: see kvp_edge.traces.labels.Labeller.labels"""

    def trace(self, n_prompt: int, source: str) -> Trace:
        """As a trace; the arguments are the trace's."""
        return Trace(
            keys=self.keys,
            values=self.values,
            indices=self.indices,
            tokens=self.tokens,
            attention=self.sums,
            n_prompt=n_prompt,
            blocks=self.blocks,
            scale=self.blocks.scale,
            source=source,
            **self.labels,
        )


class Tracer(Llama):
    """A model that reads texts of up to ``length`` tokens and captures them.

    Args:
        model_path: GGUF file.
        length: most tokens of a text.
        block: queries per sum; None: the fewest with which a trace takes at most twice the bytes of
            its keys and values.
        labels: of its tokens, that every text is to get (kvp_edge.traces.labels.LABELS).
        written: most tokens of the questions that the model writes for them.
        engine: arguments of llama_cpp.Llama. Values in a quantised ``type_v`` turn flash attention
            on.

    Attributes:
        native: the cache.
        shape: of the cache.
        flash_attn: whether llama.cpp runs with flash attention.
        labels: that every text gets.

    Raises:
        UnsupportedModelError: no model file, or one that cannot be traced (recurrent, hybrid...),
            or not with flash attention or with labels (soft caps, attention sinks, ALiBi).
    """

    def __init__(
        self,
        model_path: str,
        length: int,
        block: int | None = None,
        *,
        labels: Sequence[str] = (),
        written: int = 0,
        **engine: Any,
    ):
        self._stack = contextlib.ExitStack()  # the base class closes it even if loading fails early
        self.native: NativeCache | None = None
        # llama.cpp has quantised values only with flash attention, which never stores the
        # attention. Then it is computed from queries and keys. Otherwise llama.cpp's own is
        # captured, which is exact even for models whose attention is more than a softmax.
        self.flash_attn = bool(engine.pop("flash_attn", False)) or (
            engine.get("type_v") not in (None, *PLAIN_TYPES)  # None is llama.cpp's own choice, f16
        )
        try:
            # llama.cpp aborts when its micro-batch is smaller than the number of sequences
            engine["n_ubatch"] = n_ubatch = max(2, engine.get("n_ubatch") or 512)
            engine["n_batch"] = max(n_ubatch, engine.get("n_batch") or 0)
            super().__init__(
                model_path,
                n_ctx=round_up(max(1, tokens_needed(length, labels, written))),
                swa_full=False,
                flash_attn=self.flash_attn,
                **engine,
            )
            attention = AttentionFromQueries if self.flash_attn else AttentionAsComputed
            self._attention = attention(self._observer)
            self.native = NativeCache(self.ctx)
            self._attention.start(self.ctx, self.native, self.n_batch)
            self._labeller = Labeller(self._observer, labels, written) if labels else None
            if self._labeller is not None:
                self._labeller.start(self, self.native)
        except BaseException:
            self.close()
            raise
        transcribe_without_template(self)
        self.length, self.labels = length, tuple(labels)
        self.shape: CacheShape = self.native.shape
        if block is None:
            block = smallest_block(self.shape, length, labels)
        self.block = block

    def adjust_context(self, params: Any) -> None:
        params.n_seq_max, params.kv_unified = 2, True  # see native/kvp_edge.h
        self._observer = Observer(params)

    def size_context(self, window: int) -> None:
        # A window cache must be smaller than the base cache, since they are distinguished by size
        # (2 sequences' windows and a micro-batch: llama_kv_cache_iswa).
        if window:
            params = self.context_params
            windows = 2 * window + params.n_ubatch + 2 * CELL_UNIT
            params.n_ctx = max(params.n_ctx, round_up(windows))

    def close(self) -> None:
        if self.native is not None:
            self.native.close()
            self.native = None
        super().close()

    def capture(self, tokens: Sequence[int], n_prompt: int, n_generate: int = 0) -> Captured:
        """Read tokens, then write up to ``n_generate`` more: the likeliest ones, until the model
        ends its reply.

        Args:
            tokens: what is read, from an empty cache.
            n_prompt: where a border between blocks will be.
            n_generate: tokens to write.

        Raises:
            KVCacheError: the model computes numbers that are not finite, or too large for float16.
        """
        most = len(tokens) + n_generate
        if not 0 < len(tokens) <= most <= self.length:
            raise ValueError(
                f"a trace of {len(tokens)} tokens and {n_generate} more does not fit into the "
                f"{self.length} tokens planned"
            )
        blocks = Blocks.with_border_at(n_prompt, self.block)
        self.forget()
        self._attention.begin(blocks, most)
        if self._labeller is not None:
            self._labeller.begin()
        for at in range(0, len(tokens), self.n_batch):
            self._read(tokens[at : at + self.n_batch])
        while self.n_tokens < most:
            token = self.likeliest()
            if ends_reply(self, token):
                break
            self._read([token])
        n = int(self.n_tokens)
        assert self.native is not None
        indices, keys, values = self.native.read(0, n, n)
        assert values is not None
        sums = self._attention.end(keys)
        return Captured(
            tokens=np.array(self.input_ids[:n], np.int32),
            indices=indices,
            keys=_half(keys, "keys"),
            values=_half(values, "values"),
            sums=sums,
            blocks=blocks,
            labels={} if self._labeller is None else self._labeller.labels(),
        )

    def _read(self, batch: Sequence[int]) -> None:
        """Read at most ``n_batch`` tokens."""
        self._attention.make_room(self.n_tokens, len(batch))
        self.eval(batch)
        if self._labeller is not None:
            self._labeller.follow()

    def forget(self) -> None:
        """Empty the cache, so that the next text begins in its first cell."""
        self.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)


def smallest_block(shape: CacheShape, length: int, labels: Sequence[str] = ()) -> int:
    """The fewest queries per block with which a trace of ``length`` tokens, with its labels, is no
    larger than twice its keys and values in float16: a power of two."""
    n_heads = shape.n_layer * shape.n_head_kv
    keys_and_values = 2 * n_heads * length * (shape.head_size_k + shape.head_size_v)
    in_labels = 2 * n_heads * sum(label_size(label, length) for label in labels)
    left = keys_and_values - in_labels - _FILE_OVERHEAD - _BYTES_PER_TOKEN * length
    block = 1
    # a first block of one query makes the most blocks
    while block < length and 2 * n_heads * Blocks(block, 1).n_sums(length) > left:
        block *= 2
    return block


def _half(rows: npt.NDArray[np.float32], what: str) -> HalfArray:
    largest = float(np.abs(rows).max())
    if not largest <= float(np.finfo(np.float16).max):  # also when it is no number
        raise KVCacheError(
            f"the model's {what} reach {largest:g}, too large for a trace (float16): the "
            "model file may be damaged"
        )
    return rows.astype(np.float16)
