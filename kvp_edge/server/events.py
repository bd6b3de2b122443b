"""What a context tells of a reply while it writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvp_edge.server.served import Turn, Written


@dataclass(frozen=True)
class Began:
    """The prompt was read.

    Attributes:
        chat_id: the chat it belongs to.
        n_prompt: tokens of the prompt.
        n_cached: of these, the first ones that were not read, as they had been before.
    """

    chat_id: str
    n_prompt: int
    n_cached: int


@dataclass(frozen=True)
class Piece:
    """A part of a reply.

    Attributes:
        index: which of the replies that were asked for.
        deltas: as in OpenAI's chunks: {"content": ...} or {"tool_calls": [...]}.
        written: the tokens since the piece before.
        ending: why the reply ends here: "stop", "length", "tool_calls"; None: it does not.
    """

    index: int
    deltas: list[dict[str, Any]]
    written: list[Written]
    ending: str | None


@dataclass(frozen=True)
class Done:
    """All replies are written.

    Attributes:
        n_prompt, n_cached: see Began.
        turns: what was measured, one for each reply.
        kv_cache: kv_stats.
    """

    n_prompt: int
    n_cached: int
    turns: list[Turn]
    kv_cache: dict[str, Any]

    @property
    def n_written(self) -> int:
        return sum(len(turn.written) for turn in self.turns)


Event = Began | Piece | Done
