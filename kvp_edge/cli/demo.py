"""``kvp-edge demo``: who still finds the facts when the cache is small?"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from tqdm import tqdm

from kvp_edge.bundled import bundled_model
from kvp_edge.cache.limits import CELL_UNIT, parse_budget
from kvp_edge.cache.recall import RecallSettings
from kvp_edge.cli import options, tables
from kvp_edge.cli.chat_format import AS_TRANSCRIPTS
from kvp_edge.cli.demo_tasks import make_items
from kvp_edge.cli.parameters import option
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.evaluation import estimate
from kvp_edge.evaluation.markdown import plural
from kvp_edge.llama import Llama
from kvp_edge.llamacpp.context_shift import ContextShift
from kvp_edge.policies import HEURISTICS, Learned
from kvp_edge.text.chat_prompt import ends_reply, prompt_tokens, transcribe_without_template

_REPLY_TOKENS = 32
_MEASURE_SECONDS = 2.0  # how long to read, to tell how long it will take

FULL, SHIFT = "full context", "drop oldest half"
RECALL = " + recall"  # after a policy's name

_INTRO = """\
{conversations} of about {length} tokens with {model}. Facts are hidden in a novel's prose or
told in earlier chat turns, and the question comes last. The first row keeps every token. The others
have {cells} cells; when these are full, they drop tokens before the question is known: by
llama.cpp's own rule (the oldest half), or by a policy. With recall, dropped tokens that the
question asks for come back."""

_EPILOG = """\
The rows of the table:
  full context      every token stays in the cache
  drop oldest half  llama.cpp's context shift, in as many cells as the policies
                    have
  ... + recall      what kvp-edge chat does: a policy drops tokens, which stay
                    in a log outside the cells, and some come back for the reply
  learned           the policy that was trained for this model, if there is one
  the others        policies that need no training (see kvp-edge policies)
Replies are greedy, and right if they name the value asked for. "dropped" is the
mean number of tokens dropped per conversation.

examples:
  kvp-edge demo
  kvp-edge demo --kv-budget 512 --items 60 --seed 1
  kvp-edge demo model.gguf --items 5    (says first how long it will take)"""


_TASK = "task"


@dataclass(frozen=True, kw_only=True)
class Options(options.ModelOptions):
    items: int = option(20, panel=_TASK, metavar="N", least=1, help="conversations")
    length: int = option(
        1500, panel=_TASK, metavar="N", least=1, help="approximate tokens per conversation"
    )
    kv_budget: str = option(
        "256",
        panel=_TASK,
        metavar="N",
        help="tokens kept after an eviction, or the memory of the cache, like 1MiB",
    )
    seed: int = option(0, panel=_TASK, metavar="N", help="random seed of the conversations")
    json: bool = option(False, panel=_TASK, help="print the rows as JSON instead of the table")


@dataclass
class Row:
    """One line of the table, over all items."""

    cache: str
    cells: int
    kv_bytes: int
    items: int = 0
    right: int = 0
    tokens: int = 0
    seconds: float = 0.0
    dropped: int = 0
    log_bytes: int = 0
    right_by_kind: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """A model with a way of handling a full cache.

    Attributes:
        recall: called when a prompt was read, before the reply.
    """

    llm: Llama
    read: Callable[[Sequence[int]], None]
    reset: Callable[[], None]
    dropped: Callable[[], int]
    recall: Callable[[], object] = lambda: None


def _main(args: Options) -> int:
    demo = Demo(args)
    note(
        _INTRO.format(
            conversations=f"{args.items} {plural('conversation', args.items)}",
            length=args.length,
            model=os.path.basename(demo.path),
            cells=demo.cells,
        )
    )
    if demo.as_transcripts:
        note(f"\n{AS_TRANSCRIPTS[0].upper()}{AS_TRANSCRIPTS[1:]}.")
    note(demo.how_long())
    rows = demo.rows()
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    print("\n".join(["", *table(rows), "", *reading(rows), ""]))
    if demo.path == bundled_model():
        print("The bundled model was trained for such questions. Try yours: ", end="")
        print("kvp-edge demo MODEL.gguf")
    model = f" {args.model}" if args.model else ""
    say(f"Try it: kvp-edge chat{model} --kv-budget {args.kv_budget}")
    return 0


class Demo:
    """The conversations, and every way to read them."""

    def __init__(self, args: Options) -> None:
        self.path = options.model_path(args)
        self._engine = options.engine_options(args)
        self._budget = parse_budget(args.kv_budget)
        # sentences are not cut, so a conversation may become somewhat longer than asked for
        self._n_ctx = 2 * args.length + 1024
        with self._bounded("auto", recall="auto") as reader:
            llm = reader.llm
            self._own = str(llm.kv_stats.policy)
            self._recalls = llm.kv_stats.recall != "off"
            self.as_transcripts = transcribe_without_template(llm)
            self.cells = llm.kv_stats.cells
            self._items = make_items(
                args.items,
                args.length,
                lambda text: len(llm.tokenize(text.encode(), add_bos=False)),
                args.seed,
            )
            self._prompts = [prompt_tokens(llm, item.messages) for item in self._items]
            self._speed = estimate.measure(reader.read, self._prompts[0], _MEASURE_SECONDS)
        self._longest = max(map(len, self._prompts)) + _REPLY_TOKENS
        if self._longest < self.cells:
            raise ValueError(
                f"nothing would be dropped: the longest conversation has {self._longest} tokens, "
                f"and the cache {self.cells} cells. Raise --length or lower --kv-budget"
            )

    def _ways(self) -> dict[str, Callable[[], AbstractContextManager[Reader]]]:
        """Of reading, in the order of the table."""
        ways: dict[str, Callable[[], AbstractContextManager[Reader]]]
        ways = {FULL: self._full, SHIFT: self._shift}
        if self._recalls:
            ways[self._own + RECALL] = partial(self._bounded, "auto", recall="reply")
        if self._own == Learned.name:
            ways[Learned.name] = partial(self._bounded, "auto")
        return ways | {name: partial(self._bounded, name) for name in HEURISTICS}

    def work(self) -> estimate.Work:
        """All that will be read and written, at most: a recall may read a question again."""
        n, read = len(self._ways()), sum(map(len, self._prompts))
        settings = RecallSettings()
        # once to see its queries, and after each choice
        again = (1 + settings.passes) * settings.n_queries * len(self._items)
        again = again if self._recalls else 0
        return estimate.Work(n * read + again, n * len(self._items) * _REPLY_TOKENS)

    def how_long(self) -> str:
        """What the user should know before it begins."""
        work, speed = self.work(), self._speed
        return (
            f"\nThis takes up to about {estimate.duration(work.at(speed))} here: "
            f"{len(self._ways())} rows, {work.read:,} tokens to read at {speed.reading:,.0f} a "
            f"second and up to {work.written:,} to write at {speed.writing:,.0f}. Lower --items or "
            "--length to make it shorter."
        )

    def rows(self) -> list[Row]:
        """Read all conversations in every way. Shows a progress bar on a terminal."""
        ways, rows = self._ways(), []
        with tqdm(total=len(ways) * len(self._items), unit=" conversations", disable=None) as bar:
            for name, way in ways.items():
                bar.set_description(name)
                with way() as reader:
                    rows.append(self._row(name, reader, bar))
        return rows

    def _row(self, name: str, reader: Reader, bar: tqdm[Any]) -> Row:
        stats = reader.llm.kv_stats
        row = Row(name, stats.cells, stats.kv_bytes)
        for item, prompt in zip(self._items, self._prompts, strict=True):
            reader.reset()
            started = time.perf_counter()
            reply, n_read = greedy(reader, prompt)
            row.seconds += time.perf_counter() - started
            row.tokens += n_read
            row.dropped += reader.dropped()
            row.log_bytes = max(row.log_bytes, reader.llm.kv_stats.log_bytes)
            right = item.is_right(reply)
            row.items += 1
            row.right += right
            row.right_by_kind[item.kind] = row.right_by_kind.get(item.kind, 0) + right
            bar.update()
        return row

    @contextmanager
    def _full(self) -> Iterator[Reader]:
        cells = -(-self._longest // CELL_UNIT) * CELL_UNIT
        llm = Llama(self.path, n_ctx=cells, **self._engine)
        try:
            transcribe_without_template(llm)
            yield Reader(llm, llm.eval, llm.reset, lambda: 0)
        finally:
            llm.close()

    @contextmanager
    def _shift(self) -> Iterator[Reader]:
        llm = Llama(self.path, n_ctx=self.cells, **self._engine)
        try:
            shift = ContextShift(llm)
            transcribe_without_template(llm)
            yield Reader(llm, shift.read, shift.reset, lambda: shift.dropped)
        finally:
            llm.close()

    @contextmanager
    def _bounded(self, policy: str, recall: str = "off") -> Iterator[Reader]:
        llm = Llama(
            self.path,
            n_ctx=self._n_ctx,
            kv_budget=self._budget,
            policy=policy,
            recall=recall,
            **self._engine,
        )
        try:
            transcribe_without_template(llm)
            yield Reader(llm, llm.eval, llm.reset, lambda: llm.kv_stats.dropped, llm.recall)
        finally:
            llm.close()


def greedy(reader: Reader, prompt: Sequence[int]) -> tuple[str, int]:
    """Read a prompt and write the likeliest reply: its text, and the tokens read and written."""
    llm = reader.llm
    reader.read(prompt)
    reader.recall()
    reply: list[int] = []
    while len(reply) < _REPLY_TOKENS:
        token = llm.sample(temp=0.0)
        if ends_reply(llm, token):
            break
        reply.append(token)
        reader.read([token])
    text = llm.detokenize(reply).decode(errors="replace")
    return text, len(prompt) + len(reply)


_HEAD = (("cache", 18), ("right", 8), ("cells", 8), ("KV MiB", 9), ("tokens/s", 10), ("dropped", 9))


def table(rows: list[Row]) -> list[str]:
    """The table as lines of text."""
    return tables.table(
        _HEAD,
        [
            (
                row.cache,
                f"{row.right}/{row.items}",
                f"{row.cells}",
                f"{row.kv_bytes / 2**20:.2f}",
                f"{row.tokens / row.seconds:.0f}",
                f"{row.dropped / row.items:.0f}",
            )
            for row in rows
        ],
    )


def reading(rows: list[Row]) -> list[str]:
    """What the table says, and what it does not say."""
    full, shift, *bounded = rows
    policies = [row for row in bounded if not row.log_bytes]
    n, cells = full.items, shift.cells
    best = max(policies, key=lambda row: row.right)
    # two proportions near one half differ by this much in one of twenty comparisons of equals
    chance = math.ceil(1.96 * math.sqrt(n / 2))
    better = [row.cache for row in policies if row.right - shift.right >= chance]
    others = [row.cache for row in policies if row.cache not in better]

    lines = [f"With the full cache the model answers {full.right} of {n}."]
    if full.right < 0.8 * n:
        lines.append("It misses many even then, so the other rows also reflect the model.")
    gone = ": the old tokens are gone" if full.right - shift.right >= chance else ""
    lines.append(f"In {cells} cells, with llama.cpp's rule, it answers {shift.right}{gone}.")
    if better:
        share = best.kv_bytes / full.kv_bytes
        lines.append(
            f"In the same cells, with {best.cache}, it answers {best.right}, in {share:.0%} of the "
            "memory of the full context."
        )
        if others:
            lines.append(f"Not clearly better than dropping the oldest half: {', '.join(others)}.")
    else:
        lines.append("No policy is clearly better than that here.")
    for row in bounded:
        if row.log_bytes:
            lines.append(
                f"With {row.cache} it answers {row.right}: what the question asks for comes back "
                f"from a log of {row.log_bytes / 2**20:.1f} MiB, beside the cells."
            )
    lines.append(
        f"With {n} {plural('question', n)}, rows less than {chance} answers apart may differ by "
        "chance (raise --items for more)."
    )
    return lines


COMMAND = Command(
    _main,
    Options,
    "Hide facts in long conversations and compare which policies keep them.",
    _EPILOG,
)
