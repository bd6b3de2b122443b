"""``kvp-edge policies``: what --policy can be."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from kvp_edge.policies import FALLBACK, POLICIES


def add_policies(commands: Any) -> None:
    parser = commands.add_parser("policies", help="list the policies, one line each")
    parser.set_defaults(command=_main, verbose=False)


def _main(args: argparse.Namespace) -> int:
    print(f"{'auto':19} The policy trained for the model (kvp-*.gguf beside it), else {FALLBACK}.")
    for name, policy in POLICIES.items():
        module = inspect.getmodule(policy)
        about = (inspect.getdoc(module) or "").partition("\n")[0]
        print(f"{name:19} {about}")
    print(f"{'FILE':19} A policy file: what kvp-edge train and export made (.gguf, .onnx).")
    return 0
