"""``kvp-edge train``: traces in, policy out."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

from kvp_edge.cli import options
from kvp_edge.cli.options import verbose_option
from kvp_edge.cli.parameters import argument, option
from kvp_edge.cli.shown import say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.tables import table
from kvp_edge.traces.format import TraceSet
from kvp_edge.training.settings import OWN, Settings

_EPILOG = """\
The same command resumes an interrupted run, and ends with the same policy as without the
interruption. DIR then contains

  best.safetensors   the policy, for kvp-edge export
  last.safetensors   what a run needs to resume
  log.jsonl          every validation, head by head
  report.json        the cost of the policy and of the heuristics, head by head

Several GPUs or machines:  torchrun --nproc-per-node 8 -m kvp_edge train TRACES --out DIR

examples:
  kvp-edge train traces --out run
  kvp-edge train traces --out run --objective kvp --context 1  (the KVP paper's)
  kvp-edge train traces --out run --objective foresight --model model.gguf"""

#: setting -> what it does
_HELP: dict[str, str] = {
    "objective": "regression: importance itself; kvp: rankings of one moment, rewarded over all "
    "budgets; global: how fast the use of a token fades, with one capacity for all heads; "
    "foresight: golden evictions, then rollouts in the model",
    "scope": "what one agent scores, and sees: head: one KV head; layer: all KV heads of a layer",
    "hidden": "hidden units in each of an agent's two layers",
    "context": "tokens that a score depends on, an odd number around its own; 1: as in the KVP "
    "paper",
    "steps": "training steps of the agents",
    "token_steps": "then, steps that train the heads' weights in a whole token's score",
    "lr": "highest learning rate",
    "token_lr": "highest learning rate of the heads' weights",
    "warmup": "steps up to the highest learning rate; then a cosine to 0",
    "weight_decay": "weight decay of AdamW",
    "ema": "decay of the moving average of the weights, which becomes the policy",
    "states": "texts per step, cut at random (global: whole)",
    "tokens": "most tokens that compete in a text",
    "rankings": "rankings sampled for each text",
    "importance": "sum: attention of all later queries; peak: of the block of these with the most; "
    "later: of the one of these with the most; repeated, questioned: of the model's own use of the "
    "text (kvp-edge trace --future later repeat questions; not for global); later+repeated: both, "
    "each relative to its mean",
    "rank_weights": "i-1: budgets from 1 on (the paper); i: budget 0 as well (its code)",
    "advantage": "loo: reward minus the other rankings' mean; zscore: also scaled and clamped",
    "effort": "share of the agents trained in a step; those that lose most are drawn most often",
    "sinks": "first tokens, which are never ranked",
    "recent": "newest tokens, which are never ranked",
    "eval_every": "steps between validations, each with a checkpoint",
    "validation": "share of the traces held out for validation",
    "validation_states": "most texts, cut at random, in a validation",
    "seed": "random seed",
    "precision": "f32, or bf16 for the networks (GPUs)",
    "budget": "foresight: tokens that each head keeps after an eviction",
    "every": "foresight: tokens read between two evictions",
    "margin": "foresight: margin between the scores of a token and of one that is needed less",
    "pairs": "foresight: weight of pairs; order: all alike (the paper); cost: what a mistake loses",
    "grpo_steps": "foresight: then, steps of rollouts in the model (--model); 0: none",
    "grpo_lr": "foresight: highest learning rate of these steps",
    "texts": "foresight, global: texts per step in the model",
    "rollouts": "foresight: rollouts of each text, which are compared with each other",
    "passes": "foresight: passes over the rollouts of a step",
    "temperature": "foresight: temperature at which evictions are drawn in rollouts",
    "clip": "foresight: bound of the probability ratio of a draw",
    "kl": "foresight: weight of the distance to the agents that rollouts start from",
    "reward": "foresight: tokens whose loss may not rise: all; low: those with low entropy; "
    "low-large: of these, those whose loss rose a lot",
    "low_entropy": "foresight: share of the tokens that count as low in entropy",
    "large": "foresight: rise of a loss, in nats, that is a lot",
    "capacity": "global: tokens per head that all gates together may retain",
    "capacity_weight": "global: weight of the penalty for retaining more",
    "distil_steps": "global: then, steps of distillation in a twin of the model (--model)",
    "distil_lr": "global: highest learning rate of the distillation",
    "distil_tokens": "global: tokens of a text in the distillation",
    "horizon": "global: number of future tokens over which a token's use is summed",
}


@dataclass(frozen=True, kw_only=True)
class _Run(options.RepackOption):
    traces: str = argument(..., metavar="TRACES", help="folder that kvp-edge trace wrote")
    out: str = option(..., metavar="DIR", help="folder for the run")
    model: str | None = option(
        None, metavar="GGUF", help="the traced model, for rollouts and distillation"
    )
    device: str | None = option(None, metavar="NAME", shown="CUDA if available", help="cpu or cuda")
    threads: int | None = option(None, metavar="N", shown="torch's", help="CPU threads")
    verbose: bool = verbose_option()


def _setting(name: str) -> tuple[str, type, Any]:
    default = getattr(Settings, name)
    metavar = {float: "X", int: "N"}.get(type(default), "NAME")
    own = {"shown": own_of_objectives(name)} if name in OWN[Settings.objective] else {}
    made = option(default, panel="settings", metavar=metavar, help=_HELP[name], **own)
    return name, type(default), made


def own_of_objectives(name: str) -> str:
    """The values of a setting that each objective has its own of."""
    values: dict[Any, list[str]] = {}
    for objective, own in OWN.items():
        values.setdefault(own[name], []).append(objective)
    ours, *others = sorted(values, key=lambda value: Settings.objective not in values[value])
    return "; ".join([str(ours), *(f"{', '.join(values[v])}: {v}" for v in others)])


Options: Any = make_dataclass(
    "Options", [_setting(one.name) for one in fields(Settings)], bases=(_Run,), frozen=True,
    kw_only=True,
)  # fmt: skip


def open_traces(path: str) -> TraceSet:
    """The traces in a folder."""
    return TraceSet(path)


def require_torch(what: str) -> None:
    """Raises:
    ImportError: a package of the extra ``train`` is missing; a sentence.
    """
    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{what} needs {package}: pip install 'kvp_edge[train]'")


def _main(args: Any) -> int:
    require_torch("training")
    import torch  # noqa: PLC0415

    from kvp_edge.training.train import Result, train  # noqa: PLC0415

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    engine: dict[str, Any] = {"repack": args.repack}
    if args.threads:
        engine |= {"n_threads": args.threads, "n_threads_batch": args.threads}
    result: Result = train(
        open_traces(args.traces),
        args.out,
        settings,
        device=args.device,
        model=args.model,
        engine=engine,
    )
    say(comparison(result))
    say(f"{Path(args.out) / 'best.safetensors'}")
    return 0


def comparison(result: Any) -> str:
    """Cost of every scorer, and in how many heads the policy beats what a chat can compute."""
    from kvp_edge.training.train import BASELINES  # noqa: PLC0415

    rows = {"policy": result.quality, **result.baselines}
    head, _, *body = table(
        (("", 10), ("cost", 8), ("lost", 8), ("tokens: cost", 14), ("lost", 8)),
        [
            (
                name,
                f"{q.cost.mean():.2f}",
                f"{q.lost.mean():.3f}",
                f"{q.token_cost:.2f}",
                f"{q.token_lost:.3f}",
            )
            for name, q in rows.items()
        ],
    )
    lines = [head, *body]
    heuristics = [result.baselines[name] for name in BASELINES]
    best = [min(costs) for costs in zip(*(q.cost for q in heuristics), strict=True)]
    won = sum(mine < theirs for mine, theirs in zip(result.quality.cost, best, strict=True))
    lines.append(
        "cost: attention lost over all budgets, where the best ranking's is 1; lost: share of "
        "attention lost\nbeyond the best ranking's, at 1/2 to 1/16 of the tokens; means over heads"
    )
    lines.append(f"below the best of {', '.join(BASELINES)} in {won} of {len(best)} heads, by cost")
    if result.loss_increase:
        before, after = result.loss_increase
        lines.append(
            f"rollouts: evictions cost {after:+.4f} nats a token on the validation texts "
            f"({before:+.4f} before)"
        )
    return "\n".join(lines)


COMMAND = Command(
    _main,
    Options,
    "Train an eviction policy on the traces of a model (see kvp-edge trace).",
    _EPILOG,
)
