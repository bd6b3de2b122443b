"""Trace the bundled model, train its policy, export it and compare it, in one command:

    python -m scripts.train_policy --books data/books --model-run build/model --out build/policy

Every stage leaves its result in the output folder, and the same command goes on where it stopped.
With --objective kvp or foresight it makes the other policies of docs/results.md, of the same traces
if --out is the same.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from kvp_edge.bundled import bundled_model
from kvp_edge.export import export
from kvp_edge.traces.format import TraceSet
from kvp_edge.traces.writer import capture_traces
from kvp_edge.training.settings import Settings
from kvp_edge.training.train import plain, train
from scripts.train_model import config
from scripts.train_model.prepare import prepare

from .card import write_card
from .compare import compare, plot, summary
from .sources import GeneratedChats

LENGTH = 1536  # tokens of the longest trace
TRACES, HELD_OUT_TRACES = 800, 96
# Below 8 queries per block a trace is larger than twice its keys and values.
BLOCK = 16
RECIPE = Settings(
    objective="kvp", steps=2000, token_steps=200, states=8, tokens=512, lr=3e-3, eval_every=250
)
RECIPES = {
    "kvp": RECIPE,
    "global": Settings(
        objective="global", steps=2500, states=4, lr=3e-3, capacity=96, eval_every=250
    ),
    # the evictions of an eighth of 1,024 cells
    "foresight": Settings(
        objective="foresight",
        steps=800,
        token_steps=100,
        lr=3e-3,
        eval_every=200,
        budget=96,
        every=32,
        grpo_steps=80,
        grpo_lr=1e-3,
        texts=3,
    ),
}

SMOKE_LENGTH, SMOKE_TRACES = 256, 6
_SMALL = {"hidden": 8, "steps": 6, "warmup": 2, "states": 2, "eval_every": 4, "recent": 16}
SMOKES = {
    "kvp": Settings(objective="kvp", **_SMALL, token_steps=2, tokens=64),
    "global": Settings(objective="global", **_SMALL, distil_steps=1, texts=1, distil_tokens=32),
    "foresight": Settings(
        objective="foresight",
        **_SMALL,
        token_steps=2,
        tokens=64,
        budget=32,
        every=16,
        grpo_steps=1,
        texts=1,
        rollouts=2,
    ),
}


def capture(
    out: Path, model: str, source: GeneratedChats, length: int, seed: int, threads: int
) -> TraceSet:
    with tqdm(total=source.count, unit="trace", desc=out.name) as bar:
        capture_traces(
            model,
            [source],
            out,
            length=length,
            seed=seed,
            block=BLOCK,
            progress=lambda done, planned, tokens: bar.update(done - bar.n),
            n_threads=threads,
            n_threads_batch=threads,
        )
    return TraceSet(out, model=model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_policy", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--books", type=Path, default=Path("data/books"), help="the novels (default: %(default)s)"
    )
    parser.add_argument(
        "--model-run",
        type=Path,
        default=Path("build/model"),
        help="folder of scripts.train_model, for its tokenizer and word lists (default: "
        "%(default)s; made from the books if it is not there)",
    )
    parser.add_argument("--model", help="the GGUF file (default: the bundled model)")
    parser.add_argument("--out", type=Path, default=Path("build/policy"), help="folder for all")
    parser.add_argument(
        "--objective",
        choices=tuple(RECIPES),
        default="global",
        help="what is trained for (default: global, the bundled policy)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that all works")
    chosen = parser.parse_args(arguments)

    torch.set_num_threads(chosen.threads)
    model = chosen.model or bundled_model()
    recipe = config.SMOKE if chosen.smoke else config.FULL_CPU
    settings = (SMOKES if chosen.smoke else RECIPES)[chosen.objective]
    length = SMOKE_LENGTH if chosen.smoke else LENGTH
    counts = (SMOKE_TRACES, SMOKE_TRACES) if chosen.smoke else (TRACES, HELD_OUT_TRACES)
    corpus = prepare(chosen.books, chosen.model_run, recipe)
    sets = [
        capture(
            chosen.out / name, model, GeneratedChats(corpus, count, held_out), length, seed,
            chosen.threads,
        )
        for name, count, held_out, seed in (
            ("traces", counts[0], False, chosen.seed),
            ("held-out-traces", counts[1], True, chosen.seed + 1),
        )
    ]  # fmt: skip
    run = chosen.out / chosen.objective
    if not (run / "report.json").exists():
        engine = {"n_threads": chosen.threads, "n_threads_batch": chosen.threads}
        train(sets[0], run, settings, model=model, engine=engine)
    made = export(run, outtype="f16", license="mit", traces=sets[1])

    found = compare(made.gguf, sets[1], 2 * len(sets[1]))
    heads = sets[1].model["n_head_kv"]
    text = summary(found, heads)
    (run / "comparison.md").write_text(text + "\n", encoding="utf-8")
    figures = {name: plain(quality) for name, quality in found.items()}
    (run / "comparison.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    plot(found, heads, run / "cost-per-head.png")
    write_card(
        run,
        made.gguf,
        texts=f"{len(sets[0])} traces of generated chats and prose of up to {length} tokens",
        command=f"python -m scripts.train_policy --objective {chosen.objective} "
        f"--seed {chosen.seed}" + (" --smoke" if chosen.smoke else ""),
    )
    print(text, file=sys.stderr)
    print(made.gguf)


if __name__ == "__main__":
    main()
