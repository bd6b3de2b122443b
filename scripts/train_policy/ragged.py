"""What it costs that llama.cpp's heads must keep equal numbers of tokens, in a PyTorch twin:

    python -m scripts.train_policy.ragged --traces build/policy/held-out-traces
    python -m scripts.train_policy.ragged --model model.gguf --traces DIR --by snapkv,oracle

Each text is read up to its questions, or to its future, tokens are dropped once, and the loss of
the rest is compared with the full cache's: with the same number of tokens in every head, as
llama.cpp can do; and, as it cannot, with a budget for each layer (Ada-KV), and with one that goes
to the best tokens of all heads together (the threshold of KVzip, DBTrimKV).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from kvp_edge.bundled import bundled_model
from kvp_edge.evaluation import statistics
from kvp_edge.evaluation.markdown import signed_nats
from kvp_edge.evaluation.statistics import Scores
from kvp_edge.policies import ArrayView, Learned
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.traces.format import Trace, TraceSet
from kvp_edge.training.attention_baselines import ATTENTION_BASELINES
from kvp_edge.training.simulator import (
    equal_counts,
    layer_counts,
    ragged_counts,
    simulated_loss,
)
from kvp_edge.training.twin import Twin

COUNTS = {"equal": equal_counts, "layer": layer_counts, "ragged": ragged_counts}
SCORERS = ("policy", "oracle", *ATTENTION_BASELINES)


def worths(who: str, policy: Learned, trace: Trace, n: int) -> NDArray[np.float32]:
    """What one of ``SCORERS`` says of the first n tokens: f32 [L, H, n]."""
    if who == "oracle":
        return trace.importance(n)
    if who != "policy":
        return ATTENTION_BASELINES[who](trace, n).reshape(*trace.keys.shape[:2], n)
    keys = trace.keys[:, :, :n].astype(np.float32)
    values = trace.values[:, :, :n].astype(np.float32)
    indices = trace.indices[:n]
    scores = policy.score(ArrayView(keys, values, indices))
    return policy.worth(scores, n - indices)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_policy.ragged", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--traces", type=Path, default=Path("build/policy/held-out-traces"))
    parser.add_argument("--model", help="the GGUF file (default: the bundled model)")
    parser.add_argument("--policy", help="a file of objective global (default: the model's own)")
    parser.add_argument("--by", default="policy,oracle",
                        help=f"who ranks tokens, of {', '.join(SCORERS)}; "
                        "default: policy,oracle")  # fmt: skip
    parser.add_argument("--texts", type=int, default=24, help="most texts (default: 24)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    chosen = parser.parse_args(arguments)
    by = chosen.by.split(",")
    if unknown := set(by) - set(SCORERS):
        parser.error(f"--by knows no {', '.join(sorted(unknown))}: choose of {', '.join(SCORERS)}")

    torch.set_num_threads(chosen.threads)
    model = chosen.model or bundled_model()
    policy = Learned(chosen.policy or own_policy(model) or parser.error("name a --policy"))
    if "policy" in by and policy.info.objective != "global":
        parser.error(f"'{policy.path}' is of objective {policy.info.objective}: its heads' scores "
                     "cannot be compared with each other")  # fmt: skip
    traces, twin = TraceSet(chosen.traces, model=model), Twin.load(model)
    texts = [i for i in range(len(traces)) if 256 <= traces[i].n_prompt < len(traces[i]) - 1]
    rises: dict[tuple[str, int, str], dict[tuple[int, int], float]] = {}
    for i in tqdm(texts[: chosen.texts], unit="text"):
        trace = traces[i]
        n, tokens = trace.n_prompt, trace.tokens.tolist()
        everything = np.ones((*trace.keys.shape[:2], n), np.bool_)
        full = simulated_loss(twin, tokens, n, everything)
        at = np.arange(n)
        protected = (at < policy.info.sinks) | (at >= n - policy.info.recent)
        for who in by:
            worth = worths(who, policy, trace, n)
            for part in (4, 8):
                for name, choose in COUNTS.items():
                    keep = choose(worth, protected, n // part)
                    rise = simulated_loss(twin, tokens, n, keep) - full
                    rises.setdefault((who, part, name), {})[0, i] = rise
    print("| kept | by | equal counts: loss increase | by layer | minus equal "
          "| of all heads together | minus equal |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for who in by:
        for part in (4, 8):
            equal, layer, ragged = ({"texts": rises[who, part, name]} for name in COUNTS)
            cells = [f"1/{part}", who, _mean(equal)]
            for counts in (layer, ragged):
                cells += [_mean(counts), signed_nats(statistics.difference(counts, equal))]
            print(f"| {' | '.join(cells)} |")


def _mean(scores: Scores) -> str:
    return signed_nats(statistics.mean(scores))


if __name__ == "__main__":
    main()
