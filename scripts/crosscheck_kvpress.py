#!/usr/bin/env python3
"""``kvp-edge eval`` against kvpress: the same weights and conversations, evaluated twice.

    python scripts/crosscheck_kvpress.py [MODEL.gguf] [--items 10] [--length 512] [--own-rules]

Needs the extra ``kvpress`` and a model of architecture qwen3, such as the bundled one. Ours reads
a conversation in llama.cpp, kvpress in transformers, both with keys and values in float32. Each
drops tokens once, before the question, and keeps as many; their scores have the same definition
and parameters (tests/policies/test_kvpress.py).

Whatever the scores, ours keeps the newest token, and the tokens of a chat-template marker stay or
go together; kvpress has neither rule. So here kvpress keeps the newest token, too, and ours is told
of no markers. Then nothing but rounding differs, which decides between equal scores: knorm's of a
token that occurs often are all the same in the first layer. With --own-rules each side goes by its
own rules.

Prints a Markdown table and a verdict for every method on stdout. Fails if a method's replies score
the same in fewer than 90 % of the items: rounding decides near ties of tokens, which are rare.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import gguf
import kvpress
import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from kvp_edge.bundled import bundled_model
from kvp_edge.evaluation.markdown import table
from kvp_edge.evaluation.records import FULL
from kvp_edge.evaluation.run import Run, prompts
from kvp_edge.evaluation.setting import Prompt, Setting, budget_of
from kvp_edge.evaluation.tasks import TASKS
from kvp_edge.llama import Llama
from kvp_edge.policies import SnapKV

#: Our method's name -> kvpress's. Missing: h2o, which kvpress defines otherwise, and lagkv, whose
#: scores are ranks and ones, so that ties decide.
PRESSES = {
    "knorm": kvpress.KnormPress(),
    "keydiff": kvpress.KeyDiffPress(),
    "snapkv": kvpress.SnapKVPress(window_size=SnapKV.window, kernel_size=5),
    "tova": kvpress.TOVAPress(),
    "expected-attention": kvpress.ExpectedAttentionPress(n_future_positions=512, n_sink=4),
}
SAME_SCORE = 0.9  # of a method's items, at least


def hugging_face(path: str) -> Any:
    """The weights of a qwen3 GGUF file as transformers' model, in float32."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}

    def field(name: str) -> Any:
        return reader.fields[f"qwen3.{name}"].contents()

    embedding = tensors["token_embd.weight"]
    config = Qwen3Config(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
    )
    model = Qwen3ForCausalLM(config).float().eval().requires_grad_(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    tensors.setdefault("output.weight", embedding)
    model.load_state_dict({n: tensors[names.get_name(n, (".weight",))] for n in model.state_dict()})
    return model


@dataclass
class Outcome:
    """One item.

    Attributes:
        kept: bool [n_layer, n_head_kv, border]; [1, 1, border] for the same in all heads.
    """

    kept: npt.NDArray[np.bool_]
    reply: str
    score: float


class Transformers:
    """The model in transformers.

    Args:
        llm: the same model, which knows its words.
        own_rules: the newest token may go.
    """

    def __init__(self, llm: Llama, own_rules: bool = False) -> None:
        self._llm = llm
        self._own_rules = own_rules
        self._model = hugging_face(llm.model_path)

    def logits(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """f32 [n, vocabulary]."""
        found: npt.NDArray[np.float32] = self._model(_batch(tokens)).logits[0].numpy()
        return found

    def ask(self, prompt: Prompt, method: str, n_kept: int) -> Outcome:
        """Its reply after ``n_kept`` tokens of the context were kept."""
        assert prompt.item is not None
        cache = DynamicCache()
        kept = self._read(prompt.tokens[: prompt.border], cache, method, n_kept)
        assert cache.get_seq_length() == n_kept
        reply: list[int] = []
        unread, at = prompt.tokens[prompt.border :], prompt.border
        while len(reply) < prompt.reply_tokens:
            # positions go on from the border; what the cache holds counts for the causal mask only
            positions = torch.arange(at, at + len(unread))[None]
            out = self._model(_batch(unread), past_key_values=cache, position_ids=positions)
            at += len(unread)
            token = int(out.logits[0, -1].argmax())
            if llama_cpp.llama_vocab_is_eog(self._llm.vocab, token):
                break
            reply.append(token)
            unread = np.array([token], np.int32)
        text = self._llm.detokenize(reply).decode(errors="replace")
        return Outcome(kept, text, prompt.item.score(text))

    def _read(
        self, tokens: npt.NDArray[np.int32], cache: Any, method: str, n_kept: int
    ) -> npt.NDArray[np.bool_]:
        n = len(tokens)
        kept: list[Any] = []
        press: Any = contextlib.nullcontext()
        if n_kept < n:
            watched = copy.copy(PRESSES[method])
            # kvpress keeps int(n (1 - ratio)): half a token more, and rounding does not matter
            watched.compression_ratio = 1 - (n_kept + 0.5) / n

            def score(*args: Any) -> Any:
                scores = type(watched).score(watched, *args)
                if not self._own_rules:
                    scores[..., -1] = torch.inf
                best = scores.topk(n_kept, dim=-1).indices
                kept.append(torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True)[0])
                return scores

            watched.score = score
            press = watched(self._model)
        with press:
            self._model.model(_batch(tokens), past_key_values=cache)
        return torch.stack(kept).numpy() if kept else np.ones((1, 1, n), np.bool_)


def _batch(tokens: npt.NDArray[np.int32]) -> Any:
    """int64 [1, n]"""
    return torch.from_numpy(tokens.astype(np.int64))[None]


def load(model: str, length: int, threads: int) -> Llama:
    """For conversations of ``length`` tokens, about."""
    return Llama(model, n_ctx=2 * length, logits_all=True, **_engine(threads))


def logit_difference(llm: Llama, theirs: Transformers, prompt: Prompt) -> float:
    """The largest one after the whole prompt; ``llm`` has logits_all."""
    llm.reset()
    llm.eval(prompt.tokens.tolist())
    ours = llm.scores[: len(prompt.tokens)]
    return float(np.abs(ours - theirs.logits(prompt.tokens)).max())


def make_run(model: str, seed: int, threads: int, own_rules: bool = False) -> Run:
    """With ``own_rules`` the tokens of a marker stay or go together."""
    engine = _engine(threads)
    if not own_rules:
        engine["chat_handler"] = _no_template
    return Run(model, seed, "f32", "f32", engine)


def _engine(threads: int) -> dict[str, Any]:
    """llama_cpp.Llama's arguments."""
    f32 = 0  # enum ggml_type in ggml.h
    return {
        "n_threads": threads,
        "n_threads_batch": threads,
        "type_k": f32,
        "type_v": f32,
        "verbose": False,
    }


def _no_template(**_: Any) -> Any:
    """A chat handler without a template, so that there are no markers."""
    raise ValueError("conversations come as tokens")


def compare(
    run: Run, theirs: Transformers, method: str, budget: int | None, length: int,
    todo: Sequence[Prompt],
) -> Iterator[tuple[Outcome, Outcome]]:  # fmt: skip
    """Our outcome of every item, and kvpress's."""
    setting = Setting(
        mode="one-shot",
        question="unseen",
        granularity="head",
        length=length,
        longest=max(p.longest for p in todo),
        budget=budget,
        policy=method,
        protected=False,
    )
    held = run.kept_tokens(setting, todo)
    for prompt, record, shown in zip(todo, run.records(setting, todo), held, strict=True):
        ours = Outcome(shown.kept, record.reply, record.score)
        yield ours, theirs.ask(prompt, method, record.kept)


def row(name: Sequence[str], pairs: Sequence[tuple[Outcome, Outcome]]) -> list[str]:
    """A line of the table."""

    def share(values: Iterator[float]) -> str:
        return f"{100 * statistics.fmean(values):.1f}"

    return [
        *name,
        share(ours.score for ours, _ in pairs),
        share(theirs.score for _, theirs in pairs),
        str(len(pairs)),
        str(same_score(pairs)),
        str(sum(ours.reply == theirs.reply for ours, theirs in pairs)),
        share((ours.kept & theirs.kept).sum() / theirs.kept.sum() for ours, theirs in pairs),
    ]


def same_score(pairs: Sequence[tuple[Outcome, Outcome]]) -> int:
    """Items that both score alike."""
    return sum(ours.score == theirs.score for ours, theirs in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=bundled_model(), metavar="MODEL.gguf")
    parser.add_argument("--items", type=int, default=10, help="of each task")
    parser.add_argument("--length", type=int, default=512, help="tokens of a conversation")
    parser.add_argument("--budgets", default="1/4,1/2", help="shares of it, or numbers of tokens")
    parser.add_argument("--tasks", default="fact,niah_single_2,recall")
    parser.add_argument("--methods", default=",".join(PRESSES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--own-rules",
        action="store_true",
        help="kvpress may drop the newest token; ours keeps or drops a marker's tokens together",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with contextlib.closing(load(args.model, args.length, args.threads)) as llm:
        return crosscheck(llm, args)


def crosscheck(llm: Llama, args: argparse.Namespace) -> int:
    """The exit status."""
    todo = prompts(llm, TASKS, args.tasks.split(","), args.length, args.items, args.seed)
    run = make_run(args.model, args.seed, args.threads, args.own_rules)
    theirs = Transformers(llm, args.own_rules)
    print(f"Largest difference of a logit: {logit_difference(llm, theirs, todo[0]):.2g}\n")
    settings: list[tuple[str, str]] = [(FULL, "all")]
    settings += product(args.methods.split(","), args.budgets.split(","))
    found: dict[str, list[tuple[Outcome, Outcome]]] = {}
    rows = []
    with tqdm(total=len(settings) * len(todo), unit=" items", disable=None) as bar:
        for method, share in settings:
            bar.set_description(f"{method}, {share}")
            budget = None if method == FULL else budget_of(share, args.length)
            pairs = []
            for pair in compare(run, theirs, method, budget, args.length, todo):
                pairs.append(pair)
                bar.update()
            rows.append(row([method, share], pairs))
            found.setdefault(method, []).extend(pairs)
    header = [
        "method", "budget", "accuracy of ours", "of kvpress", "items", "same score",
        "same reply", "% of the kept tokens in common",
    ]  # fmt: skip
    print("\n".join(table(header, rows)), end="\n\n")
    failed = False
    for method, pairs in found.items():
        same = same_score(pairs)
        agrees = same >= SAME_SCORE * len(pairs)
        failed |= not agrees
        verdict = "agrees with kvpress" if agrees else "DIFFERS from kvpress"
        print(f"{method} {verdict}: {same} of {len(pairs)} items score the same")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
