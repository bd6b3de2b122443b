"""``kvp-edge trace``: read texts with a model and keep what a policy can learn from."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from kvp_edge.cli import options
from kvp_edge.cli.parameters import option
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.traces.format import TraceSet
from kvp_edge.traces.sources import ChatFile, Source, Tasks, TextFile
from kvp_edge.traces.writer import capture_traces

_EPILOG = """\
A policy learns which tokens a model can do without by looking at what it really looked up. For each
text, this command runs the model as it is (quantised, on your machine) and stores, for every layer
and KV head, the keys and values in its cache and the attention that later tokens paid to earlier
ones. Any point of a trace can later be taken as the moment of an eviction.

what to read (several may be given together):
  --text   plain text, cut into traces of --length tokens; the end of each is
           its future
  --chats  JSON lines, each a list of {"role": ..., "content": ...}; the last
           reply that fits into --length tokens is the future
  --tasks  generated questions about facts hidden in prose (that of
           --task-prose, or of the novel that comes along); the question and its
           answer are the future
Give texts like those that your chats will be about, and in the language they
will be in.

what the future is:
  --future text    what follows in the source
  --future greedy  what the model itself goes on with: closer to a chat, and
                   slower, because tokens are written one by one

The cache may have any type. Values of a quantised type (--type-v q8_0) turn flash attention on.
With it attention is computed from queries and keys, which takes longer, and a model with soft caps,
attention sinks or ALiBi is refused.

A trace takes at most twice the bytes of its keys and values in float16: the fewer numbers the
model has per token, and the longer a trace, the larger the blocks of queries that are summed up
(--block).
An interrupted run goes on when the same command is given again, and gives the same files.

examples:
  kvp-edge trace --out traces --tasks 100   (with the small model)
  kvp-edge trace model.gguf --out traces --text books/*.txt --traces 500
  kvp-edge trace model.gguf --out traces --chats chats.jsonl --tasks 200 \\
      --length 4096
  kvp-edge trace model.gguf --out traces --chats chats.jsonl --future greedy \\
      --future-tokens 300"""


_SOURCES, _TRACES = "what is read", "traces"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Texts, chats, generated questions; how long and how many."""

    text: list[str] = option((), panel=_SOURCES, metavar="FILE ...", help="text files to read")
    chats: list[str] = option((), panel=_SOURCES, metavar="FILE ...", help="chats, as JSON lines")
    tasks: int | None = option(
        None, panel=_SOURCES, metavar="N", least=1, help="generate N questions"
    )
    task_prose: list[str] = option(
        (), panel=_SOURCES, metavar="FILE ...", help="texts to hide the facts of --tasks in"
    )
    length: int = option(1024, panel=_SOURCES, metavar="N", least=1, help="most tokens of a trace")
    traces: int | None = option(
        None,
        panel=_SOURCES,
        metavar="N",
        least=1,
        shown="all",
        help="how many, drawn from all that can be made",
    )


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions, options.ModelOptions):
    out: str = option(
        ..., panel=_TRACES, metavar="DIR", help="folder for the traces; made if need be"
    )
    future: str = option(
        "text", panel=_TRACES, choices=("text", "greedy"), help="what the future is made of"
    )
    future_tokens: int | None = option(
        None,
        panel=_TRACES,
        metavar="N",
        least=1,
        shown="a quarter of --length",
        help="tokens of a text, or of the model's own, that are the future",
    )
    block: int | None = option(
        None,
        panel=_TRACES,
        metavar="N",
        least=1,
        shown="as few as the size on disk allows",
        help="queries summed up together",
    )
    seed: int = option(0, panel=_TRACES, metavar="N", help="draws tasks and traces")


def sources_of(args: SourceOptions) -> list[Source]:
    """The sources that the options ask for; none if none was named."""
    sources: list[Source] = [TextFile(path) for path in args.text]
    sources += [ChatFile(path) for path in args.chats]
    if args.tasks:
        sources.append(Tasks(args.tasks, tuple(args.task_prose)))
    elif args.task_prose:
        raise ValueError(
            "--task-prose is where the facts of --tasks are hidden: give --tasks N, too"
        )
    return sources


def warn_beyond_training(length: int, path: str) -> None:
    trained = options.trained_context(path)
    if length > trained:
        warnings.warn(
            f"traces of {length} tokens are longer than the {trained} that the model was "
            "trained for: what it looks up beyond them may mean little",
            stacklevel=2,
        )


def trace(path: str, sources: list[Source], out: str, **how: Any) -> TraceSet:
    """Capture traces with a progress bar, and say what came of it."""
    warn_beyond_training(how["length"], path)
    note(f"tracing; what is finished stays in '{out}', and the same command goes on")
    with tqdm(unit=" traces", disable=None) as bar:

        def show(done: int, planned: int, n_tokens: int) -> None:
            bar.total = planned
            bar.update(done - bar.n)

        traces = TraceSet(capture_traces(path, sources, out, progress=show, **how))
    entries = traces.manifest["traces"]
    n_tokens, n_bytes = (sum(e[key] for e in entries) for key in ("n_tokens", "bytes"))
    note(
        f"{len(traces)} traces, {n_tokens} tokens, {n_bytes / 2**20:.1f} MiB "
        f"({n_bytes / n_tokens:.0f} bytes per token), blocks of "
        f"{traces.manifest['settings']['block']} queries"
    )
    sys.stderr.flush()
    return traces


def _main(args: Options) -> int:
    sources = sources_of(args)
    if not sources:
        raise ValueError("give something to read: --text FILE, --chats FILE or --tasks N")
    traces = trace(
        options.model_path(args),
        sources,
        args.out,
        length=args.length,
        n_traces=args.traces,
        seed=args.seed,
        future=args.future,
        future_tokens=args.future_tokens,
        block=args.block,
        **options.engine_options(args),
    )
    say(str(traces.path))
    return 0


COMMAND = Command(
    _main,
    Options,
    "Read texts with a model and keep keys, values and the attention they got.",
    _EPILOG,
)
