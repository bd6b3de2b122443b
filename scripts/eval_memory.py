#!/usr/bin/env python3
"""What a cache of so many bytes loses: by its types, by what is protected in it, by its log.

    python scripts/eval_memory.py --model model.gguf --out memory.jsonl --data DIR
    python scripts/eval_memory.py --out memory.jsonl --types q8_0 --recents 4,8,16
    python scripts/eval_memory.py --out memory.jsonl --types f16 --log-types cache,q8_0,q4_0
    python scripts/eval_memory.py --out memory.jsonl --types f16 --recalls "after=4;floor=0.25"
    python scripts/eval_memory.py --out memory.jsonl --table
    python scripts/eval_memory.py --out memory.jsonl --plot memory.png
    python scripts/eval_memory.py --out memory.jsonl --ship kvp_edge/data/kv_types.json

A cache gets 1/4, 1/8 or 1/16 of the bytes that all tokens of a text would take in f16. In the same
bytes there is room for more tokens of a smaller type. A text is read through that cache from its
first token on, evictions included, as in a chat; then comes a question, or what follows in the
text, without recall and with it.

Measured is a loss, and no answers are written: of questions that of the first tokens of the
reply of the full f16 cache, where it is right, of texts that of the 128 tokens that follow; less
what the full f16 cache loses on the same. With --one-shot each text is read once into cells for all
of it, and cut 32 tokens before its end, which ask: then all keys and values are those of the full
cache, only the choice of tokens counts, and many settings share one reading. With share 1 all
tokens stay, whatever that takes: what a type costs by itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import json_lines
import kvp_edge  # noqa: F401  # says what is missing, before anything else is imported
from kvp_edge.bundled import bundled_model
from kvp_edge.cache.recall import RecallSettings
from kvp_edge.cache.types import CACHE_TYPES, F16, KVTypes
from kvp_edge.errors import KVPError, OptionError
from kvp_edge.evaluation.estimate import duration
from kvp_edge.llama import Llama
from kvp_edge.text.chat_prompt import transcribe_without_template
from label_eval.items import LOOK_UPS, Item, known_tasks, make_items
from lists import names, numbers
from memory_eval import records
from memory_eval.plot import draw
from memory_eval.settings import Setting
from memory_eval.shipped import write
from memory_eval.subject import Subject
from memory_eval.table import render
from recall_eval.ways import parse_ways

TYPES = "f16,q8_0/f16,q4_0/f16,q8_0,q8_0/q4_0,q4_0"
TASKS = (LOOK_UPS, "dialogues", "books")

#: Tokens of a reply that are measured: the answer is in them, and little else.
REPLY = 14

#: The cells of a cache hold this many tokens at least, those for the next batch included.
_SMALLEST = 40

_EPILOG = """\
The file gets one line of JSON for every measurement. What is in it is not measured again, so an
interrupted run goes on where it stopped. One item of every task is finished after the other:
whatever there is makes a table.

examples:
  python scripts/eval_memory.py --out tiny.jsonl --length 500 --items 1 --types f16,q8_0 --shares 4
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=bundled_model(), help="GGUF file (the bundled model)")
    add("--out", type=Path, required=True, help="file of measurements, continued if it exists")
    add("--table", action="store_true", help="measure nothing; print the file as Markdown tables")
    add("--plot", type=Path, metavar="PNG", help="measure nothing; draw loss against memory")
    add("--ship", type=Path, metavar="JSON", help="measure nothing; put the tables into this file")
    add("--types", type=names, default=names(TYPES), help=f"of keys/values ({TYPES})")
    add("--shares", type=numbers, default=[1, 4, 8, 16], help="1/N of the full f16 cache's bytes")
    add("--recents", type=numbers, default=[4], help="recent window: 1/N of the budget (4)")
    add("--sinks", type=numbers, default=[4], help="first tokens that are protected (4)")
    add("--recalls", default="", help='also recall with other settings, "after=4;floor=0.25"')
    add("--one-shot", action="store_true", help="read each text into cells for all of it, then cut")
    add("--log-types", type=names, default=["cache"], help="types of the log (cache)")
    add("--policy", default="auto", help="as of kvp_edge.Llama (auto)")
    add("--length", type=int, default=2000, help="tokens of a conversation or text (2000)")
    add("--items", type=int, default=8, help="of each task (8)")
    add("--facts", type=int, default=5, help="in a conversation of look-ups, each asked for (5)")
    add("--data", type=Path, help="folder with more texts, see docs/evaluation.md")
    add("--tasks", type=names, default=list(TASKS), help=f"({','.join(TASKS)})")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if args.table or args.plot or args.ship:
        return args
    try:
        if args.data is not None and not args.data.is_dir():
            raise ValueError(f"there is no folder '{args.data}'")
        known = known_tasks(args.data)
        for name in args.tasks:
            if name not in known:
                raise ValueError(f"no task '{name}': there are {', '.join(known)}")
        args.tasks = {name: known[name] for name in args.tasks}
        for name in args.log_types:
            if name not in ("cache", *CACHE_TYPES):
                raise ValueError(f"no type '{name}': there are cache, {', '.join(CACHE_TYPES)}")
        args.settings = list(_settings(args))
        args.recalls = _recalls(args.recalls)
        if args.length // 2 // max(args.shares) < _SMALLEST:  # the context is half of it at least
            raise ValueError(
                f"1/{max(args.shares)} of half of {args.length} tokens is less than {_SMALLEST}: "
                "ask for a greater --length or larger shares"
            )
    except (ValueError, OptionError) as error:
        parser.error(str(error))
    return args


def _settings(args: argparse.Namespace) -> Iterator[Setting]:
    """All that are asked for, the full f16 cache first."""
    yield REFERENCE
    for name in args.types:
        types = KVTypes.parse("--types", name)
        for share in args.shares:
            whole = replace(REFERENCE, types=types)
            if share == 1:
                if not whole.is_reference:
                    yield whole
                continue
            for rest in itertools.product(args.recents, args.sinks, args.log_types):
                yield Setting(types, share, *rest, args.one_shot)


REFERENCE = Setting(F16, share=1, recent=4, sinks=4, log_type="cache", one_shot=False)


def _recalls(text: str) -> dict[bool | str, RecallSettings | None]:
    """No recall, recall, and what "after=4;after=8,floor=0.25" describes, by its own text.

    Raises:
        ValueError: no such setting, or no such value.
    """
    found: dict[bool | str, RecallSettings | None] = {False: None, True: RecallSettings()}
    for part in filter(None, map(str.strip, text.split(";"))):
        for way in parse_ways(f"{part}:{part}"):
            found[way.name] = way.settings
    return found


@dataclass(frozen=True)
class Asked:
    """What is read after a context, and what of it is measured.

    Attributes:
        number: of the question; 0 of a text.
        question: its tokens; empty of a text.
        reply: the tokens that are measured.
    """

    number: int
    question: list[int]
    reply: list[int]


class Evaluation:
    """All measurements of one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path: Path = args.out
        self.model = Path(args.model).stem
        self.done = {records.key(r): r for r in records.read(self.path) if r["model"] == self.model}

    def run(self) -> None:
        """Measure what is not in the file yet.

        Raises:
            ValueError: a task has too few items of this length.
            KVPError: the model cannot be measured.
        """
        a = self.args
        with closing(Llama(a.model, vocab_only=True, verbose=False)) as llm:
            transcribe_without_template(llm)
            items = list(make_items(llm, a.tasks, a.length, a.items, a.facts, a.seed))
        todo = [item for item in items if not self._finished(item)]
        self._longest = max(len(i.context) + i.after for i in items) + 1
        self._subjects: dict[tuple[str, str], Subject] = {}
        with ExitStack() as self._closing:
            started = time.monotonic()
            for i, item in enumerate(todo):
                for setting in a.settings:
                    self._measure(item, setting)
                left = (time.monotonic() - started) / (i + 1) * (len(todo) - i - 1)
                print(
                    f"{i + 1}/{len(todo)} items: {item.task} {item.number} "
                    f"({len(item.context)} tokens); about {duration(left)} left",
                    file=sys.stderr,
                    flush=True,
                )

    # -- what is to be done ------------------------------------------------------------------

    def _key(self, item: Item, number: int, setting: Setting, recall: bool | str) -> records.Record:
        return {
            "model": self.model,
            "seed": self.args.seed,
            "length": self.args.length,
            "facts": self.args.facts if item.task == LOOK_UPS else None,
            "task": item.task,
            "item": item.number,
            "question": number,
            **setting.record(recall),
        }

    def _record(
        self, item: Item, number: int, setting: Setting, recall: bool | str
    ) -> records.Record | None:
        return self.done.get(records.key(self._key(item, number, setting, recall)))

    def _finished(self, item: Item) -> bool:
        full = [self._record(item, n, REFERENCE, False) for n in range(max(1, len(item.questions)))]
        return all(full) and not any(self._missing(item, s) for s in self.args.settings)

    def _asked(self, item: Item) -> list[Asked]:
        """A text's ending, or the questions that the full cache has answered rightly."""
        if not item.questions:
            return [Asked(0, [], list(item.ending))]
        asked = []
        for number, question in enumerate(item.questions):
            full = self._record(item, number, REFERENCE, False)
            if full is not None and full["score"] == 1:
                asked.append(Asked(number, question.tokens, full["reply"]))
        return asked

    def _missing(self, item: Item, setting: Setting) -> list[tuple[Asked, bool | str]]:
        """What is asked, and whether with recall, and how."""
        ways = (False,) if setting.share == 1 else self.args.recalls
        return [
            (one, recall)
            for one in self._asked(item)
            for recall in ways
            if self._record(item, one.number, setting, recall) is None
        ]

    # -- doing it ----------------------------------------------------------------------------

    def _subject(self, setting: Setting) -> Subject:
        types, log_type = str(setting.types), setting.log_type
        if (types, log_type) not in self._subjects:
            threads = {"n_threads": self.args.threads, "n_threads_batch": self.args.threads}
            self._subjects[types, log_type] = self._closing.enter_context(
                closing(
                    Subject(
                        self.args.model,
                        setting.types,
                        self._longest,
                        policy=self.args.policy,
                        kv_log_type=log_type,
                        **threads,
                    )
                )
            )
        return self._subjects[types, log_type]

    def _measure(self, item: Item, setting: Setting) -> None:
        if setting.is_reference:
            self._measure_reference(item)
            return
        missing = self._missing(item, setting)
        if not missing:
            return
        full = self._subject(REFERENCE).bytes_per_cell
        subject = self._subject(setting)
        subject.begin(item.context, setting, full * len(item.context) // setting.share)
        for one, recall in missing:
            loss = subject.loss(one.question, one.reply, self.args.recalls[recall])
            self._write(subject, item, one.number, setting, recall, {"loss": loss})

    def _measure_reference(self, item: Item) -> None:
        """The full cache's replies, and its losses."""
        questions = [*enumerate(item.questions or (None,))]
        if all(self._record(item, number, REFERENCE, False) for number, _ in questions):
            return
        subject = self._subject(REFERENCE)
        subject.begin(item.context, REFERENCE, 0)
        for number, question in questions:
            reply, score, asked = list(item.ending), 1.0, []
            if question is not None:
                asked = question.tokens
                subject.return_to_context()
                subject.read(asked)
                whole = subject.reply(question.most)
                reply, score = whole[:REPLY], question.score(subject.text(whole))
            loss = subject.loss(asked, reply, recall=None) if score == 1 else None
            outcome = {"loss": loss, "score": score, "reply": reply}
            self._write(subject, item, number, REFERENCE, False, outcome)

    def _write(
        self,
        subject: Subject,
        item: Item,
        number: int,
        setting: Setting,
        recall: bool | str,
        outcome: dict[str, object],
    ) -> None:
        record = {
            **self._key(item, number, setting, recall),
            "policy": subject.policy_identity,
            "context": len(item.context),
            "cells": subject.cells,
            "budget": subject.budget,
            "bytes": subject.cells * subject.bytes_per_cell,
            "log_bytes": subject.kv_stats.log_bytes,
            **outcome,
        }
        json_lines.append(self.path, record)
        self.done[records.key(record)] = record


def _require_same_policy(found: Iterable[records.Record]) -> None:
    """One file compares caches, so their policy must be the same.

    Raises:
        ValueError: it is not.
    """
    by_model: dict[str, set[str]] = {}
    for record in found:
        by_model.setdefault(record["model"], set()).add(record["policy"])
    for model, policies in by_model.items():
        if len(policies) > 1:
            raise ValueError(
                f"'{model}' was measured with several policies: {', '.join(sorted(policies))}. "
                "Write to another file"
            )


def _command(found: Sequence[records.Record]) -> str:
    """The command that measures what was measured."""
    types, shares = (dict.fromkeys(r[name] for r in found) for name in ("types", "share"))
    lengths = dict.fromkeys(r["length"] for r in found)
    return (
        "python scripts/eval_memory.py --model MODEL.gguf --out memory.jsonl --data DIR "
        f"--types {','.join(types)} --shares {','.join(map(str, sorted(shares)))} "
        f"--length {','.join(map(str, lengths))}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.table or args.plot or args.ship:
            found = records.read(args.out)
            _require_same_policy(found)
            if args.table:
                print("\n".join(render(found)))
            if args.plot:
                draw(args.plot, found)
            if args.ship:
                write(args.ship, found, _command(found), time.strftime("%Y-%m-%d"))
            return 0
        json_lines.drop_unfinished_line(args.out)
        Evaluation(args).run()
    except (ValueError, KVPError) as error:
        raise SystemExit(f"eval_memory.py: {error}") from None
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
