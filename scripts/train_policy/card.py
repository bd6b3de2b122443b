"""Write the card of a policy, in Markdown beside it, from the folder of its run:

python -m scripts.train_policy.card build/policy/global --texts "800 traces of generated chats" \\
    --command "python -m scripts.train_policy ..."
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.evaluation.markdown import escape, table
from kvp_edge.policy_file import PolicyInfo, PolicyWeights, outtype_of, read_policy
from kvp_edge.sensitive_heads import in_words
from kvp_edge.training.checkpoint import load_agents
from kvp_edge.training.settings import Settings

#: What a quality is called in report.json and in comparison.json, and in the table.
_COLUMNS = {
    "cost": "cost, mean over heads",
    "lost": "lost",
    "token_cost": "whole tokens: cost",
    "token_lost": "lost",
}
_BY_SENSITIVITY = "cost, heads by their sensitivity"
_SENSITIVITY = " *Sensitivity*: how much of the loss of later text hangs on what a head remembers."
_DOCS = "docs/training-policies.md"


def card(
    policy: Path,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    *,
    texts: str,
    command: str,
    measured: str,
) -> str:
    """The card's text.

    Args:
        policy: the policy file.
        settings: of its training (kvp_edge.training.settings).
        figures: name of a policy ("policy" is the file's own) -> {"cost": ..., ...}, a number or
            one per head; other entries are left out.
        texts: what it was trained on.
        command: what made it.
        measured: what the figures were measured on.
    """
    info, weights = read_policy(policy)
    lines = [
        f"# {info.name}",
        "",
        f"A policy of kvp_edge for **{escape(info.base_model) or info.architecture}**: it decides "
        "which tokens stay in a small KV cache. Networks score each token from its cached key, "
        f"value and place in the conversation, {info.context // 2} neighbours on either side "
        "included.",
        "",
        *table(("", ""), _facts(policy, info, weights, texts)),
        "",
        "## Use",
        "",
        "Beside the model file, in any of its quantisations, kvp_edge finds it by itself. "
        "Otherwise:",
        "",
        f"    kvp-edge chat MODEL.gguf --policy {policy.name}",
        "",
        "## How it was made",
        "",
        *(f"    {line}" for line in command.splitlines()),
        "",
        f"Settings other than the defaults of `kvp-edge train`: {_changed(settings)}.",
        "",
        "## Figures",
        "",
        f"Measured on {measured}. *Cost*: importance lost, summed over all budgets, relative to "
        "the best ranking (1). *Lost*: importance lost beyond the best ranking; what importance "
        f"is, `--importance` says ({_DOCS}). Lower is better."
        + ("" if weights.sensitivity is None else _SENSITIVITY),
        "",
        *table(("policy", *_titles(weights.sensitivity)), _rows(figures, weights.sensitivity)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _facts(
    policy: Path, info: PolicyInfo, weights: PolicyWeights, texts: str
) -> list[tuple[str, str]]:
    n = sum(array.size for array in weights.arrays().values())
    size = os.path.getsize(policy) / 1024
    return [
        ("file", f"`{policy.name}`, {n} weights, {outtype_of(policy).upper()}, {size:.0f} KiB"),
        ("model", f"{escape(info.base_model) or 'not said'}, architecture {info.architecture}"),
        ("its cache", f"{info.n_layer} layers x {info.n_head_kv} KV heads, keys of "
         f"{info.head_size_k} numbers, values of {info.head_size_v}"),
        ("its file's fingerprint", f"`{info.fingerprint or 'none'}`"),
        ("its identity", f"`{info.model_identity or 'none'}`"),
        ("objective", info.objective),
        ("networks", f"one for each {'layer' if info.scope == 'layer' else 'KV head'}, "
         f"{info.hidden} + {info.hidden} hidden units, context width {info.context}"),
        *([] if weights.sensitivity is None else
          [("sensitive heads", in_words(weights.sensitivity))]),
        ("never dropped in training", f"the first {info.sinks} and newest {info.recent} tokens"),
        ("trained on", escape(texts)),
        ("licence", info.license or "not said"),
    ]  # fmt: skip


def _changed(settings: Mapping[str, Any]) -> str:
    plain = Settings(objective=settings.get("objective", Settings.objective))
    defaults = {field.name: getattr(plain, field.name) for field in fields(Settings)}
    defaults["objective"] = Settings.objective
    changed = [
        f"`--{name.replace('_', '-')} {settings[name]}`"
        for name, value in defaults.items()
        if name in settings and settings[name] != value
    ]
    return ", ".join(changed) or "none"


def _titles(sensitivity: FloatArray | None) -> list[str]:
    return [*_COLUMNS.values(), *([] if sensitivity is None else [_BY_SENSITIVITY])]


def _rows(figures: Mapping[str, Any], sensitivity: FloatArray | None) -> list[list[str]]:
    """The policy first, then the others as they come."""
    found = {name: f for name, f in figures.items() if isinstance(f, Mapping) and "cost" in f}
    rows = []
    for name, f in sorted(found.items(), key=lambda item: item[0] != "policy"):
        row = [f"{np.mean(f[column]):.{2 if 'cost' in column else 3}f}" for column in _COLUMNS]
        if sensitivity is not None:
            each = np.ravel(f["cost"])
            known = each.size == sensitivity.size
            row.append(f"{np.average(each, weights=sensitivity.ravel()):.2f}" if known else "")
        rows.append(["**this policy**" if name == "policy" else name, *row])
    return rows


def write_card(run: Path, policy: Path, *, texts: str, command: str) -> Path:
    """Write the card of a run's policy beside it: figures of held-out traces (comparison.json) if
    the run has them, otherwise those of validation (report.json).

    Raises:
        TrainingError: the folder has no finished run.
        OSError: it has no figures.
    """
    _, about = load_agents(run)
    held_out = run / "comparison.json"
    source = held_out if held_out.exists() else run / "report.json"
    text = card(
        policy,
        about.settings,
        json.loads(source.read_text(encoding="utf-8")),
        texts=texts,
        command=command,
        measured="held-out traces" if source == held_out else "the validation traces of the run",
    )
    path = policy.with_suffix(".md")
    path.write_text(text, encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_policy.card", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument(
        "--policy", type=Path, help="the policy file (default: the only kvp-*.gguf in the folder)"
    )
    parser.add_argument("--texts", required=True, help="what it was trained on, in words")
    parser.add_argument("--command", required=True, help="the command that made it")
    chosen = parser.parse_args(arguments)
    files = [chosen.policy] if chosen.policy else sorted(chosen.run.glob("kvp-*.gguf"))
    if len(files) != 1:
        parser.error(f"'{chosen.run}' has {len(files)} policy files: name one with --policy")
    print(write_card(chosen.run, files[0], texts=chosen.texts, command=chosen.command))


if __name__ == "__main__":
    main()
