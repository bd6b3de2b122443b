"""``kvp-edge policies``: what --policy can be."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from kvp_edge.policies import POLICIES


def add_policies(commands: Any) -> None:
    parser = commands.add_parser("policies", help="list the policies, one line each")
    parser.set_defaults(command=_main, verbose=False)


def _main(args: argparse.Namespace) -> int:
    for name, policy in POLICIES.items():
        module = inspect.getmodule(policy)
        about = (inspect.getdoc(module) or "").partition("\n")[0]
        print(f"{name:10} {about}")
    return 0
