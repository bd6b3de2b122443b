"""How a cache is made: its types, its bytes, what is protected in it, and its log."""

from __future__ import annotations

from dataclasses import dataclass

from kvp_edge.cache.types import CACHE_TYPES, ggml_type
from memory_eval.records import F16


@dataclass(frozen=True)
class Types:
    """The types of keys and of values, as in "q8_0", or "q8_0/q4_0" if they differ."""

    keys: str
    values: str

    @classmethod
    def parse(cls, text: str) -> Types:
        """
        Raises:
            ValueError: there is no such type.
        """
        keys, _, values = text.partition("/")
        for name in filter(None, (keys, values)):
            if name not in CACHE_TYPES:
                raise ValueError(f"no type '{name}': there are {', '.join(CACHE_TYPES)}")
        return cls(keys, values or keys)

    def __str__(self) -> str:
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    @property
    def numbers(self) -> tuple[int, int]:
        """In enum ggml_type."""
        return ggml_type(self.keys), ggml_type(self.values)


@dataclass(frozen=True)
class Setting:
    """One cache, but for whether it recalls.

    Attributes:
        types: of its keys and values.
        share: it has 1/share of the bytes that all tokens of the text take in f16; 1: it holds all
            of them, in whatever type.
        recent: 1/recent of the budget is its recent window, at most 256 tokens.
        sinks: first tokens that are protected.
        log_type: of its log, see kvp_edge.CacheOptions.
        one_shot: the text is read into cells for all of it, and cut to the budget at its end.
    """

    types: Types
    share: int
    recent: int
    sinks: int
    log_type: str
    one_shot: bool

    @property
    def is_reference(self) -> bool:
        return self.share == 1 and str(self.types) == F16

    def record(self, recall: bool | str) -> dict[str, object]:
        """Its fields of a record."""
        return {
            "types": str(self.types),
            "share": self.share,
            "recent": self.recent,
            "sinks": self.sinks,
            "log_type": self.log_type,
            "one_shot": self.one_shot,
            "recall": recall,
        }


#: Fewer free cells than these after an eviction are not tried: a batch of a few tokens would read
#: as slowly as a reply is written.
LEAST_RESERVE = 16


def limits_in(cells: int) -> tuple[int, int]:
    """Budget and reserve in so many cells, as kvp_edge spends a budget in memory."""
    reserve = max(LEAST_RESERVE, cells // 5)
    return cells - reserve, reserve
