"""A Llama that can be watched while it reads and writes: progress bar, pace, status line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from kvp_edge.cache.recall import Recall
from kvp_edge.cli import recalled
from kvp_edge.llama import Llama


def rate(n: int, seconds: float) -> str:
    """Tokens per second; "-" when there is nothing to divide."""
    if n <= 0 or seconds <= 0:
        return "-"
    per_second = n / seconds
    # "0 t/s" would be untrue of a slow machine
    return f"{per_second:.1f}" if per_second < 9.95 else f"{per_second:.0f}"


@dataclass
class Pace:
    """Tokens and seconds of one reply; ``total_s`` covers reading, with recall, and writing."""

    read: int = 0
    written: int = 0
    read_s: float = 0.0
    total_s: float = 0.0

    def __str__(self) -> str:
        read, written = self.read_s, self.total_s - self.read_s
        return (
            f"read {self.read} at {rate(self.read, read)} t/s, "
            f"wrote {self.written} at {rate(self.written, written)} t/s"
        )


class WatchedLlama(Llama):
    """A Llama that measures its pace and tells how far it has read, and what it recalls.

    Attributes:
        pace: of the last reply.
        on_read: called after each batch of a prompt with (tokens read, tokens to read).
        on_came_back: called with lines that say what came back of dropped tokens, before the reply
            that needs them; if the model is ``verbose``, with their text.
    """

    def __init__(self, model_path: str, **options: Any) -> None:
        self.pace = Pace()
        self.on_read: Callable[[int, int], None] | None = None
        self.on_came_back: Callable[[str], None] | None = None
        self._reading_since: float | None = None
        self._writing = False
        super().__init__(model_path, **{"on_recall": self._tell_recall, **options})

    def eval(self, tokens: Sequence[int]) -> None:
        if self._writing:
            super().eval(tokens)
            self.pace.written += len(tokens)
            return
        if self._reading_since is None:
            self._reading_since = time.perf_counter()
        for at in range(0, len(tokens), self.n_batch):
            batch = tokens[at : at + self.n_batch]
            super().eval(batch)
            self.pace.read += len(batch)
            if self.on_read is not None:
                self.on_read(at + len(batch), len(tokens))

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self._end_reading()
        self._writing = True
        return super().sample(*args, **kwargs)

    def _end_reading(self) -> None:
        if self._reading_since is not None:
            self.pace.read_s += time.perf_counter() - self._reading_since
            self._reading_since = None

    def _tell_recall(self, event: Recall) -> None:
        if self.on_came_back is None or self._writing or not event.n_rows:
            return
        lines = [recalled.line(event, by_head=self.kv_stats.granularity == "head")]
        if self.verbose:
            lines += recalled.passages(event, self._text_of)
        self.on_came_back("\n".join(lines))

    def _text_of(self, start: int, end: int) -> str:
        return self.detokenize(self.input_ids[start:end].tolist()).decode(errors="replace")

    @contextmanager
    def timed(self, *, bar_after: float | None) -> Iterator[None]:
        """Measure one reply.

        Args:
            bar_after: show a progress bar on stderr if reading takes longer than these seconds;
                None: never.
        """
        started = time.perf_counter()
        pace = self.pace = Pace()
        self._writing, self._reading_since = False, None
        bar: tqdm[Any] | None = None

        def show(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = tqdm(
                    total=total, desc="reading", unit=" tokens", leave=False, delay=bar_after
                )
            bar.update(done - bar.n)
            if done == total:  # the reply follows on the same terminal
                bar.close()
                bar = None

        self.on_read = None if bar_after is None else show
        try:
            yield
        finally:
            self._end_reading()
            pace.total_s = time.perf_counter() - started
            self.on_read = None
            if bar is not None:
                bar.close()

    def status_line(self) -> str:
        """What the cache holds and how fast the last reply was, on one line."""
        s = self.kv_stats
        log = f", log {s.log_bytes / 2**20:.1f} MiB" if s.log_bytes else ""
        return (
            f"[kvp: {s.seen} tokens seen, {s.kept} kept, {s.dropped} dropped by {s.policy} "
            f"({s.evictions} evictions), {s.memory}{log} | {self.pace}]"
        )


STATUS_LINE_HELP = """\
the status line on stderr after a reply:
  [kvp: 5321 tokens seen, 640 kept, 4681 dropped by keydiff (19 evictions),
   1.5 MiB, log 12.4 MiB | read 37 at 512 t/s, wrote 211 at 80 t/s]
  seen     tokens of the conversation, with the markers of the chat template
  kept     tokens of these that are still in the cache: between the budget and
           the number of cells
  dropped  tokens of these that are not
  MiB      memory of the cache, however long the conversation becomes; q8_0 or
           the like behind it is the type of keys and values, if not f16
  log      memory of what recall brings back: the keys and values of dropped
           tokens; up to --kv-log-limit, none with --recall off
  read     tokens of the prompt that were not read yet; recall counts as reading
  wrote    tokens of the reply
If dropped tokens come back, a line before the reply says how many."""
