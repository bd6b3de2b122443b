"""Traces that a model reads when they are wanted, and that memory alone holds.

On disk, traces of a small model take some 40 KB a token. A run that learns from what it reads needs
only some of them at a time (kvp_edge.training.supply decides which), and an interrupted one reads
those again: what is read follows from the sources and the seed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvp_edge.arrays import TokenIds
from kvp_edge.binding.blocks import Blocks
from kvp_edge.traces.format import Json, Trace
from kvp_edge.traces.labels import label_size
from kvp_edge.traces.sources import Piece, Source
from kvp_edge.traces.tracer import Tracer
from kvp_edge.traces.writer import claim_folder, planned

#: Tokens of the text that a measurement reads.
_MEASURED = 256


class TraceStream:
    """The traces of a plan, of which some are held at a time; ``stream[i]`` is one of these.

    Args:
        tracer: reads them; ``close`` closes it.
        pieces: the plan.
        model: what the traces say of their model (kvp_edge.traces.format.TraceSet.model).
        buffer: bytes of traces that may be held.

    Attributes:
        on_read: called after each reading.
        run: identifies model, sources and settings; "" if nobody said.
    """

    def __init__(
        self, tracer: Tracer, pieces: Sequence[Piece], model: Json, buffer: int, run: str = ""
    ) -> None:
        self._tracer, self._pieces = tracer, pieces
        self._held: dict[int, Trace] = {}
        self.model, self.buffer, self.run = model, buffer, run
        self.on_read: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int, /) -> Trace:
        """A trace that is held; KeyError if it is not."""
        return self._held[index]

    @property
    def held_bytes(self) -> int:
        return sum(trace.nbytes for trace in self._held.values())

    @property
    def head_shape(self) -> tuple[int, int, int, int]:
        """Layers, KV heads, head_size_k, head_size_v of all traces."""
        s = self._tracer.shape
        return s.n_layer, s.n_head_kv, s.head_size_k, s.head_size_v

    def size(self, index: int) -> int:
        """The most bytes that a trace takes."""
        piece, s = self._pieces[index], self._tracer.shape
        n = len(piece.tokens) + piece.n_generate
        sums = Blocks.with_border_at(piece.n_prompt, self._tracer.block).n_sums(n)
        labels = sum(label_size(label, n) for label in self._tracer.labels)
        per_head = n * (s.head_size_k + s.head_size_v) + labels + sums
        return 2 * s.n_layer * s.n_head_kv * per_head + 8 * n

    def text(self, index: int) -> TokenIds:
        """int32, the tokens of a trace that need not be held, without those that the model
        writes."""
        return np.array(self._pieces[index].tokens, np.int32)

    def hold(self, indices: Iterable[int]) -> None:
        """Hold these traces and no others: those that are not held yet are read, in this order.

        Raises:
            KVCacheError: the model's numbers are not finite.
        """
        wanted = list(indices)
        self._held = {i: self._held[i] for i in wanted if i in self._held}
        for i in wanted:
            if i not in self._held:
                self._held[i] = self._read(self._pieces[i])
                self.on_read()

    @property
    def n_tokens(self) -> int:
        """The most tokens of all traces together."""
        return sum(len(piece.tokens) + piece.n_generate for piece in self._pieces)

    def measure(self) -> float:
        """Seconds that a token of a trace takes here, its labels included, by the start of the
        first one."""
        tokens = self._pieces[0].tokens[:_MEASURED]
        started = time.perf_counter()
        self._tracer.capture(tokens, len(tokens))
        return (time.perf_counter() - started) / len(tokens)

    def close(self) -> None:
        self._held.clear()
        self._tracer.close()

    def _read(self, piece: Piece) -> Trace:
        got = self._tracer.capture(piece.tokens, piece.n_prompt, piece.n_generate)
        return got.trace(piece.n_prompt, piece.source)


def open_stream(
    model_path: str | os.PathLike[str],
    sources: Sequence[Source],
    *,
    buffer: int,
    folder: Path | None = None,
    **how: Any,
) -> TraceStream:
    """Plan what to read; nothing is read yet.

    Args:
        model_path, sources: as in capture_traces, and so ``how``, without ``progress``.
        buffer: see TraceStream.
        folder: of the run that will learn from it, for a manifest without traces, so that another
            run is refused there; None: nothing is written.

    Raises:
        TraceError: nothing to read, or ``folder`` is another run's.
        UnsupportedModelError: a model that cannot be traced.
    """
    plan = planned(model_path, sources, **how)
    try:
        pieces = plan.pieces()
        if folder is not None:
            claim_folder(folder, plan.manifest | {"planned": len(pieces)})
    except BaseException:
        plan.tracer.close()
        raise
    manifest = plan.manifest
    return TraceStream(plan.tracer, pieces, manifest["model"], buffer, manifest["run"])
