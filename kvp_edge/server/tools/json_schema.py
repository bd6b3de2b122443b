"""JSON schemas as shapes that a grammar can keep (kvp_edge.server.tools.grammar).

What a grammar cannot keep (``minimum``, ``pattern``...) is refused in a strict schema, and left out
of account in another. What is written in the grammar of a strict schema fits it, always. ``format``
gives a string the look of a date, a time or a UUID, and elsewhere says nothing.

Texts may be fewer than a schema allows: an object with ``properties`` has no others.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from kvp_edge.files.json_values import shortened
from kvp_edge.server.tools.grammar import (
    Choice,
    Grammar,
    GrammarError,
    List,
    Map,
    Plain,
    Record,
    Shape,
    Text,
    Tuple,
    Union,
    json_text,
)

MAX_BYTES = 64 * 1024
#: Lists and objects inside of each other; a schema inside of another one takes two.
MAX_DEPTH = 32
#: Schemas inside of one.
MAX_SCHEMAS = 256
#: Choices of an enum; minItems, maxItems, minLength, maxLength.
MAX_COUNT = 256

_TYPES: Mapping[str, Any] = {
    "string": str,
    "number": int | float,
    "integer": int,
    "boolean": bool,
    "null": type(None),
    "object": dict,
    "array": list,
}
_FORMATS = ("date", "time", "date-time", "uuid")
#: They say nothing about what is allowed; ``discriminator`` repeats what a oneOf says.
_ANNOTATIONS = {
    *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default"),
    *("examples", "deprecated", "readOnly", "writeOnly", "format", "contentEncoding"),
    *("contentMediaType", "discriminator"),
}
#: Those of other types than a value's own say nothing about it.
_OF_OBJECTS = ("properties", "required", "additionalProperties")
_OF_ARRAYS = ("items", "prefixItems", "minItems", "maxItems")
_OF_STRINGS = ("minLength", "maxLength")
_OF_TYPES = ("type", *_OF_OBJECTS, *_OF_ARRAYS, *_OF_STRINGS)


def check_size(document: object, what: str, most: int = MAX_BYTES) -> None:
    """Check a value that a request brought.

    Raises:
        GrammarError: it is not JSON in UTF-8, too large, or too deep.
    """
    level = _holders([document])
    for _ in range(MAX_DEPTH):
        level = [one for value in level for one in _holders(value)]
    if level:
        raise GrammarError(f"{what} is nested more than {MAX_DEPTH} deep")
    try:
        n = len(json.dumps(document, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as error:  # NaN, half of a surrogate pair, too many digits
        raise GrammarError(f"{what} is not JSON: {error}") from error
    if n > most:
        raise GrammarError(f"{what} has {n} bytes, and may have {most}")


def _holders(value: Any) -> list[Any]:
    """The lists and objects in a list or an object."""
    values = value.values() if isinstance(value, dict) else value
    return [one for one in values if isinstance(one, dict | list)]


def add_schema(grammar: Grammar, schema: object, what: str, *, strict: bool) -> int:
    """The number of a schema's shape in a grammar.

    Args:
        what: its name in sentences.
        strict: refuse what a grammar cannot keep.

    Raises:
        GrammarError: it is too large, contradicts itself, or has what no grammar can keep.
    """
    check_size(schema, what)
    return _Reader(grammar, schema, what, strict).read()


class _Reader:
    """Reads one document. Schemas wait in a queue, so that no depth of ``$ref`` is recursion."""

    def __init__(self, grammar: Grammar, document: object, what: str, strict: bool) -> None:
        self._grammar = grammar
        self._document = document
        self._what = what
        self._strict = strict
        self._numbers: dict[int, int] = {}  # of schemas, by id(); all live as long as this object
        self._made: list[object] = []  # schemas that are not in the document
        self._waiting: deque[tuple[int, Any]] = deque()

    def read(self) -> int:
        first = self._number(self._document)
        while self._waiting:
            number, schema = self._waiting.popleft()
            self._grammar.set(number, self._shape(schema))
        return first

    def _number(self, schema: object) -> int:
        if id(schema) not in self._numbers:
            if len(self._numbers) == MAX_SCHEMAS:
                raise GrammarError(f"{self._what} has more than {MAX_SCHEMAS} schemas in it")
            self._numbers[id(schema)] = number = self._grammar.add(Plain("value"))
            self._waiting.append((number, schema))
        return self._numbers[id(schema)]

    def _make(self, schema: dict[str, Any]) -> int:
        self._made.append(schema)
        return self._number(schema)

    def _fault(self, sentence: str) -> GrammarError:
        return GrammarError(f"{self._what}: {sentence}")

    def _shape(self, schema: Any) -> Shape:
        if schema is True:
            return Plain("value")
        if schema is False:
            raise self._fault("the schema false allows nothing")
        if not isinstance(schema, dict):
            raise self._fault(f"{shortened(schema)} is no schema, which is an object")
        type_ = schema.get("type")
        types: list[Any] = type_ if isinstance(type_, list) and type_ else [type_]
        if not all(one is None or (isinstance(one, str) and one in _TYPES) for one in types):
            raise self._fault(f"type cannot be {shortened(type_)}: {', '.join(_TYPES)}")
        if "$ref" in schema:
            self._keep(schema, {"$ref"})
            return Union((self._number(self._resolve(schema["$ref"])),))
        if "const" in schema or "enum" in schema:
            self._keep(schema, {"const", "enum", "type"})
            return self._choice(schema, types)
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema and "properties" not in schema:
                return self._union(schema, word)
        self._keep(schema, _OF_TYPES)
        if len(types) > 1:
            return Union(tuple(self._make({**schema, "type": one}) for one in types))
        return self._of_type(schema, types[0])

    def _keep(self, schema: Mapping[str, Any], words: Iterable[str]) -> None:
        """Refuse other words if the schema is strict."""
        others = sorted(set(schema) - _ANNOTATIONS - set(words))
        if others and self._strict:
            rest = sorted(set(schema) - {others[0]})
            beside = f" beside {shortened(rest)}" if rest else ""
            raise self._fault(
                f"{shortened(others[0])} cannot be kept{beside}: leave it out, or strict"
            )

    def _resolve(self, ref: object) -> object:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise self._fault(f"$ref {shortened(ref)} is not in the document: '#/$defs/NAME' is")
        value: Any = self._document
        for part in unquote(ref).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdecimal() and int(key[:9]) < len(value):
                value = value[int(key[:9])]
            else:
                raise self._fault(f"$ref {shortened(ref)} leads nowhere")
        return value

    def _choice(self, schema: Mapping[str, Any], types: list[str | None]) -> Shape:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not 0 < len(values) <= MAX_COUNT:
            raise self._fault(f"enum must be a list of 1 to {MAX_COUNT} values")
        if "const" in schema and "enum" in schema and schema["const"] not in schema["enum"]:
            raise self._fault("const is not among enum")
        fitting = [v for v in values if any(t is None or _is_a(v, t) for t in types)]
        if not fitting:
            raise self._fault(f"{shortened(values)} has no value of type {schema['type']}")
        return Choice(tuple(dict.fromkeys(json_text(value) for value in fitting)))

    def _union(self, schema: Mapping[str, Any], word: str) -> Shape:
        members = schema[word]
        if not isinstance(members, list) or not members:
            raise self._fault(f"{word} must be a list of schemas")
        self._keep(schema, {word})
        if self._strict and word != "anyOf" and len(members) > 1:
            raise self._fault(f"{word} cannot be kept: use anyOf, or leave out strict")
        if word == "allOf" and len(members) > 1:
            return Plain("value")
        return Union(tuple(self._number(member) for member in members))

    def _of_type(self, schema: Mapping[str, Any], type_: str | None) -> Shape:
        if type_ is None:
            for one, words in (
                ("object", _OF_OBJECTS),
                ("array", _OF_ARRAYS),
                ("string", _OF_STRINGS),
            ):
                if type_ is None and any(word in schema for word in words):
                    type_ = one
        if type_ == "object":
            return self._object(schema)
        if type_ == "array":
            return self._array(schema)
        if type_ == "string" and any(word in schema for word in _OF_STRINGS):
            return Text(*self._counts(schema, "minLength", "maxLength"))
        if type_ == "string" and schema.get("format") in _FORMATS:
            return Plain(schema["format"])
        return Plain(type_ or "value")

    def _counts(self, schema: Mapping[str, Any], least: str, most: str) -> tuple[int, int | None]:
        for word in (least, most):
            value = schema.get(word, 0)
            if type(value) is not int or not 0 <= value <= MAX_COUNT:
                raise self._fault(f"{word} must be 0 to {MAX_COUNT}, not {shortened(value)}")
        low, high = schema.get(least, 0), schema.get(most)
        if high is not None and high < low:
            raise self._fault(f"{least} {low} is more than {most} {high}")
        return low, high

    def _array(self, schema: Mapping[str, Any]) -> Shape:
        least, most = self._counts(schema, "minItems", "maxItems")
        items = schema.get("items", True)
        first = schema.get("prefixItems", items if isinstance(items, list) else [])
        if not isinstance(first, list):
            raise self._fault("prefixItems must be a list of schemas")
        if first:
            if least > len(first) or (most is not None and most < len(first)):
                raise self._fault(
                    f"a list of {len(first)} prefixItems has as many items here, which minItems "
                    "and maxItems must allow"
                )
            return Tuple(tuple(self._number(item) for item in first))
        if items is False or most == 0:
            return self._empty_list(least)
        return List(self._number(items), least, most)

    def _empty_list(self, least: int) -> Shape:
        if least:
            raise self._fault("minItems asks for items, and items allows none")
        return Choice(("[]",))

    def _object(self, schema: Mapping[str, Any]) -> Shape:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict):
            raise self._fault("properties must be an object of schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._fault("required must be a list of names")
        if properties or required or "properties" in schema or others is False:
            unknown = [name for name in dict.fromkeys(required) if name not in properties]
            if unknown and others is False:
                raise self._fault(f"{shortened(unknown[0])} is required, and not in properties")
            fields = {**properties, **dict.fromkeys(unknown, others)}
            if len(fields) > MAX_COUNT:
                raise self._fault(f"{len(fields)} properties, and may have {MAX_COUNT}")
            needed = set(required)
            return Record(tuple((n, self._number(s), n in needed) for n, s in fields.items()))
        return Plain("object") if others is True or others == {} else Map(self._number(others))


def _is_a(value: object, type_: str) -> bool:
    if isinstance(value, bool):
        return type_ == "boolean"
    whole = type_ == "integer" and isinstance(value, float) and value.is_integer()
    return whole or isinstance(value, _TYPES[type_])
