"""Statistics of the cache, and an event for every eviction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class KVStats:
    """The state of one bounded cache. ``seen = kept + dropped`` and ``kept <= cells`` always hold.

    It can be read as attributes (``stats.kept``), as a mapping (``stats["kept"]``,
    ``dict(stats)``), and as a sentence (``str(stats)``).

    Attributes:
        seen: tokens of the conversation read so far (the logical length).
        kept: of these, still in the cache. At head granularity: kept by each head; heads keep
            different tokens, but all the same number.
        dropped: of these, evicted, from each head.
        evictions: evictions since the conversation was begun, or read again from its start.
        cells: cells of the cache; it never holds more tokens.
        kv_bytes: bytes of the K and V buffers, from llama.cpp's own report.
        kv_type: types of keys and values: "f16" for both, or "q8_0/q4_0".
        eviction_ms: milliseconds spent reading keys, scoring and removing in these evictions.
        budget: tokens kept after an eviction; None when the cache is not bounded.
        policy: name of the policy; None when the cache is not bounded.
        granularity: "token" or "head"; None when the cache is not bounded.
        pack: "device" when the cache is scored and packed in place wherever possible
            (``Eviction.pack`` lists the exceptions), "state" when every eviction goes through
            llama.cpp's state; None when the cache is not bounded.
        where: the cache's devices, separated by commas; with "state", why they are not known; None
            when the cache is not bounded.
        transferred_bytes: bytes transferred between the cache and the host so far: cell indices and
            scores of layers on a device, nothing for layers in host memory, whole states when an
            eviction went through one.
        evictions_as_state: of the evictions, those that went through llama.cpp's state.
        recall: when dropped tokens come back: "reply", "always" or "off"; None when the cache is
            not bounded.
        logged: tokens whose keys and values are in the KV log.
        lost: tokens that the log had no room for, so that they cannot come back.
        log_bytes: bytes of the log.
        recalls: replies (with "always": and moments while writing) before which tokens came back.
        recalled: tokens that came back in these recalls, on average over the heads.
        recall_ms: milliseconds spent on scoring the log and filling the cells.
    """

    seen: int
    kept: int
    dropped: int
    evictions: int
    cells: int
    kv_bytes: int
    kv_type: str = "f16"
    eviction_ms: float = 0.0
    budget: int | None = None
    policy: str | None = None
    granularity: str | None = None
    pack: str | None = None
    where: str | None = None
    transferred_bytes: int = 0
    evictions_as_state: int = 0
    recall: str | None = None
    logged: int = 0
    lost: int = 0
    log_bytes: int = 0
    recalls: int = 0
    recalled: int = 0
    recall_ms: float = 0.0

    @property
    def memory(self) -> str:
        """``kv_bytes`` in words, with the types if they are not f16: "1.5 MiB q8_0"."""
        types = "" if self.kv_type == "f16" else f" {self.kv_type}"
        return f"{self.kv_bytes / 2**20:.1f} MiB{types}"

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)]

    def __getitem__(self, key: str) -> int | float | str | None:
        value: int | float | str | None = vars(self)[key]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __str__(self) -> str:
        text = f"{self.seen} tokens seen, {self.kept} kept in {self.cells} cells"
        text += f" ({self.memory})"
        if self.policy is None:
            return text + ", cache not bounded"
        how = "through states"
        if self.pack == "device" and not 0 < self.evictions == self.evictions_as_state:
            how = f"in place: {self.where}"
            if self.evictions_as_state:
                how += f"; {self.evictions_as_state} through states"
        text += (
            f", {self.dropped} dropped in {self.evictions} evictions by {self.policy} "
            f"({self.eviction_ms:.0f} ms, {how})"
        )
        if self.logged or self.lost:
            text += f"; {self.logged} logged ({self.log_bytes / 2**20:.1f} MiB)"
            text += f", {self.lost} lost" if self.lost else ""
            text += f", {self.recalled} recalled ({self.recall_ms:.0f} ms)"
        return text


@dataclass(frozen=True)
class Eviction:
    """One eviction, as handed to ``on_evict``.

    Attributes:
        dropped: [start, end) spans of tokens, by index in the conversation, that were just dropped.
            At head granularity: that no head holds any more. Each head drops its own tokens, so a
            token may leave some heads in one eviction and the last of them in a later one.
        n_dropped: tokens in these spans.
        kept: tokens held afterwards (by each head).
        seen: tokens of the conversation read so far.
        policy: name of the policy.
        ms: milliseconds it took.
        pack: "device" if the cache was packed where it lies, "state" if it went through llama.cpp's
            state. With KVStats.pack "device" that happens when positions are compacted and where a
            sliding window would lose tokens that it still sees (the budget without the recent
            window is smaller than the sliding window).
        transferred_bytes: bytes it transferred between the cache and the host.
    """

    dropped: tuple[tuple[int, int], ...]
    n_dropped: int
    kept: int
    seen: int
    policy: str
    ms: float
    pack: str
    transferred_bytes: int
