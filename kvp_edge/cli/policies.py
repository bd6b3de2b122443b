"""``kvp-edge policies``: what --policy can be."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from kvp_edge.cli.commands import Command
from kvp_edge.policies import FALLBACK, POLICIES


@dataclass(frozen=True)
class Options:
    """It has none."""


def _main(_: Options) -> int:
    print(f"{'auto':19} The policy trained for the model (kvp-*.gguf beside it), else {FALLBACK}.")
    for name, policy in POLICIES.items():
        module = inspect.getmodule(policy)
        about = (inspect.getdoc(module) or "").partition("\n")[0]
        print(f"{name:19} {about}")
    print(f"{'FILE':19} A policy file: what kvp-edge train and export made (.gguf, .onnx).")
    return 0


COMMAND = Command(_main, Options, "List the policies, one line each.")
