#!/usr/bin/env python3
"""What labels are worth, before a policy is trained for any: each one as an oracle.

    python scripts/eval_labels.py --model model.gguf --out labels.jsonl --data DIR
    python scripts/eval_labels.py --model model.gguf --out labels.jsonl --policies my-policy.gguf
    python scripts/eval_labels.py --out labels.jsonl --table [--against my-policy.gguf]

A label says how much a token may be asked for later: the attention that the rest of the text pays,
or the model's own continuation, questions and repetition (kvp_edge/traces/labels.py). A policy is
trained to guess it. Here nothing is guessed: the label itself ranks the tokens, and what is lost
then says what the label is worth. (A policy may lose less, as it has seen in many texts what is
asked for.) Rules and policy files are measured beside the labels.

The whole context is read into a full cache, before any question is known, then cut once: every head
keeps as many tokens as any other, sinks and newest ones protected as in `kvp-edge eval`. The label
"asked" is made of what is measured, so it bounds what any ranking can do.

Measured is a loss, and no answers are written. Of questions it is that of the first --reply tokens
of the full cache's own reply, read after the question, less what the full cache loses on them; only
questions that the full cache answers rightly count. "Same reply" means that each of these tokens is
still the likeliest. Of texts it is the loss of the 128 tokens that follow. One short read per
setting takes the place of a reply of 26 tokens or more, written one by one: several times cheaper
than `kvp-edge eval`, and far more sensitive, since an answer that is nearly lost shows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import json_lines
import kvp_edge  # noqa: F401  # says what is missing, before anything else is imported
from kvp_edge.arrays import FloatArray
from kvp_edge.bundled import bundled_model
from kvp_edge.errors import KVPError
from kvp_edge.evaluation.estimate import duration
from kvp_edge.evaluation.setting import SMALLEST
from kvp_edge.llama import Llama
from kvp_edge.measuring import Bookmark
from kvp_edge.policies import Policy, get_policy
from kvp_edge.text.chat_prompt import transcribe_without_template
from label_eval import items, labels, records
from label_eval.items import Item, Question, known_tasks, make_items
from label_eval.labels import Given, Label
from label_eval.records import FULL
from label_eval.subject import Subject
from label_eval.table import render
from lists import names, numbers

RULES = ("keydiff", "knorm", "lagkv", "value-range", "snapkv", "recency", "random")

#: Tokens of a reply that are measured: of a short one the answer is in them, and little else.
REPLY = 14

_EPILOG = f"""\
The file gets one line of JSON for every measurement. What is in it is not measured again, so an
interrupted run goes on where it stopped, and more labels or policies can be added later. One item
of every task is finished after the other: whatever there is makes a table (--table).

labels:
{chr(10).join(f"  {name:<11} {about}" for name, about in labels.PARTS.items())}
  a+b         each divided by its mean over the tokens of its head, then added
  a*value     times the norm of the token's value; of a+b each part
  a:shared    heads decide together ({labels.SHARED}; see kvp_edge/cache/recall.py)
  a:wide      {labels.AFTER} tokens after a token and {labels.BEFORE} before it count as much
  The default: {", ".join(labels.DEFAULT[:8])},
    {", ".join(labels.DEFAULT[8:])}

Among the rules, snapkv goes by the newest tokens of the text, as no question is known.

examples:
  python scripts/eval_labels.py --out tiny.jsonl --length 400 --items 2 --tasks look-ups,books
  python scripts/eval_labels.py --model m.gguf --out l.jsonl --labels asked,later*value:wide
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=bundled_model(), help="GGUF file (the bundled model)")
    add("--out", type=Path, required=True, help="file of measurements, continued if it exists")
    add("--table", action="store_true", help="measure nothing; print the file as Markdown tables")
    add("--against", metavar="ROW", help="with --table: this row against every other one")
    add("--labels", type=names, default=list(labels.DEFAULT), help="see below")
    add("--rules", type=names, default=list(RULES), help=f"policies by name ({','.join(RULES)})")
    add("--policies", type=names, default=[], help="policy files, like a.gguf,b.gguf")
    add("--shares", type=numbers, default=[2, 4, 8], help="2,4,8: keep 1/2, 1/4 and 1/8")
    add("--length", type=int, default=1000, help="tokens of a conversation or text (1000)")
    add("--items", type=int, default=8, help="of each task (8)")
    add("--reply", type=int, default=REPLY, help="tokens of a reply that are measured (14)")
    add("--facts", type=int, default=5, help="in a conversation of look-ups, each asked for (5)")
    add("--data", type=Path, help="folder with more texts, see docs/evaluation.md")
    add(
        "--tasks",
        type=names,
        help=f"look-ups, or tasks of kvp-edge eval (of {','.join(items.DEFAULT)} those there are)",
    )
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    try:
        if args.table:
            return args
        if args.data is not None and not args.data.is_dir():
            raise ValueError(f"there is no folder '{args.data}'")
        known = known_tasks(args.data)
        if args.tasks is None:
            args.tasks = [name for name in items.DEFAULT if name in known]
        for name in args.tasks:
            if name not in known:
                raise ValueError(f"no task '{name}': there are {', '.join(known)}")
        args.tasks = {name: known[name] for name in args.tasks}
        args.rows = _rows(args)
        if args.reply < 1:
            raise ValueError(f"--reply must be 1 token or more, not {args.reply}")
        if args.facts < 2:
            raise ValueError("--facts must be 2 or more: one question is asked beside another")
        # the context of a text is at least half of it
        if args.length // 2 // max(args.shares) < SMALLEST:
            raise ValueError(
                f"1/{max(args.shares)} of half of {args.length} tokens is less than {SMALLEST}: "
                "ask for a greater --length or larger shares"
            )
    except (ValueError, KVPError) as error:
        parser.error(str(error))
    return args


def _rows(args: argparse.Namespace) -> dict[str, Label | Policy]:
    """What is measured, by its name in tables.

    Raises:
        ValueError, PolicyError: there is no such label, rule or file, or two of the same name.
    """
    named: list[tuple[str, Label | Policy]] = []
    for label in map(Label.parse, args.labels):
        named.append((label.name, label))
    for name in args.rules:
        named.append((name, get_policy(name)))
    for path in args.policies:
        named.append((Path(path).name, get_policy(path)))
    if not named:
        raise ValueError("nothing to measure: name labels, rules or policies")
    taken = [name for name, _ in named]
    for name in taken:
        if taken.count(name) > 1:
            raise ValueError(f"two rows are called '{name}'")
    return dict(named)


@dataclass(frozen=True)
class Asked:
    """What is measured after a context.

    Attributes:
        number: of the question; 0 of a text.
        question: None of a text.
        reply: the beginning of the full cache's; of a text, what follows.
    """

    number: int
    question: Question | None
    reply: list[int]

    @property
    def use(self) -> list[int]:
        """All tokens that are read after the context."""
        return [*(self.question.tokens if self.question else ()), *self.reply]


class Evaluation:
    """All measurements of one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path: Path = args.out
        self.model = Path(args.model).stem
        self.rows: dict[str, Label | Policy] = args.rows
        found = [r for r in records.read(self.path) if r["model"] == self.model]
        records.require_same_policies(found, {n: _identity(row) for n, row in self.rows.items()})
        self.done = {records.key(record): record for record in found}
        self.parts = {
            part for row in self.rows.values() if isinstance(row, Label) for part in row.parts
        }

    def run(self) -> None:
        """Measure what is not in the file yet.

        Raises:
            ValueError: a task has too few items of this length.
            KVPError: the model cannot be measured.
        """
        a = self.args
        with closing(Llama(a.model, vocab_only=True, verbose=False)) as llm:
            transcribe_without_template(llm)
            made = list(make_items(llm, a.tasks, a.length, a.items, a.facts, a.seed))
        todo = [item for item in made if not self._finished(item)]
        if not todo:
            return
        room = max(
            max(Subject.room(len(i.context), self.parts), len(i.context) + i.after) for i in made
        )
        policies = [row for row in self.rows.values() if isinstance(row, Policy)]
        subject = Subject(a.model, room + 1, self.parts, policies, a.threads)
        with closing(subject):
            started = time.monotonic()
            for i, item in enumerate(todo):
                self._measure(subject, item)
                left = (time.monotonic() - started) / (i + 1) * (len(todo) - i - 1)
                print(
                    f"{i + 1}/{len(todo)} items: {item.task} {item.number} "
                    f"({len(item.context)} tokens); about {duration(left)} left",
                    file=sys.stderr,
                    flush=True,
                )

    # -- what is to be done ------------------------------------------------------------------

    def _identity(self, item: Item, question: int, row: str, share: int | None) -> records.Record:
        return {
            "model": self.model,
            "seed": self.args.seed,
            "length": self.args.length,
            "facts": self.args.facts if item.task == items.LOOK_UPS else None,
            "measured": self.args.reply if item.questions else items.ENDING,
            "task": item.task,
            "item": item.number,
            "question": question,
            "row": row,
            "share": share,
        }

    def _record(
        self, item: Item, question: int, row: str, share: int | None = None
    ) -> records.Record | None:
        return self.done.get(records.key(self._identity(item, question, row, share)))

    def _finished(self, item: Item) -> bool:
        full = [self._record(item, n, FULL) for n in range(max(1, len(item.questions)))]
        return all(full) and not self._missing(item, self._asked(item))

    def _asked(self, item: Item) -> list[Asked]:
        """What can be measured: a text, or the questions that the full cache has answered
        rightly."""
        if not item.questions:
            return [Asked(0, None, list(item.ending))]
        asked = []
        for number, question in enumerate(item.questions):
            full = self._record(item, number, FULL)
            if full is not None and full["score"] == 1:
                asked.append(Asked(number, question, full["reply"]))
        return asked

    def _missing(self, item: Item, asked: Sequence[Asked]) -> dict[str, dict[int, list[Asked]]]:
        """By row and share."""
        found: dict[str, dict[int, list[Asked]]] = {}
        for row in self.rows:
            for share in self.args.shares:
                left = [a for a in asked if self._record(item, a.number, row, share) is None]
                if left:
                    found.setdefault(row, {})[share] = left
        return found

    # -- doing it ----------------------------------------------------------------------------

    def _measure(self, subject: Subject, item: Item) -> None:
        at = subject.begin(item.context)
        self._measure_full(subject, item, at)
        asked = self._asked(item)
        missing = self._missing(item, asked)
        if not missing:
            return
        parts = {
            part
            for name in missing
            if isinstance(row := self.rows[name], Label)
            for part in row.parts
        }
        attention = subject.attention(at, parts, [a.use for a in asked])
        norms = subject.value_norms(at)
        for name, shares in missing.items():
            ranked = subject.ranked(at, self._policy(name, attention, norms, subject.options.sinks))
            for share, left in shares.items():
                budget = len(item.context) // share
                for one in left:
                    subject.cut(ranked, budget)
                    kept = int(subject.held)
                    self._write(
                        item, one, name, share, {**self._outcome(subject, one), "budget": kept}
                    )

    def _policy(
        self, name: str, attention: dict[str, FloatArray], norms: FloatArray, sinks: int
    ) -> Policy:
        row = self.rows[name]
        if isinstance(row, Policy):
            return row
        return Given(row.scores(attention, norms, sinks))

    def _measure_full(self, subject: Subject, item: Item, at: Bookmark) -> None:
        """The full cache's replies, and its losses."""
        for number, question in enumerate(item.questions or (None,)):
            if self._record(item, number, FULL) is not None:
                continue
            subject.go_back(at)
            reply, score = list(item.ending), 1.0
            if question is not None:
                subject.read(question.tokens)
                whole = subject.reply(question.most)
                reply, score = whole[: self.args.reply], question.score(subject.text(whole))
            outcome: dict[str, Any] = {"loss": None, "same": None}
            one = Asked(number, question, reply)
            if score == 1:
                subject.go_back(at)
                outcome = self._outcome(subject, one)
            outcome |= {"budget": None, "score": score, "reply": reply}
            self._write(item, one, FULL, None, outcome)

    def _outcome(self, subject: Subject, one: Asked) -> dict[str, Any]:
        if one.question is None:
            return {"loss": round(float(subject.losses(one.reply).mean()), 6), "same": None}
        forced = subject.forced(one.question.tokens, one.reply)
        return {"loss": round(forced.loss, 6), "same": forced.same}

    def _write(
        self, item: Item, one: Asked, row: str, share: int | None, outcome: dict[str, Any]
    ) -> None:
        record = self._identity(item, one.number, row, share) | {
            "measure": "text" if one.question is None else "reply",
            "policy": FULL if row == FULL else _identity(self.rows[row]),
            "context": len(item.context),
            "threads": self.args.threads,
            **outcome,
        }
        json_lines.append(self.path, record)
        self.done[records.key(record)] = record


def _identity(row: Label | Policy) -> str:
    return f"label {row.name}" if isinstance(row, Label) else row.identity()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.table:
            print("\n".join(render(records.read(args.out), args.against)))
            return 0
        evaluation = Evaluation(args)
        json_lines.drop_unfinished_line(args.out)
        evaluation.run()
    except (ValueError, KVPError) as error:
        raise SystemExit(f"eval_labels.py: {error}") from None
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
