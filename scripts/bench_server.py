#!/usr/bin/env python3
"""kvp-edge serve in numbers: how soon a reply begins, what it costs to change chats, and what else
the server does meanwhile.

    python scripts/bench_server.py [--model FILE] [--tokens 8192] [--rounds 3]
    python scripts/bench_server.py --beside   # llama_cpp.server, too: llama-cpp-python[server]

Two chats of so many tokens are told, turn by turn. Then each gets short questions in turn: the same
chat twice (follow-up), and after the other one (change). Time to the first token is measured by the
client. llama_cpp.server has one context of as many tokens and reads a chat again after the other
one. Rows of both servers alternate in one run; medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx2 as httpx

from kvp_edge import Llama
from kvp_edge.bundled import bundled_model
from makers.command import COMMAND

#: Tokens of a message, about.
PIECE = 700


@contextlib.contextmanager
def running(command: list[str], ready: str) -> Iterator[tuple[httpx.Client, int]]:
    """A server: a client of it, and its process.

    Args:
        ready: pattern of the line on stderr that says that it is, with its address or port.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        found, said = None, []
        for line in process.stderr:
            said.append(line)
            found = re.search(ready, line)
            if found:
                break
        if not found:
            raise SystemExit("".join(said))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with httpx.Client(base_url=found.group(1), timeout=None) as client:
            yield client, process.pid
        process.terminate()


def ours(args: Any, *more: str) -> list[str]:
    return [
        *(*COMMAND, "serve", args.model, "--port", "0"),
        *("--kv-budget", str(args.budget), "--n-ctx", str(args.tokens + 2048), *more),
        *(("--threads", str(args.threads)) if args.threads else ()),
    ]


def theirs(args: Any, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "llama_cpp.server", "--model", args.model, "--port", str(port)),
        *("--n_ctx", str(args.tokens + 2048)),
        *(
            ("--n_threads", str(args.threads), "--n_threads_batch", str(args.threads))
            if args.threads
            else ()
        ),
    ]


class Talk:
    """One chat with a server."""

    def __init__(self, client: httpx.Client, name: str) -> None:
        self._client, self._name = client, name
        self.messages: list[dict[str, str]] = []
        self.length = 0  # tokens

    def say(self, text: str, max_tokens: int) -> float:
        """Seconds to the first token of the reply."""
        self.messages.append({"role": "user", "content": text})
        asked = {
            "messages": self.messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        began, said, first = time.perf_counter(), "", None
        with self._client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(chunk["error"]["message"])
                self.length = chunk.get("kv_cache", {}).get("seen", self.length)
                if not chunk["choices"]:
                    continue
                said += chunk["choices"][0]["delta"].get("content") or ""
                first = first or time.perf_counter()
        self.messages.append({"role": "assistant", "content": said})
        return (first or time.perf_counter()) - began

    def grow(self, tokens: int, words: list[str], per: int) -> float:
        """Tell it a text in messages of ``per`` words; returns the seconds it took to read."""
        read, at, seconds = 0, 0, 0.0
        while read + PIECE <= tokens:
            piece = " ".join(words[at : at + per])
            at = (at + per) % max(1, len(words) - per)
            seconds += self.say(f"{self._name} {read}: {piece}", 4)
            read += PIECE
        return seconds


def pieces(model: str) -> tuple[list[str], int]:
    """The words of a text, and how many of them have PIECE tokens."""
    text = (resources.files("kvp_edge") / "data" / "prose.txt").read_text(encoding="utf-8")
    llm = Llama(model, vocab_only=True, verbose=False)
    n = len(llm.tokenize(text.encode(), add_bos=False))
    llm.close()
    words = text.split()
    return words, len(words) * PIECE // n


def rss(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def first_tokens(args: Any, client: httpx.Client, text: tuple[list[str], int]) -> dict[str, float]:
    one, other = Talk(client, "First"), Talk(client, "Second")
    read = statistics.mean([one.grow(args.tokens, *text), other.grow(args.tokens, *text)])
    change, follow = [], []
    for i in range(args.rounds):
        for talk in (one, other):
            change.append(talk.say(f"Who was that, number {i}?", 8))
            follow.append(talk.say(f"And why, number {i}?", 8))
    return {
        "tokens": one.length,
        "read": read,
        "change": statistics.median(change),
        "follow": statistics.median(follow),
    }


def meanwhile(args: Any, client: httpx.Client) -> dict[str, float]:
    """Requests for /health, and completions of one token, per second, while a reply streams."""
    done = threading.Event()

    def stream() -> None:
        with httpx.Client(base_url=client.base_url, timeout=None) as own:
            while not done.is_set():
                Talk(own, "Streams").say("Tell me of the sea.", 200)

    def rate(asks: Any) -> float:
        n, began = 0, time.perf_counter()
        while time.perf_counter() - began < args.seconds:
            asks()
            n += 1
        return n / (time.perf_counter() - began)

    one = {"prompt": "The old man went to", "max_tokens": 1, "temperature": 0}
    thread = threading.Thread(target=stream)
    thread.start()
    try:
        return {
            "health": rate(lambda: client.get("/health")),
            "one token": rate(lambda: client.post("/v1/completions", json=one)),
        }
    finally:
        done.set()
        thread.join()


def idle_chats(
    args: Any, client: httpx.Client, pid: int, text: tuple[list[str], int], n: int = 8
) -> float:
    """MiB of memory that a chat takes which nobody talks to."""
    tokens = max(args.tokens // 4, PIECE)
    Talk(client, "Warm").grow(tokens, *text)
    before = rss(pid)
    for i in range(n):
        Talk(client, f"Chat {i}").grow(tokens, *text)
    return (rss(pid) - before) / n


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--tokens", type=int, default=8192, help="of each chat (8192)")
    parser.add_argument("--budget", type=int, default=1024, help="--kv-budget (1024)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each rate (5)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--beside", action="store_true", help="llama_cpp.server, too")
    parser.add_argument("--port", type=int, default=8765, help="of llama_cpp.server (8765)")
    args = parser.parse_args()
    text = pieces(args.model)
    ready = r"(http://127\.0\.0\.1:\d+) is ready"
    rows: list[tuple[str, dict[str, float]]] = []
    with running(ours(args), ready) as (client, _):
        rows.append(("in memory", first_tokens(args, client, text)))
        rates = meanwhile(args, client)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(ours(args, "--chats", folder), ready) as (client, _),
    ):
        rows.append(("with --chats", first_tokens(args, client, text)))
    if args.beside:
        with running(theirs(args, args.port), r"running on (http://\S+:\d+)") as (client, _):
            rows.append(("llama_cpp.server", first_tokens(args, client, text)))
    print("| server | tokens of a chat | read in s | change of chats, ms | follow-up, ms |")
    print("|---|---|---|---|---|")
    for name, row in rows:
        length = int(row["tokens"] or rows[0][1]["tokens"])
        print(
            f"| {name} | {length} | {row['read']:.1f} | {1e3 * row['change']:.0f} "
            f"| {1e3 * row['follow']:.0f} |"
        )
    print(
        f"\nWhile a reply streams: {rates['health']:.0f} requests for /health per second, "
        f"{rates['one token']:.1f} completions of one token."
    )
    with running(ours(args), ready) as (client, pid):
        memory = idle_chats(args, client, pid, text)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(ours(args, "--chats", folder), ready) as (client, pid),
    ):
        on_disk = idle_chats(args, client, pid, text)
    print(
        f"An idle chat of about {max(args.tokens // 4, PIECE)} tokens takes {memory:.1f} MiB of "
        f"memory, {on_disk:.1f} with --chats."
    )


if __name__ == "__main__":
    main()
