"""Train variants of the KVP recipe on the same traces and compare them on the same held-out ones:

    python -m scripts.train_policy.ablate --traces build/policy --out build/ablations

after `python -m scripts.train_policy`, which made the traces. Every variant changes one setting.
What is finished stays, and the same command goes on where it stopped.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from kvp_edge.traces.format import TraceSet
from kvp_edge.training import checkpoint
from kvp_edge.training.data import Protected, check_traces
from kvp_edge.training.settings import Settings
from kvp_edge.training.train import plain, scorer_of, train
from kvp_edge.training.validate import choose_states, measure

from .__main__ import RECIPE

STEPS = 800
VARIANTS = {
    "recipe": {},
    "another seed": {"seed": 1},
    "no context (the paper's agent)": {"context": 1},
    "context 5": {"context": 5},
    "context 17": {"context": 17},
    "32 hidden units": {"hidden": 32},
    "128 hidden units": {"hidden": 128},
    "advantage: leave-one-out alone": {"advantage": "loo"},
    "importance: sum (the paper's)": {"importance": "sum"},
    "rank weights i": {"rank_weights": "i"},
    "sinks compete in training": {"sinks": 0},
    "half of the heads in a step": {"effort": 0.5},
    "16 rankings": {"rankings": 16},
}


def evaluate(
    name: str, settings: Settings, traces: TraceSet, held_out: TraceSet, out: Path
) -> dict[str, object]:
    """Train one variant and measure it, always with the recipe's protected tokens."""
    run = out / name.replace(" ", "-").replace("(", "").replace(")", "").replace(":", "")
    file = run / "held-out.json"
    if not file.exists():
        result = train(traces, run, settings)
        agents, _ = checkpoint.load_agents(run)
        protected = Protected(RECIPE.sinks, RECIPE.recent)
        usable, _ = check_traces(held_out, protected)
        states = choose_states(held_out, usable, protected, 2 * len(held_out))
        scorer, whole = scorer_of(agents, settings.horizon)
        quality = measure(scorer, held_out, states, protected, whole)
        found = {**plain(quality), "tokens_per_second": result.tokens_per_second}
        file.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def table(found: dict[str, dict[str, object]]) -> str:
    """Markdown, one row per variant."""
    lines = [
        "| variant | cost | attention lost | whole tokens: cost | lost | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, quality in found.items():
        cost, lost = quality["cost"], quality["lost"]
        assert isinstance(cost, list)
        assert isinstance(lost, list)
        lines.append(
            f"| {name} | {sum(cost) / len(cost):.3f} | {sum(lost) / len(lost):.4f} "
            f"| {quality['token_cost']:.3f} | {quality['token_lost']:.4f} "
            f"| {quality['tokens_per_second']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_policy.ablate", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--traces",
        type=Path,
        default=Path("build/policy"),
        help="output folder of scripts.train_policy (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("build/ablations"), help="folder for all")
    parser.add_argument("--variants", nargs="*", metavar="NAME", help="default: all of them")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    chosen = parser.parse_args(arguments)

    torch.set_num_threads(chosen.threads)
    names = chosen.variants or list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"there is no variant {', '.join(sorted(unknown))}: {', '.join(VARIANTS)}")
    traces = TraceSet(chosen.traces / "traces")
    held_out = TraceSet(chosen.traces / "held-out-traces")
    found = {}
    for name in names:
        settings = replace(RECIPE, steps=chosen.steps, **VARIANTS[name])
        found[name] = evaluate(name, settings, traces, held_out, chosen.out)
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    text = table(found)
    (chosen.out / "ablations.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
