"""Ways to answer: with the full cache, without recall, with it, and controls that recall wrongly.

A conversation is read once for every cache. A snapshot is taken then, and every question starts
from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from kvp_edge import Llama
from kvp_edge.binding.queries import Queries
from kvp_edge.cache import recall
from kvp_edge.cache.limits import CELL_UNIT
from kvp_edge.cache.recall import Choice, Recall, RecallSettings
from kvp_edge.policies import get_policy
from kvp_edge.text.chat_prompt import ends_reply

#: Recalls by hand: whose queries choose, or nobody's.
PREVIOUS, FOREIGN, RANDOM = "previous", "foreign", "random"


@dataclass(frozen=True)
class Way:
    """How a question is answered from a bounded cache.

    Attributes:
        name: in records and tables.
        settings: None: nothing is recalled.
        asks: what chooses the rows: "own", or PREVIOUS, FOREIGN or RANDOM.
    """

    name: str
    settings: RecallSettings | None
    asks: str = "own"


BASE = RecallSettings()
OFF, RECALL = Way("off", None), Way("recall", BASE)

CONTROLS = {
    way.name: way
    for way in (
        Way("previous question", BASE, PREVIOUS),
        Way("foreign question", BASE, FOREIGN),
        Way("random rows", replace(BASE, passes=1), RANDOM),
        Way("no widening", replace(BASE, after=0, before=0)),
        Way("after 8", replace(BASE, after=8)),
        Way("after 20", replace(BASE, after=20)),
        Way("one pass", replace(BASE, passes=1)),
        Way("three passes", replace(BASE, passes=3)),
        Way("each head by itself", replace(BASE, shared=0.0)),
        Way("heads by half", replace(BASE, shared=0.5)),
        Way("all heads the same", replace(BASE, shared=1.0)),
        Way("floor 0.25", replace(BASE, floor=0.25)),
        Way("floor 0.5", replace(BASE, floor=0.5)),
    )
}


def parse_ways(text: str) -> list[Way]:
    """The ways that "name:after=20,floor=0.25;name2:passes=1" describes.

    Raises:
        ValueError: no such setting, or no such value.
    """
    kinds = {f.name: type(getattr(BASE, f.name)) for f in fields(RecallSettings)}
    ways = []
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, rest = part.partition(":")
        changes: dict[str, Any] = {}
        for pair in filter(None, map(str.strip, rest.split(","))):
            key, _, value = pair.partition("=")
            if key not in kinds:
                raise ValueError(f"no recall setting '{key}': there are {', '.join(kinds)}")
            if kinds[key] is bool:
                if value not in ("true", "false"):
                    raise ValueError(f"'{key}' is true or false, not '{value}'")
                changes[key] = value == "true"
            else:
                changes[key] = kinds[key](value)
        ways.append(Way(name.strip(), replace(BASE, **changes)))
    return ways


@dataclass
class Answer:
    """A reply, and what it took.

    Attributes:
        tokens: of the reply.
        first_ms: from the question's first token to the reply's.
        seconds: to the end of the reply.
        recalled: what came back; None: nothing did. By hand, without milliseconds and share.
    """

    tokens: list[int] = field(default_factory=list)
    first_ms: float = 0.0
    seconds: float = 0.0
    recalled: Recall | None = None


def _take(llm: Llama, written: Iterator[int], max_tokens: int, started: float) -> Answer:
    answer = Answer()
    for token in written:
        if not answer.first_ms:
            answer.first_ms = 1e3 * (time.perf_counter() - started)
        if ends_reply(llm, token):
            break
        answer.tokens.append(token)
        if len(answer.tokens) == max_tokens:
            break
    answer.seconds = time.perf_counter() - started
    return answer


def _greedy(llm: Llama) -> Iterator[int]:
    while True:
        token = llm.likeliest()
        yield token
        llm.eval([token])


class FullCache:
    """A model that keeps every token."""

    def __init__(self, model: str, n_ctx: int, threads: int) -> None:
        self.llm = Llama(
            model, n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._read = 0

    def read(self, context: Sequence[int]) -> None:
        """Start a conversation with these tokens."""
        self.llm.reset()
        self.llm.eval(context)
        self._read = len(context)

    def go_back(self) -> None:
        """Be where ``read`` ended."""
        self.llm.n_tokens = self._read

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Reply to a prompt that begins with what was read."""
        started = time.perf_counter()
        self.llm.eval(prompt[self.llm.n_tokens :])
        return _take(self.llm, _greedy(self.llm), max_tokens, started)


class BoundedCache:
    """A model whose cache a policy bounds, with a log to recall from.

    Args:
        budget: the largest that ``read`` is called with; ``reserve`` and ``recent`` likewise.
        one_shot: the cache holds all of a conversation while it is read, up to ``n_ctx`` tokens.
    """

    def __init__(
        self,
        model: str,
        policy: str,
        n_ctx: int,
        budget: int,
        reserve: int,
        threads: int,
        sinks: int = 4,
        one_shot: bool = False,
    ) -> None:
        if one_shot:  # all cells for reading; beyond them the context goes on, as it is bounded
            budget, n_ctx = n_ctx, n_ctx + reserve + CELL_UNIT
        self._one_shot = one_shot
        self._events: list[Recall] = []
        self.llm = Llama(
            model,
            n_ctx=n_ctx,
            kv_budget=budget,
            reserve=reserve,
            sinks=sinks,
            recent=1,
            policy=policy,
            granularity="head",
            recall="reply",
            on_recall=self._events.append,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        assert self.llm.kv is not None
        self._kv = self.llm.kv
        self._planned = self._kv.limits
        self._context: list[int] = []

    def read(self, context: Sequence[int], budget: int, reserve: int, recent: int) -> None:
        """Start a conversation with these tokens, evict, and take a snapshot. The model has more
        cells than ``budget + reserve`` only in memory, and with ``one_shot`` until all is read: an
        eviction comes when so many are taken."""
        self.llm.reset()
        planned = replace(self._planned, n_batch=min(self._planned.n_batch, reserve))
        limits = replace(planned, budget=budget, cells=budget + reserve, recent=recent)
        self._kv.replace_limits(planned if self._one_shot else limits)
        self._kv.recall_settings = BASE
        self.llm.eval(context)
        if self._one_shot:
            assert self._kv.complete
            self._kv.replace_limits(limits)
        self.llm.evict()
        self._context = list(context)
        self._snapshot = self._kv.snapshot(), self._kv.cache.state(), self._kv.log.held

    def go_back(self) -> None:
        """Be where ``read`` ended."""
        table, state, logged = self._snapshot
        with self._kv.restoring(table, state):
            self.llm.take_over(self._context)
        self._kv.restore(table, logged)

    def answer(
        self,
        prompt: Sequence[int],
        way: Way,
        max_tokens: int,
        other: Sequence[int] = (),
        seed: int = 0,
    ) -> Answer:
        """Reply to a prompt that begins with what was read.

        Args:
            other: the prompt whose question's queries choose, for PREVIOUS and FOREIGN; the cache
                goes back for it.
            seed: of RANDOM.
        """
        self._events.clear()
        if way.settings is None:
            started = time.perf_counter()
            self.llm.eval(prompt[self.llm.n_tokens :])
            return _take(self.llm, _greedy(self.llm), max_tokens, started)
        self._kv.recall_settings = way.settings
        if way.asks != "own":
            return self._by_hand(prompt, way, max_tokens, other, seed)
        started = time.perf_counter()
        with closing(self.llm.generate(prompt, temp=0.0, top_k=1)) as written:
            answer = _take(self.llm, written, max_tokens, started)
        answer.recalled = self._events[-1] if self._events else None
        return answer

    # -- controls ----------------------------------------------------------------------------

    def _by_hand(
        self, prompt: Sequence[int], way: Way, max_tokens: int, other: Sequence[int], seed: int
    ) -> Answer:
        kv, rng = self._kv, np.random.default_rng(seed)
        asked = [] if way.asks == RANDOM else self._queries_of(other)

        def choose(n: int, number: int) -> Choice | None:
            if way.asks == RANDOM:
                choice = kv.choose_by_queries(n)
                return None if choice is None else self._random(choice, rng)
            return kv.choose_by_queries(n, asked[number]) if number < len(asked) else None

        self.go_back()
        started = time.perf_counter()
        recalled = self._recall(prompt, choose)
        answer = _take(self.llm, _greedy(self.llm), max_tokens, started)
        answer.recalled = recalled
        return answer

    def _queries_of(self, prompt: Sequence[int]) -> list[Queries]:
        """The queries of the question that ends ``prompt``, in every pass of its own recall."""
        found: list[Queries] = []

        def choose(n: int, _: int) -> Choice | None:
            assert self._kv.query_log is not None
            found.append(self._kv.query_log.read(n))
            return self._kv.choose_by_queries(n)

        self.go_back()
        self._recall(prompt, choose)
        return found

    def _recall(
        self, prompt: Sequence[int], choose: Callable[[int, int], Choice | None]
    ) -> Recall | None:
        """What Llama does before a reply, with another choice of rows.

        Args:
            choose: called with the number of tokens that ask and that of the pass.
        """
        kv, llm = self._kv, self.llm
        before = kv.indices
        rest = prompt[llm.n_tokens :]
        kv.watch_queries(True)
        try:
            llm.eval(rest)
            n = kv.n_asking(len(rest))
            end = int(llm.n_tokens)
            found: list[Choice] = []
            while n and len(found) < kv.recall_settings.passes:
                choice = choose(n, len(found))
                if choice is None:
                    break
                llm.n_tokens = end - n
                llm.sync()
                kv.bring(choice)
                llm.eval(prompt[end - n :])
                found.append(choice)
        finally:
            kv.watch_queries(False)
        if not found:
            return None
        event = Recall.of(before, kv.indices, kv.seen, found)
        return replace(event, ms=float("nan"))

    def _random(self, choice: Choice, rng: np.random.Generator) -> Choice:
        """The same number of rows: the policy's floor stays, and chance takes the others."""
        kv, t, tail = self._kv, choice.table, choice.tail
        n = choice.tokens.shape[-1]
        shape = (*choice.tokens.shape[:-1], tail)
        held = t.indices()[..., :n]
        competing = held >= kv.protected_prefix
        worth = kv.policy.worth(t.scores, t.seen - t.indices())[..., :n]
        floor = recall.floor_of(worth, held, competing, kv.recall_settings.floor, tail)
        tokens = np.arange(tail, dtype=np.int32)
        chosen = recall.choose(
            rng.random(shape, np.float32),
            floor,
            (choice.rows[..., :tail] >= 0) | kv.log.holds(tail),
            tokens < kv.protected_prefix,
            tokens,
            n,
        )
        fresh = np.take_along_axis(choice.rows, chosen, axis=-1) < 0
        none = np.zeros(chosen.shape, np.float32)
        return replace(choice, tokens=chosen, wanted=none, n_rows=int(fresh.sum()))


def require_policy(name: str) -> None:
    """Refuse a policy that there is not, before anything is measured.

    Raises:
        PolicyError: there is none of this name.
    """
    get_policy(name)
