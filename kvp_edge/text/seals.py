"""Seals: what keeps a text from being taken for a special token.

A *seal* stands behind the first character of everything in a text that spells a guarded token, or
its beginning at the text's end: another text may follow. Chat templates carry seals along like any
other text. When a chat is rendered they are taken out, and tell where no guarded token begins.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import accumulate
from typing import Any

#: Characters of a token's text that are compared: with more of them patterns nest too deeply. Fewer
#: tell that a chat may need seals; some models have thousands of special tokens.
_COMPARED, _COMPARED_FIRST = 64, 6

_JSON = json.JSONEncoder(ensure_ascii=False, check_circular=False)


def new_seal() -> str:
    """Digits that nobody guesses. Templates do not change them: they have no case, and there is
    nothing to escape or to trim."""
    return "".join(secrets.choice("0123456789") for _ in range(32))


class Seals:
    """Seals what messages hold.

    Args:
        guarded: texts of tokens that nobody may spell.
        in_replies: those of them that the assistant may not spell either.
        seal: see ``new_seal``.
    """

    def __init__(self, guarded: Iterable[bytes], in_replies: Iterable[bytes], seal: str) -> None:
        self._guarded, self._guarded_in_replies = _texts(guarded), _texts(in_replies)
        first = {text[:_COMPARED_FIRST] for text in self._guarded}
        self._in_json = _beginnings(first, '"', lambda char: _JSON.encode(char)[1:-1])
        self._seal = seal

    @cached_property
    def _by_anybody(self) -> re.Pattern[str]:
        return _beginnings(self._guarded, r"\Z", str)

    @cached_property
    def _by_assistant(self) -> re.Pattern[str]:
        if self._guarded_in_replies == self._guarded:
            return self._by_anybody
        return _beginnings(self._guarded_in_replies, r"\Z", str)

    def on(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a chat handler or formatter, with seals in all that lists, tuples and
        dictionaries hold. Other objects are not looked into; nothing that was given is changed."""
        if not self._may_be_needed(arguments):
            return arguments
        return {
            name: self._on_messages(value)
            if name == "messages" and isinstance(value, (list, tuple))
            else self._on(value, self._by_anybody)
            for name, value in arguments.items()
        }

    def _may_be_needed(self, arguments: dict[str, Any]) -> bool:
        """Without a step for each message: a chat is long."""
        try:
            text = _JSON.encode(arguments)
        except (TypeError, ValueError):  # JSON cannot hold it
            return True
        return self._in_json.search(text) is not None

    def _on_messages(self, messages: Iterable[Any]) -> list[Any]:
        return [
            self._on(
                message,
                self._by_assistant
                if isinstance(message, dict) and message.get("role") == "assistant"
                else self._by_anybody,
            )
            for message in messages
        ]

    def _on(self, value: Any, beginning: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return beginning.sub(r"\g<0>" + self._seal, value)
        if isinstance(value, (list, tuple)):
            return [self._on(item, beginning) for item in value]
        if isinstance(value, dict):
            return {
                self._on_name(key, beginning): self._on_name(item, beginning)
                if key in ("role", "type")
                else self._on(item, beginning)
                for key, item in value.items()
            }
        return value

    def _on_name(self, name: Any, beginning: re.Pattern[str]) -> Any:
        """Templates ask for fields by their names, and compare roles and types."""
        if isinstance(name, str) and name.isidentifier():
            return name
        return self._on(name, beginning)


def unsealed(text: bytes, seal: bytes) -> tuple[bytes, set[int]]:
    """A text without its seals, and the bytes in it at which no guarded token begins."""
    *parts, last = text.split(seal)
    plain, closed = b"".join((*parts, last)), set()
    for end in accumulate(map(len, parts)):
        at = end - 1
        while at > 0 and plain[at] & 0xC0 == 0x80:  # not the first byte of a character
            at -= 1
        closed.add(at)
    return plain, closed


def _texts(texts: Iterable[bytes]) -> list[str]:
    """Those that a str can hold."""
    found = []
    for text in texts:
        try:
            found.append(text.decode()[:_COMPARED])
        except UnicodeDecodeError:  # so no message holds it
            continue
    return found


def _beginnings(texts: Iterable[str], end: str, escape: Callable[[str], str]) -> re.Pattern[str]:
    """A pattern of the first characters of ``texts``, wherever one of them stands, or the beginning
    of one before ``end``.

    Args:
        end: a pattern.
        escape: how a character is written where the pattern is searched for.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}  # a whole text

    def of(node: dict[str, Any]) -> str:
        if "" in node:
            return ""
        ways = [re.escape(escape(char)) + of(then) for char, then in node.items()]
        return f"(?:{'|'.join([*ways, end])})"

    ways = [f"{re.escape(escape(char))}(?={of(then)})" for char, then in tree.items()]
    return re.compile("|".join(ways) or r"(?!)")
