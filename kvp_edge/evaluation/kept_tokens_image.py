"""The picture of which tokens each head kept: a map of all heads, and a passage of the text."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kvp_edge.evaluation.kept_tokens import KeptTokens
from kvp_edge.evaluation.plots import load_matplotlib

_DROPPED, _KEPT, _PROTECTED = "#ffffff", "#2f78b5", "#e69f00"
_PIXELS = 1200  # across the map, about
_COLUMNS = 110  # characters in a line of text
_FONT, _LINE = 9, 0.2  # points; inches from line to line
_CHARACTER = _FONT * 0.602 / 72  # inches: how wide DejaVu Sans Mono is


def write_png(
    shown: KeptTokens,
    path: str | os.PathLike[str],
    *,
    passage: tuple[int, int] | None = None,
    passage_tokens: int = 250,
) -> None:
    """Above, a row for every head and a column for every token: kept, protected or dropped. Below,
    a passage of the text; the darker a token's background, the more heads kept it.

    Args:
        shown: tokens, and who kept them.
        path: PNG.
        passage: first token, and the one behind the last. Default: where ``passage_tokens`` tokens
            differ most in how many heads kept them, protected ones aside.

    Raises:
        ValueError: the passage has no tokens.
        ImportError: there is no matplotlib.
    """
    n_layer, n_head_kv, n = shown.kept.shape
    start, stop = passage or _liveliest(shown, passage_tokens)
    if not 0 <= start < stop <= n:
        raise ValueError(f"tokens {start} to {stop} are no passage of a text of {n} tokens")
    lines = _lines(shown, start, stop)
    matplotlib, pyplot = load_matplotlib()

    n_heads = n_layer * n_head_kv
    width = _COLUMNS * _CHARACTER + 1.5
    map_height = float(np.clip(0.16 * n_heads, 0.8, 6))
    text_height = _LINE * (len(lines) + 1)
    gap, top = 0.85, 0.7
    height = top + map_height + gap + text_height + 0.2
    figure = pyplot.figure(figsize=(width, height))

    def area(bottom: float, tall: float) -> Any:
        inside = (width - 1.5) / width
        return figure.add_axes((1.0 / width, bottom / height, inside, tall / height))

    _draw_map(area(height - top - map_height, map_height), shown, start, stop, matplotlib)
    _draw_text(area(0.2, text_height), shown, lines, start, stop, matplotlib)
    figure.text(
        1.0 / width, 1 - 0.28 / height, shown.title, fontsize=12, weight="bold", parse_math=False
    )
    figure.text(1.0 / width, 1 - 0.5 / height, shown.about(), fontsize=_FONT, parse_math=False)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _liveliest(shown: KeptTokens, count: int) -> tuple[int, int]:
    """The ``count`` neighbouring tokens whose shares of heads vary most: a passage that all heads
    keep or drop shows nothing."""
    share = np.where(shown.protected, shown.share.mean(), shown.share)
    count = min(count, len(share))
    sums, squares = (np.concatenate([[0.0], np.cumsum(share**k)]) for k in (1, 2))
    means = (sums[count:] - sums[:-count]) / count
    variances = (squares[count:] - squares[:-count]) / count - means**2
    start = int(np.argmax(variances))
    return start, start + count


def _draw_map(axes: Any, shown: KeptTokens, start: int, stop: int, matplotlib: Any) -> None:
    n_layer, n_head_kv, n = shown.kept.shape
    palette = np.array([matplotlib.colors.to_rgb(c) for c in (_DROPPED, _KEPT, _PROTECTED)])
    image = palette[np.where(shown.kept & shown.protected, 2, shown.kept).reshape(-1, n)]
    # If tokens are narrower than pixels, a pixel shows the mean colour of its tokens.
    borders = np.linspace(0, n, min(n, _PIXELS) + 1).astype(int)
    image = np.add.reduceat(image, borders[:-1], axis=1) / np.diff(borders)[:, None]
    axes.imshow(
        image, aspect="auto", interpolation="nearest", extent=(0, n, n_layer * n_head_kv, 0)
    )
    for layer in range(1, n_layer):
        axes.axhline(layer * n_head_kv, color="#888888", linewidth=0.6)
    axes.set_yticks(
        [(layer + 0.5) * n_head_kv for layer in range(n_layer)],
        [f"layer {layer}" for layer in range(n_layer)],
        fontsize=min(8, 0.16 * 72 * n_head_kv),
    )
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(
        "token (rows: KV heads; the frame is the passage below)", fontsize=8, loc="left"
    )
    axes.add_patch(
        matplotlib.patches.Rectangle(
            (start, 0),
            stop - start,
            n_layer * n_head_kv,
            fill=False,
            edgecolor="#d55e00",
            linewidth=1.5,
            clip_on=False,
        )
    )
    handles = [
        matplotlib.patches.Patch(facecolor=colour, edgecolor="#888888", label=label)
        for colour, label in ((_KEPT, "kept"), (_PROTECTED, "protected"), (_DROPPED, "dropped"))
    ]
    axes.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1, -0.28 / axes.get_window_extent().height * axes.figure.dpi),
        ncols=3,
        fontsize=8,
        frameon=False,
        borderaxespad=0,
    )


def _lines(shown: KeptTokens, start: int, stop: int) -> list[list[tuple[int, int, str]]]:
    """The passage as lines of (token, column, text). A line ends where the text's does, or when it
    is full; tokens longer than what is left of it begin the next."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for i in range(start, stop):
        text = shown.texts[i].replace("\t", "⇥") or "▯"
        for part in text.splitlines(keepends=True):
            ends = part.rstrip("\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029") != part
            piece = "".join(c if c.isprintable() else "·" for c in part.splitlines()[0])
            piece += "↵" if ends else ""
            if column and column + len(piece) > _COLUMNS:
                lines.append([])
                column = 0
            for at in range(0, len(piece), _COLUMNS):
                if at:
                    lines.append([])
                    column = 0
                lines[-1].append((i, column, piece[at : at + _COLUMNS]))
                column += len(piece[at : at + _COLUMNS])
            if ends:
                lines.append([])
                column = 0
    return lines if lines[-1] else lines[:-1]


def _draw_text(
    axes: Any,
    shown: KeptTokens,
    lines: list[list[tuple[int, int, str]]],
    start: int,
    stop: int,
    matplotlib: Any,
) -> None:
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(len(lines) + 1, 0)
    axes.set_axis_off()
    axes.text(
        0,
        0.5,
        f"Tokens {start} to {stop - 1}: the darker, the more of the heads kept a token; "
        "underlined: protected",
        fontsize=8,
        va="center",
    )
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("share", [_DROPPED, "#0f5a96"])
    shares = shown.share
    for row, line in enumerate(lines, 1):
        for i, column, text in line:
            share = shares[i]
            axes.add_patch(
                matplotlib.patches.Rectangle(
                    (column, row + 0.06), len(text), 0.88, color=shades(share), linewidth=0
                )
            )
            if shown.protected[i]:
                axes.plot(
                    (column, column + len(text)),
                    (row + 0.97, row + 0.97),
                    color=_PROTECTED,
                    linewidth=1.5,
                )
            axes.text(
                column,
                row + 0.5,
                text,
                family="DejaVu Sans Mono",
                fontsize=_FONT,
                va="center_baseline",
                color="#a3a3a3" if share == 0 else "#ffffff" if share > 0.6 else "#000000",
                parse_math=False,
            )
