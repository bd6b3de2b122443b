"""Every figure of the model card, measured in llama.cpp on held-out words, names, books, wordings.

Greedy decoding; an item counts when the whole answer, with its end token, is the expected one.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from random import Random

import llama_cpp
import numpy as np
import torch

from .model import Model
from .ngram import KneserNey
from .prepare import Corpus
from .tasks import Item, TaskMaker
from .tokenizer import BOS

SINK, RECENT = 4, 32  # tokens that no eviction may touch
CHUNK = 512  # tokens per call of llama_decode
CACHE_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)
SKILLS: dict[str, Callable[[TaskMaker, int], Item | None]] = {
    "needle, 1 key": lambda m, n: m.needle(n, keys=1, asked=1),
    "needle, 4 distractors": lambda m, n: m.needle(n, keys=5, asked=1),
    "needle, 4 queries at once": lambda m, n: m.needle(n, keys=4, asked=4, at_once=True),
    "needle, 3 values": lambda m, n: m.needle(n, keys=1, values=3, asked=1),
    "variables, value after 2 hops, 2 chains": lambda m, n: m.variables(
        n, chains=2, hops=2, asked=1, names=False
    ),
    "variables, names of a 2-hop chain, 2 chains": lambda m, n: m.variables(
        n, chains=2, hops=2, asked=1, names=True
    ),
    "lookup, 32 pairs in prose": lambda m, n: m.lookup(n, pairs=32, asked=1),
    "lookup, pairs fill the context": lambda m, n: m.lookup(n, pairs=0, asked=1),
    "facts of earlier turns, 6 told": lambda m, n: m.facts(n, count=6, asked=1),
}
# Lengths in tokens at which each skill is measured.
LENGTHS: dict[str, tuple[int, ...]] = {
    "needle, 1 key": (512, 1024, 2048, 4096),
    "needle, 4 distractors": (1024, 2048),
    "needle, 4 queries at once": (1024,),
    "needle, 3 values": (1024,),
    "variables, value after 2 hops, 2 chains": (1024,),
    "variables, names of a 2-hop chain, 2 chains": (1024,),
    "lookup, 32 pairs in prose": (512, 1024, 2048, 4096),
    "lookup, pairs fill the context": (1024,),
    "facts of earlier turns, 6 told": (1024, 2048),
}

# Skills measured again with a quantised file and with a quantised cache.
QUANTISED = ("needle, 4 distractors", "facts of earlier turns, 6 told", "lookup, 32 pairs in prose")


@dataclass(frozen=True)
class Score:
    """`right` of `items`, with the 95 % Wilson interval."""

    right: int
    items: int

    def interval(self) -> tuple[float, float]:
        if not self.items:
            return 0.0, 1.0
        z, share = 1.959964, self.right / self.items
        scale = 1 + z * z / self.items
        middle = (share + z * z / (2 * self.items)) / scale
        spread = (
            z / scale * math.sqrt(share * (1 - share) / self.items + z * z / (4 * self.items**2))
        )
        return max(0.0, middle - spread), min(1.0, middle + spread)

    def to_json(self) -> dict[str, float]:
        low, high = self.interval()
        return {**asdict(self), "share": self.right / max(1, self.items), "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.right}/{self.items} = {self.right / self.items:.3f} [{low:.3f}, {high:.3f}]"


def items(maker: TaskMaker, skill: str, length: int, count: int, seed: int) -> list[Item]:
    """`count` items of about `length` tokens; the same ones for the same arguments."""
    maker.seed(seed, length, list(SKILLS).index(skill))
    made: list[Item] = []
    while len(made) < count:
        if (item := SKILLS[skill](maker, length)) is not None:
            made.append(item)
    return made


class Runner:
    """A GGUF in llama.cpp with one sequence; `cache` is the type of K and V.

    Written on the C API because weights must stay in plain buffers: builds for processors with AMX
    repack q8_0 weights and then stop with an illegal instruction on some virtual machines
    (https://github.com/ggml-org/llama.cpp/issues/28756).
    """

    def __init__(self, path: str, context: int, cache: str = "f16", threads: int = 2) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load '{path}'. Was it written completely?")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, CHUNK, CHUNK
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = CACHE_TYPES[cache]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.position = 0

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        self.position = 0

    def feed(self, ids: list[int], every: bool = False) -> np.ndarray:
        """Read tokens; logits float32 [vocab], or [len(ids), vocab] for `every` token."""
        rows = []
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, self.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i + 1 == len(part)
            failed = llama_cpp.llama_decode(self.context, batch)
            llama_cpp.llama_batch_free(batch)
            if failed:
                raise RuntimeError(
                    f"llama.cpp could not decode {len(part)} tokens at position {self.position} "
                    f"(error {failed}). Give the context more cells."
                )
            self.position += len(part)
            for i in range(len(part)) if every else [len(part) - 1]:
                row = llama_cpp.llama_get_logits_ith(self.context, i)
                rows.append(np.ctypeslib.as_array(row, (self.vocab,)).copy())
        return np.stack(rows) if every else rows[-1]

    def right(self, item: Item, keep: list[int] | None = None) -> bool:
        """Does greedy decoding give the first answer, token by token?

        With `keep` (sorted positions), every other cell of the context is removed after the context
        is read and before the question is.
        """
        self.clear()
        self.feed(item.context)
        if keep is not None:
            for start, stop in gaps(keep, len(item.context)):
                llama_cpp.llama_memory_seq_rm(self.memory, 0, start, stop)
        logits = self.feed(item.turns[0].question)
        for wanted in item.turns[0].answer:
            if int(logits.argmax()) != wanted:
                return False
            logits = self.feed([wanted])
        return True


def gaps(keep: list[int], length: int) -> list[tuple[int, int]]:
    """Half-open ranges of 0..length that `keep` (sorted) leaves out."""
    edges = [-1, *keep, length]
    return [(a + 1, b) for a, b in pairwise(edges) if b > a + 1]


def kept(policy: str, length: int, budget: int, rng: Random) -> list[int]:
    """Positions that a rule keeps, sorted: the protected ones and the rest by the rule."""
    protected = {*range(min(SINK, length)), *range(max(0, length - RECENT), length)}
    free = [i for i in range(length) if i not in protected]
    room = max(0, budget - len(protected))
    chosen = free[len(free) - room :] if policy == "recency" else rng.sample(free, room)
    return sorted(protected | set(chosen))


def exact_match(
    runner: Runner, maker: TaskMaker, skill: str, length: int, count: int, seed: int
) -> Score:
    found = [runner.right(item) for item in items(maker, skill, length, count, seed)]
    return Score(sum(found), len(found))


def eviction(
    runner: Runner, maker: TaskMaker, length: int, share: float, count: int, seed: int
) -> dict[str, Score]:
    """Single needles after one eviction to `share` of the cells, before the question is read.

    Recency is split by whether the needle lay in what it keeps.
    """
    rng, budget = Random(seed), int(share * length)
    outcome: dict[str, list[bool]] = {}
    for item in items(maker, "needle, 1 key", length, count, seed):
        window = len(item.context) - (budget - SINK)
        # The value tokens of the answer stand in the context only inside the needle.
        value = item.turns[0].answer[-4:-2]
        places = [i for i in range(len(item.context) - 1) if item.context[i : i + 2] == value]
        inside = bool(places) and places[-1] - 20 >= window
        for policy in ("random", "recency"):
            label = policy
            if policy == "recency":
                label += ", needle in window" if inside else ", needle outside window"
            right = runner.right(item, kept(policy, len(item.context), budget, rng))
            outcome.setdefault(label, []).append(right)
    return {label: Score(sum(found), len(found)) for label, found in sorted(outcome.items())}


def excerpts(ids: np.ndarray, windows: int, length: int) -> list[np.ndarray]:
    """`windows` evenly spread excerpts of `length` tokens."""
    starts = np.linspace(0, len(ids) - length - 1, windows).astype(int)
    return [ids[start : start + length] for start in starts]


def prose_loss(runner: Runner, ids: np.ndarray, windows: int, length: int) -> float:
    """Mean loss in nats per token over excerpts, each after a beginning-of-text token.

    Counted from the middle of an excerpt on, so that every token has at least length / 2 before it.
    """
    half, losses = length // 2, []
    for text in excerpts(ids, windows, length):
        runner.clear()
        logits = runner.feed([BOS, *text[:-1].tolist()], every=True)[half:].astype(np.float64)
        top = logits.max(1)
        log_sum = np.log(np.exp(logits - top[:, None]).sum(1)) + top
        losses.append(log_sum - logits[np.arange(len(logits)), text[half:]])
    return float(np.concatenate(losses).mean())


def ngram_loss(corpus: Corpus, windows: int, length: int, order: int = 4) -> float:
    """The same figure for an n-gram model of the same training text, on the same tokens."""
    model = KneserNey(corpus.train_ids, corpus.tokenizer.get_vocab_size(), order)
    texts = excerpts(corpus.held_out_ids, windows, length)
    losses = [-np.log(model.probabilities(text)[length // 2 :]) for text in texts]
    return float(np.concatenate(losses).mean())


@torch.no_grad()
def sink_mass(model: Model, texts: list[list[int]]) -> np.ndarray:
    """Mean attention of the later half of each text on its first token, [n_layer, n_head]."""
    total = np.zeros((model.config.n_layer, model.config.n_head))
    for ids in texts:
        for layer, weights in enumerate(model.attention(torch.tensor([ids]))):
            total[layer] += weights[0, :, len(ids) // 2 :, 0].mean(-1).numpy()
    return total / len(texts)


@torch.no_grad()
def logit_difference(runner: Runner, model: Model, ids: list[int]) -> dict[str, float]:
    """llama.cpp against PyTorch (float32) on one text."""
    runner.clear()
    theirs = runner.feed(ids, every=True)
    ours = model.logits(torch.tensor([ids]))[0].numpy()
    return {
        "largest": float(np.abs(theirs - ours).max()),
        "scale": float(np.abs(ours).max()),
        "same_choice": float((theirs.argmax(1) == ours.argmax(1)).mean()),
    }


def rounded(model: Model) -> Model:
    """The model with its matrices rounded to float16, as the f16 file stores them."""
    copy = Model(model.config)
    copy.load_state_dict(
        {
            name: value.half().float() if value.dim() == 2 else value
            for name, value in model.state_dict().items()
        }
    )
    return copy
