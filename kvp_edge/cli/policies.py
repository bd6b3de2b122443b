"""``kvp-edge policies``: what --policy can be."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from kvp_edge.cli.shown import say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.tables import named
from kvp_edge.policies import FALLBACK, POLICIES


@dataclass(frozen=True)
class Options:
    """It has none."""


def _main(_: Options) -> int:
    about = {"auto": f"The policy trained for the model (beside it, or shipped), or {FALLBACK}."}
    for name, policy in POLICIES.items():
        about[name] = (inspect.getdoc(inspect.getmodule(policy)) or "").partition("\n")[0]
    about["FILE"] = "A policy file written by kvp-edge export (.gguf, .onnx)."
    for name, text in about.items():
        say(named(name, text, 20))
    return 0


COMMAND = Command(_main, Options, "List the policies, one line each.")
