"""Write README's table of options anew, from kvp_edge.cache.options.

python scripts/options_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from kvp_edge.cache.options import OPTIONS, Option

ROOT = Path(__file__).resolve().parent.parent


BEGIN, END = "<!-- scripts/options_table.py writes this table -->", "<!-- end of the table -->"


def row(option: Option) -> str:
    text = option.help
    for choice in option.choices:
        text = re.sub(rf"(?<![\w`]){choice}(?=:)", f"`{choice}`", text)
    default = option.means or f"`{option.default}`"
    return f"| `{option.name}` | {text} | {default} |"


def table() -> str:
    rows = [row(option) for option in OPTIONS.values()]
    return "\n".join(["| argument | meaning | default |", "|---|---|---|", *rows])


def renewed(readme: str) -> str:
    """The text with the table as it should be."""
    before, _, rest = readme.partition(BEGIN)
    old, _, after = rest.partition(END)
    if not (old and after):
        raise ValueError(f"README.md lacks the lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
