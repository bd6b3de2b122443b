"""Schemas as grammars: what is written fits the schema, and what is refused is refused early."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import LlamaGrammar

from kvp_edge import Llama
from kvp_edge.server.tools.grammar import MAX_READINGS, Grammar, GrammarError, rule
from kvp_edge.server.tools.json_schema import (
    MAX_BYTES,
    MAX_COUNT,
    MAX_DEPTH,
    MAX_SCHEMAS,
    add_schema,
    check_size,
)
from support.properties import examples

# -- an independent validator, of the words that strict schemas may have -------------------------

TYPES = {
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
}


def same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def fits(value: Any, schema: Any, root: Any) -> bool:
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part]
        return fits(value, target, root)
    types = schema.get("type", list(TYPES))
    types = types if isinstance(types, list) else [types]
    checks = [any(TYPES[one](value) for one in types)]
    if "const" in schema:
        checks.append(same(value, schema["const"]))
    if "enum" in schema:
        checks.append(any(same(value, one) for one in schema["enum"]))
    if "anyOf" in schema:
        checks.append(any(fits(value, one, root) for one in schema["anyOf"]))
    if isinstance(value, str):
        checks.append(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9))
    if isinstance(value, list):
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9))
        first = schema.get("prefixItems", [])
        checks += [fits(v, s, root) for v, s in zip(value, first, strict=False)]
        checks += [fits(v, schema.get("items", True), root) for v in value[len(first) :]]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        checks += [name in value for name in schema.get("required", [])]
        others = schema.get("additionalProperties", True)
        checks += [fits(v, properties.get(name, others), root) for name, v in value.items()]
    return all(checks)


# -- the bundled model writes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(bundled_model: str) -> Iterator[Llama]:
    with closing(Llama(bundled_model, n_ctx=1024, n_threads=1, verbose=False)) as llm:
        yield llm


def gbnf(schema: object, *, strict: bool = True) -> str:
    grammar = Grammar()
    number = add_schema(grammar, schema, "the schema", strict=strict)
    return grammar.gbnf({"": rule(number)})


def write(llm: Llama, grammar: str, *, seed: int = 0, n: int = 500) -> str:
    """What the model writes, up to n tokens."""
    text: str = llm.create_completion(
        "Once upon a time",
        grammar=LlamaGrammar.from_string(grammar, verbose=False),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=seed,
        max_tokens=n,
    )["choices"][0]["text"]
    return text


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-200, 200), st.text(max_size=4), st.sampled_from('"\\é\n')
).filter(lambda v: not isinstance(v, str) or v.isprintable() or v == "\n")


def counts(least: str, most: str) -> st.SearchStrategy[dict[str, int]]:
    pairs = st.tuples(st.integers(0, 3), st.integers(0, 2))
    return pairs.map(lambda pair: {least: pair[0], most: sum(pair)})


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def make(properties: dict[str, Any], mask: int, closed: bool) -> dict[str, Any]:
        required = [name for i, name in enumerate(properties) if mask >> i & 1]
        schema = {"type": "object", "properties": properties, "required": required}
        return {**schema, "additionalProperties": False} if closed else schema

    names = st.text('ab"\\ é', min_size=1, max_size=3)
    properties = st.dictionaries(names, inner, max_size=4)
    return st.builds(make, properties, st.integers(0, 15), st.booleans())


LEAVES = st.one_of(
    st.sampled_from(["integer", "number", "boolean", "null"]).map(lambda t: {"type": t}),
    counts("minLength", "maxLength").map(lambda c: {"type": "string", **c}),
    st.lists(SCALARS, min_size=1, max_size=5).map(lambda values: {"enum": values}),
    SCALARS.map(lambda value: {"const": value}),
    counts("minLength", "maxLength").map(lambda c: {"type": ["string", "null"], **c}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda items, c: {"type": "array", "items": items, **c},
            inner,
            counts("minItems", "maxItems"),
        ),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda items: {"prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members}),
    ),
    max_leaves=6,
)


@examples(80)
@given(SCHEMAS, st.integers(0, 1000))
def test_what_is_written_fits_the_schema(llm: Llama, schema: Any, seed: int) -> None:
    try:
        grammar = gbnf(schema)
    except GrammarError as error:
        if "readings" in str(error):
            return
        raise  # all others are sound
    text = write(llm, grammar, seed=seed)
    assert fits(json.loads(text), schema, schema), text


TREE = {
    "$defs": {
        "node/a": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "left": {"anyOf": [{"$ref": "#/$defs/node~1a"}, {"type": "null"}]},
                "right": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node~1a"}]},
            },
            "required": ["value", "left", "right"],
        }
    },
    "$ref": "#/$defs/node~1a",
}
KINDS = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "of": {"$ref": "#"}, "n": {"type": "integer"}},
            "required": ["kind"],
        }
        for kind in "abcd"
    ]
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "schema",
    [
        KINDS,
        {"type": "array", "items": {"type": ["integer", "null"]}, "maxItems": 5},
        {"type": "object", "required": ["a"], "additionalProperties": {"const": 1}},
        {"type": "object", "properties": {}},
        {"type": "object", "additionalProperties": False},
        {"type": "array", "items": False},
        {"type": "array", "items": {"type": "null"}, "minItems": 3, "maxItems": 6},
        {"type": "array", "maxItems": 0},
        {"type": "integer", "enum": [1, "1", 2, None]},
        {"enum": [{"a": [1, 2]}, [], "", 0.5, 12, 1]},
        {"type": "string", "minLength": 20, "maxLength": 20},
        {"type": "string", "maxLength": 0},
        {"allOf": [{"type": "boolean"}]},
    ],
)
def test_schemas_of_every_kind_are_kept(llm: Llama, schema: Any, seed: int) -> None:
    text = write(llm, gbnf(schema), seed=seed)
    plain = {k: v for k, v in schema.items() if k != "allOf"}
    assert fits(json.loads(text), plain, plain), text


@pytest.mark.parametrize("schema", [{}, True])
def test_anything_is_any_json(llm: Llama, schema: Any) -> None:
    texts = [write(llm, gbnf(schema), seed=seed, n=100) for seed in range(8)]
    whole = []
    for text in texts:
        try:
            whole.append(json.loads(text))
        except ValueError:
            assert len(llm.tokenize(text.encode(), add_bos=False)) > 80  # it was cut
    assert len({type(value) for value in whole}) > 1


def test_an_object_of_any_names_has_values_of_one_kind(llm: Llama) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "boolean"}}
    texts = [write(llm, gbnf(schema), seed=seed, n=100) for seed in range(8)]
    values = [re.match(r'\{"(?:\\.|[^"\\])*": (.)', text) for text in texts]
    first = {value[1] for value in values if value}
    assert first
    assert first <= {"t", "f"}


def test_a_schema_may_refer_to_itself(llm: Llama) -> None:
    plain = json.loads(json.dumps(TREE).replace("node~1a", "node").replace("node/a", "node"))
    for seed in range(3):
        assert fits(json.loads(write(llm, gbnf(TREE), seed=seed)), plain, plain)


@pytest.mark.parametrize(
    ("format_", "pattern"),
    [
        ("date", r"\d{4}-[01]\d-[0-3]\d"),
        ("time", r"[0-2]\d:[0-5]\d:[0-5]\d(\.\d+)?(Z|[-+]\d\d:\d\d)"),
        ("date-time", r"\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d(\.\d+)?(Z|[-+]\d\d:\d\d)"),
        ("uuid", r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
    ],
)
def test_formats_give_strings_their_look(llm: Llama, format_: str, pattern: str) -> None:
    for seed in range(3):
        text = write(llm, gbnf({"type": "string", "format": format_}), seed=seed)
        assert re.fullmatch(pattern, json.loads(text))


def may_go_on(llm: Llama, text: str, begun: str, c: str) -> bool:
    """Whether a grammar allows a character behind a text that it allows."""
    vocab = llm.vocab
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    assert sampler
    for one in begun:
        (token,) = llm.tokenize(one.encode(), add_bos=False)
        llama_cpp.llama_sampler_accept(sampler, token)
    n = llama_cpp.llama_vocab_n_tokens(vocab)
    data = (llama_cpp.llama_token_data * n)(*((i, 0.0, 0.0) for i in range(n)))
    candidates = llama_cpp.llama_token_data_array(data, n, -1, False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(candidates))
    llama_cpp.llama_sampler_free(sampler)
    (token,) = llm.tokenize(c.encode(), add_bos=False)
    return bool(data[token].logit == 0)


def test_half_of_a_surrogate_pair_cannot_be_written(llm: Llama) -> None:
    text = gbnf({"type": "string"})
    for high in "dD":
        allowed = [c for c in "0123456789abcdefABCDEF" if may_go_on(llm, text, f'"\\u{high}', c)]
        assert allowed == list("01234567")
    assert all(may_go_on(llm, text, '"\\ud7', c) for c in "0fF")
    assert all(may_go_on(llm, text, '"\\ue', c) for c in "09fF")
    assert not may_go_on(llm, text, '"', "\n")


def test_what_a_grammar_cannot_keep_is_left_out_of_account_if_not_strict(llm: Llama) -> None:
    schema = {"type": "integer", "minimum": 3, "not": {"const": 4}}
    assert isinstance(json.loads(write(llm, gbnf(schema, strict=False))), int)


# -- refused -------------------------------------------------------------------------------------


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(n):
        schema = {"items": schema}
    return schema


ALIKE = [{"type": "array", "items": {"$ref": "#"}}, {"type": "array", "items": {"$ref": "#"}}]


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (nested(MAX_DEPTH), "nested more than 32 deep"),
        ({"const": "x" * MAX_BYTES}, "has 65549 bytes, and may have 65536"),
        ({"const": float("nan")}, "is not JSON"),
        ({"const": "\ud800"}, "is not JSON"),
        ({"prefixItems": [{} for _ in range(MAX_SCHEMAS)]}, "more than 256 schemas"),
        ({"required": [str(i) for i in range(MAX_COUNT + 1)]}, "257 properties, and may have 256"),
        ({"enum": list(range(MAX_COUNT + 1))}, "1 to 256 values"),
        ({"enum": []}, "1 to 256 values"),
        ({"enum": 7}, "1 to 256 values"),
        ({"enum": ["a"], "type": "integer"}, "no value of type integer"),
        ({"enum": ["a"], "const": "b"}, "const is not among enum"),
        ({"type": "string", "maxLength": MAX_COUNT + 1}, "maxLength must be 0 to 256, not 257"),
        ({"type": "string", "minLength": -1}, "minLength must be 0 to 256, not -1"),
        ({"type": "array", "maxItems": True}, "maxItems must be 0 to 256, not True"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems 3 is more than maxItems 2"),
        ({"type": "array", "minItems": 1, "items": False}, "items allows none"),
        ({"type": "array", "minItems": 3, "prefixItems": [{}]}, "prefixItems"),
        ({"type": "text"}, "type cannot be 'text'"),
        ({"type": ["string", 1]}, "type cannot be"),
        ({"properties": []}, "properties must be an object"),
        ({"required": "a"}, "required must be a list of names"),
        ({"required": ["a"], "additionalProperties": False}, "'a' is required"),
        ({"properties": {"a": 1}}, "1 is no schema"),
        ({"anyOf": []}, "anyOf must be a list"),
        (False, "false allows nothing"),
        ("string", "'string' is no schema"),
        ({"$ref": "http://example.com/schema"}, "is not in the document"),
        ({"$ref": "#/$defs/a"}, "leads nowhere"),
        ({"$ref": 1}, "is not in the document"),
        ({"$ref": "#"}, "leads to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads to itself"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no text would ever end"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no text would ever end"),
        ({"anyOf": [*ALIKE, {"type": "null"}]}, "readings"),
        ({"enum": [chr(0x4E00 + i) for i in range(2 * MAX_READINGS + 1)]}, "readings"),
        ({"anyOf": [{"type": "string", "minLength": i} for i in range(9)]}, "readings"),
        ({"type": "integer", "minimum": 3}, "'minimum' cannot be kept beside ['type']: leave"),
        ({"minimum": 3}, "'minimum' cannot be kept: leave it out"),
        ({"type": "string", "pattern": "(a*)*"}, "'pattern' cannot be kept"),
        ({"oneOf": [{}, {}]}, "oneOf cannot be kept"),
        ({"anyOf": [{}], "maxLength": 3}, "'maxLength' cannot be kept"),
        ({"properties": {}, "anyOf": [{}]}, "'anyOf' cannot be kept"),
    ],
)
def test_a_schema_is_refused_with_a_sentence(schema: object, sentence: str) -> None:
    with pytest.raises(GrammarError) as error:
        gbnf(schema)
    assert sentence in str(error.value)


def test_a_document_of_any_depth_is_refused_without_recursion() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(GrammarError, match="nested more than 32 deep"):
        check_size(value, "it")


def test_a_chain_of_references_is_no_recursion() -> None:
    n = MAX_SCHEMAS - 1
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n - 1)}
    definitions[f"d{n - 1}"] = {"type": "null"}
    assert "null" in gbnf({"$ref": "#/$defs/d0", "$defs": definitions})


@pytest.mark.parametrize(
    "schema",
    [
        nested(MAX_DEPTH - 1),
        {"const": "x" * (MAX_BYTES - 13)},
        {"prefixItems": [{} for _ in range(MAX_SCHEMAS - 1)]},
        {"required": [str(i) for i in range(MAX_COUNT)]},
        {"properties": {"x" * 9 + str(i): {} for i in range(100)}},
        {"enum": ["a" * i for i in range(MAX_COUNT)]},
        {"type": "string", "minLength": MAX_COUNT, "maxLength": MAX_COUNT},
        {"items": {"items": {"const": 1}, "minItems": 256, "maxItems": 256}, "minItems": 256},
        {"enum": [chr(0x4E00 + i) + "a" for i in range(2 * MAX_READINGS)]},
        TREE,
    ],
)  # fmt: skip
def test_llama_cpp_takes_what_is_just_allowed(llm: Llama, schema: Any) -> None:
    assert write(llm, gbnf(schema), n=8)
