"""Grammars of JSON texts for llama.cpp (GBNF), at a bounded cost.

llama.cpp follows all readings of a text at once. Each is a stack, and for every token each stack
looks at what the others rejected of the vocabulary. Some grammars have so many readings that one
token takes minutes, so the readings are counted before a grammar is made (``_count_readings``).

A text may have one form only, as json.dumps writes it: ``{"a": 1, "b": [2, 3]}``, properties in
the order in which they were given.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

#: Readings of one text. Each costs up to 1.3 ms a token if the vocabulary has 150,000 tokens, where
#: a plain string costs 10 to 25 ms. Two that differ in the next character count as one.
MAX_READINGS = 20
#: Characters of a grammar: a million take llama.cpp 0.1 s.
MAX_CHARACTERS = 512 * 1024


class GrammarError(ValueError):
    """No grammar can be made, or none that is cheap; a sentence that says why."""


#: Rules of every grammar. Half of a surrogate pair is no character: \ud800 cannot be written.
_RULES = {
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" escape',
    "escape": r'["\\/bfnrt] | "u" ( [0-9a-cefA-CEF] hex hex hex | [dD] [0-7] hex hex )',
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "integer": '"-"? ( "0" | [1-9] [0-9]{0,15} )',
    "number": 'integer ( "." [0-9]{1,16} )? ( [eE] [-+]? [0-9]{1,2} )?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": r'"{" ( member ( ", " member )* )? "}"',
    "member": 'string ": " value',
    "array": '"[" ( value ( ", " value )* )? "]"',
    "value": "string | number | object | array | boolean | null",
    "day": '[0-9]{4} "-" ( "0" [1-9] | "1" [0-2] ) "-" ( "0" [1-9] | [12] [0-9] | "3" [01] )',
    "minute": '( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9]',
    "clock": 'minute ":" [0-5] [0-9] ( "." [0-9]{1,6} )? ( "Z" | [-+] minute )',
    "date": r'"\"" day "\""',
    "time": r'"\"" clock "\""',
    "date-time": r'"\"" day "T" clock "\""',
    "uuid": r'"\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\""',
}
_NUMBER_STARTS = tuple("-0123456789")
#: What texts of ``Plain`` begin with.
_BEGINNINGS = {
    "string": ('"',),
    "integer": _NUMBER_STARTS,
    "number": _NUMBER_STARTS,
    "boolean": ("true", "false"),
    "null": ("null",),
    "object": ("{",),
    "array": ("[",),
    "value": ("",),
    **dict.fromkeys(("date", "time", "date-time", "uuid"), ('"',)),
}
#: Readings at the beginning, where there are more than one; anywhere, where there are more than
#: those of a number that may have ended: one more digit, point, exponent, and what comes behind.
_AT_START = {"integer": 3, "number": 3, "boolean": 2, "value": 9}
_ANYWHERE = 6
#: A union knows apart what begins with so few texts.
_FEW = 4


# -- shapes: what a JSON text may be. They name each other by number, as they may form circles. ---


class Shape:
    """What a JSON text may be. ``shapes`` below are all those of the grammar."""

    def parts(self) -> tuple[int, ...]:
        """The shapes that it names."""
        return ()

    def can_end(self, ends: Sequence[bool]) -> bool:
        """Whether it has a text, if of all shapes these have one."""
        return True

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        """One of these begins every text; none of a union."""
        raise NotImplementedError

    def readings_at_start(self) -> int:
        return 1

    def readings(self) -> int:
        """At most, anywhere but in the shapes that it names."""
        return _ANYWHERE

    def characters(self) -> int:
        """Of names and texts in its rules."""
        return 0

    def rules(self, name: str) -> dict[str, str]:
        """Its rule in GBNF, and those that it needs for itself."""
        raise NotImplementedError


@dataclass(frozen=True)
class Choice(Shape):
    """One of these JSON texts."""

    texts: tuple[str, ...]

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        few = len(self.texts) <= _FEW
        return self.texts if few else tuple({text[0] for text in self.texts})

    def readings_at_start(self) -> int:
        return _branches({text[0] for text in self.texts})

    def readings(self) -> int:
        return max(_ANYWHERE, self._tree()[1])

    def characters(self) -> int:
        return sum(map(len, self.texts))

    def rules(self, name: str) -> dict[str, str]:
        return {name: self._tree()[0]}

    def _tree(self) -> tuple[str, int]:
        return _either([(text, "") for text in sorted(self.texts)])


@dataclass(frozen=True)
class Plain(Shape):
    """Anything of a kind: a JSON type, "value" for all of them, or a string that looks like a
    "date", "time", "date-time" or "uuid"."""

    kind: str

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        return _BEGINNINGS[self.kind]

    def readings_at_start(self) -> int:
        return _AT_START.get(self.kind, 1)

    def readings(self) -> int:
        return max(_ANYWHERE, self.readings_at_start())

    def rules(self, name: str) -> dict[str, str]:
        return {name: self.kind}


@dataclass(frozen=True)
class Text(Shape):
    """A string of so many characters."""

    least: int
    most: int | None

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        return ('"',)

    def rules(self, name: str) -> dict[str, str]:
        chars = "" if self.most == 0 else "char" + _count(self.least, self.most)
        return {name: rf'"\"" {chars} "\""'}


@dataclass(frozen=True)
class List(Shape):
    """A list of so many items."""

    item: int
    least: int
    most: int | None

    def parts(self) -> tuple[int, ...]:
        return (self.item,)

    def can_end(self, ends: Sequence[bool]) -> bool:
        return self.least == 0 or ends[self.item]

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        return ("[",)

    def rules(self, name: str) -> dict[str, str]:
        item = rule(self.item)
        if self.most == 0:
            return {name: '"[]"'}
        more = _count(max(self.least, 1) - 1, None if self.most is None else self.most - 1)
        items = item if self.most == 1 else f"{item} {name}-m{more}"
        items = items if self.least else f"( {items} )?"
        return {name: f'"[" {items} "]"', f"{name}-m": f'", " {item}'}


@dataclass(frozen=True)
class Tuple(Shape):
    """A list of these items."""

    items: tuple[int, ...]

    def parts(self) -> tuple[int, ...]:
        return self.items

    def can_end(self, ends: Sequence[bool]) -> bool:
        return all(ends[one] for one in self.items)

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        return ("[",)

    def rules(self, name: str) -> dict[str, str]:
        items = ' ", " '.join(map(rule, self.items))
        return {name: f'"[" {items} "]"'}


@dataclass(frozen=True)
class Map(Shape):
    """An object of any names, with values of one shape."""

    value: int

    def parts(self) -> tuple[int, ...]:
        return (self.value,)

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        return ("{",)

    def rules(self, name: str) -> dict[str, str]:
        return {
            name: f'"{{" ( {name}-m ( ", " {name}-m )* )? "}}"',
            f"{name}-m": f'string ": " {rule(self.value)}',
        }


@dataclass(frozen=True)
class Record(Shape):
    """An object: of each property its name, its value, and whether it must be there."""

    fields: tuple[tuple[str, int, bool], ...]

    def parts(self) -> tuple[int, ...]:
        return tuple(value for _, value, _ in self.fields)

    def can_end(self, ends: Sequence[bool]) -> bool:
        return all(ends[value] for _, value, needed in self.fields if needed)

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        if not self.fields or not self.fields[0][2]:
            return ("{",)
        name, value, _ = self.fields[0]
        known = shapes[value]
        values = known.texts if isinstance(known, Choice) and len(known.texts) <= _FEW else ("",)
        return tuple(f"{{{json_text(name)}: {text}" for text in values)

    def readings(self) -> int:
        most = 0
        for i in range(len(self.fields)):
            if i == 0 or self.fields[i - 1][2]:  # those behind an optional one are fewer
                names = sorted((json_text(name), "") for name, _, _ in self._next(i))
                most = max(most, _either(names)[1])
        return _ANYWHERE + most

    def characters(self) -> int:
        n = before = 0
        for name, _, needed in self.fields:
            before += 1  # rules that it may begin
            n += before * (len(name) + 10)
            before = 0 if needed else before
        return n

    def rules(self, name: str) -> dict[str, str]:
        """Rule i is what comes behind property i - 1; its name itself holds what comes first."""
        rules = {}
        for i in range(len(self.fields) + 1):
            run = self._next(i)
            members = {
                json_text(key) + ": ": f"{rule(value)} {name}-{j + 1}"
                for j, (key, value, _) in enumerate(run, i)
            }
            body = _either(sorted(members.items()))[0] if members else ""
            body = f'", " ( {body} )' if i and body else body
            if not any(needed for _, _, needed in run):  # the object may end
                body = f"( {body} )?" if body else '""'
            rules[f"{name}-{i}" if i else name] = body if i else f'"{{" ( {body} ) "}}"'
        return rules

    def _next(self, start: int) -> list[tuple[str, int, bool]]:
        """The properties, from one on, that may be written next: up to one that must be there."""
        run = []
        for field in self.fields[start:]:
            run.append(field)
            if field[2]:
                break
        return run


@dataclass(frozen=True)
class Union(Shape):
    """One of these shapes."""

    of: tuple[int, ...]

    def parts(self) -> tuple[int, ...]:
        return self.of

    def can_end(self, ends: Sequence[bool]) -> bool:
        return any(ends[one] for one in self.of)

    def beginnings(self, shapes: Sequence[Shape]) -> tuple[str, ...]:
        return ()

    def rules(self, name: str) -> dict[str, str]:
        return {name: " | ".join(rule(one) for one in sorted(set(self.of)))}


# -- GBNF ----------------------------------------------------------------------------------------


def rule(number: int) -> str:
    """A shape in GBNF."""
    return f"s{number}"


def literal(text: str) -> str:
    """A text in GBNF."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def json_text(value: object) -> str:
    """A JSON value in the one form that grammars know."""
    return json.dumps(value, ensure_ascii=False)


def _either(texts: Sequence[tuple[str, str]]) -> tuple[str, int]:
    """One of these texts, which are sorted, with what comes behind it in GBNF. Common beginnings
    are written once.

    Returns:
        The GBNF, and how many readings there are at most.
    """
    if len(texts) == 1:
        text, behind = texts[0]
        return f"{literal(text)} {behind}" if text else behind or '""', 1
    prefix = _common(texts[0][0], texts[-1][0])
    rest = [(text[len(prefix) :], behind) for text, behind in texts]
    branches, most = [], 0
    for _, group in groupby(rest, lambda one: one[0][:1]):
        branch, readings = _either(list(group))
        branches.append(branch)
        most = max(most, readings)
    body = " | ".join(branches)
    return f"{literal(prefix) if prefix else ''} ( {body} )", max(most, _branches(branches))


def _branches(differing: Collection[str]) -> int:
    """Readings that differ in their first character: tokens are soon known to be of none."""
    return (len(differing) + 1) // 2


def _common(one: str, other: str) -> str:
    """The longest common beginning."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return one[:n]


def _count(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


# -- grammars -------------------------------------------------------------------------------------


class Grammar:
    """A root and shapes, which are added first."""

    def __init__(self) -> None:
        self._shapes: list[Shape] = []

    def __len__(self) -> int:
        return len(self._shapes)

    def add(self, shape: Shape) -> int:
        """Its number."""
        self._shapes.append(shape)
        return len(self._shapes) - 1

    def set(self, number: int, shape: Shape) -> None:
        """Let a shape be another one, that was not known when the number was needed."""
        self._shapes[number] = shape

    def gbnf(self, alternatives: Mapping[str, str]) -> str:
        """The whole text is one of these texts, each with what comes behind it, in GBNF, where
        ``rule(number)`` is a shape.

        Raises:
            GrammarError: it would be too costly, or some text could never end.
        """
        _refuse_long(sum(shape.characters() for shape in self._shapes))  # before any of it is made
        unions = _sorted_unions(self._shapes)
        _check_ends(self._shapes)
        root, branches = _either(sorted(alternatives.items()))
        _check_readings(self._shapes, unions, branches)
        rules = {"root": root, **_RULES}
        for number, shape in enumerate(self._shapes):
            rules.update(shape.rules(rule(number)))
        text = "".join(f"{name} ::= {body}\n" for name, body in rules.items())
        _refuse_long(len(text))
        return text


def _sorted_unions(shapes: Sequence[Shape]) -> list[int]:
    """The unions, each behind those it consists of.

    Raises:
        GrammarError: one consists of itself.
    """
    left = {n: shape for n, shape in enumerate(shapes) if isinstance(shape, Union)}
    done: list[int] = []
    while left:
        ready = [n for n, shape in left.items() if not any(one in left for one in shape.of)]
        if not ready:
            raise GrammarError("a $ref, anyOf or oneOf in it leads to itself, with nothing between")
        done += ready
        for n in ready:
            del left[n]
    return done


def _check_ends(shapes: Sequence[Shape]) -> None:
    """Raises GrammarError if some text could never end, as it must hold one like itself."""
    ends = [False] * len(shapes)
    changed = True
    while changed:
        changed = False
        for n in reversed(range(len(shapes))):  # most name shapes that were added later
            if not ends[n] and shapes[n].can_end(ends):
                ends[n] = changed = True
    if not all(ends):
        raise GrammarError(
            "something in it must hold another of its kind, so no text would ever end: make a "
            "property optional, or allow null"
        )


def _check_readings(shapes: Sequence[Shape], unions: Sequence[int], least: int) -> None:
    """Raises GrammarError if a text may have more readings than MAX_READINGS.

    Two members of a union are read side by side until they differ, so their readings are added. The
    sum grows without end where such a union is inside of itself.
    """
    begins = [shape.beginnings(shapes) for shape in shapes]
    start = [shape.readings_at_start() for shape in shapes]
    alike: dict[int, list[list[int]]] = {}  # of each member, those that it is read beside
    for n in unions:
        members = sorted(set(shapes[n].parts()))
        start[n] = sum(start[one] for one in members)
        _refuse_many(start[n])
        begins[n] = tuple({text for one in members for text in begins[one]})
        alike[n] = [
            [other for other in members if not _apart(begins[one], begins[other])]
            for one in members
        ]
    readings = [max(shape.readings(), start[n]) for n, shape in enumerate(shapes)]
    _refuse_many(max([least, *readings]))
    changed = True
    while changed:
        changed = False
        for n in reversed(range(len(shapes))):
            if n in alike:
                most = max(sum(readings[one] for one in group) for group in alike[n])
            else:
                most = max((readings[one] for one in shapes[n].parts()), default=0)
            if most > readings[n]:
                _refuse_many(most)
                readings[n], changed = most, True


def _refuse_long(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise GrammarError(
            f"its grammar would have {characters} characters, and may have {MAX_CHARACTERS}: "
            "shorten names and enums, or make properties required"
        )


def _refuse_many(readings: int) -> None:
    if readings > MAX_READINGS:
        raise GrammarError(
            f"a text would have more than {MAX_READINGS} readings: have fewer members of an anyOf "
            "or oneOf that begin alike, none inside of each other, and fewer choices of an enum or "
            "names of optional properties that differ in the same letter"
        )


def _apart(one: Sequence[str], other: Sequence[str]) -> bool:
    return not any(a.startswith(b) or b.startswith(a) for a in one for b in other)
