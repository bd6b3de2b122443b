"""What ``Llama.save_state`` of a bounded cache returns: a session in memory."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.cache.kv_log import Logged
from kvp_edge.files.records import Array


class SavedState(llama_cpp.LlamaState):  # type: ignore[misc]  # llama_cpp is untyped
    """A LlamaState that llama_cpp's prompt caches can keep, in memory or pickled.

    ``llama_state`` is the state of the one sequence, not of the whole context; ``input_ids`` has
    the tokens read and no more; ``scores`` has rows only with ``logits_all``. The size
    ``llama_state_size``, by which prompt caches count, is that of the rows in the KV log, too.

    Args:
        header: of a session (kvp_edge.cache.session_file).
        arrays: likewise, the cache's state among them.
        held: what the KV log holds. Its rows are shared with the log, and become part of a pickle.
        scores: f32 [n_tokens or 0, n_vocab].
        seed: of the model.
    """

    held = Logged()  # of a state that an older version has pickled; it is refused for its header

    def __init__(
        self,
        header: dict[str, Any],
        arrays: dict[str, Array],
        held: Logged,
        scores: Array,
        seed: int,
    ) -> None:
        self.header = header
        self.held = held
        self._arrays = dict(arrays)
        state = self._arrays.pop("state").tobytes()
        tokens = self._arrays["tokens"]
        super().__init__(
            input_ids=tokens.astype(np.intc),
            scores=scores,
            n_tokens=len(tokens),
            llama_state=state,
            llama_state_size=len(state) + sum(block.rows.nbytes for block in held.blocks),
            seed=seed,
        )

    @property
    def arrays(self) -> dict[str, Array]:
        return {**self._arrays, "state": np.frombuffer(self.llama_state, np.uint8)}
