"""``kvp-edge inspect``: what a policy file is, for a person."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from kvp_edge.cli.parameters import argument
from kvp_edge.cli.shown import say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.tables import named
from kvp_edge.policy_file import PolicyInfo, PolicyWeights, read_policy
from kvp_edge.sensitive_heads import by_layer, in_words


@dataclass(frozen=True, kw_only=True)
class Options:
    file: str = argument(..., metavar="FILE", help="policy file")


def _main(args: Options) -> int:
    info, weights = read_policy(args.file)
    for name, value in _facts(args.file, info, weights):
        say(named(name, value, 16))
    return 0


def _facts(path: str, info: PolicyInfo, weights: PolicyWeights) -> list[tuple[str, str]]:
    numbers = sum(array.size for array in weights.arrays().values())
    networks = info.n_layer * info.n_networks
    whose, what = "KV head,", "key, value and position"
    if info.scope == "layer":
        whose, what = "layer, for all of its KV heads,", "keys, values and position"
    sight = (
        "each token is scored by itself"
        if info.context == 1
        else f"a score depends on {info.context // 2} tokens before and after its own"
    )
    share = weights.aggregate / max(float(weights.aggregate.sum()), 1e-12)
    layer, head = np.unravel_index(int(share.argmax()), share.shape)
    sensitive = [("sensitive heads", "not said")]
    if weights.sensitivity is not None:
        sensitive = [
            ("sensitive heads", in_words(weights.sensitivity)),
            ("mean by layer", by_layer(weights.sensitivity)),
        ]
    return [
        ("name", info.name),
        ("for the model", f"{info.base_model or 'unknown'} (architecture {info.architecture})"),
        ("fingerprint", info.fingerprint or "none"),
        ("identity", info.model_identity or "none: found only beside the very file it is for"),
        (
            "its cache",
            f"{info.n_layer} layers x {info.n_head_kv} KV heads, keys of {info.head_size_k} "
            f"numbers, values of {info.head_size_v}",
        ),
        ("objective", info.objective),
        (
            "scorer",
            f"{networks} networks, one per {whose} of {info.hidden} + {info.hidden} hidden units "
            f"on {what}",
        ),
        ("context width", f"{info.context}: {sight}"),
        (
            "whole tokens",
            f"sum of the heads' scores; heaviest is head {head} of layer {layer}",
        ),
        *sensitive,
        ("trained with", f"{info.sinks} sinks and {info.recent} recent tokens protected"),
        ("cache types", info.kv_type or "not said: --kv-type auto follows its table"),
        ("training data", info.training_data or "not said"),
        ("licence", info.license or "not said"),
        ("size", f"{numbers} weights, {os.path.getsize(path) / 1024:.0f} KiB"),
    ]


COMMAND = Command(
    _main,
    Options,
    "Show what a policy file (.gguf) was trained for, and how it scores.",
)
