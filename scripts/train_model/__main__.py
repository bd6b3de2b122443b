"""Train, export and evaluate the bundled model in one command:

    python -m scripts.train_model --books data/books --out build/model

Every stage leaves its result in the output folder; `--resume` goes on where an earlier run ended.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from . import config, evaluate
from .export import write_gguf
from .model import Model
from .prepare import Corpus, prepare
from .tokenizer import BOS
from .train import train


def pick_device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch sees no CUDA device here. Use --device cpu, or install a PyTorch "
            "build with CUDA."
        )
    return torch.device(wanted)


def export_all(
    model: Model, corpus: Corpus, recipe: config.Recipe, out: Path, seed: int
) -> dict[str, Path]:
    """Write one GGUF per file type and return their paths."""
    facts: dict[str, str | int] = {
        "seed": seed,
        "tokens": sum(stage.steps * stage.batch * stage.length for stage in recipe.stages),
        "schedule": json.dumps([[s.length, s.batch, s.steps] for s in recipe.stages]),
        "data": "public-domain English novels and generated look-up tasks",
        "longest_sequence": max(stage.length for stage in recipe.stages),
    }
    files = {}
    for file_type in ("f32", "f16", "q8_0"):
        files[file_type] = out / f"bookworm-4m-{file_type}.gguf"
        write_gguf(
            files[file_type], model, corpus.tokenizer, context_length(recipe), facts, file_type
        )
    return files


def context_length(recipe: config.Recipe) -> int:
    """Tokens declared in the file: what was trained, never less than llama.cpp needs to run."""
    return max(512, *(stage.length for stage in recipe.stages))


def evaluate_all(
    files: dict[str, Path],
    model: Model,
    corpus: Corpus,
    recipe: config.Recipe,
    out: Path,
    seed: int,
    threads: int,
    resume: bool,
) -> None:
    """Measure everything the model card reports and write it to `figures.json` as it comes in.

    With `resume`, figures of this very model that are in the file already are not measured again.
    """
    file = out / "figures.json"
    digest = hashlib.sha256(files["f16"].read_bytes()).hexdigest()
    figures: dict[str, object] = json.loads(file.read_text()) if resume and file.exists() else {}
    if figures.get("model, sha256") != digest:
        figures = {"model, sha256": digest}
    maker, count = corpus.maker(held_out=True), recipe.evaluation_items
    longest = max(stage.length for stage in recipe.stages)
    usual = min(1024, longest)

    def note(name: str, measure: Callable[[], object]) -> None:
        if name not in figures:
            figures[name] = measure()
            file.write_text(json.dumps(figures, indent=1))
        print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)

    @cache
    def runner(file_type: str, cache_type: str = "f16") -> evaluate.Runner:
        return evaluate.Runner(str(files[file_type]), longest + 64, cache_type, threads)

    def match(skill: str, length: int, file_type: str, cache_type: str) -> None:
        name = f"{skill} | {length} | {file_type} file | {cache_type} cache"
        note(
            name,
            lambda: evaluate.exact_match(
                runner(file_type, cache_type), maker, skill, length, count, seed
            ).to_json(),
        )

    maker.seed(seed)
    texts = [[BOS, *maker.prose.anywhere(maker.rng, usual - 1)] for _ in range(max(1, count // 10))]
    note("logits, f32 file", lambda: evaluate.logit_difference(runner("f32"), model, texts[0]))
    note(
        "logits, f16 file",
        lambda: evaluate.logit_difference(runner("f16"), evaluate.rounded(model), texts[0]),
    )
    note("prose, characters per token", lambda: corpus.held_out_chars / len(corpus.held_out_ids))
    windows = max(2, count // 2)
    for file_type in ("f16", "q8_0"):
        note(
            f"prose, nats per token, {file_type} file",
            lambda of=file_type: evaluate.prose_loss(
                runner(of), corpus.held_out_ids, windows, usual
            ),
        )
    note("prose, nats per token, 4-gram", lambda: evaluate.ngram_loss(corpus, windows, usual))
    note(
        "attention on the first token, prose, per layer and head",
        lambda: np.round(evaluate.sink_mass(model, texts), 3).tolist(),
    )
    for skill, lengths in evaluate.LENGTHS.items():
        for length in sorted({min(length, longest) for length in lengths}):
            match(skill, length, "f16", "f16")
    note(
        f"needle, 1 key, 1/8 of the cells | {usual} | f16 file | f16 cache",
        lambda: {
            policy: score.to_json()
            for policy, score in evaluate.eviction(
                runner("f16"), maker, usual, 1 / 8, count, seed
            ).items()
        },
    )
    for skill in evaluate.QUANTISED:
        match(skill, usual, "q8_0", "f16")
        match(skill, usual, "f16", "q8_0")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_model", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--books",
        type=Path,
        default=Path("data/books"),
        help="folder with the novels as *.txt (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/model"),
        help="folder for data, checkpoint, GGUF files and figures",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a tiny model in about a minute, to see that everything works",
    )
    parser.add_argument(
        "--stop-after",
        type=int,
        metavar="STEP",
        help="end after this step, without export (go on with --resume)",
    )
    chosen = parser.parse_args(arguments)

    torch.set_num_threads(chosen.threads)
    device = pick_device(chosen.device)
    recipe = config.FULL_CUDA if device.type == "cuda" else config.FULL_CPU
    if chosen.smoke:
        recipe = config.SMOKE
    corpus = prepare(chosen.books, chosen.out, recipe)
    model = train(
        recipe, corpus, chosen.out, chosen.seed, device, chosen.resume, chosen.stop_after
    ).cpu()
    if chosen.stop_after is not None and chosen.stop_after < recipe.steps:
        return
    files = export_all(model, corpus, recipe, chosen.out, chosen.seed)
    evaluate_all(
        files, model, corpus, recipe, chosen.out, chosen.seed, chosen.threads, chosen.resume
    )
    print(f"Model: {files['f16']}\nFigures: {chosen.out / 'figures.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
