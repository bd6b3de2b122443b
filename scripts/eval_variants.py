"""``kvp-edge eval`` with policies whose parameters are not the defaults.

python -m scripts.eval_variants 'gkv(balance=1.0)' 'lazy-eviction(threshold=0.01)' -- \\
    --tasks continuation --policies 'gkv,gkv(balance=1.0),lazy-eviction(threshold=0.01)'

A variant is named as it is written (no commas: one parameter each), and --policies says which are
compared. With one worker only: other processes do not know of variants.
"""

from __future__ import annotations

import ast
import re
import sys

from kvp_edge.cli import main as command_line
from kvp_edge.policies import POLICIES, Policy


def variant(text: str) -> type[Policy]:
    """The policy named so, with another default: NAME(PARAMETER=VALUE).

    Raises:
        ValueError: it is not of that form, there is no such policy, or the value is not possible.
        TypeError: there is no such parameter.
    """
    found = re.fullmatch(r"([a-z0-9-]+)\((\w+)=([^,()]+)\)", text)
    if found is None or found[1] not in POLICIES:
        raise ValueError(f"'{text}' is not NAME(PARAMETER=VALUE) of a policy")
    policy, value = POLICIES[found[1]], ast.literal_eval(found[3])
    policy(**{found[2]: value})  # or a sentence about it

    class Variant(policy):  # type: ignore[misc, valid-type]
        name = text

        def __init__(self) -> None:
            super().__init__(**{found[2]: value})

    return Variant


def main(argv: list[str]) -> int:
    at = argv.index("--") if "--" in argv else 0
    if not argv[:at]:
        print(__doc__, file=sys.stderr)
        return 2
    for text in argv[:at]:
        POLICIES[text] = variant(text)
    return command_line(["eval", *argv[at + 1 :]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
