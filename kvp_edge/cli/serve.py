"""``kvp-edge serve``: OpenAI's protocol for one model, and a page to chat on."""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvp_edge.cache.limits import memory_bytes
from kvp_edge.cli import chat_format, options
from kvp_edge.cli.chat_format import ChatFormatOptions
from kvp_edge.cli.option_names import as_options
from kvp_edge.cli.parameters import option
from kvp_edge.cli.shown import note
from kvp_edge.cli.subcommands import Command
from kvp_edge.text import transcript

_PANEL, _CHATS = "server", "chats"

_EPILOG = """\
Every chat is a KV log; the cells are the working set of the chat that is being answered. A request
goes on with the chat whose messages it begins with, and only what is new is read. An edited message
or another reply makes a new chat from the log of the old one. Requests for the one context wait in
a queue, in order; --parallel N loads the model N times.

In a browser, http://127.0.0.1:8080 is a page to chat on that shows the cache. For programs:

  POST /v1/chat/completions   messages, tools, response_format, stream, ...
  POST /v1/completions        a text to continue
  GET  /v1/models  /health  /metrics      POST /tokenize

A line on stderr for every reply says how many of the prompt's tokens were read, how many came back
from the log, and how many were written; never what was said.

The server answers this machine only. With another --host it needs --api-key-file.

examples:
  kvp-edge serve model.gguf --kv-budget 1024
  kvp-edge serve model.gguf --chats ~/chats --chats-limit 20GiB
  curl http://127.0.0.1:8080/v1/chat/completions \\
      -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hello."}]}'"""


@dataclass(frozen=True, kw_only=True)
class _ServerOptions:
    host: str = option("127.0.0.1", panel=_PANEL, metavar="ADDRESS", help="address to answer at")
    port: int = option(8080, panel=_PANEL, metavar="N", least=0, help="port; 0: any free one")
    api_key_file: str | None = option(
        None,
        panel=_PANEL,
        metavar="FILE",
        help="a file with the keys that clients must have one of, a line each",
    )
    parallel: int = option(
        1,
        panel=_PANEL,
        metavar="N",
        least=1,
        help="contexts, to serve N requests at once",
    )
    queue: int = option(64, panel=_PANEL, metavar="N", least=1, help="requests that may wait")
    longest_reply: int = option(
        4096, panel=_PANEL, metavar="N", least=1, help="tokens of a reply, whatever is asked for"
    )
    chats: str | None = option(
        None,
        panel=_CHATS,
        metavar="DIR",
        shown="in memory",
        help="keep chats in this folder, where they survive the server",
    )
    chats_limit: str = option(
        "2GiB",
        panel=_CHATS,
        metavar="SIZE",
        help="bytes of all chats; past it the least recently used ones are deleted",
    )


@dataclass(frozen=True, kw_only=True)
class Options(_ServerOptions, ChatFormatOptions, options.CacheAndModelOptions):
    n_ctx: int | None = options.n_ctx_option("the length that the model was trained for")
    chat_format: str | None = chat_format.chat_format_option("transcript if it has none")
    protect_system: bool = option(
        False, panel=_CHATS, help="never drop system prompts; they must fit into the cells"
    )


def _main(args: Options) -> int:
    try:
        uvicorn: Any = importlib.import_module("uvicorn")
        app = importlib.import_module("kvp_edge.server.app")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"kvp-edge serve needs the package {error.name}: pip install 'kvp_edge[server]'"
        ) from error
    rules = _rules(args)
    limit = memory_bytes("--chats-limit", args.chats_limit)
    if args.parallel > 1 and args.kv_log is not None:
        raise ValueError("with --parallel every context has its own log: leave out --kv-log")
    path = options.model_path(args)
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(args.host, args.port))
        llms = []
        for _ in range(args.parallel):
            llms.append(_load(path, args))
            stack.callback(llms[-1].close)
        store = _store(args, limit, llms[0])
        stack.callback(store.close)
        settings = app.Settings(
            model=Path(path).stem,
            rules=rules,
            most_waiting=args.queue,
            longest_reply=args.longest_reply,
            worded=lambda message: as_options(message, Options),
            log=_log,
        )
        config = uvicorn.Config(
            app.make_app(llms, store, settings),
            log_level="error",  # its warnings are about what clients sent
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=2,
        )
        options.warn_beyond_training(llms[0].n_ctx(), path, args)
        _greet(listening, llms[0])
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _rules(args: Options) -> Any:
    access = importlib.import_module("kvp_edge.server.access")
    loopback = access.is_loopback(args.host)
    keys: tuple[str, ...] = ()
    if args.api_key_file is not None:
        keys = access.read_keys(_lines(args.api_key_file))
        if not keys:
            raise ValueError(
                f"--api-key-file: '{args.api_key_file}' has no key in it: write one on a line"
            )
    if not loopback and not keys:
        raise ValueError(
            f"--host {args.host} can be reached from other machines: give --api-key-file, so that "
            "only those can use the server who have a key"
        )
    return access.Rules(keys=keys, loopback=loopback, host=args.host)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"--api-key-file: cannot read '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--api-key-file: '{path}' is no text in UTF-8: write keys into it, a line each"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        version = 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    # asyncio sends small packets at once (TCP_NODELAY) only where the protocol is named; else each
    # token of a stream would wait 40 ms for the client's acknowledgement of the one before
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
        return listening
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot answer at {host}, port {port}: {reason}. Give another --port or --host"
        ) from error


def _load(path: str, args: Options) -> Any:
    served = importlib.import_module("kvp_edge.server.served")
    llm = options.load_as(
        served.ServedLlama, path, args.n_ctx, args, protect_system=args.protect_system
    )
    chat_format.choose(llm, args)
    if llm.lacks_chat_template:
        llm.chat_format = transcript.NAME
        note(f"kvp-edge: {chat_format.AS_TRANSCRIPTS} (--chat-template names another form)")
    chat_format.check(llm, [])
    return llm


def _store(args: Options, limit: int, llm: Any) -> Any:
    chats = importlib.import_module("kvp_edge.server.chats")
    folder = Path(os.path.expanduser(args.chats)) if args.chats is not None else None
    _require_kept(llm, folder)

    def forgot(chat: Any) -> None:
        note(
            f"{_now()} deleted chat {chat.id} ({len(chat.tokens)} tokens), the least recently used "
            f"one: all chats took more than --chats-limit {args.chats_limit}"
        )

    try:
        store = chats.Chats(folder, limit, forgot)
    except OSError as error:
        raise ValueError(
            f"--chats: '{folder}' cannot be used: {error.strerror}. Name a folder that you may "
            "write to"
        ) from error
    if folder is not None:
        for problem in store.read_folder(llm):
            note(f"kvp-edge: left alone: {problem}")
        note(f"{len(store)} {'chat' if len(store) == 1 else 'chats'} in '{folder}'.")
    return store


def _require_kept(llm: Any, folder: Path | None) -> None:
    """Without its queries a policy cannot go on with a cache that was kept."""
    if not llm.kv.policy.n_queries:
        return
    problem = f"--policy {llm.kv.policy.name} needs queries, which are not kept with a chat"
    if folder is not None:
        raise ValueError(f"{problem}: leave out --chats, or choose another --policy")
    warnings.warn(
        f"{problem}: one that comes back into the cells is read again, all of it", stacklevel=2
    )


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _log(done: Any, seconds: float) -> None:
    back = sum(turn.n_recalled for turn in done.turns)
    came_back = f", {back} came back" if back else ""
    note(
        f"{_now()} read {done.n_prompt - done.n_cached} of {done.n_prompt} "
        f"tokens{came_back}, wrote {done.n_written} in {seconds:.1f} s"
    )


def _greet(listening: socket.socket, llm: Any) -> None:
    host, port = listening.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    stats = llm.kv_stats
    note(
        f"{os.path.basename(llm.model_path)}: conversations of up to {llm.n_ctx()} tokens, in "
        f"{stats.cells} cells ({stats.memory}). {stats.policy} keeps "
        f"{stats.budget} tokens.\nhttp://{where}:{port} is ready: a page to chat on, and "
        f"OpenAI's protocol under http://{where}:{port}/v1. Ctrl-C ends it."
    )


COMMAND = Command(
    _main,
    Options,
    "Serve a model to everything that speaks OpenAI's protocol, with a page to chat on.",
    _EPILOG,
)
