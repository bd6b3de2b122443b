"""What every query of a bounded Llama could see, recorded while it runs, for the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvp_edge import Llama
from makers.gguf_models import ModelShape

from .reference import Reference


@dataclass
class Watch:
    """Records the tokens held before each decode; rewound tokens are overwritten by later ones.

    It trusts the eviction manager's own table of what each head holds: if rows in llama.cpp's cache
    are not what the table says, logits differ from the reference's.
    """

    llm: Llama
    shape: ModelShape
    held: dict[int, tuple[int, NDArray[np.int32], NDArray[np.int32], int]] = field(
        default_factory=dict
    )
    """by token: first token of its batch, tokens held [..., n], their RoPE positions, shift"""

    def __post_init__(self) -> None:
        decode = self.llm._decode

        def recording(tokens: list[int], shift: int) -> None:
            manager = self.llm._kv
            assert manager is not None
            table = manager.snapshot()
            start = self.llm.n_tokens
            for token in range(start, start + len(tokens)):
                self.held[token] = (start, table.indices(), table.rope_positions(), shift)
            decode(tokens, shift)

        self.llm._decode = recording  # type: ignore[method-assign]

    def visible(self) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.int32]]:
        """For the tokens read so far: [n_layer, n_head_kv, n, n] what each query sees, [n] its RoPE
        position, [n_layer, n_head_kv, n, n] the RoPE position of each key when it is seen."""
        n, s = self.llm.n_tokens, self.shape
        shape = (s.n_layer, s.n_head_kv, n, n)
        seen, key_positions = np.zeros(shape, bool), np.zeros(shape, np.int32)
        positions = np.zeros(n, np.int32)
        base = [il for il in range(s.n_layer) if not s.is_local(il)]
        for query in range(n):
            start, held, rotated, shift = self.held[query]
            positions[query] = query - shift
            groups = (len(base), s.n_head_kv, held.shape[-1])
            held, rotated = np.broadcast_to(held, groups), np.broadcast_to(rotated, groups)
            for il in range(s.n_layer):
                if il in base:
                    at = base.index(il)
                    np.put_along_axis(seen[il, :, query], held[at], True, -1)
                    np.put_along_axis(key_positions[il, :, query], held[at], rotated[at], -1)
                    own = slice(start, query + 1)
                else:
                    own = slice(0, query + 1)  # the window cache is left to itself
                seen[il, :, query, own] = True
                key_positions[il, :, query, own] = np.arange(n)[own] - shift
        return seen, positions, key_positions

    def expected(self, reference: Reference) -> NDArray[np.float32]:
        """The reference's logits of all tokens read so far, [n, n_vocab]."""
        seen, positions, key_positions = self.visible()
        tokens: Any = self.llm.input_ids[: self.llm.n_tokens]
        if (positions == np.arange(len(positions))).all():
            return reference.logits(tokens, seen)
        return reference.forward(tokens, seen, positions, key_positions).logits
