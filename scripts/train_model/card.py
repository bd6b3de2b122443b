"""Print the tables of the model card from the figures of a run:

python -m scripts.train_model.card build/model/figures.json
"""

import json
import math
import sys
from pathlib import Path

from .evaluate import LENGTHS, QUANTISED

_COLUMNS = (512, 1024, 2048, 4096)


def percent(score: dict[str, float] | None) -> str:
    """Share with its interval in percent, or a dash where nothing was measured."""
    if score is None:
        return "-"
    low, high = score["low"], score["high"]
    return f"{100 * score['share']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def tables(figures: dict) -> str:
    """Markdown for skills, quantisation, prose, attention sink and eviction."""
    lines = ["| exact match, % | " + " | ".join(map(str, _COLUMNS)) + " |", "|---" * 5 + "|"]
    for skill in LENGTHS:
        cells = [percent(figures.get(f"{skill} | {n} | f16 file | f16 cache")) for n in _COLUMNS]
        lines.append(f"| {skill} | " + " | ".join(cells) + " |")
    kinds = (("f16", "f16"), ("q8_0", "f16"), ("f16", "q8_0"))
    heads = [f"{file} file, {cache} cache" for file, cache in kinds]
    lines += ["", "| exact match at 1024, % | " + " | ".join(heads) + " |", "|---" * 4 + "|"]
    for skill in QUANTISED:
        names = [f"{skill} | 1024 | {file} file | {cache} cache" for file, cache in kinds]
        lines.append(f"| {skill} | " + " | ".join(percent(figures.get(n)) for n in names) + " |")
    lines += ["", "| held-out books | nats per token | perplexity |", "|---|---|---|"]
    for name, value in figures.items():
        if name.startswith("prose, nats per token, "):
            source = name.removeprefix("prose, nats per token, ")
            lines.append(f"| {source} | {value:.3f} | {math.exp(value):.1f} |")
    sink = figures.get("attention on the first token, prose, per layer and head", [])
    lines += [
        "",
        "| attention on the first token | "
        + " | ".join(f"head {i}" for i in range(len(sink[0]) if sink else 0))
        + " |",
        "|---" * (1 + len(sink[0]) if sink else 1) + "|",
    ]
    lines += [
        f"| layer {i} | " + " | ".join(f"{m:.2f}" for m in row) + " |" for i, row in enumerate(sink)
    ]
    for name, value in figures.items():
        if name.startswith("logits"):
            lines.append(
                f"\n{name}: largest difference {value['largest']:.4f} at a scale of "
                f"{value['scale']:.1f}, same first choice {value['same_choice']:.4f}"
            )
        if "1/8 of the cells" in name:
            lines += ["", f"| {name.split(' | ')[0]} | exact match, % | items |", "|---|---|---|"]
            lines += [
                f"| {policy} | {percent(score)} | {score['items']} |"
                for policy, score in value.items()
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
