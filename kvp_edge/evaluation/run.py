"""One evaluation: every policy in every setting reads the same conversations.

Two modes. "one-shot", that of the papers: the whole conversation is read into a full cache, then
tokens are dropped once, down to the budget. "bounded", that of a user: never more tokens than the
budget are held, and tokens are dropped again and again while the conversation is read; an eviction
leaves three quarters of them, and the last quarter is the room to read on. With the question
"unseen" nothing of it was read when the context is dropped (in bounded mode evictions may follow
while question and reply are read); "seen", for one-shot alone, drops after it. Where several
questions are asked, it is the first of them, and the model's own replies stay in the conversation.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvp_edge.capture import Tracer
from kvp_edge.chat_prompt import last_begin, next_turn, prompt_tokens
from kvp_edge.evaluation.continuations import write_all
from kvp_edge.evaluation.item import Continuation, Item, Reading, Task
from kvp_edge.evaluation.kept_tokens import KeptTokens
from kvp_edge.evaluation.oracle import Oracle
from kvp_edge.evaluation.records import FULL, GOLDEN, ORACLE, PARTS, SHIFT, Key, Record
from kvp_edge.evaluation.subject import Shifted, Subject
from kvp_edge.llama import Llama
from kvp_edge.own_policy import own_policy
from kvp_edge.policies import POLICIES, Learned, get_policy
from kvp_edge.traces import Trace

IntArray = npt.NDArray[np.int32]

#: The policy trained for the model; besides it FULL, SHIFT, ORACLE, GOLDEN,
#: kvp_edge.policies.POLICIES and policy files can be compared.
OWN = Learned.name

#: The smallest budget: sinks, newest tokens, and a few to choose.
SMALLEST = 16


@dataclass(frozen=True)
class Prompt:
    """An item or reading in tokens of the model.

    Attributes:
        task, number: which.
        tokens: int32 [n], the conversation without its reply; of a reading the ending, too.
        border: where the question begins, or the ending.
        item: None for a reading.
        reply_tokens: the most tokens of a reply.
        turns: of an item with several questions, what is read after every reply but the last.
        measured: of a reading, bool [n - border]: which tokens of the ending count. None: all.
    """

    task: str
    number: int
    tokens: IntArray
    border: int
    item: Item | None
    reply_tokens: int
    turns: tuple[tuple[int, ...], ...] = ()
    measured: npt.NDArray[np.bool_] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the conversation with the longest replies, and one to spare."""
        turns = sum(len(turn) + self.reply_tokens for turn in self.turns)
        return len(self.tokens) + self.reply_tokens + turns + 1

    @cached_property
    def digest(self) -> str:
        read = np.concatenate((self.tokens, *self.turns), dtype=np.int32)
        return hashlib.sha256(read.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Setting:
    """How a conversation is read.

    Attributes:
        length: tokens of a conversation, about.
        longest: tokens of the longest one, with its reply.
        budget: most tokens that are held (bounded), or that stay (one-shot). None: all of them.
        protected: whether the first and the newest tokens stay, whatever their score.
        keep_whole, isolate_turns: see kvp_edge.Llama.
    """

    mode: Literal["bounded", "one-shot"]
    question: Literal["unseen", "seen"]
    granularity: str
    length: int
    longest: int
    budget: int | None
    policy: str
    protected: bool
    keep_whole: str = "tokens"
    isolate_turns: bool = False

    def __post_init__(self) -> None:
        if self.mode == "bounded" and self.question == "seen":
            raise ValueError(
                "in bounded mode tokens are dropped while the conversation is read, before its "
                "question is: --question seen is for --mode one-shot"
            )


def budget_of(share: str, length: int) -> int:
    """Tokens for "1/8" or "0.125" of ``length``, or for a whole number like "512".

    Raises:
        ValueError: neither of them, or too few tokens.
    """
    try:
        number = Fraction(share)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number <= 0 or (number > 1 and number.denominator != 1):
        raise ValueError(
            f"a budget is a share of the length like 1/8, or a number of tokens like 512, not "
            f"'{share}'"
        )
    budget = int(number) if number.denominator == 1 and number > 1 else int(number * length)
    if budget < SMALLEST:
        raise ValueError(
            f"a budget of {share} is {budget} of {length} tokens, and less than {SMALLEST} leave a "
            "policy nothing to choose: raise --budgets or --lengths"
        )
    return budget


def prompts(
    llm: Llama,
    tasks: dict[str, Task],
    names: Sequence[str],
    length: int,
    count: int,
    seed: int,
    engine: Mapping[str, Any] = MappingProxyType({}),
) -> list[Prompt]:
    """``count`` conversations of each task, of at most about ``length`` tokens.

    Args:
        llm: whose tokenizer and chat template they are for.
        engine: arguments of llama_cpp.Llama, for endings that the model itself writes.
    """

    def tokens_of(text: str) -> list[int]:
        tokens: list[int] = llm.tokenize(text.encode(), add_bos=False)
        return tokens

    found: list[Prompt] = []
    for name in names:
        task = tasks[name]
        made = task.make(count, length, lambda text: len(tokens_of(text)), seed)
        starts = [
            (_context(llm, one), [next_turn(llm, text) for text in one.questions], one)
            for one in made
            if isinstance(one, Continuation)
        ]
        written = iter(write_all(llm.model_path, starts, engine))
        for number, item in enumerate(made):
            turns: tuple[tuple[int, ...], ...] = ()
            measured = None
            if isinstance(item, Item):
                tokens = prompt_tokens(llm, item.messages)
                border = last_begin(llm, tokens, item.question)
                turns = tuple(tuple(next_turn(llm, question.text)) for question in item.more)
            elif isinstance(item, Reading):
                tokens = _context(llm, item)
                border = len(tokens)
                tokens = [*tokens, *tokens_of(item.ending)]
            else:
                tokens, border, measured = next(written)
            found.append(
                Prompt(
                    name,
                    number,
                    np.array(tokens, np.int32),
                    border,
                    item if isinstance(item, Item) else None,
                    task.reply_tokens,
                    turns,
                    measured,
                )
            )
    return found


def _context(llm: Llama, reading: Reading | Continuation) -> list[int]:
    if isinstance(reading.context, str):
        tokens: list[int] = llm.tokenize(reading.context.encode(), add_bos=True)
        return tokens
    return prompt_tokens(llm, reading.context)


@dataclass(frozen=True)
class Run:
    """What all settings share. ``engine`` are llama_cpp.Llama's arguments."""

    model: str
    seed: int
    type_k: str
    type_v: str
    engine: dict[str, Any]

    def key(self, setting: Setting, prompt: Prompt) -> Key:
        """Of the record that this will make."""
        return self._record(setting, prompt).key()

    def _record(self, setting: Setting, prompt: Prompt, **outcome: Any) -> Record:
        s = setting
        return Record(
            mode=s.mode,
            question=s.question,
            granularity=s.granularity,
            type_k=self.type_k,
            type_v=self.type_v,
            length=s.length,
            budget=s.budget,
            share=None if s.budget is None else round(s.budget / s.length, 6),
            policy=s.policy,
            task=prompt.task,
            item=prompt.number,
            seed=self.seed,
            protected=s.protected,
            keep_whole=s.keep_whole,
            isolate_turns=s.isolate_turns,
            prompt=prompt.digest,
            n_prompt=len(prompt.tokens),
            measure="loss" if prompt.item is None else "accuracy",
            **{
                "kept": 0,
                "dropped": 0,
                "evictions": 0,
                "reply": "",
                "score": 0.0,
                "seconds": 0.0,
                "kv_bytes": 0,
                **outcome,
            },
        )

    def records(self, setting: Setting, todo: Sequence[Prompt]) -> Iterator[Record]:
        """One record after the other."""
        with _Reader(self, setting) as reader:
            for prompt in todo:
                started = time.perf_counter()
                outcome = reader.ask(prompt)
                seconds = round(time.perf_counter() - started, 3)
                yield self._record(setting, prompt, seconds=seconds, **outcome)

    def kept_tokens(self, setting: Setting, shown: Sequence[Prompt]) -> Iterator[KeptTokens]:
        """Which tokens of each conversation each head holds when the question comes."""
        with _Reader(self, setting) as reader:
            for prompt in shown:
                yield reader.kept_tokens(prompt)


class _Reader:
    """A subject in one setting."""

    def __init__(self, run: Run, setting: Setting) -> None:
        self._setting = setting
        self._run = run
        self._tracer: Tracer | None = None
        self._full: Subject | None = None  # what an oracle reads replies from
        self._one_shot = setting.mode == "one-shot" and setting.budget is not None
        n_ctx, budget, engine = setting.longest, setting.budget, run.engine
        if budget is None:
            self._subject = Subject.whole(run.model, n_ctx, **engine)
            return
        if setting.policy == SHIFT:
            self._subject = Shifted(run.model, n_ctx, min(budget, n_ctx), **engine)
            return
        protection = {} if setting.protected else {"sinks": 0, "recent": 1}
        policy = setting.policy
        if policy == OWN:
            policy = own_policy(run.model) or ""
        if policy in (ORACLE, GOLDEN):
            # without flash attention the attention itself is captured, in models of every kind
            plain = {k: v for k, v in engine.items() if k != "flash_attn"}
            self._tracer = Tracer(run.model, n_ctx, **plain)
            policy = "recency"  # until the first conversation is traced
        budget = min(budget, n_ctx)
        unbounded = self._one_shot or budget == n_ctx
        kept = budget if unbounded else budget - max(1, budget // 4)
        self._subject = Subject(
            run.model,
            n_ctx,
            n_ctx if unbounded else budget,
            kept,
            policy=policy,
            granularity=setting.granularity,
            keep_whole=setting.keep_whole,
            isolate_turns=setting.isolate_turns,
            **protection,
            **engine,
        )

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._subject, self._tracer, self._full):
            if one is not None:
                one.close()

    def ask(self, prompt: Prompt) -> dict[str, Any]:
        subject, tokens = self._subject, prompt.tokens.tolist()
        cut = self._read_context(prompt)
        seen = cut == len(tokens)
        held = {"kept": subject.held, "dropped": cut - subject.held}
        if prompt.item is None:
            losses = subject.losses(tokens[cut:])
            if prompt.measured is not None:
                losses = losses[prompt.measured]
            outcome: dict[str, Any] = {
                "score": round(float(losses.mean()), 6),
                "losses": _by_part(losses),
            }
        else:
            if not seen:
                subject.read(tokens[cut:])
            written = subject.converse(prompt.turns, prompt.reply_tokens)
            replies = [subject.text(reply) for reply in written]
            outcome = {"reply": "\n".join(replies), "score": prompt.item.score(*replies)}
        return {**held, **outcome, "evictions": subject.evictions, "kv_bytes": self._kv_bytes()}

    def _kv_bytes(self) -> int:
        """Of the most tokens held at once. Cells that no token was in do not count."""
        stats, held = self._subject.kv_stats, self._subject.n_tokens
        budget = self._setting.budget
        if self._setting.mode == "bounded" and budget is not None and self._subject.evictions:
            held = budget  # it was full; after a context shift n_tokens is what is left
        return stats.kv_bytes * held // stats.cells

    def _read_context(self, prompt: Prompt) -> int:
        """Read all that comes before the question, or the question too where it is to be seen, and
        drop what is to be dropped. How many tokens were read."""
        subject, tokens = self._subject, prompt.tokens.tolist()
        if self._tracer is not None:
            trace = _traced(self._tracer, self._whole(prompt), prompt)
            subject.policy = Oracle(trace, peak=self._setting.policy == GOLDEN)
        subject.forget()
        seen = self._setting.question == "seen" and prompt.item is not None
        cut = len(tokens) if seen else prompt.border
        subject.read(tokens[:cut])
        if self._one_shot:
            subject.evict()
        return cut

    def _whole(self, prompt: Prompt) -> list[int]:
        """The conversation up to its last question, with the replies of the full cache before."""
        tokens: list[int] = prompt.tokens.tolist()
        if not prompt.turns:
            return tokens
        if self._full is None:
            run = self._run
            self._full = Subject.whole(run.model, self._setting.longest, **run.engine)
        self._full.forget()
        self._full.read(tokens)
        replies = self._full.converse(prompt.turns, prompt.reply_tokens)
        for reply, turn in zip(replies, prompt.turns, strict=False):  # the last one is traced
            tokens += [*reply, *turn]
        return tokens

    def kept_tokens(self, prompt: Prompt) -> KeptTokens:
        subject, setting = self._subject, self._setting
        n = self._read_context(prompt)
        positions = np.asarray(subject.kv_positions)
        if positions.ndim == 1:
            positions = positions[None, None]
        kept = np.zeros((*positions.shape[:2], n), np.bool_)
        np.put_along_axis(kept, positions, True, axis=2)
        return KeptTokens(
            texts=[subject.text_of(t) for t in prompt.tokens[:n].tolist()],
            kept=kept,
            protected=subject.protected(n),
            title=f"{setting.policy}, {setting.budget} tokens, {prompt.task} {prompt.number}",
        )


def _by_part(losses: npt.NDArray[np.float64]) -> list[float]:
    """The mean of each of PARTS parts in a row; none if there are fewer tokens than that."""
    if len(losses) < PARTS:
        return []
    return [round(float(part.mean()), 6) for part in np.array_split(losses, PARTS)]


def _traced(tracer: Tracer, tokens: list[int], prompt: Prompt) -> Trace:
    """The conversation with its last reply, read with a full cache."""
    n_reply = prompt.reply_tokens if prompt.item is not None else 0
    got = tracer.capture(tokens, prompt.border, n_reply)
    return Trace(
        keys=got.keys,
        values=got.values,
        positions=got.positions,
        tokens=got.tokens,
        attention=got.sums,
        n_prompt=prompt.border,
        blocks=got.blocks,
        scale=got.blocks.scale,
        source=prompt.task,
    )


def run_all(
    run: Run, jobs: Sequence[tuple[Setting, Sequence[Prompt]]], workers: int
) -> Iterator[Record]:
    """The records of all jobs as they come in; with several workers in any order."""
    if workers == 1:
        for setting, todo in jobs:
            yield from run.records(setting, todo)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(_job, run, setting, todo) for setting, todo in jobs]
        try:
            for done in as_completed(waiting):
                yield from done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _job(run: Run, setting: Setting, todo: Sequence[Prompt]) -> list[Record]:
    return list(run.records(setting, todo))


def check_policy(policy: str, model: str) -> None:
    """Raises:
    ValueError: a policy that cannot be compared on this model; a policy file that cannot be used.
    """
    if policy in (FULL, SHIFT, ORACLE, GOLDEN) or (policy == OWN and own_policy(model)):
        return
    if policy == OWN:
        raise ValueError(f"there is no policy trained for '{model}': kvp-edge learn makes one")
    get_policy(policy)


def known_policies(model: str) -> list[str]:
    """All that can be compared on this model, in the order in which they are presented."""
    own = [OWN] if own_policy(model) else []
    return [FULL, *own, *POLICIES, SHIFT, ORACLE, GOLDEN]
