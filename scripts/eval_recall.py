#!/usr/bin/env python3
"""How many answers recall brings back.

    python scripts/eval_recall.py --model model.gguf --out answers.jsonl
    python scripts/eval_recall.py --model model.gguf --out answers.jsonl --one-shot
    python scripts/eval_recall.py --out answers.jsonl --table

A conversation with five facts about different things is read once for every cache. Tokens are
evicted while it is read, when no question is known, and once more at its end. Each question is then
asked from there, in a message of its own, and answered greedily. A reply is right if it names the
answer. Conversations are of two kinds in turn: facts hidden in one long message of prose, and facts
told in earlier turns of a chat.

The same questions are put to the full cache; and to each policy's cache of 1/8 and of 1/16 of the
conversation, without recall ("off") and with it ("recall"). Beside the facts there are two tasks
that ask for the whole text: how often a word occurs, and a list of all facts.

With --one-shot a cache holds all of the conversation while it is read, and is cut once, at its end.
Then all keys and values are those of the full cache: what a reply lacks, its question did not ask
for. Without it, keys and values were also computed while tokens were missing.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import json_lines
import kvp_edge  # noqa: F401  # says what is missing, before anything else is imported
from kvp_edge.bundled import bundled_model
from kvp_edge.cli.demo_tasks import Prose
from kvp_edge.evaluation.estimate import duration
from kvp_edge.text.chat_prompt import next_turn, transcribe_without_template
from lists import names, numbers
from recall_eval import records
from recall_eval.conversations import KINDS, Conversation, Question, make_facts
from recall_eval.prompts import fitting_conversation, prompt_of, rng_of, shared_context
from recall_eval.table import FULL, render
from recall_eval.ways import (
    CONTROLS,
    FOREIGN,
    OFF,
    RECALL,
    Answer,
    BoundedCache,
    FullCache,
    Way,
    parse_ways,
    require_policy,
)

TASKS = ("fact", "count", "all", "dialogue")

_EPILOG = f"""\
The file gets one line of JSON for every answer. What is in it is not measured again, so an
interrupted run goes on where it stopped. Conversations are finished one after the other: whatever
there is makes a table (--table).

controls: {", ".join(CONTROLS)}
  previous question   the queries of the question before choose the rows
  foreign question    those of another conversation's question, asked of this one
  random rows         chance chooses, beside the floor
  the others          recall with other settings (kvp_edge/cache/recall.py)

examples:
  python scripts/eval_recall.py --out tiny.jsonl --lengths 600 --conversations 2
  python scripts/eval_recall.py --model m.gguf --out a.jsonl --lengths 2000,4000 --dialogue
  python scripts/eval_recall.py --model m.gguf --out a.jsonl --controls
  python scripts/eval_recall.py --model m.gguf --out a.jsonl --one-shot
  python scripts/eval_recall.py --model m.gguf --out tune.jsonl --tasks fact \\
      --settings "wide:after=20,floor=0.25;deep:passes=3"
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=bundled_model(), help="GGUF file (the bundled model)")
    add("--out", type=Path, required=True, help="file of answers, continued if it exists")
    add("--table", action="store_true", help="measure nothing; print the file as Markdown tables")
    add("--lengths", type=numbers, default=[2000], help="tokens of a conversation, like 2000,4000")
    add("--shares", type=numbers, default=[8, 16], help="8,16: keep 1/8 and 1/16 of the length")
    add("--conversations", type=int, default=20, help="of each length, the kinds in turn (20)")
    add("--facts", type=int, default=5, help="in every conversation, each asked for (5)")
    add("--policies", type=names, default=["keydiff"], help="names or files, like keydiff,knorm")
    add(
        "--tasks",
        type=names,
        default=list(TASKS[:3]),
        help=f"some of {','.join(TASKS)} ({','.join(TASKS[:3])})",
    )
    add("--dialogue", action="store_true", help="also all questions in a row, the replies staying")
    add(
        "--controls",
        nargs="?",
        const=",".join(CONTROLS),
        default="",
        help="also recall wrongly or otherwise, of the first policy: all controls, or those named",
    )
    add("--one-shot", action="store_true", help="evict nothing while a conversation is read")
    add("--settings", default="", help='also recall with "name:after=20,floor=0.25;name2:passes=1"')
    add("--recent", type=int, default=32, help="newest tokens that stay (32, or a quarter)")
    add("--reserve", type=int, default=64, help="free cells at least (64); else budget / 4")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if args.dialogue and "dialogue" not in args.tasks:
        args.tasks.append("dialogue")
    try:
        for name in args.tasks:
            if name not in TASKS:
                raise ValueError(f"no task '{name}': there are {', '.join(TASKS)}")
        for name in names(args.controls):
            if name not in CONTROLS:
                raise ValueError(f"no control '{name}': there are {', '.join(CONTROLS)}")
        for policy in args.policies:
            require_policy(policy)
        args.tried = [*(CONTROLS[name] for name in names(args.controls))]
        args.tried += parse_ways(args.settings)
        ways = [way.name for way in (OFF, RECALL, *args.tried)]
        if len(set(ways)) < len(ways):
            raise ValueError(f"two ways of the same name among {', '.join(ways)}")
        if args.facts < 2:
            raise ValueError("--facts must be 2 or more: one question is asked beside another")
        if min(args.lengths) // max(args.shares) < 16:
            raise ValueError(
                f"1/{max(args.shares)} of {min(args.lengths)} tokens is less than 16: ask for "
                "longer conversations or larger shares"
            )
    except ValueError as error:
        parser.error(str(error))
    return args


@dataclass(frozen=True)
class Budget:
    """What a cache keeps of a conversation."""

    share: int
    budget: int
    reserve: int
    recent: int


@dataclass(frozen=True)
class Job:
    """Answers from one reading: of a conversation, by one cache."""

    number: int
    length: int
    policy: str
    budget: Budget | None  # None: the full cache
    ways: tuple[Way | None, ...]

    @property
    def kind(self) -> str:
        return KINDS[self.number % len(KINDS)]


class Evaluation:
    """All answers of one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.path: Path = args.out
        self.mode = records.ONE_SHOT if args.one_shot else records.BOUNDED
        self.model = Path(args.model).stem
        found = records.read(self.path)
        settings = {w.name: _settings(w) for w in (OFF, RECALL, *args.tried)}
        records.require_same_settings([r for r in found if r["model"] == self.model], settings)
        self.done = {records.key(record) for record in found}
        self._bounded: dict[str, BoundedCache] = {}
        self._n_ctx = max(args.lengths) * 5 // 4 + 1024 + 128 * args.facts

    @cached_property
    def full(self) -> FullCache:
        full = FullCache(self.args.model, self._n_ctx, self.args.threads)
        transcribe_without_template(full.llm)
        return full

    @cached_property
    def prose(self) -> Prose:
        return Prose(self.count)

    def count(self, text: str) -> int:
        return len(self.full.llm.tokenize(text.encode(), add_bos=False))

    def bounded(self, policy: str) -> BoundedCache:
        if policy not in self._bounded:
            most = [
                self.budget(length, share)
                for length in self.args.lengths
                for share in self.args.shares
            ]
            cache = BoundedCache(
                self.args.model,
                policy,
                self._n_ctx,
                max(b.budget for b in most),
                max(b.reserve for b in most),
                self.args.threads,
                one_shot=self.args.one_shot,
            )
            transcribe_without_template(cache.llm)
            self._bounded[policy] = cache
        return self._bounded[policy]

    def budget(self, length: int, share: int) -> Budget:
        budget = length // share
        reserve = max(self.args.reserve, budget // 4)
        return Budget(share, budget, reserve, min(self.args.recent, budget // 4))

    # -- what is to be done ------------------------------------------------------------------

    def jobs(self) -> Iterator[Job]:
        """Conversation by conversation."""
        a = self.args
        for number in range(a.conversations):
            for length in a.lengths:
                yield Job(number, length, FULL, None, (None,))
                for share in a.shares:
                    for policy in a.policies:
                        tried = a.tried if policy == a.policies[0] else []
                        budget = self.budget(length, share)
                        yield Job(number, length, policy, budget, (OFF, RECALL, *tried))

    def asked(self, job: Job) -> list[tuple[Way | None, str, int]]:
        """What this reading has not answered yet: way, task and number of the question. What is
        tried beside recall is asked for facts alone."""
        found = []
        for way in job.ways:
            for task in self.args.tasks:
                if task != "fact" and way not in (None, OFF, RECALL):
                    continue
                for number in range(self.args.facts if task in ("fact", "dialogue") else 1):
                    if records.key(self.identity(job, way, task, number)) not in self.done:
                        found.append((way, task, number))
        return found

    def identity(self, job: Job, way: Way | None, task: str, question: int) -> records.Record:
        b = job.budget
        return {
            "model": self.model,
            "seed": self.args.seed,
            "conversation": job.number,
            "kind": job.kind,
            "length": job.length,
            "facts": self.args.facts,
            "share": b and b.share,
            "mode": b and self.mode,
            "reserve": b and self.args.reserve,  # as asked for; "cells" says what came of it
            "recent": b and self.args.recent,
            "policy": job.policy,
            "way": FULL if way is None else way.name,
            "task": task,
            "question": question,
        }

    # -- doing it ----------------------------------------------------------------------------

    def run(self) -> None:
        jobs = [job for job in self.jobs() if self.asked(job)]
        total = sum(self._work(job) for job in jobs)
        done, started = 0.0, time.monotonic()
        for i, job in enumerate(jobs):
            done += self._work(job)
            self._job(job)
            took = time.monotonic() - started
            where = f"1/{job.budget.share}" if job.budget else "full"
            print(
                f"{i + 1}/{len(jobs)} readings: conversation {job.number} ({job.kind}, "
                f"{job.length} tokens, {where} {job.policy}); about "
                f"{duration(took * (total - done) / done)} left",
                file=sys.stderr,
                flush=True,
            )

    def _work(self, job: Job) -> float:
        """In tokens read; one that is written takes about as long as five."""
        asked = self.asked(job)
        return job.length + sum(320 if way in (None, OFF) else 520 for way, _, _ in asked)

    def _rng(self, number: int, length: int) -> random.Random:
        return rng_of(self.args.seed, number, length)

    def _conversation(self, job: Job) -> Conversation:
        a = self.args
        return fitting_conversation(
            self.full.llm, job.kind, a.facts, job.length, self.prose,
            lambda: self._rng(job.number, job.length),
        )  # fmt: skip

    def _foreign(self, job: Job, conversation: Conversation) -> str:
        """A question of the next conversation of this kind about something that is not in this."""
        own = {question.text for question in conversation.questions}
        number = job.number
        while True:
            number += len(KINDS)
            for fact in make_facts(job.kind, self.args.facts, self._rng(number, job.length)):
                if fact.question not in own:
                    return fact.question

    def _job(self, job: Job) -> None:
        conversation = self._conversation(job)
        llm = self.full.llm
        foreign = self._foreign(job, conversation)
        texts = [*(q.text for q in conversation.questions), foreign]
        prompts = {text: prompt_of(llm, conversation, text) for text in texts}
        context = shared_context(llm, prompts)
        b = job.budget
        cache: FullCache | BoundedCache
        if b is None:
            cache = self.full
            cache.read(context)
        else:
            cache = self.bounded(job.policy)
            cache.read(context, b.budget, b.reserve, b.recent)
        asked = self.asked(job)
        questions = {(q.task, q.number): q for q in conversation.questions}
        for way, task, number in asked:
            if task == "dialogue":
                continue
            question = questions[task, number]
            other = texts[(number - 1) % self.args.facts]
            if way is not None and way.asks == FOREIGN:
                other = foreign
            cache.go_back()
            answer = self._answer(cache, way, prompts[question.text], question, prompts[other])
            self._write(job, way, task, question, len(prompts[question.text]), answer)
        for way in dict.fromkeys(way for way, task, _ in asked if task == "dialogue"):
            self._dialogue(
                job, cache, way, prompts, [questions["fact", i] for i in range(self.args.facts)]
            )

    def _answer(
        self,
        cache: FullCache | BoundedCache,
        way: Way | None,
        prompt: list[int],
        question: Question,
        other: list[int],
    ) -> Answer:
        if isinstance(cache, FullCache):
            return cache.answer(prompt, question.max_tokens)
        assert way is not None
        return cache.answer(prompt, way, question.max_tokens, other, seed=question.number)

    def _dialogue(
        self,
        job: Job,
        cache: FullCache | BoundedCache,
        way: Way | None,
        prompts: dict[str, list[int]],
        questions: Sequence[Question],
    ) -> None:
        """The questions in a row; each reply stays."""
        cache.go_back()
        read = list[int]()
        for question in questions:
            if read:
                prompt = read + next_turn(self.full.llm, question.text)
            else:
                prompt = prompts[question.text]
            answer = self._answer(cache, way, prompt, question, [])
            key = records.key(self.identity(job, way, "dialogue", question.number))
            if key not in self.done:
                self._write(job, way, "dialogue", question, len(prompt), answer)
            read = prompt + answer.tokens

    def _write(
        self,
        job: Job,
        way: Way | None,
        task: str,
        question: Question,
        n_prompt: int,
        answer: Answer,
    ) -> None:
        reply = self.full.llm.detokenize(answer.tokens).decode("utf-8", "replace")
        r, b = answer.recalled, job.budget
        record = self.identity(job, way, task, question.number) | {
            "settings": _settings(way),
            "asked": question.text,
            "answers": list(question.answers),
            "reply": reply,
            "score": question.score(reply),
            "n_prompt": n_prompt,
            "budget": b and b.budget,
            "cells": b and b.budget + b.reserve,
            "threads": self.args.threads,
            "first_ms": round(answer.first_ms, 1),
            "seconds": round(answer.seconds, 3),
            "recalled": r.n_tokens if r else 0,
            "recalled_rows": r.n_rows if r else 0,
            "attention": round(r.share, 4) if r else None,
            "passes": r.passes if r else 0,
            "recall_ms": round(r.ms, 1) if r and math.isfinite(r.ms) else None,
        }
        json_lines.append(self.path, record)
        self.done.add(records.key(record))


def _settings(way: Way | None) -> dict[str, Any] | None:
    return (
        None if way is None or way.settings is None else asdict(way.settings) | {"asks": way.asks}
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.table:
            print("\n".join(render(records.read(args.out))))
            return 0
        evaluation = Evaluation(args)
    except ValueError as error:
        raise SystemExit(f"eval_recall.py: {error}") from None
    json_lines.drop_unfinished_line(args.out)
    try:
        evaluation.run()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
