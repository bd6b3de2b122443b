"""Where a chat template's own text (role headers, end-of-turn marks) lies among the tokens.

Half a marker is worse than none: "<|im_start|>" without its role, or "[/INST" without its
bracket, tells the model of a turn that does not exist (seen in practice: llama.cpp issue 15416). So
a marker's tokens are evicted together or not at all.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

#: Longer template text (a default system prompt, say) is prose, not a marker.
MAX_MARKER_BYTES = 96

_CONTENTS = ("KVPONE", "KVPTWO", "KVPTHREE")


class _Rendered(Exception):
    """Carries the prompt out of a chat handler, which would otherwise complete it."""

    def __init__(self, prompt: bytes) -> None:
        super().__init__()
        self.prompt = prompt


class _Renderer:
    """Stands in for a Llama, to catch the prompt of a chat handler. Most handlers tokenize it
    first; some (chatml-function-calling) complete it at once."""

    verbose = False

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        raise _Rendered(text)

    def create_completion(self, prompt: str, **_: Any) -> None:
        raise _Rendered(prompt.encode())


def template_markers(handler: Callable[..., Any]) -> list[bytes]:
    """The texts that a chat template puts between the contents of messages.

    Found by rendering short conversations of known words and cutting these out, so it works for any
    template, built in or from a GGUF file.

    Args:
        handler: a llama_cpp chat completion handler.

    Returns:
        Distinct markers, longest first; empty when the template cannot be rendered.
    """
    one, two, three = _CONTENTS
    turns = [
        {"role": "user", "content": one},
        {"role": "assistant", "content": two},
        {"role": "user", "content": three},
    ]
    with_system = [{"role": "system", "content": two}, {"role": "user", "content": one}]
    found: set[bytes] = set()
    for messages in (turns, with_system):
        try:
            handler(llama=_Renderer(), messages=messages)
        except _Rendered as rendered:
            text = rendered.prompt
        except Exception:  # a template may refuse system messages, or be no text template at all
            continue
        else:
            continue
        for word in _CONTENTS:
            text = text.replace(word.encode(), b"\0")
        for marker in text.split(b"\0"):
            if marker.strip() and len(marker) <= MAX_MARKER_BYTES:
                found.add(marker)
    return sorted(found, key=lambda m: (-len(m), m))


def _occurrences(text: bytes, markers: Sequence[bytes], beginnings: bool) -> list[tuple[int, int]]:
    """[start, end) byte spans of markers in ``text``, ascending, overlapping ones merged. With
    ``beginnings``, also the longest prefix of a marker at the end of the text."""
    found = []
    for marker in markers:
        at = text.find(marker)
        while at >= 0:
            found.append((at, at + len(marker)))
            at = text.find(marker, at + 1)
        for length in range(min(len(marker) - 1, len(text)), 0, -1) if beginnings else ():
            if text.endswith(marker[:length]):
                found.append((len(text) - length, len(text)))
                break
    merged: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def token_spans(pieces: Sequence[bytes], markers: Sequence[bytes]) -> list[tuple[int, int]]:
    """Token spans [start, end) of the markers in a run of tokens.

    Args:
        pieces: the text of each token, special tokens included.
        markers: what to look for.

    Returns:
        Spans of the tokens with any byte of a marker, or, at the end, of a possible prefix of one:
        ascending, not overlapping.
    """
    return _token_spans(pieces, _occurrences(b"".join(pieces), markers, beginnings=True))


def complete_markers(pieces: Sequence[bytes], markers: Sequence[bytes]) -> list[tuple[int, int]]:
    """``token_spans`` without what is only the first part of a marker."""
    return _token_spans(pieces, _occurrences(b"".join(pieces), markers, beginnings=False))


def _token_spans(pieces: Sequence[bytes], found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The tokens that hold the bytes of each [start, end) in ``found``."""
    if not found:
        return []
    ends = list(accumulate(map(len, pieces)))
    spans: list[tuple[int, int]] = []
    for start, end in found:
        first = bisect_right(ends, start)  # the token that holds byte `start`
        last = bisect_left(ends, end) + 1
        if spans and first < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        else:
            spans.append((first, last))
    return spans
