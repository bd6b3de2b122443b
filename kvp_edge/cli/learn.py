"""``kvp-edge learn``: from a model to its policy in one command."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from kvp_edge.bundled import bundled_model
from kvp_edge.cli import options
from kvp_edge.cli.parameters import option
from kvp_edge.cli.shown import note, say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.trace import SourceOptions, sources_of, trace
from kvp_edge.cli.train import comparison, require_torch
from kvp_edge.files import write_whole
from kvp_edge.policy_file import Scope
from kvp_edge.traces.sources import Source, Tasks
from kvp_edge.training.settings import Objective, Settings

_TASKS = 300

_EPILOG = """\
Three steps, which are also commands with more options: kvp-edge trace, train and export. Finished
work stays in --out, and the same command resumes an interrupted run. By default the model reads 300
generated questions about facts hidden in the bundled novel. For a policy that fits your chats, give
texts and chats like yours with --text and --chats.

The policy file is written beside the model, where kvp-edge chat and kvp_edge.Llama find it. The
last line of the output is its path. If a rule that needs no training does better on the validation
traces, this command says so.

examples:
  kvp-edge learn model.gguf
  kvp-edge learn model.gguf --chats chats.jsonl --text books/*.txt \\
      --traces 500 --steps 4000"""


_LEARNING = "learning"


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions, options.ModelOptions):
    out: str | None = option(
        None,
        panel=_LEARNING,
        metavar="DIR",
        shown="kvp-<MODEL>",
        help="folder for traces and training",
    )
    steps: int = option(
        Settings.steps, panel=_LEARNING, metavar="N", least=1, help="training steps"
    )
    objective: str = option(
        Settings.objective,
        panel=_LEARNING,
        choices=get_args(Objective),
        help="training objective, see kvp-edge train",
    )
    scope: str = option(
        Settings.scope,
        panel=_LEARNING,
        choices=get_args(Scope),
        help="what one network scores, see kvp-edge train",
    )
    seed: int = option(0, panel=_LEARNING, metavar="N", help="random seed")
    device: str | None = option(
        None, panel=_LEARNING, metavar="NAME", shown="CUDA if available", help="cpu or cuda"
    )


def _main(args: Options) -> int:
    require_torch("learning")
    from kvp_edge.training.train import train  # noqa: PLC0415

    path = options.model_path(args)
    stem = Path(path).stem
    out = Path(args.out or f"kvp-{stem}")
    sources: list[Source] = sources_of(args) or [Tasks(_TASKS)]
    note("step 1 of 3: recording what the model attends to")
    traces = trace(
        path,
        sources,
        str(out / "traces"),
        length=args.length,
        n_traces=args.traces,
        seed=args.seed,
        **options.engine_options(args),
    )
    note("step 2 of 3: training the policy")
    run = out / (args.objective if args.scope == "head" else f"{args.objective}-{args.scope}")
    if not (run / "report.json").exists():
        settings = Settings(
            objective=cast(Objective, args.objective),
            scope=cast(Scope, args.scope),
            steps=args.steps,
            seed=args.seed,
        )
        engine = {
            "n_threads": args.threads,
            "n_threads_batch": args.threads,
            "repack": args.repack,
        }
        note(
            comparison(train(traces, run, settings, device=args.device, model=path, engine=engine))
        )
    note("step 3 of 3: writing and checking the policy file")
    made = importlib.import_module("kvp_edge.export").export(run, traces=traces)
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
    "Record what a model attends to, train a policy on it, and write the policy beside the model.",
    _EPILOG,
)
