"""Public-domain novels: read, clean, split into training and held-out books.

Source of the text used for the published model: the 100 English Novels corpus
(https://github.com/computationalstylistics/100_english_novels), plain text, public domain.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from kvp_edge.corpora import EVALUATION_BOOKS


@dataclass(frozen=True)
class Library:
    """Cleaned texts by title, in alphabetical order."""

    train: dict[str, str]
    held_out: dict[str, str]


def clean(raw: str) -> str:
    """Plain ASCII prose with one paragraph per line.

    Hard line breaks inside paragraphs are joined, typographic quotes and dashes become ASCII and
    accents are dropped: a small vocabulary should not be spent on spellings of the same character.
    """
    text = raw.translate(
        str.maketrans(
            {
                "\u2018": "'",
                "\u2019": "'",
                "\u201c": '"',
                "\u201d": '"',
                "\u2014": " - ",
                "\u2013": "-",
                "\u00a0": " ",
                "_": "",
                "*": "",
            }
        )
    )
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    text = text.replace("--", " - ").replace("\r\n", "\n").replace("\x0c", "\n\n")
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    # Headings ("CHAPTER IV") and page numbers are not sentences.
    return "\n".join(part for part in paragraphs if len(part) > 30 or part[-1:] in '.!?"')


def read_library(folder: Path, max_books: int | None = None) -> Library:
    """Read every `*.txt` of `folder`; `max_books` keeps that many training books (smoke runs).

    Held out, and never read during training, are the books for evaluation (kvp_edge/corpora.py):
    perplexity is measured on stories whose names and places the model has not met.
    """
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(
            f"No *.txt books in '{folder}'. Copy the novels there (see docs/bundled-model.md) "
            "or name their folder with --books."
        )
    texts: dict[str, dict[str, str]] = {"train": {}, "held_out": {}}
    for file in files:
        part = "held_out" if file.stem in EVALUATION_BOOKS else "train"
        if part == "train" and max_books is not None and len(texts["train"]) >= max_books:
            continue
        texts[part][file.stem] = clean(file.read_text(encoding="utf-8", errors="ignore"))
    if not texts["held_out"]:
        # Any other collection: keep one book in ten, at least one, out of training.
        for title in list(texts["train"])[::10]:
            texts["held_out"][title] = texts["train"].pop(title)
    if not texts["train"]:
        raise SystemExit(f"'{folder}' holds only held-out books. Add books to train on.")
    return Library(**texts)
