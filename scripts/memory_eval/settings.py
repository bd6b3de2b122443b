"""How a cache is made: its types, its bytes, what is protected in it, and its log."""

from __future__ import annotations

from dataclasses import dataclass

from kvp_edge.cache.types import F16, KVTypes


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

    types: KVTypes
    share: int
    recent: int
    sinks: int
    log_type: str
    one_shot: bool

    @property
    def is_reference(self) -> bool:
        return self.share == 1 and self.types == F16

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
