#!/usr/bin/env python3
"""Many clients of one server, and what they do to it: no chat is lost, mixed, or kept waiting.

    python scripts/stress_server.py [--seconds 600] [--clients 50] [--parallel 1] [--seed 0]

A server process with the bundled model, and clients that do one of these again and again:

    turns     the next message of a chat; some of them are long, so that tokens are dropped
    branches  a message edited, a reply regenerated, or one chat gone on with by two at once
    drops     a stream left after a random piece, and the chat gone on with
    leaving   a request left while it waits, or before it is read
    slow      a stream read slowly

The queue is too short for all of them: who gets 503 comes again after Retry-After. Afterwards every
reply is compared with what an undisturbed ``Llama`` says. One that reads the same turns must say
the same, token for token. After a branch or a drop this is promised as long as nothing was dropped.
Checked as well: requests begin in the order in which they came; /health, /kvp/cache and /metrics
answer all the time; memory is bounded; in the end the server is idle, and has told of no error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from makers.command import COMMAND

TEXT = "the old man went to sea and my dog is called Rex snow fell on all roofs where we sang"
WORDS = TEXT.split()
CACHE: dict[str, Any] = {"kv_budget": 96, "recent": 16, "reserve": 64, "n_ctx": 2048}
CHATS = 256  # MiB of all chats together
MOST_GROWTH = CHATS + 64  # MiB of the process, from the first fifth of the time to the end
MOST_WAIT = 10.0  # seconds for /health
JITTER = 2.0  # seconds between two requests that are surely in order
CHAT = "/v1/chat/completions"


class Server:
    """A process of ``kvp-edge serve``. What it says on stderr is in ``said``."""

    def __init__(self, *options: str) -> None:
        command = [*COMMAND, "serve", "--port", "0", "--threads", "1"]
        for name, value in CACHE.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self.url = ""
        ready = threading.Event()
        threading.Thread(target=self._read, args=(ready,), daemon=True).start()
        ready.wait()
        if not self.url:
            raise SystemExit("".join(self.said))

    def _read(self, ready: threading.Event) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"(http://\S+) is ready", line):
                self.url = found[1]
                ready.set()
        ready.set()

    @property
    def mebibytes(self) -> float:
        """Memory that it uses; 0 where /proc does not tell."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
            return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
        return 0.0

    def end(self) -> int:
        """Its status after Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextlib.contextmanager
def running(*options: str) -> Iterator[Server]:
    # in the background of a shell script SIGINT is ignored, and the server would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    server = Server(*options)
    try:
        yield server
    finally:
        server.end()


@dataclass
class Reply:
    """
    Attributes:
        asked: the body of the request.
        text: of the whole reply.
        chat: its id.
        evictions: of its chat so far.
    """

    asked: dict[str, Any]
    text: str
    chat: str
    evictions: int


@dataclass
class Talk:
    """One chat as its client knows it.

    Attributes:
        plain: nothing but turns, so all replies can be compared, evictions or not.
        forgotten: replies before the server had no room for it any more.
    """

    name: str
    plain: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    forgotten: int | None = None


class Left(Exception):
    """The client did, as it wanted to."""


class Stress:
    def __init__(self, args: argparse.Namespace, server: Server) -> None:
        self.args, self.server = args, server
        self.rng = random.Random(args.seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.talks: list[Talk] = []
        self.begun: list[tuple[float, float]] = []  # when a request was sent, and when it began
        self.longest_wait = 0.0
        self.ends = time.monotonic() + args.seconds

    def fail(self, what: str) -> None:
        self.failures.append(what)
        print(what, file=sys.stderr)

    # -- clients -----------------------------------------------------------------------------

    def text(self, name: str, longest: int) -> str:
        words = self.rng.choices(WORDS, k=self.rng.randint(2, longest))
        return f"{name}: {' '.join(words)}?"

    def talk(self, plain: bool) -> Talk:
        talk = Talk(f"Number {len(self.talks)}", plain)
        self.talks.append(talk)
        return talk

    async def client(self, http: httpx.AsyncClient) -> None:
        """Several chats, by turns."""
        mine = [self.talk(plain=i < 2) for i in range(4)]
        while time.monotonic() < self.ends and not self.failures:
            i = self.rng.randrange(len(mine))
            talk = mine[i]
            if len(talk.messages) > (16 if talk.plain else 4):
                mine[i] = talk = self.talk(talk.plain)
            ways = [self.turn] if talk.plain else [self.branch, self.drop, self.leave, self.both]
            try:
                await self.rng.choice([*ways, self.turn])(http, talk)
            except httpx.HTTPError as error:
                self.fail(f"a connection failed: {error!r}")

    async def turn(self, http: httpx.AsyncClient, talk: Talk) -> None:
        said = {"role": "user", "content": self.text(talk.name, 120 if talk.plain else 8)}
        talk.messages.append(said)
        await self.answer(http, talk, talk.messages, slow=self.rng.random() < 0.1)
        self.counts["turns"] += 1
        if talk.plain and talk.replies and talk.forgotten is None:
            await self.same(http, talk)

    async def same(self, http: httpx.AsyncClient, talk: Talk) -> None:
        """Whether a plain chat has gone on with itself, or is rightly forgotten."""
        first, last = talk.replies[0].chat, talk.replies[-1].chat
        if first != last:
            if (await http.get(f"/kvp/chats/{first}")).status_code != 404:
                self.fail(f"the chat {first} went on in another, {last}: {talk}")
            self.counts["forgotten"] += 1
            talk.forgotten = len(talk.replies) - 1

    async def branch(self, http: httpx.AsyncClient, talk: Talk) -> None:
        if not talk.messages:
            return
        n = self.rng.randrange(0, len(talk.messages), 2)
        del talk.messages[n + 1 :]
        if self.rng.random() < 0.5:
            talk.messages[n] = {"role": "user", "content": self.text(talk.name, 8)}
        await self.answer(http, talk, talk.messages)
        self.counts["branches"] += 1

    async def both(self, http: httpx.AsyncClient, talk: Talk) -> None:
        """Two clients go on with one chat at once."""
        each = [
            [*talk.messages, {"role": "user", "content": self.text(talk.name, 8)}] for _ in range(2)
        ]
        await asyncio.gather(*(self.answer(http, talk, messages) for messages in each))
        talk.messages = each[0]
        self.counts["two at once"] += 1

    async def drop(self, http: httpx.AsyncClient, talk: Talk) -> None:
        talk.messages.append({"role": "user", "content": self.text(talk.name, 8)})
        with contextlib.suppress(Left):
            await self.answer(http, talk, talk.messages, most=self.rng.randint(1, 8))
        self.counts["drops"] += 1

    async def leave(self, http: httpx.AsyncClient, talk: Talk) -> None:
        messages = [*talk.messages, {"role": "user", "content": self.text(talk.name, 8)}]
        body = self.body(messages, stream=self.rng.random() < 0.5)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(http.post(CHAT, json=body), self.rng.random() / 2)
        self.counts["left"] += 1

    def body(self, messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
        return {"messages": list(messages), "max_tokens": 12, "temperature": 0, "seed": 1, **more}

    async def answer(
        self,
        http: httpx.AsyncClient,
        talk: Talk,
        messages: list[dict[str, str]],
        *,
        most: int | None = None,
        slow: bool = False,
    ) -> None:
        """Ask until there is an answer, and add it to the messages.

        Args:
            most: pieces, after which the client leaves.
            slow: it takes its time between them.

        Raises:
            Left: it did.
        """
        stream = most is not None or slow or self.rng.random() < 0.7
        body = self.body(messages, stream=stream)
        while True:
            sent = time.monotonic()
            if stream:
                found = await self.streamed(http, body, sent, most, slow)
            else:
                answer = await http.post(CHAT, json=body)
                found = await self.checked(answer)
            if found is not None:
                break
        text, last = found
        messages.append({"role": "assistant", "content": text})
        if last is None:
            raise Left
        talk.replies.append(Reply(body, text, last["chat_id"], last["kv_cache"]["evictions"]))

    async def checked(self, answer: httpx.Response) -> tuple[str, Any] | None:
        """Text of a reply, and the last part of it that came, if it is whole; None: the client
        shall come again, and has waited."""
        if answer.status_code == 503:
            await answer.aread()
            self.counts["come again"] += 1
            await asyncio.sleep(min(float(answer.headers["retry-after"]), 3 * self.rng.random()))
            return None
        if answer.status_code != 200:
            await answer.aread()
            self.fail(f"status {answer.status_code}: {answer.text}")
            return "", None
        if "json" in answer.headers["content-type"]:
            reply = answer.json()
            return reply["choices"][0]["message"]["content"], reply
        return "", None

    async def streamed(
        self,
        http: httpx.AsyncClient,
        body: dict[str, Any],
        sent: float,
        most: int | None,
        slow: bool,
    ) -> tuple[str, Any] | None:
        text, last, n = "", None, 0
        async with http.stream("POST", CHAT, json=body) as answer:
            if answer.status_code != 200:
                return await self.checked(answer)
            async for chunk in self.chunks(answer):
                if n == 0:
                    self.begun.append((sent, time.monotonic()))
                n += 1
                text += chunk["choices"][0]["delta"].get("content") or ""
                last = chunk if "kv_cache" in chunk else None
                if slow:
                    await asyncio.sleep(self.rng.random() / 5)
                if n == most and last is None:
                    return text, None
        if last is None:
            self.fail(f"a stream ended without its last chunk, after {text!r}")
        return text, last

    async def chunks(self, answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.fail(f"an error in a stream: {chunk}")
                    return
                yield chunk

    # -- meanwhile ---------------------------------------------------------------------------

    async def look(self, http: httpx.AsyncClient, warm: Callable[[], None]) -> None:
        """At what must always answer, and at the memory."""
        warms, chat = time.monotonic() + self.args.seconds / 5, ""
        while time.monotonic() < self.ends and not self.failures:
            since = time.monotonic()
            if (await http.get("/health")).status_code != 200:
                self.fail("/health is not well")
            self.longest_wait = max(self.longest_wait, time.monotonic() - since)
            for path in (f"/kvp/cache?chat={chat}&texts_from=3", "/metrics", "/kvp/chats"):
                answer = await http.get(path)
                if answer.status_code != 200:
                    self.fail(f"{path}: {answer.status_code} {answer.text}")
            listed = answer.json()["chats"]
            chat = self.rng.choice(listed)["id"] if listed else ""
            if self.rng.random() < 0.1 and chat:
                await http.get(f"/kvp/chats/{chat}")
            if time.monotonic() > warms:
                warm()
                warms = float("inf")
            self.counts["looks"] += 1
            await asyncio.sleep(0.3)

    async def run(self) -> None:
        at_first = [0.0]

        def warm() -> None:
            at_first[0] = self.server.mebibytes

        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self.server.url, timeout=600, limits=limits, trust_env=False
        ) as http:
            clients = [self.client(http) for _ in range(self.args.clients)]
            await asyncio.gather(self.look(http, warm), *clients)
            while re.search(r"^kvp_(queue|at_work) [^0]", (await http.get("/metrics")).text, re.M):
                await asyncio.sleep(0.1)
        at_last = self.server.mebibytes
        if at_last > max(at_first[0], 1) + MOST_GROWTH and at_first[0]:
            self.fail(f"memory grew from {at_first[0]:.0f} to {at_last:.0f} MiB")
        if self.longest_wait > MOST_WAIT:
            self.fail(f"/health answered after {self.longest_wait:.1f} s")
        print(
            f"/health in {self.longest_wait:.2f} s at most; "
            f"{at_first[0]:.0f} MiB after warming up, {at_last:.0f} MiB at the end"
        )

    # -- afterwards --------------------------------------------------------------------------

    def check_order(self) -> None:
        """Who came surely earlier began earlier; with one context."""
        if self.args.parallel > 1:
            return
        begun = sorted(self.begun)
        latest, j = 0.0, 0  # the latest begin of those that were sent JITTER before this one
        for sent, began in begun:
            while begun[j][0] < sent - JITTER:
                latest, j = max(latest, begun[j][1]), j + 1
            if began < latest - JITTER:
                self.fail(f"a request began {latest - began:.1f} s before an earlier one")
        self.counts["in order"] += len(begun)

    def check_replies(self) -> None:
        """Each beside what a Llama says that reads the same."""
        llm = Llama(
            bundled_model(), recall="off", verbose=False, n_threads=1, n_threads_batch=1, **CACHE
        )
        known: dict[str, str] = {}
        for talk in self.talks:
            llm.reset()
            for i, reply in enumerate(talk.replies):
                again = talk.forgotten is not None and i >= talk.forgotten
                if reply.evictions and (again or not talk.plain):
                    self.counts["not compared"] += 1
                    continue
                key = json.dumps(reply.asked["messages"])
                if talk.plain or key not in known:
                    body = {k: v for k, v in reply.asked.items() if k != "stream"}
                    result: Any = llm.create_chat_completion(**body)
                    known[key] = result["choices"][0]["message"]["content"]
                if reply.text != known[key]:
                    self.fail(f"{talk}\nsaid {reply.text!r}, alone {known[key]!r}")
                    return
                self.counts["compared"] += 1
                self.counts["compared after evictions"] += reply.evictions > 0
        llm.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--parallel", type=int, default=1, help="contexts of the server")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = ("--recall", "off", "--queue", str(max(1, args.clients * 3 // 5)))
    options += ("--chats-limit", f"{CHATS}MiB", "--parallel", str(args.parallel))
    with running(*options) as server:
        stress = Stress(args, server)
        asyncio.run(stress.run())
        status = server.end()
    if status != 130:
        stress.fail(f"the server ended with status {status}")
    said = [line for line in server.said if not re.match(r"[\d:]+ read \d+ of", line)]
    if re.search("Traceback|Error|Exception|warning", "".join(said)):
        stress.fail("the server said:\n" + "".join(said))
    stress.check_order()
    stress.check_replies()
    print(", ".join(f"{name} {n}" for name, n in sorted(stress.counts.items())))
    return 1 if stress.failures else 0


if __name__ == "__main__":
    sys.exit(main())
