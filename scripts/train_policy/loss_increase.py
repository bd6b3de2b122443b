"""What evictions during a long text cost the tokens that follow, on held-out traces:

    python -m scripts.train_policy.loss_increase --traces build/policy/held-out-traces \\
        --policies build/foresight/kvp-....gguf,learned,snapkv,keydiff,recency,oracle,golden

Every policy reads the same texts (the tokens of the traces) with so few cells that it drops tokens
again and again; its loss on every token is compared with the full cache's. The first policy is
compared with each of the others, text by text.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kvp_edge.bundled import bundled_model
from kvp_edge.evaluation import statistics
from kvp_edge.evaluation.markdown import estimate
from kvp_edge.evaluation.oracle import Oracle
from kvp_edge.evaluation.readers import OWN
from kvp_edge.evaluation.records import GOLDEN, ORACLE
from kvp_edge.evaluation.statistics import Scores
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.traces.format import TraceSet
from kvp_edge.training.rollouts import Reading, Rollouts
from kvp_edge.training.settings import Settings


def increases(
    name: str,
    model: str,
    traces: TraceSet,
    chosen: list[int],
    full: dict[int, Reading],
    settings: Settings,
    threads: int,
) -> NDArray[np.float64]:
    """Mean loss increase of every text, in nats a token: f64 [n]."""
    known = name in (ORACLE, GOLDEN)
    policy = "recency" if known else (own_policy(model) or "") if name == OWN else name
    engine = {"n_threads": threads, "n_threads_batch": threads}
    longest = max(len(traces[i]) for i in chosen)
    rollouts = Rollouts(model, longest, settings, engine, policy)
    found = []
    try:
        for i in tqdm(chosen, desc=Path(name).stem, unit="text"):
            seer = Oracle(traces[i], peak=name == GOLDEN) if known else None
            losses = rollouts.read(traces[i].tokens.tolist(), seer)
            found.append(float((losses - full[i].losses).mean()))
    finally:
        rollouts.close()
    return np.array(found)


def table(found: dict[str, NDArray[np.float64]], full: float) -> str:
    """Markdown: every policy's increase, and the first policy against it."""
    scores: dict[str, Scores] = {
        name: {"texts": {(0, i): float(x) for i, x in enumerate(values)}}
        for name, values in found.items()
    }
    first = next(iter(found))
    lines = [
        f"| policy | loss increase, nats a token | loss, full cache = 1 | {Path(first).stem} minus "
        "this |",
        "|---|---|---|---|",
    ]
    for name in found:
        rise = statistics.mean(scores[name])
        against = (
            "" if name == first else _words(statistics.difference(scores[first], scores[name]))
        )
        lines.append(
            f"| {Path(name).stem} | {_words(rise)} | {1 + rise.value / full:.3f} | {against} |"
        )
    return "\n".join(lines)


def _words(found: statistics.Estimate) -> str:
    return estimate(found, 1, "{:+.4f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_policy.loss_increase", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--traces", type=Path, default=Path("build/policy/held-out-traces"))
    parser.add_argument("--model", help="the GGUF file (default: the bundled model)")
    parser.add_argument("--policies", default="learned,snapkv,keydiff,recency,oracle,golden")
    parser.add_argument("--budget", type=int, default=96, help="tokens kept (default: 96)")
    parser.add_argument("--every", type=int, default=32, help="tokens between evictions (32)")
    parser.add_argument("--texts", type=int, default=60, help="most texts (default: 60)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    chosen = parser.parse_args(arguments)

    model = chosen.model or bundled_model()
    settings = Settings(objective="foresight", budget=chosen.budget, every=chosen.every)
    traces = TraceSet(chosen.traces, model=model)
    long = [i for i in range(len(traces)) if len(traces[i]) > 4 * chosen.budget][: chosen.texts]
    if not long:
        parser.error(f"no text has more than {4 * chosen.budget} tokens: lower --budget")
    engine = {"n_threads": chosen.threads, "n_threads_batch": chosen.threads}
    reader = Rollouts(model, max(len(traces[i]) for i in long), settings, engine)
    full = {i: reader.full(traces[i].tokens.tolist()) for i in tqdm(long, desc="full cache")}
    reader.close()
    found = {
        name: increases(name, model, traces, long, full, settings, chosen.threads)
        for name in chosen.policies.split(",")
    }
    mean = float(np.mean([reading.losses.mean() for reading in full.values()]))
    if chosen.out:
        chosen.out.write_text(json.dumps({k: v.tolist() for k, v in found.items()}, indent=1))
    print(f"{len(long)} texts, full cache {mean:.3f} nats a token\n\n{table(found, mean)}")


if __name__ == "__main__":
    main()
