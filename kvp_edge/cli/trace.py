"""``kvp-edge trace``: read texts with a model and keep what a policy can learn from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvp_edge.cli import options
from kvp_edge.cli.parameters import option
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.corpora import for_training
from kvp_edge.traces.format import TraceSet
from kvp_edge.traces.sources import ChatFile, Source, Tasks, TextFile
from kvp_edge.traces.writer import FUTURES, capture_traces, reach

_EPILOG = """\
A policy learns from the attention of the model which tokens to drop. For each text, this command
runs the model as it is (quantised, on your machine) and stores, for every layer and KV head, the
keys and values in its cache and the attention of later tokens to earlier ones. Training can then
evict at any point of a trace.

what to read (may be combined):
  --text   plain text, cut into traces of --length tokens; the end of each is
           its future
  --chats  JSON lines, each a list of {"role": ..., "content": ...}; the last
           reply that fits into --length tokens is the future
  --tasks  generated questions about facts hidden in prose (that of
           --task-prose, or the bundled one); the question and its answer are
           the future
Give texts on the topics and in the language of your chats.

what the future is:
  --future text    what follows in the source
  --future greedy  the model's own continuation: closer to a chat, but
                   slower, because tokens are written one by one

labels, which can be added to text or greedy, say what may be asked for (see
kvp-edge train --importance): the most attention that each token gets from any
one token of
  --future later      the rest of the text
  --future repeat     a repetition of the text by the model. Twice the reading
  --future questions  up to --future-tokens (128) tokens of questions and
                      answers about the text, which the model writes

The cache may have any type. Quantised values (--type-v q8_0) turn flash attention on. Attention is
then computed from queries and keys, which takes longer; a model with soft caps, attention sinks or
ALiBi is refused. Labels are always computed so.

A trace takes at most twice the bytes of its keys and values in float16. To fit, attention is summed
over blocks of queries (--block): larger blocks for longer traces and for models with fewer numbers
per token.

The same command resumes an interrupted run, and gives the same files.

examples:
  kvp-edge trace --out traces --tasks 100   (with the bundled model)
  kvp-edge trace model.gguf --out traces --text books/*.txt --traces 500
  kvp-edge trace model.gguf --out traces --chats chats.jsonl --tasks 200 \\
      --length 4096
  kvp-edge trace model.gguf --out traces --chats chats.jsonl --future greedy \\
      --future-tokens 300
  kvp-edge trace model.gguf --out traces --text books/*.txt \\
      --future repeat questions"""


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
        (), panel=_SOURCES, metavar="FILE ...", help="texts in which --tasks hides its facts"
    )
    length: int = option(1024, panel=_SOURCES, metavar="N", least=1, help="most tokens of a trace")
    traces: int | None = option(
        None,
        panel=_SOURCES,
        metavar="N",
        least=1,
        shown="all",
        help="number of traces, drawn at random from all possible ones",
    )


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions, options.ModelOptions):
    out: str = option(
        ..., panel=_TRACES, metavar="DIR", help="folder for the traces; created if missing"
    )
    future: list[str] = option(
        (),
        panel=_TRACES,
        metavar="NAME ...",
        choices=tuple(FUTURES),
        shown="text later",
        help="what the future is made of: text or greedy; labels of tokens that may be asked for: "
        "later, repeat, questions",
    )
    future_tokens: int | None = option(
        None,
        panel=_TRACES,
        metavar="N",
        least=1,
        shown="a quarter of --length; questions: 128",
        help="tokens of a text, or of the model's continuation, that are the future; most tokens "
        "of questions",
    )
    block: int | None = option(
        None,
        panel=_TRACES,
        metavar="N",
        least=1,
        shown="as few as the size limit allows",
        help="queries whose attention is summed",
    )
    seed: int = option(0, panel=_TRACES, metavar="N", help="random seed of tasks and traces")


def sources_of(args: SourceOptions) -> list[Source]:
    """The sources that the options ask for; none if none was named."""
    sources: list[Source] = [TextFile(path) for path in _for_training(args.text)]
    sources += [ChatFile(path) for path in args.chats]
    if args.tasks:
        sources.append(Tasks(args.tasks, _for_training(args.task_prose)))
    elif args.task_prose:
        raise ValueError("--task-prose needs --tasks N, whose facts are hidden in it")
    return sources


def _for_training(paths: Sequence[str]) -> tuple[str, ...]:
    """The paths without the books that policies are measured on."""
    left_out = [Path(path).name for path in paths if not for_training(path)]
    if left_out:
        note(
            f"left out, because policies are measured on them: {', '.join(left_out)} "
            "(kvp_edge/corpora.py)"
        )
    return tuple(filter(for_training, paths))


def warn_beyond_training(
    path: str, length: int, future: str | Sequence[str], future_tokens: int | None
) -> None:
    trained, read = options.trained_context(path), reach(length, future, future_tokens)
    if read > trained:
        more = "" if read == length else f" (with their labels up to {read})"
        warnings.warn(
            f"traces of {length} tokens{more} are longer than the {trained} that the model was "
            "trained for: its attention beyond these may mean little",
            stacklevel=2,
        )


def trace(path: str, sources: list[Source], out: str, **how: Any) -> TraceSet:
    """Capture traces with a progress bar, and say what came of it."""
    warn_beyond_training(path, how["length"], how["future"], how["future_tokens"])
    note(f"tracing into '{out}'; after an interruption the same command resumes")
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
        raise ValueError("nothing to read: give --text FILE, --chats FILE or --tasks N")
    traces = trace(
        options.model_path(args),
        sources,
        args.out,
        length=args.length,
        n_traces=args.traces,
        seed=args.seed,
        future=args.future or ("text", "later"),
        future_tokens=args.future_tokens,
        block=args.block,
        **options.engine_options(args),
    )
    say(str(traces.path))
    return 0


COMMAND = Command(
    _main,
    Options,
    "Record the keys, values and attention of a model that reads texts.",
    _EPILOG,
)
