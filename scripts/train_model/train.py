"""The training loop: seeded, resumable, bfloat16 arithmetic on float32 master weights."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvp_edge.files import replacing

from .config import Recipe, Stage
from .model import Model, causal_mask, rotary_tables
from .optimizer import Muon
from .prepare import Corpus
from .tasks import ANSWERED, TaskMaker, sample
from .wordings import WORDINGS

LONGEST_EXPLICIT = 1024  # tokens up to which attention written out beats the fused kernel on CPUs


def make_optimizers(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    norms = [p for p in model.blocks.parameters() if p.dim() == 1]
    groups = [
        {"params": norms, "lr": recipe.norm_lr},
        {"params": [model.norm], "lr": recipe.gain_lr},
        {"params": [model.embed.weight], "lr": recipe.embed_lr},
    ]
    optimizers = [
        Muon(matrices, recipe.matrix_lr, recipe.momentum, recipe.weight_decay),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate at `step` (from the start of the run) as a share of its peak."""
    warm, first = min(1.0, (step + 1) / recipe.warmup_steps), 0
    for stage in recipe.stages:
        if step < first + stage.steps:
            start, end = stage.rates
            return warm * (start + (end - start) * (step - first) / stage.steps)
        first += stage.steps
    raise ValueError(f"Step {step} is beyond the {first} steps of this recipe.")


def batch(maker: TaskMaker, stage: Stage, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The data of one step, a function of seed and step alone, so that a resumed run sees the same.

    Returns token ids int64 [batch, length + 1], the flat indices int64 [predictions] of the tokens
    whose prediction counts, all answers among them, and their loss weights float32 [predictions].
    """
    maker.seed(seed, step)
    maker.invented, maker.free, maker.new_words = stage.invented, stage.free, stage.new_words
    maker.loose = stage.loose
    maker.phrases = WORDINGS[stage.wordings]
    rows = [sample(maker, stage.mix, stage.length + 1) for _ in range(stage.batch)]
    ids = torch.tensor([row[0] for row in rows])
    classes = torch.tensor([row[1] for row in rows])[:, 1:].reshape(-1)
    noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
    order = torch.rand(classes.numel(), generator=noise) + classes
    chosen = order.topk(stage.predictions)[1].sort()[0]
    weights = torch.where(classes[chosen] == ANSWERED, 1.0, stage.other_weight)
    return ids, chosen, weights


def loss_function(
    model: Model, stage: Stage, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled for the stage's shapes: (ids, positions, weights) -> weighted mean loss in nats."""
    cos, sin = (t.to(device, torch.bfloat16) for t in rotary_tables(model.config, stage.length))
    mask = None
    if device.type == "cpu" and stage.length <= LONGEST_EXPLICIT:
        mask = causal_mask(stage.length).bfloat16()

    def loss(ids: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
        hidden = model(ids[:, :-1], cos, sin, mask).view(-1, model.config.width)[positions]
        wanted = ids[:, 1:].reshape(-1)[positions]
        logits = F.linear(hidden, model.embed.weight).float()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        return (losses * weights).sum() / weights.sum()

    return torch.compile(loss, dynamic=False)


@torch.no_grad()
def answered(model: Model, maker: TaskMaker, task: str, length: int, count: int) -> float:
    """Share of answer tokens of one task that the model (float32) ranks first, given the rest."""
    maker.seed(1, length)
    rows = [sample(maker, {task: 1.0}, length + 1) for _ in range(count)]
    ids = torch.tensor([row[0] for row in rows], device=model.norm.device)
    wanted = torch.tensor([row[1] for row in rows], device=ids.device)[:, 1:] == ANSWERED
    hits = model.logits(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    return (hits & wanted).sum().item() / wanted.sum().item()


def save(path: Path, model: Model, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write the checkpoint, whole or not at all: an interrupted write must not cost the run."""
    state = {
        "model": model.state_dict(),
        "step": step,
        "optimizers": [o.state_dict() for o in optimizers],
    }
    with replacing(path) as file:
        torch.save(state, file)


def train(
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    seed: int,
    device: torch.device,
    resume: bool,
    stop_after: int | None = None,
) -> Model:
    """Train to the end of the recipe (or `stop_after` steps) and return the float32 model."""
    torch.manual_seed(seed)
    model = Model(recipe.model)
    working = Model(recipe.model).bfloat16().to(device)
    model.to(device)
    optimizers = make_optimizers(model, recipe)
    checkpoint, done = out / "checkpoint.pt", 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done = state["step"]
        print(f"Resuming after step {done} of {recipe.steps}.", file=sys.stderr)

    masters, copies = list(model.parameters()), list(working.parameters())
    maker, judge = corpus.maker(held_out=False), corpus.maker(held_out=True)
    with torch.no_grad():
        torch._foreach_copy_(copies, masters)
    step = seen = 0
    compiled: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    for stage in recipe.stages:
        if step + stage.steps <= done:
            step, seen = step + stage.steps, seen + stage.steps * stage.batch * stage.length
            continue
        if stage.length not in compiled:
            compiled[stage.length] = loss_function(working, stage, device)
        loss_of = compiled[stage.length]
        losses, started, since = [], time.time(), 0
        for _ in range(stage.steps):
            if step < done:
                step, seen = step + 1, seen + stage.batch * stage.length
                continue
            ids, chosen, weights = batch(maker, stage, seed, step)
            loss = loss_of(ids.to(device), chosen.to(device), weights.to(device))
            loss.backward()
            for master, copy in zip(masters, copies, strict=True):
                master.grad, copy.grad = copy.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(step, recipe)
                optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(copies, masters)
            losses.append(loss.item())
            step, seen, since = step + 1, seen + stage.batch * stage.length, since + 1
            last = step in (recipe.steps, stop_after)
            if step % recipe.save_every == 0 or last:
                save(checkpoint, model, optimizers, step)
                speed = since * stage.batch * stage.length / (time.time() - started)
                items = max(1, min(8, 2048 // stage.length))
                scores = {
                    task: round(answered(model, judge, task, stage.length, items), 2)
                    for task in stage.mix
                    if task != "reading"
                }
                print(
                    f"step {step}/{recipe.steps} length {stage.length} {seen / 1e6:.2f}M tokens "
                    f"loss {sum(losses) / len(losses):.3f} {speed:.0f} tokens/s {scores}",
                    file=sys.stderr,
                    flush=True,
                )
                losses, started, since = [], time.time(), 0
            if last:
                return model
    return model
