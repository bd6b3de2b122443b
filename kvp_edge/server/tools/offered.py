"""``tools``, ``tool_choice`` and ``response_format`` of OpenAI's chat completions.

``check`` turns them into a ``Reply``: what the chat template is shown, what the model may write,
and what reads it.

    tool_choice  "none"      the template is not shown the tools; all is content
                 "auto"      the model writes freely, and what is a call becomes one
                 "required"  a grammar lets it write one call, of any of the tools
                 a function  the same, of this tool
    response_format          a grammar lets it write such JSON, or, with "auto", a call
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_cpp import LlamaGrammar

from kvp_edge.files.json_values import shortened
from kvp_edge.server.tools.calls import ReplyParser
from kvp_edge.server.tools.grammar import Grammar, GrammarError, Plain, json_text, literal, rule
from kvp_edge.server.tools.json_schema import add_schema, check_size
from kvp_edge.server.tools.messages import for_template, shows_tools

MAX_TOOLS = 128
#: Of all tools together, as JSON.
MAX_TOOLS_BYTES = 256 * 1024
#: Of the schemas of all tools that one grammar allows.
MAX_SHAPES = 1024

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}
#: Words that say by themselves what is allowed.
_OPEN = frozenset(("$ref", "anyOf", "oneOf", "allOf"))
#: They may allow what is no object.
_OTHERS = frozenset(("const", "enum"))
#: Calls beside a response_format, in the form that most templates with tools ask for.
_CALL_BEGINS, _CALL_ENDS = "<tool_call>\n", "}\n</tool_call>"


class BadRequest(ValueError):
    """A request that cannot be answered.

    Attributes:
        param: the part of the request that is wrong.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Reply:
    """How a reply comes about.

    Attributes:
        tools: for the chat template; None: it is shown none.
        names: tools that the reply may call.
        gbnf: the grammar of the whole reply, None without one.
        parallel: whether it may have more than one call.
        bare: whether JSON that is the whole reply may be a call.
    """

    tools: list[dict[str, Any]] | None = None
    names: tuple[str, ...] = ()
    gbnf: str | None = None
    parallel: bool = True
    bare: bool = True

    def arguments(self) -> dict[str, Any]:
        """Arguments for ``create_chat_completion``."""
        arguments: dict[str, Any] = {}
        if self.tools is not None:
            arguments["tools"] = self.tools
        if self.gbnf is not None:
            arguments["grammar"] = LlamaGrammar.from_string(self.gbnf, verbose=False)
        return arguments

    def messages(
        self, messages: Sequence[Mapping[str, Any]], template: str
    ) -> list[dict[str, Any]]:
        """Messages for ``create_chat_completion``.

        Args:
            template: the model's chat template, "" if it has none.
        """
        return for_template(messages, None if shows_tools(template) else self.tools or [])

    def parser(self) -> ReplyParser:
        """What reads the reply, once."""
        return ReplyParser(self.names, parallel=self.parallel, bare=self.bare)


def check(
    tools: object = None,
    tool_choice: object = None,
    response_format: object = None,
    parallel_tool_calls: object = None,
) -> Reply:
    """Check these fields of a request; None: it has no such field.

    Raises:
        BadRequest: the message is a sentence for whoever sent it.
    """
    if parallel_tool_calls is not None and not isinstance(parallel_tool_calls, bool):
        raise BadRequest("parallel_tool_calls must be true or false", "parallel_tool_calls")
    known = _check_tools(tools)
    chosen = _chosen(known, tool_choice)
    grammar = Grammar()
    shape = _format(grammar, response_format)
    if not chosen or tool_choice == "none":
        if shape is None:
            return Reply()
        return Reply(gbnf=_gbnf(grammar, {"": rule(shape)}, "response_format"))
    shown = list(known.values())
    must = tool_choice not in (None, "auto")
    gbnf = None
    if must:
        grammar = Grammar()  # no other reply than a call
        gbnf = _gbnf(grammar, _calls(grammar, chosen, "", "}"), "tools")
    elif shape is not None:
        calls = _calls(grammar, chosen, _CALL_BEGINS, _CALL_ENDS)
        gbnf = _gbnf(grammar, {"": rule(shape), **calls}, "tools")
    parallel = parallel_tool_calls is not False
    return Reply(shown, tuple(chosen), gbnf, parallel, bare=must or shape is None)


# -- checks --------------------------------------------------------------------------------------


def _check_tools(tools: object) -> dict[str, dict[str, Any]]:
    """By their names."""
    if tools is None:
        return {}
    if not isinstance(tools, list):
        raise BadRequest("tools must be a list", "tools")
    if len(tools) > MAX_TOOLS:
        raise BadRequest(f"there are {len(tools)} tools, and may be {MAX_TOOLS}", "tools")
    known: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise BadRequest(f"{where} must be an object with type 'function'", where)
        function = tool.get("function")
        if not isinstance(function, dict):
            raise BadRequest(f"{where}.function must be an object", f"{where}.function")
        name = _name(function.get("name"), f"{where}.function.name")
        if name in known:
            raise BadRequest(f"two tools are called '{name}'", f"{where}.function.name")
        for field, types, what in (
            ("description", str, "a text"),
            ("strict", bool, "true or false"),
            ("parameters", dict, "a JSON schema, which is an object"),
        ):
            if function.get(field) is not None and not isinstance(function[field], types):
                raise BadRequest(
                    f"{field} of '{name}' must be {what}, not {shortened(function[field])}",
                    f"{where}.function.{field}",
                )
        parameters = function.get("parameters") or _NO_ARGUMENTS  # templates look into them
        _check_size(parameters, f"the parameters of '{name}'", f"{where}.function.parameters")
        if not _OPEN & set(parameters):
            parameters = {"type": "object", **parameters}
        if parameters.get("type", "object") != "object" or _OTHERS & set(parameters):
            raise BadRequest(
                f"the parameters of '{name}' must be a schema of type 'object', with properties",
                f"{where}.function.parameters",
            )
        known[name] = {**tool, "function": {**function, "parameters": parameters}}
    _check_size(list(known.values()), "the list of tools", "tools", MAX_TOOLS_BYTES)
    return known


def _name(name: object, param: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRequest(
            f"a name has 1 to 64 letters, digits, _ or -, unlike {shortened(name)}", param
        )
    return name


def _check_size(value: object, what: str, param: str, *most: int) -> None:
    try:
        check_size(value, what, *most)
    except GrammarError as error:
        raise BadRequest(str(error), param) from error


def _chosen(known: Mapping[str, dict[str, Any]], choice: object) -> dict[str, dict[str, Any]]:
    """The tools that may be called."""
    if choice in (None, "none", "auto"):
        return dict(known)
    if not known:
        raise BadRequest("tool_choice needs tools, and there are none", "tool_choice")
    if choice == "required":
        return dict(known)
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise BadRequest(
            "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': "
            f"{{'name': ...}}}}, not {shortened(choice)}",
            "tool_choice",
        )
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in known:
        raise BadRequest(
            f"tool_choice names no tool that there is: {shortened(name)}", "tool_choice"
        )
    return {name: known[name]}


def _format(grammar: Grammar, response_format: object) -> int | None:
    """The shape of a reply that is JSON."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return grammar.add(Plain("object"))
    if not isinstance(response_format, dict) or kind != "json_schema":
        raise BadRequest(
            "response_format must be an object with type 'text', 'json_object' or 'json_schema'",
            "response_format",
        )
    where = "response_format.json_schema"
    spec = response_format.get("json_schema")
    if not isinstance(spec, dict):
        raise BadRequest("json_schema must be an object with a name and a schema", where)
    name, strict = _name(spec.get("name"), f"{where}.name"), spec.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise BadRequest("strict must be true or false", f"{where}.strict")
    schema = spec.get("schema")
    try:
        return add_schema(
            grammar, {} if schema is None else schema, f"the schema '{name}'", strict=bool(strict)
        )
    except GrammarError as error:
        raise BadRequest(str(error), f"{where}.schema") from error


def _calls(
    grammar: Grammar, tools: Mapping[str, dict[str, Any]], begins: str, ends: str
) -> dict[str, str]:
    """How a call of each of the tools begins, and what comes behind, in GBNF."""
    calls = {}
    for name, tool in tools.items():
        function = tool["function"]
        what = f"the parameters of '{name}'"
        try:
            strict = bool(function.get("strict"))
            number = add_schema(grammar, function["parameters"], what, strict=strict)
        except GrammarError as error:
            raise BadRequest(str(error), "tools") from error
        if len(grammar) > MAX_SHAPES:
            raise BadRequest(
                f"the tools have more than {MAX_SHAPES} schemas in them, too many for a reply that "
                "must be a call: name the tool in tool_choice, or let it be 'auto'",
                "tools",
            )
        begin = f'{begins}{{"name": {json_text(name)}, "arguments": '
        calls[begin] = f"{rule(number)} {literal(ends)}"
    return calls


def _gbnf(grammar: Grammar, alternatives: Mapping[str, str], param: str) -> str:
    try:
        return grammar.gbnf(alternatives)
    except GrammarError as error:
        raise BadRequest(f"{param} cannot be kept by a grammar: {error}", param) from error
