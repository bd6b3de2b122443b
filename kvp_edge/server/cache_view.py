"""What the page shows of the cache: which heads hold which token, and what came back."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from kvp_edge.server.context import Context

#: Passages that came back, at most: those of most tokens.
_PASSAGES = 12


def view(context: Context, writing: bool, chat: str | None, texts_from: int) -> dict[str, Any]:
    """The cells of a context, as they are now; it may be at work.

    Args:
        writing: whether it is.
        chat: whose tokens the asker knows.
        texts_from: the first token whose text is not known yet.
    """
    llm, current = context.llm, context.chat
    kv = llm.kv
    assert kv is not None
    stats = llm.kv_stats
    indices, seen = kv.indices, stats.seen
    n_heads = math.prod(indices.shape[:-1])
    held = indices.ravel()
    counts = np.bincount(held[held < seen], minlength=seen)
    back = counts == n_heads
    if kv.log is not None:
        for block in tuple(kv.log.blocks):
            back[block.first : block.end] = True
    known = current is not None and current.id == chat
    start = min(texts_from, seen) if known else 0
    tokens = llm.input_ids[start:seen].tolist()
    return {
        "chat": current.id if current is not None else None,
        "writing": writing,
        "n_heads": n_heads,
        "stats": dict(stats),
        "bytes_per_cell": stats.kv_bytes / max(stats.cells, 1),
        "tokens_per_second": context.tokens_per_second,
        "texts_from": start,
        "texts": [llm.piece([token]).decode(errors="replace") for token in tokens],
        "held": counts.tolist(),
        "logged": back.tolist(),
        "last_recall": _recall(context),
    }


def _recall(context: Context) -> dict[str, Any] | None:
    event, llm = context.llm.turn.recalled, context.llm
    if event is None:
        return None
    return {
        "n_tokens": event.n_tokens,
        "n_rows": event.n_rows,
        "share": event.share,
        "ms": event.ms,
        "passes": event.passes,
        "asked_by": [asdict(word) for word in context.asked_by],
        "heads": [round(float(x), 3) for x in event.heads],
        "spans": [
            {
                "start": start,
                "end": end,
                "text": llm.piece(llm.input_ids[start:end].tolist()).decode(errors="replace"),
            }
            for start, end in event.largest_spans(_PASSAGES)
        ],
    }
