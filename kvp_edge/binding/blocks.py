"""How the queries of a trace are gathered into sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: A stored sum is at most this; float16 ends at 65504.
_LARGEST_SUM = 32768


@dataclass(frozen=True)
class Blocks:
    """How queries are gathered: blocks of ``size``, the first one shorter where ``first`` < size,
    so that the end of the prompt is a border."""

    size: int
    first: int

    @classmethod
    def with_border_at(cls, n: int, size: int) -> Blocks:
        return cls(size, n % size or size)

    @property
    def scale(self) -> float:
        """What sums are multiplied by before they are rounded to float16, a power of two: the
        largest that cannot overflow, so that small sums keep their digits."""
        return float(2 ** ((_LARGEST_SUM // self.size).bit_length() - 1))

    def ends(self, n_tokens: int) -> list[int]:
        """The end of every block of ``n_tokens`` queries; the last is ``n_tokens``."""
        return [*range(self.first, n_tokens, self.size), n_tokens] if n_tokens > 0 else []

    def spans(self, n_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Every block of ``n_tokens`` queries: (first query, end, where its sums begin in those of
        a head). It has ``end`` sums."""
        begin = at = 0
        for end in self.ends(n_tokens):
            yield begin, end, at
            begin, at = end, at + end

    def n_sums(self, n_tokens: int) -> int:
        """Sums of one head: a block that ends at e has one for each of the tokens before e."""
        return sum(self.ends(n_tokens))
