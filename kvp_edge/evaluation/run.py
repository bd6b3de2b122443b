"""One evaluation: every policy in every setting reads the same conversations.

There are two modes. "one-shot", as in the papers: the whole conversation is read into a full cache,
then tokens are dropped once, down to the budget. "bounded", as for a user: the cache never keeps
more tokens than the budget, and an eviction leaves three quarters of it, so tokens are dropped
again and again while reading. With the question "unseen", tokens are dropped before it is read (in
bounded mode evictions may follow during question and reply); "seen", only in one-shot mode, drops
after it. With several questions it is the first, and the model's own replies stay in the
conversation.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from kvp_edge.evaluation.continuations import write_all
from kvp_edge.evaluation.item import Continuation, Item, Reading, Task
from kvp_edge.evaluation.kept_tokens import KeptTokens
from kvp_edge.evaluation.readers import OWN, reader_of, shares_reading, shares_trace
from kvp_edge.evaluation.records import FULL, GOLDEN, ORACLE, SHIFT, Key, Record
from kvp_edge.evaluation.setting import Prompt, Setting
from kvp_edge.llama import Llama
from kvp_edge.policies import POLICIES, get_policy
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.processor import repack
from kvp_edge.text.chat_prompt import (
    last_begin,
    next_turn,
    prompt_tokens,
    transcribe_without_template,
)


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
        llm: the model whose tokenizer and chat template are used; without a template it is set to
            the chat format "transcript".
        engine: arguments of llama_cpp.Llama, for endings that the model itself writes.
    """

    def tokens_of(text: str) -> list[int]:
        tokens: list[int] = llm.tokenize(text.encode(), add_bos=False)
        return tokens

    transcribe_without_template(llm)
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


#: A setting, and the conversations that it reads.
Job: TypeAlias = tuple[Setting, Sequence[Prompt]]

#: Conversations for which a process loads the model, where settings share their reading.
_AT_ONCE = 4


@dataclass(frozen=True)
class Run:
    """What all settings share. ``engine`` are llama_cpp.Llama's arguments."""

    model: str
    seed: int
    type_k: str
    type_v: str
    engine: dict[str, Any]

    def key(self, setting: Setting, prompt: Prompt) -> Key:
        """The key of the record that this will make."""
        return self._record(setting, prompt).key()

    def _record(self, setting: Setting, prompt: Prompt, **outcome: Any) -> Record:
        s = setting
        return Record(
            mode=s.mode,
            question=s.question,
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
            **s.how,
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
        """Yield the records one by one."""
        return self.records_of([(setting, todo)])

    def records_of(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """The records of one setting, or of several that share their reading: all settings of a
        conversation, then those of the next."""
        with reader_of(self.model, [setting for setting, _ in jobs], self.engine) as reader:
            for setting, prompt in _by_conversation(jobs):
                reader.prepare(setting, prompt)
                started = time.perf_counter()
                outcome = reader.ask(setting, prompt)
                seconds = round(time.perf_counter() - started, 3)
                yield self._record(setting, prompt, seconds=seconds, **outcome)

    def kept_tokens(self, setting: Setting, shown: Sequence[Prompt]) -> Iterator[KeptTokens]:
        """Which tokens of each conversation each head holds when the question comes."""
        for _, _, kept in self.all_kept_tokens([(setting, shown)]):
            yield kept

    def all_kept_tokens(self, jobs: Sequence[Job]) -> Iterator[tuple[Setting, Prompt, KeptTokens]]:
        """The same for all settings of all jobs."""
        for group in groups(jobs):
            with reader_of(self.model, [setting for setting, _ in group], self.engine) as reader:
                for setting, prompt in _by_conversation(group):
                    yield setting, prompt, reader.kept_tokens(setting, prompt)


def _by_conversation(jobs: Sequence[Job]) -> Iterator[tuple[Setting, Prompt]]:
    """Every setting of the first conversation, then of the second..."""
    read_in: dict[int, list[tuple[Setting, Prompt]]] = {}
    for setting, todo in jobs:
        for prompt in todo:
            read_in.setdefault(id(prompt), []).append((setting, prompt))
    for settings in read_in.values():
        yield from settings


def run_all(run: Run, jobs: Sequence[Job], workers: int) -> Iterator[Record]:
    """The records of all jobs as they come in; with several workers in any order."""
    all_groups = groups(jobs)
    if workers == 1:
        for group in all_groups:
            yield from run.records_of(group)
        return
    pieces = [piece for group in all_groups for piece in _pieces(group)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, repack.say_nothing) as pool:
        waiting = [pool.submit(_records_of, run, piece) for piece in pieces]
        try:
            for done in as_completed(waiting):
                yield from done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def groups(jobs: Sequence[Job]) -> list[list[Job]]:
    """Groups of jobs: those whose settings share reading or traces, and every other job by
    itself."""
    found: dict[object, list[Job]] = {}
    for number, (setting, todo) in enumerate(jobs):
        together = shares_reading(setting) or shares_trace(setting)
        same = replace(setting, policy="", budget=None)
        found.setdefault(same if together else number, []).append((setting, todo))
    return list(found.values())


def _pieces(group: list[Job]) -> Iterator[list[Job]]:
    """Split a group's work for processes: jobs of one setting as they are, jobs that share their
    reading into a few conversations each."""
    if len(group) == 1:
        yield group
        return
    prompts = list({id(prompt): prompt for _, todo in group for prompt in todo}.values())
    for at in range(0, len(prompts), _AT_ONCE):
        some = {id(prompt) for prompt in prompts[at : at + _AT_ONCE]}
        piece = [(setting, [p for p in todo if id(p) in some]) for setting, todo in group]
        yield [(setting, todo) for setting, todo in piece if todo]


def _records_of(run: Run, jobs: Sequence[Job]) -> list[Record]:
    return list(run.records_of(jobs))


def check_policy(policy: str, model: str) -> None:
    """Raises:
    ValueError: the policy cannot be compared on this model, or its file cannot be used.
    """
    if policy in (FULL, SHIFT, ORACLE, GOLDEN) or (policy == OWN and own_policy(model)):
        return
    if policy == OWN:
        raise ValueError(f"no policy was trained for '{model}': run kvp-edge learn")
    get_policy(policy)


def known_policies(model: str) -> list[str]:
    """All policies that can be compared on this model, in the order of presentation."""
    own = [OWN] if own_policy(model) else []
    return [FULL, *own, *POLICIES, SHIFT, ORACLE, GOLDEN]
