"""What queries find in a KV log: the attention that they pay to all of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray
from kvp_edge.binding.library import call
from kvp_edge.binding.queries import Queries
from kvp_edge.binding.rope import KeyFrequencies
from kvp_edge.binding.structs import LogBlock, LogLayout, LogQueries


def score_log(
    layout: LogLayout,
    blocks: Sequence[LogBlock],
    queries: Queries,
    n_threads: int,
    *,
    turn: npt.NDArray[np.float64] | None = None,
    frequencies: KeyFrequencies | None = None,
    mean: bool = True,
) -> tuple[FloatArray, FloatArray]:
    """The attention softmax(scale q.k) that queries pay to all tokens of a log (kvp_log_score).

    Every query sees its own token and those before it; one softmax goes over the tokens of all
    blocks. N is the number of the blocks' tokens, in the order of the blocks.

    Args:
        layout: of the log.
        blocks: ascending by token; gaps between them are allowed.
        queries: f32 [n_layer, n_head, m, head_size_k] of m tokens.
        n_threads: 1 or more; each needs 32 MiB, or 128 bytes for every token if that is more.
        turn: f64 [n_blocks], RoPE positions by which the keys of each block count as turned, whole
            or not. None: keys are seen as they are stored.
        frequencies: of RoPE; needed with ``turn``.
        mean: whether the means are wanted.

    Returns:
        f32 [n_layer, n_head_kv, N]: of each token the largest attention over the queries and the
        query heads of the KV head, and the mean over them ([n_layer, n_head_kv, 0] without
        ``mean``). Tokens later than every query have 0.

    Raises:
        ValueError: arrays or numbers that do not fit each other; the message names them.
        UnsupportedModelError: keys of a type that cannot be read.
        MemoryError: not enough memory.
    """
    n_layer, n_head, m, size = queries.queries.shape
    if (n_layer, size) != (layout.n_layer, layout.head_size_k) or len(queries.indices) != m:
        raise ValueError(
            f"queries {queries.queries.shape} of {len(queries.indices)} tokens, for a log of "
            f"{layout.n_layer} layers and keys of {layout.head_size_k} values"
        )
    if len(queries.scale) != n_layer:
        raise ValueError(f"{len(queries.scale)} scales for {n_layer} layers")
    asked = LogQueries(
        queries=np.ascontiguousarray(queries.queries, np.float32),
        indices=np.ascontiguousarray(queries.indices, np.int32),
        scale=np.ascontiguousarray(queries.scale, np.float32),
        n_head=n_head,
        n_queries=m,
        **({} if turn is None else _turning(turn, frequencies, len(blocks), n_layer)),
    )
    n = sum(block.n for block in blocks)
    largest = np.empty((layout.n_layer, layout.n_head_kv, n), np.float32)
    means = np.empty((layout.n_layer, layout.n_head_kv, n if mean else 0), np.float32)
    call(
        "kvp_log_score",
        layout,
        blocks,
        len(blocks),
        asked,
        n_threads,
        largest,
        means if mean else None,
    )
    return largest, means


def _turning(
    turn: npt.NDArray[np.float64], frequencies: KeyFrequencies | None, n_blocks: int, n_layer: int
) -> dict[str, object]:
    """The fields of LogQueries that say how keys are turned."""
    if frequencies is None:
        raise ValueError("keys are turned by RoPE's frequencies: give them, or no turn")
    if np.shape(turn) != (n_blocks,) or len(frequencies.radians) != n_layer:
        raise ValueError(
            f"turn {np.shape(turn)} for {n_blocks} blocks, frequencies "
            f"{frequencies.radians.shape} for {n_layer} layers"
        )
    return {
        "turn": np.ascontiguousarray(turn, np.float64),
        "frequency": np.ascontiguousarray(frequencies.radians, np.float64),
        "n_pairs": frequencies.radians.shape[1],
        "neox": frequencies.neox,
    }
