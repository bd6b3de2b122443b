"""Messages that are written for Python's arguments, in words of the command line.

``kv_budget=5 must be larger ... lower recent`` becomes ``--kv-budget 5 must be larger ... lower
--recent``. A name of several words is an argument wherever it stands; one that is a word of English
only where a message speaks of arguments.
"""

from __future__ import annotations

import re

from kvp_edge.cli.parameters import names_of

#: Arguments of ``kvp_edge.Llama`` whose options have other names.
_OTHERS = {
    "n_threads": "--threads",
    "n_threads_batch": "--threads",
    "n_gpu_layers": "--gpu-layers",
    "protect_system": "--no-protect-system",
}


def as_options(message: str, options: type) -> str:
    """The message with the options of a command in place of arguments.

    Args:
        options: the command's dataclass.
    """
    names = {**_OTHERS, **names_of(options)}
    name = "|".join(names)
    long = "|".join(one for one in names if "_" in one)

    def optioned(found: re.Match[str]) -> str:
        return re.sub(rf"\b({name})\b", lambda one: names[one[0]], found[0])

    def told(found: re.Match[str]) -> str:
        if found["given"]:
            said = found["text"] or found["value"]
            option = names[found["given"]]
            return option if said in ("True", "False") else f"{option} {said}"
        return found[0] if found[0].startswith("'") else optioned(found)

    message = re.sub(
        rf"^((({name}), )*({name}) and )?({name})(?= (must|is|are|needs?|belongs|\())",
        optioned,
        message,
    )
    return re.sub(
        r"(?<![\w=])'[^'\n]*'"  # what somebody typed, or a file has
        rf"|(?<![\w./-])(?P<given>{name})=('(?P<text>[^']*)'|(?P<value>[^\s,;:)]+))"
        rf"|(?<=[Rr]aise |[Ll]ower )({name})( or ({name}))*\b(?!=)"
        rf"|(?<![\w./-])({long})(?![\w/-]|\.\w)",
        told,
        message,
    )
