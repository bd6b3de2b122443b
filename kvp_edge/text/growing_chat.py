"""A chat template that is not rendered again for messages it has shown before.

A chat is rendered whole at every turn. Most templates are a head, a loop that shows one message
after the other, and a tail. The head and the tail are short. What the loop shows of a message is
remembered, if it is certain that it would be the same again:

    The loop's body, by what it is made of (``_Body``), computes the same text from the same
    message, its number, whether it is the first or last one, other messages by their number, and
    the values that names outside the loop have. It keeps nothing for the next message, reads
    neither clock nor chance, and nothing that two equal messages could differ in.

    What it showed is taken again only while all of these are the same: all earlier messages are
    equal to those of that time and hold texts only, names have the same values, and no message was
    looked at that was not there. The last message is always shown anew.

Any other template, and any other chat, is rendered whole.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, Template, Undefined, filters, nodes, tests
from jinja2.visitor import NodeTransformer
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from kvp_edge.text.formatters import formatter_of

#: Names of our own in templates; one that uses such names itself is rendered whole.
_OURS = "kvp_chat_"
_ITEMS, _CUT, _MESSAGE, _START = (_OURS + name for name in ("items", "cut", "message", "start"))
#: llama_cpp's names of the list and of what stops a rendering.
_MESSAGES, _RAISE = "messages", "raise_exception"

_ALLOWED = (
    *(nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.Continue),
    *(nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Concat, nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr),
    *(nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice),
)


class _CannotTell(Exception):
    """It is not certain that a text would be the same again."""


class _Changed(Exception):
    """Names have other values than at the last time."""


@dataclass(frozen=True)
class _Shown:
    """What the first items of a loop gave."""

    messages: list[dict[str, str]]  # of that time, all of them
    names: Any  # their values, comparable
    n: int  # items
    text: str


class GrowingChat:
    """Stands in for a compiled template of chats. Threads may share it.

    Args:
        template: as jinja2 compiled it.
        source: of the template.
    """

    def __init__(self, template: Template, source: str) -> None:
        self._template = template
        self._steps = _in_steps(template, source)
        self._shown: _Shown | None = None

    def render(self, **context: Any) -> str:
        """As jinja2.Template.render."""
        messages = context.get(_MESSAGES)
        if self._steps is None or type(messages) is not list:
            return self._template.render(**context)
        shown = self._shown  # read once: another thread may put another one in its place
        if shown is not None and messages[: len(shown.messages)] != shown.messages:
            shown = None
        try:
            try:
                return self._render(self._steps, context, messages, shown)
            except _Changed:
                return self._render(self._steps, context, messages, None)
        except _CannotTell:
            return self._template.render(**context)

    def _render(
        self, steps: Template, context: dict[str, Any], messages: list[Any], shown: _Shown | None
    ) -> str:
        start, before = (0, "") if shown is None else (shown.n, shown.text)
        run = _Run(steps.environment, messages, start, None if shown is None else shown.names)
        head, *bodies, tail = steps.render(**context, **run.hooks()).split(run.cut)
        if len(bodies) != run.n_items - start:
            raise _CannotTell
        sure = max(min(run.sure, run.n_items - 1), start)
        text = "".join((before, *bodies[: sure - start]))
        self._remember(messages, shown, run.names, sure, text)
        return "".join((head, text, *bodies[sure - start :], tail))

    def _remember(
        self, messages: list[Any], shown: _Shown | None, names: Any, n: int, text: str
    ) -> None:
        known = [] if shown is None else shown.messages
        new = messages[len(known) :]
        if all(map(_has_texts_only, new)):
            self._shown = _Shown(known + [dict(m) for m in new], names, n, text)


class _Run:
    """One rendering: what the template calls on its way."""

    def __init__(self, environment: Environment, messages: list[Any], start: int, names: Any):
        self.cut = secrets.token_hex(16)
        self.names = names  # known values, then those found; None: not known
        self.n_items = 0
        self._environment = environment
        self._messages = messages
        self._start = start
        self._at = start - 1  # the item that is shown
        self.sure = len(messages)  # items before this one will give the same text again

    def hooks(self) -> dict[str, Any]:
        return {
            _ITEMS: self._items,
            _CUT: self._cut,
            _MESSAGE: self._message,
            _START: self._start,
        }

    def _items(self, items: Any, values: list[Any]) -> list[Any]:
        """What the loop goes over."""
        first = len(self._messages) - len(items) if type(items) is list else -1
        if first < 0 or not (items is self._messages or items == self._messages[first:]):
            raise _CannotTell
        names = (first, *map(_frozen, values))
        if self.names is not None and self.names != names:
            raise _Changed
        self.names, self.n_items = names, len(items)
        shown: list[Any] = items[self._start :]
        return shown

    def _cut(self) -> str:
        """Where the text of an item begins, and that of the last one ends."""
        self._at += 1
        return self.cut

    def _message(self, number: Any) -> Any:
        """A message of the list, looked at while an item is shown."""
        if type(number) is not int or not 0 <= number < len(self._messages):  # a slice, too
            self.sure = min(self.sure, self._at)
        return self._environment.getitem(self._messages, number)


def remember_messages(handler: Callable[..., Any]) -> bool:
    """Have one of llama_cpp's chat completion handlers render only what is new.

    Returns:
        Whether it is one of those that render a template of the model's file.
    """
    formatter = formatter_of(handler)
    if type(formatter) is not Jinja2ChatFormatter:
        return False
    if isinstance(formatter._environment, Template):
        formatter._environment = GrowingChat(formatter._environment, formatter.template)
    return isinstance(formatter._environment, GrowingChat)


def _has_texts_only(message: Any) -> bool:
    return type(message) is dict and {str, type(None)}.issuperset(
        map(type, (*message, *message.values()))
    )


def _frozen(value: Any) -> Any:
    """The same for the same value only, also where Python takes different ones for equal."""
    if type(value) in (list, tuple):
        return type(value), tuple(map(_frozen, value))
    if type(value) is dict:
        return dict, tuple((_frozen(k), _frozen(v)) for k, v in value.items())
    if value is None or type(value) in (str, bool, int, float):
        return type(value), repr(value)
    if type(value) is Undefined:
        return Undefined
    raise _CannotTell


def _in_steps(template: Template, source: str) -> Template | None:
    """The template with ``_Run``'s hooks in its loop over messages; None if it has no such loop, or
    one that is not certain to give the same text again."""
    environment = template.environment
    tree = environment.parse(source)
    about_messages = {_MESSAGES} | _names(tree, "store")
    loops = [
        (i, node)
        for i, node in enumerate(tree.body)
        if isinstance(node, nodes.For) and not about_messages.isdisjoint(_names(node.iter))
    ]
    if len(loops) != 1 or _OURS in source or {_MESSAGES, _RAISE} & _names(tree, "store"):
        return None
    ((at, loop),) = loops
    if loop.recursive or loop.test or loop.else_ or not isinstance(loop.target, nodes.Name):
        return None
    body = _Body(environment, loop.target.name)
    try:
        loop.body = [body.visit(node) for node in loop.body]
    except _CannotTell:
        return None
    if not body.names.isdisjoint(_names(loop.iter)):
        return None
    values = nodes.List([nodes.Name(name, "load") for name in sorted(body.names)])
    loop.iter = _call(_ITEMS, loop.iter, values)
    loop.body.insert(0, nodes.Output([_call(_CUT)]))
    tree.body.insert(at + 1, nodes.Output([_call(_CUT)]))
    tree.set_environment(environment)
    tree.set_lineno(loop.lineno)
    code = environment.compile(tree)
    return Template.from_code(environment, code, template.globals)


def _call(name: str, *arguments: Any) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)


def _names(node: nodes.Node, ctx: str | None = None) -> set[str]:
    """All names that occur in a node, or those in one context ("load", "store")."""
    found = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    return {name.name for name in found if ctx is None or name.ctx == ctx}


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


class _Body(NodeTransformer):
    """Puts hooks into a loop's body.

    Raises:
        _CannotTell: it holds something whose text may be another one for the same message.
    """

    def __init__(self, environment: Environment, target: str) -> None:
        self.names: set[str] = set()  # that have values outside, perhaps
        self._environment = environment
        self._target = target
        self._inner = 0  # loops inside the loop around what is visited

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(node, _ALLOWED):
            raise _CannotTell
        return super().visit(node, *args, **kwargs)

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.name in ("loop", self._target, _MESSAGES, _RAISE):
            raise _CannotTell  # as a whole; its parts: below
        if node.ctx == "load":
            self.names.add(node.name)
        return node

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:
        if _is_name(node.node, "loop"):
            return self._of_loop(node)
        return self._field(node, node.attr)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        field = node.arg.value if isinstance(node.arg, nodes.Const) else None
        node.arg = self.visit(node.arg)
        return self._field(node, field)

    def _field(self, node: nodes.Getattr | nodes.Getitem, field: Any) -> nodes.Node:
        """A field of something; messages themselves would show the order of their fields."""
        of, number = node.node, None
        if isinstance(of, nodes.Getitem) and _is_name(of.node, _MESSAGES):
            number = of.arg  # of another message
        if number is None and not _is_name(of, self._target):
            node.node = self.visit(of)
        elif type(field) is not str or (hasattr(dict, field) and field != "get"):
            raise _CannotTell
        elif number is not None:
            node.node = _call(_MESSAGE, self.visit(number))
        return node

    def _of_loop(self, node: nodes.Getattr) -> nodes.Expr:
        if self._inner or node.attr == "last":
            return node
        start = nodes.Name(_START, "load")
        if node.attr == "first":
            return nodes.And(nodes.Not(start), node)
        if node.attr in ("index", "index0"):
            return nodes.Add(node, start)
        raise _CannotTell

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        if node.op not in ("in", "notin") or not _is_name(node.expr, self._target):
            node.expr = self.visit(node.expr)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise _CannotTell
        node.iter = self.visit(node.iter)
        self.visit(node.target)
        self._inner += 1
        node.test = node.test and self.visit(node.test)
        node.body = [self.visit(inner) for inner in node.body]
        self._inner -= 1
        node.else_ = [self.visit(inner) for inner in node.else_]
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if _is_name(node.node, _RAISE):
            node.args = [self.visit(argument) for argument in node.args]
            return node
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        # "map" calls any filter by its name
        if node.name == "random" or (node.name == "map" and node.args):
            raise _CannotTell
        if node.name != "tojson":  # llama_cpp's own
            self._require_builtin(node.name, self._environment.filters, filters.FILTERS)
        return self.generic_visit(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        if node.name == "sameas":
            raise _CannotTell
        self._require_builtin(node.name, self._environment.tests, tests.TESTS)
        return self.generic_visit(node)

    def _require_builtin(self, name: str, known: dict[str, Any], builtin: dict[str, Any]) -> None:
        if name not in builtin or known.get(name) is not builtin[name]:
            raise _CannotTell
