"""``kvp-edge learn``: from a model to its policy in one command."""

from __future__ import annotations

import importlib
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from tqdm import tqdm

from kvp_edge.bundled import bundled_model
from kvp_edge.cache.limits import memory_bytes
from kvp_edge.cli import options
from kvp_edge.cli.parameters import option
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.trace import SourceOptions, sources_of, warn_beyond_training
from kvp_edge.cli.train import comparison, own_of_objectives, require_torch
from kvp_edge.evaluation.estimate import duration
from kvp_edge.files import write_whole
from kvp_edge.policy_file import Scope
from kvp_edge.traces.sources import Tasks
from kvp_edge.traces.stream import TraceStream, open_stream
from kvp_edge.traces.writer import FUTURES
from kvp_edge.training.settings import LABELLED, Objective, Settings, importance_parts

_TASKS = 300
#: Traces on which the policy file is checked.
_CHECKED = 8

_EPILOG = """\
The model reads, and the policy learns from what it reads, in turns. Traces are kept in memory, in
--buffer: when it is full, each new one replaces the oldest. Nothing is stored but checkpoints; the
same command resumes an interrupted run from the last one, and reads again what the buffer held
then. --estimate says how long the reading takes. kvp-edge trace, train and export do the same in
steps, with traces on disk and more options.

By default the model reads 300 generated questions about facts hidden in bundled prose. For a policy
that fits your chats, give texts and chats like yours with --text and --chats.

The policy file is written beside the model, where kvp-edge chat and kvp_edge.Llama find it. The
last line of the output is its path. If a rule that needs no training does better on the validation
traces, this command says so.

examples:
  kvp-edge learn model.gguf
  kvp-edge learn model.gguf --chats chats.jsonl --text books/*.txt \\
      --traces 500 --steps 4000
  kvp-edge learn model.gguf --text books/*.txt --objective kvp \\
      --future repeat --importance peak+repeated --estimate"""


_LEARNING = "learning"


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions, options.ModelOptions):
    out: str | None = option(
        None,
        panel=_LEARNING,
        metavar="DIR",
        shown="kvp-<MODEL>",
        help="folder for the training",
    )
    steps: int | None = option(
        None,
        panel=_LEARNING,
        metavar="N",
        least=1,
        shown=own_of_objectives("steps"),
        help="training steps",
    )
    objective: str = option(
        Settings.objective,
        panel=_LEARNING,
        choices=get_args(Objective),
        help="training objective, see kvp-edge train",
    )
    scope: str | None = option(
        None,
        panel=_LEARNING,
        choices=get_args(Scope),
        shown=own_of_objectives("scope"),
        help="what one network scores, see kvp-edge train",
    )
    seed: int = option(0, panel=_LEARNING, metavar="N", help="random seed")
    importance: str | None = option(
        None,
        panel=_LEARNING,
        metavar="NAME",
        shown=own_of_objectives("importance"),
        help="what counts as a token's importance, see kvp-edge train",
    )
    future: list[str] = option(
        (),
        panel=_LEARNING,
        metavar="NAME ...",
        choices=tuple(FUTURES),
        shown="text, and the labels that --importance needs",
        help="what the future is made of, see kvp-edge trace",
    )
    future_tokens: int | None = option(
        None,
        panel=_LEARNING,
        metavar="N",
        least=1,
        shown="a quarter of --length; questions: 128",
        help="tokens of the future, see kvp-edge trace",
    )
    buffer: str = option(
        "2GiB", panel=_LEARNING, metavar="SIZE", help="memory for traces, such as 512MiB"
    )
    estimate: bool = option(
        False,
        panel=_LEARNING,
        help="say how much will be read and how long it will take here, and stop",
    )
    device: str | None = option(
        None, panel=_LEARNING, metavar="NAME", shown="CUDA if available", help="cpu or cuda"
    )


def _main(args: Options) -> int:
    require_torch("learning")
    from kvp_edge.training.supply import read_for_validation  # noqa: PLC0415
    from kvp_edge.training.train import train  # noqa: PLC0415

    path = options.model_path(args)
    out = Path(args.out or f"kvp-{Path(path).stem}")
    settings = Settings(
        objective=cast(Objective, args.objective),
        scope=cast(Scope, args.scope or Settings.scope),
        importance=args.importance or Settings.importance,
        steps=args.steps or Settings.steps,
        seed=args.seed,
    )
    future = _future(args.future, settings.importance)
    stream = open_stream(
        path,
        sources_of(args) or [Tasks(_TASKS)],
        buffer=memory_bytes("--buffer", args.buffer),
        folder=None if args.estimate else out,
        length=args.length,
        n_traces=args.traces,
        seed=args.seed,
        future=future,
        future_tokens=args.future_tokens,
        **options.engine_options(args),
    )
    with closing(stream):
        warn_beyond_training(path, args.length, future, args.future_tokens)
        if args.estimate:
            say(_estimate(stream))
            return 0
        run = out / f"{settings.objective}-{settings.scope}"
        if not (run / "report.json").exists():
            note(
                f"step 1 of 2: learning from {len(stream)} traces while they are read; after an "
                "interruption the same command resumes"
            )
            engine = {
                "n_threads": args.threads,
                "n_threads_batch": args.threads,
                "repack": args.repack,
            }
            with tqdm(total=len(stream), unit=" traces", disable=None) as bar:
                stream.on_read = lambda: bar.update() and None
                result = train(stream, run, settings, device=args.device, model=path, engine=engine)
            note(comparison(result))
        note("step 2 of 2: writing and checking the policy file")
        checked = read_for_validation(len(stream), settings)[:_CHECKED]
        stream.hold(checked)
        made = importlib.import_module("kvp_edge.export").export(
            run, traces=[stream[i] for i in checked]
        )
    policy = _beside(Path(path), Path(made.gguf))
    rule = _better_rule(run / "report.json")
    if rule is not None:
        note(
            f"On the validation traces {rule} loses less attention than the trained policy. More "
            "data (--text, --chats, --tasks) or more --steps may change that. Until then, chat "
            f"with --policy {rule}, or remove the policy file"
        )
    say(str(policy))
    return 0


def _future(given: list[str], importance: str) -> list[str]:
    """What the future is made of.

    Raises:
        ValueError: labels would be read and not used, or used and not read.
    """
    needed = [LABELLED[part] for part in importance_parts(importance) if part in LABELLED]
    if not given:
        return ["text", *needed]
    for future in needed:
        if future not in given:
            raise ValueError(f"--importance {importance} needs --future {future}")
    for label, future in LABELLED.items():
        if future in given and future not in needed:
            raise ValueError(
                f"--future {future} is not used: it is for --importance {label}, or a mixture "
                f"like sum+{label}"
            )
    return given


def _estimate(stream: TraceStream) -> str:
    """What a run reads, and how long that takes here."""
    n, total = stream.n_tokens, sum(map(stream.size, range(len(stream))))
    seconds = n * stream.measure()
    return (
        f"{len(stream)} traces, {n} tokens: reading them takes about {duration(seconds)} here, "
        f"and training its time besides\n{total / 2**20:.1f} MiB of traces, of which "
        f"{min(total, stream.buffer) / 2**20:.1f} MiB are in memory at a time and none on disk"
    )


def _better_rule(report: Path) -> str | None:
    """The rule that loses least of those that lose less than the policy, in heads and in whole
    tokens; None if there is none."""
    from kvp_edge.training.train import BASELINES  # noqa: PLC0415

    qualities = json.loads(report.read_text(encoding="utf-8"))

    def lost(name: str) -> tuple[float, float]:
        heads = qualities[name]["lost"]
        return sum(heads) / len(heads), qualities[name]["token_lost"]

    mine = lost("policy")
    better = [r for r in BASELINES if all(a < b for a, b in zip(lost(r), mine, strict=True))]
    return min(better, key=lost, default=None)


def _beside(model: Path, policy: Path) -> Path:
    """A copy of the policy beside the model; the policy itself where that cannot or must not be."""
    if model == Path(bundled_model()):
        note(f"the bundled model keeps its own policy; to use the new one: --policy '{policy}'")
        return policy
    target = model.parent / policy.name
    try:
        write_whole(target, policy.read_bytes())
    except OSError as error:
        note(
            f"cannot write to '{model.parent}' ({error.strerror}); to use the policy: "
            f"--policy '{policy}'"
        )
        return policy
    note("chats with this model now use the new policy")
    return target


COMMAND = Command(
    _main,
    Options,
    "Train a policy on what a model attends to while it reads, and write it beside the model.",
    _EPILOG,
)
