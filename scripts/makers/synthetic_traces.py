"""Traces whose importance is a known function of keys, for training without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class SyntheticTrace:
    """T tokens; ``paid`` [L, H, T] is what every later query pays to a token."""

    keys: NDArray[np.float16]
    values: NDArray[np.float16]
    indices: NDArray[np.int32]
    paid: NDArray[np.float32]
    block: int = 16

    @property
    def splits(self) -> NDArray[np.int32]:
        return np.arange(self.block, len(self.indices), self.block, dtype=np.int32)

    def importance(self, n: int) -> NDArray[np.float32]:
        assert n in self.splits
        return self.paid[:, :, :n] * np.float32(self.keys.shape[2] - n)

    def payments(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for begin in range(0, len(self.indices), self.block):
            yield begin, self.paid[:, :, :begin]

    def peak(self, n: int) -> NDArray[np.float32]:
        """What the one block wants that looks for the second dimension of keys."""
        assert n in self.splits
        return np.exp(2 * self.keys[:, :, :n, 1].astype(np.float32))


class SyntheticTraces:
    """``kind`` "key": the first dimension of its key says how important a token is. "neighbour":
    that of the token two after it does. A list of traces that can also be told of a model."""

    def __init__(
        self,
        count: int,
        kind: str = "key",
        *,
        tokens: int = 160,
        shape: tuple[int, int, int, int] = (2, 2, 8, 8),
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        n_layer, n_head_kv, dk, dv = shape
        self.model = {
            "architecture": "llama",
            "name": "synthetic",
            "fingerprint": "f00d",
            "identity": "1dea",
        }
        self.items = []
        for _ in range(count):
            keys = rng.normal(size=(n_layer, n_head_kv, tokens, dk)).astype(np.float16)
            values = rng.normal(size=(n_layer, n_head_kv, tokens, dv)).astype(np.float16)
            signal = keys[..., 0].astype(np.float32)
            if kind == "neighbour":
                signal = np.roll(signal, -2, axis=-1)
            paid = np.exp(2 * signal)
            paid /= paid.sum(-1, keepdims=True)
            self.items.append(SyntheticTrace(keys, values, np.arange(tokens, dtype=np.int32), paid))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> SyntheticTrace:
        return self.items[index]
