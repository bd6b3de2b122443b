"""What a model writes, told apart: content, and calls of tools.

A call is JSON with a name, and arguments that are an object, in one of the forms that chat models
are trained on:

    Hermes, Qwen   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere, also several
    Mistral        [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], anywhere
    Llama 3        {"name": ..., "parameters": {...}}, also after <|python_tag|>, also several with
                   ";" or nothing between, or a list of them: only where it is the whole reply

llama.cpp leaves out the text of control tokens, so Mistral's form may come as a mere list.

Everything else is content, so no word is lost: JSON of another shape, a tool that does not exist, a
call that was not finished. White space beside calls is part of their form.

The text is read character by character, and what becomes of it never depends on the pieces in
which it came. What may still become a call is held back; every other character is passed on.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Generator, Iterable
from typing import Any

from kvp_edge.files import json_values

#: Deeper JSON is no call.
MAX_DEPTH = 64

_SPACE = frozenset(" \t\r\n")
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")
#: Keys that a call may have.
_KEYS = ("name", "arguments", "parameters", "type", "id")

#: A name, and arguments as JSON text.
Call = tuple[str, str]
_Step = Generator[None, str, None]


class _NoCall(Exception):
    """The character that came last cannot go on with a call."""


class ReplyParser:
    """Turns the text of a reply into OpenAI's deltas.

    Args:
        names: tools that can be called; without any, all is content.
        parallel: False: calls after the first are left out.
        bare: whether JSON that is the whole reply, without any mark, is a call.
    """

    def __init__(
        self, names: Collection[str] = (), *, parallel: bool = True, bare: bool = True
    ) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._bare = bare
        self._whole = True  # nothing but white space was written before
        self._space: list[str] = []  # at the beginning or after a call, until it is known whose
        self._form: Generator[None, str, list[Call]] | None = None  # what reads the held text
        self._held: list[str] = []
        self._content: list[str] = []  # to be passed on
        self._n_calls = 0
        self._ends_in_call = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The deltas that are certain after the next piece of the reply."""
        if not self._names:
            return [{"content": text}] if text else []
        deltas: list[dict[str, Any]] = []
        for c in text:
            deltas += self._take(c)
        return deltas + self._pass_on()

    def finish(self, reason: str = "stop") -> tuple[list[dict[str, Any]], str]:
        """The deltas that are left when the reply has ended, and OpenAI's finish_reason.

        Args:
            reason: the model's own.
        """
        deltas = self._take("") if self._form is not None else []
        if self._n_calls == 0:
            self._keep("")
        self._space = []
        deltas += self._pass_on()
        return deltas, "tool_calls" if self._ends_in_call else reason

    def _take(self, c: str) -> list[dict[str, Any]]:
        """The next character; "" is the end."""
        if self._form is None:
            if c in _SPACE and (self._whole or self._ends_in_call):
                self._space.append(c)
                return []
            if c not in ("<", "[", "{"):
                self._keep(c)
                return []
            self._form, self._held = _calls(self._names, self._whole and self._bare), []
            next(self._form)
        try:
            self._form.send(c)
        except StopIteration as end:
            self._form = None
            return self._call(end.value)
        except _NoCall:
            # A mark inside of what was held is none: its first character would have come here.
            held, self._form = "".join(self._held), None
            if held:
                self._keep(held)
                return self._take(c) if c else []
            self._keep(c)  # "{" or "[" that begins nothing
            return []
        self._held.append(c)
        return []

    def _keep(self, content: str) -> None:
        """It is content, and so is white space before it."""
        self._content += [*self._space, content]
        self._space = []
        self._whole = self._ends_in_call = False

    def _pass_on(self) -> list[dict[str, Any]]:
        content, self._content = "".join(self._content), []
        return [{"content": content}] if content else []

    def _call(self, calls: list[Call]) -> list[dict[str, Any]]:
        deltas = self._pass_on()
        for name, arguments in calls:
            if self._n_calls == 0 or self._parallel:
                call = {
                    "index": self._n_calls,
                    "id": f"call_{secrets.token_hex(12)}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                deltas.append({"tool_calls": [call]})
                self._n_calls += 1
        self._space, self._whole, self._ends_in_call = [], False, True
        return deltas


def merge(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message of a reply that is not streamed."""
    content, calls = "", list[dict[str, Any]]()
    for delta in deltas:
        content += delta.get("content", "")
        calls += [{k: v for k, v in c.items() if k != "index"} for c in delta.get("tool_calls", ())]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["content"] = content or None
        message["tool_calls"] = calls
    return message


# -- forms ---------------------------------------------------------------------------------------
#
# A reader is a generator to which the characters are sent one by one. In ``tape.c`` is the first
# one it looks at when it begins, and the first one behind its own when it ends. "" is the end of
# the reply, after which no reader asks for more.


class _Tape:
    """The characters that were sent."""

    def __init__(self) -> None:
        self.c = ""
        self.read: list[str] = []  # all before ``c``

    def step(self) -> _Step:
        if self.read or self.c:
            self.read.append(self.c)
        self.c = yield

    def at(self) -> int:
        return len(self.read)

    def since(self, start: int) -> str:
        return "".join(self.read[start:])


def _calls(names: frozenset[str], whole: bool) -> Generator[None, str, list[Call]]:
    """Calls in any of the forms."""
    tape = _Tape()
    yield from tape.step()
    first = tape.c
    if first == "{" and whole:
        return (yield from _bare(tape, names))
    if first not in ("<", "["):
        raise _NoCall
    yield from tape.step()
    if first == "<" and tape.c == "|" and whole:
        yield from _word(tape, "|python_tag|>")
        yield from _blank(tape)
        return (yield from _bare(tape, names))
    if first == "<":
        yield from _word(tape, "tool_call>")
        yield from _blank(tape)
        call = yield from _call(tape, names)
        yield from _blank(tape)
        if tape.c:  # models leave the end out where the reply ends
            yield from _word(tape, "</tool_call>", last=True)
        return [call]
    if tape.c == "T":
        yield from _word(tape, "TOOL_CALLS]")
        yield from _blank(tape)
        if tape.c != "[":
            raise _NoCall
        yield from tape.step()
        return (yield from _list(tape, names))
    if whole:
        calls = yield from _list(tape, names)
        yield from tape.step()
        yield from _blank(tape)
        if not tape.c:
            return calls
    raise _NoCall


def _bare(tape: _Tape, names: frozenset[str]) -> Generator[None, str, list[Call]]:
    """Calls up to the end of the reply."""
    calls = []
    while True:
        calls.append((yield from _call(tape, names)))
        yield from _blank(tape)
        if tape.c == ";":
            yield from tape.step()
            yield from _blank(tape)
        if not tape.c:
            return calls


def _list(tape: _Tape, names: frozenset[str]) -> Generator[None, str, list[Call]]:
    """Calls behind "[", up to "]", which is not passed."""
    calls = []
    while True:
        yield from _blank(tape)
        calls.append((yield from _call(tape, names)))
        yield from _blank(tape)
        if tape.c == "]":
            return calls
        yield from _word(tape, ",")


def _call(tape: _Tape, names: frozenset[str]) -> Generator[None, str, Call]:
    name = arguments = None
    if tape.c != "{":
        raise _NoCall
    while tape.c != "}":
        yield from tape.step()  # "{" or ","
        yield from _blank(tape)
        key = yield from _string(tape, _KEYS)
        yield from _colon(tape)
        if key == "name" and name is None:
            name = yield from _string(tape, names)
        elif key in ("arguments", "parameters") and arguments is None:
            start, quoted = tape.at(), tape.c == '"'
            if tape.c not in ("{", '"'):
                raise _NoCall
            yield from _value(tape, MAX_DEPTH)
            arguments = tape.since(start)
            if quoted:  # an object as OpenAI has it, in a string
                arguments = json.loads(arguments)
                if not _is_object(arguments):
                    raise _NoCall
        elif key in ("type", "id"):
            yield from _string(tape)
        else:  # for the second time
            raise _NoCall
        yield from _blank(tape)
        if tape.c not in ("}", ","):
            raise _NoCall
    if name is None or arguments is None:
        raise _NoCall
    yield from tape.step()
    return name, arguments


def _is_object(text: str) -> bool:
    try:
        text.encode()  # half of a surrogate pair cannot be sent
        return isinstance(json_values.parse(text), dict)
    except ValueError:
        return False


# -- JSON ----------------------------------------------------------------------------------------


def _word(tape: _Tape, word: str, *, last: bool = False) -> _Step:
    """``last``: end with its last character, and not with the one behind it."""
    for i, c in enumerate(word):
        if tape.c != c:
            raise _NoCall
        if not (last and i == len(word) - 1):
            yield from tape.step()


def _blank(tape: _Tape) -> _Step:
    while tape.c in _SPACE:
        yield from tape.step()


def _colon(tape: _Tape) -> _Step:
    yield from _blank(tape)
    yield from _word(tape, ":")
    yield from _blank(tape)


def _string(tape: _Tape, among: Collection[str] | None = None) -> Generator[None, str, str]:
    """A string, as it is written between the quotes.

    Args:
        among: it must be one of these.
    """
    start = tape.at() + 1
    yield from _word(tape, '"')
    while tape.c != '"':
        if tape.c < " ":  # the end, too
            raise _NoCall
        if tape.c == "\\":
            yield from tape.step()
            if tape.c == "u":
                for _ in range(4):
                    yield from tape.step()
                    if tape.c not in _HEX:
                        raise _NoCall
            elif not tape.c or tape.c not in '"\\/bfnrt':
                raise _NoCall
        if among is not None:
            text = tape.since(start) + tape.c
            if not any(one.startswith(text) for one in among):
                raise _NoCall
        yield from tape.step()
    text = tape.since(start)
    if among is not None and text not in among:
        raise _NoCall
    yield from tape.step()
    return text


def _digits(tape: _Tape) -> _Step:
    if tape.c not in _DIGITS:
        raise _NoCall
    while tape.c in _DIGITS:
        yield from tape.step()


def _number(tape: _Tape) -> _Step:
    if tape.c == "-":
        yield from tape.step()
    if tape.c == "0":
        yield from tape.step()
    else:
        yield from _digits(tape)
    if tape.c == ".":
        yield from tape.step()
        yield from _digits(tape)
    if tape.c in ("e", "E"):
        yield from tape.step()
        if tape.c in ("+", "-"):
            yield from tape.step()
        yield from _digits(tape)


def _value(tape: _Tape, depth: int) -> _Step:
    if depth == 0:
        raise _NoCall
    if tape.c == '"':
        yield from _string(tape)
    elif tape.c in ("{", "["):
        opened, end = tape.c, "}" if tape.c == "{" else "]"
        yield from tape.step()
        yield from _blank(tape)
        while tape.c != end:
            if opened == "{":
                yield from _string(tape)
                yield from _colon(tape)
            yield from _value(tape, depth - 1)
            yield from _blank(tape)
            if tape.c == ",":
                yield from tape.step()
                yield from _blank(tape)
                if tape.c == end:
                    raise _NoCall
            elif tape.c != end:
                raise _NoCall
        yield from tape.step()
    elif tape.c in ("t", "f", "n"):
        yield from _word(tape, {"t": "true", "f": "false", "n": "null"}[tape.c])
    else:
        yield from _number(tape)
