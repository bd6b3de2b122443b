"""Sentences of the package name Python's arguments; whoever typed a command gave options."""

from __future__ import annotations

import argparse
import re

#: Arguments whose names are no ordinary words: they mean the argument wherever they stand.
_ARGUMENTS = (
    *("kv_budget", "n_ctx", "keep_whole", "isolate_turns"),
    *("type_k", "type_v", "flash_attn", "chat_format"),
)
#: Those that mean it where a value follows, or in "raise X or Y".
_WORDS = ("sinks", "recent", "reserve", "policy", "granularity", "positions", "pack", "repack")


def with_options(sentence: str, args: argparse.Namespace) -> str:
    """The sentence with the options that the command has in place of arguments of their names:
    "--reserve 20" for "reserve=20"."""
    for name in (*_ARGUMENTS, *_WORDS):
        if name not in args:
            continue
        option = "--" + name.replace("_", "-")
        sentence = re.sub(rf"\b{name}=('?)([\w.+-]*\w)\1", rf"{option} \2", sentence)
        before = r"\b" if name in _ARGUMENTS else r"(?i:(?<=raise )|(?<=lower )|(?<=or ))"
        sentence = re.sub(rf"(?<!-){before}{name}\b(?!=)", option, sentence)
    return sentence
