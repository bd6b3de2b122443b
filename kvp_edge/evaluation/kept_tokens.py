"""Shows over the text which tokens each head kept: an HTML page, or a picture.

The page (HTML) needs nothing but a browser: no other files, nothing from the network. It shows the
text once; a selector colours it by the share of heads that kept a token, or by one head's choice.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from kvp_edge.arrays import BoolArray
from kvp_edge.files import write_whole

_LEVELS = 10  # shades, besides white for what no head kept


@dataclass(frozen=True)
class KeptTokens:
    """The contents of a page or picture, with n tokens.

    Attributes:
        texts: the text of each token; "" for special tokens.
        kept: bool [n_layer, n_head_kv, n].
        protected: bool [n], tokens that no head could drop.
        title: of the page or picture.
        scores: [n_layer, n_head_kv, n], the policy's scores; larger means keep. None: not shown.

    Raises:
        ValueError: no tokens, or shapes that do not fit together.
    """

    texts: Sequence[str]
    kept: BoolArray
    protected: BoolArray
    title: str = "Kept tokens"
    scores: npt.NDArray[np.floating[Any]] | None = None

    def __post_init__(self) -> None:
        n = len(self.texts)
        if n == 0:
            raise ValueError("there are no tokens to show")
        if self.kept.ndim != 3 or self.kept.shape[2] != n or self.kept.size == 0:
            raise ValueError(
                f"'kept' must be [n_layer, n_head_kv, {n}] for {n} tokens, not "
                f"{list(self.kept.shape)}"
            )
        if self.protected.shape != (n,):
            raise ValueError(
                f"'protected' must be [{n}] for {n} tokens, not {list(self.protected.shape)}"
            )
        if self.scores is not None and self.scores.shape != self.kept.shape:
            raise ValueError(
                f"'scores' must be {list(self.kept.shape)} like 'kept', not "
                f"{list(self.scores.shape)}"
            )

    @property
    def share(self) -> npt.NDArray[np.float64]:
        """The share of heads that kept each token: f64 [n]."""
        share: npt.NDArray[np.float64] = self.kept.mean((0, 1), dtype=np.float64)
        return share

    def levels(self) -> npt.NDArray[np.int64]:
        """The share as a shade, int64 [n]: 0 only for no head, 10 only for all."""
        some = np.clip(np.rint(self.share * _LEVELS), 1, _LEVELS - 1).astype(np.int64)
        return np.where(self.share == 0, 0, np.where(self.share == 1, _LEVELS, some))

    def about(self) -> str:
        """The numbers in a sentence."""
        n_layer, n_head_kv, n = self.kept.shape
        nobody, everybody = int((self.share == 0).sum()), int((self.share == 1).sum())
        return (
            f"{n_layer} x {n_head_kv} heads keep {self.kept.mean():.1%} of {n} tokens on average; "
            f"{everybody} are kept by all heads, {nobody} by none."
        )


def html_page(shown: KeptTokens) -> str:
    """The page. It takes about 60 bytes per token, and one bit per token and head (nine with
    scores)."""
    n_layer, n_head_kv, n = shown.kept.shape
    packed = np.packbits(shown.kept.astype(bool).reshape(-1, n), axis=1)
    data = {
        "n": n,
        "layers": n_layer,
        "heads": n_head_kv,
        "stride": packed.shape[1],
        "kept": _base64(packed),
        "ranks": None if shown.scores is None else _base64(_ranks(shown.scores)),
    }
    return _template().render(
        title=_storable(shown.title),
        about=shown.about(),
        n_layer=n_layer,
        n_head_kv=n_head_kv,
        tokens=zip(map(_storable, shown.texts), shown.levels(), shown.protected, strict=True),
        data=data,
    )


def write_html(shown: KeptTokens, path: str | os.PathLike[str]) -> None:
    """Write the page to a file."""
    write_whole(path, html_page(shown).encode())


def _marked(text: str) -> Markup:
    """A token as HTML. The style sheet adds the marks for white space, so that copied text is the
    original."""
    marks = {"\n": Markup("<i></i>\n"), "\t": Markup('<i class="tab"></i>\t')}
    return Markup("").join(marks.get(part, part) for part in re.split(r"([\n\t])", text))


def _storable(text: str) -> str:
    """Replaces control characters, which HTML cannot contain, by their symbols, and half
    characters."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    # tokens may end within a character
    return text.translate(pictures).encode("utf-8", "replace").decode("utf-8")


def _ranks(scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """For each score, the percentage of its head's scores below it: uint8, same shape. NaN is below
    all, as in an eviction."""
    n = scores.shape[-1]
    rows = np.nan_to_num(scores.reshape(-1, n).astype(np.float64), nan=-np.inf)
    below = np.stack([np.searchsorted(np.sort(row), row) for row in rows])
    ranks: npt.NDArray[np.uint8] = np.rint(100 * below / max(1, n - 1)).astype(np.uint8)
    return ranks.reshape(scores.shape)


def _template() -> jinja2.Template:
    source = Path(__file__).with_name("kept_tokens.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["marked"] = _marked
    return environment.from_string(source)


def _base64(array: npt.NDArray[np.uint8]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
