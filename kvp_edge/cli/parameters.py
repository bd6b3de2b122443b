"""A command's options are the fields of a dataclass; typer is told of them here.

A field says all there is to say of its option: name, type, default, and in its metadata the help. A
command's dataclass inherits the options that it shares with others, those that come last in --help
from its first base, and may give one another default: ``temperature: float = 0.7``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

#: What --help shows as the value of a switch: it takes none.
NO_VALUE = ""


def option(default: Any, *names: str, **said: Any) -> Any:
    """A field for an option.

    Args:
        default: ``...``: the option must be given. ``()``: its type is a list, and it takes several
            values at once.
        names: derived from the field's if there are none.
        said: ``help``: what it does. ``panel``: the heading in --help that it stands under.
            ``metavar``: its value there. ``choices``: the only values there are. ``least``: the
            smallest number allowed. ``parse``: makes a value of what was typed, or raises
            ``typer.BadParameter``. ``shown``: the default in words; False: the help says all.
    """
    metadata = {"names": names, **said}
    if default == ():
        return field(default_factory=list, metadata=metadata)
    return field(default=MISSING if default is ... else default, metadata=metadata)


def argument(default: Any, **said: Any) -> Any:
    """A field for a value that is given without a name before it."""
    return option(default, argument=True, shown=False, **said)


def option_name(name: str) -> str:
    """The option of a field that names none."""
    return "--" + name.replace("_", "-")


def names_of(cls: type) -> dict[str, str]:
    """Field -> its option, of those that have one."""
    return {
        one.name: _names(cls, one)[-1]
        for one in fields(cls)
        if not _said(cls, one.name).get("argument")
    }


def several(cls: type) -> set[str]:
    """The names of the options of ``cls`` that take several values at once."""
    hints = get_type_hints(cls)
    lists = [one for one in fields(cls) if get_origin(hints[one.name]) is list]
    return {name for one in lists for name in _names(cls, one)}


def signature(cls: type) -> inspect.Signature:
    """The options of ``cls`` as the parameters of a function, for typer."""
    hints = get_type_hints(cls)
    return inspect.Signature([_parameter(cls, one, hints[one.name]) for one in fields(cls)])


def _parameter(cls: type, one: Field[Any], kind: Any) -> inspect.Parameter:
    said = _said(cls, one.name)
    default = one.default
    if one.default_factory is not MISSING:
        default = one.default_factory()
    nothing = default is False or default in ("", [])
    silent = default is MISSING or (nothing and "shown" not in said)
    how: dict[str, Any] = {
        "help": said["help"],
        "metavar": NO_VALUE if kind is bool else said.get("metavar"),
        "rich_help_panel": said.get("panel"),
        "show_default": not silent and said.get("shown", True),
    }
    info: Any
    if said.get("argument"):
        info = typer.Argument(**how)
    else:
        if kind is not bool:
            how["parser"] = said.get("parse") or reader(
                _type(kind), least=said.get("least"), choices=said.get("choices", ())
            )
        if (choices := said.get("choices")) and how["metavar"] is None:
            how["metavar"] = f"{{{','.join(choices)}}}"
        info = typer.Option(*_names(cls, one), **how)
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, info],
    )


def reader(
    kind: type, *, least: int | None = None, choices: Sequence[str] = ()
) -> Callable[[Any], Any]:
    """Makes a value of what was typed, or of a default."""

    def read(typed: Any) -> Any:
        try:
            value = kind(typed)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise typer.BadParameter(f"must be a {what}, not '{typed}'") from None
        if least is not None and value < least:
            raise typer.BadParameter(f"must be at least {least}, not {value}")
        if choices and value not in choices:
            raise typer.BadParameter(f"must be {', '.join(choices)}, not '{value}'")
        return value

    return read


def _type(kind: Any) -> type:
    """Of a value: of ``int | None``, and of ``list[int]``, it is int."""
    found: type = next((one for one in get_args(kind) if one is not type(None)), kind)
    return found


def _names(cls: type, one: Field[Any]) -> tuple[str, ...]:
    return _said(cls, one.name).get("names") or (option_name(one.name),)


def _said(cls: type, name: str) -> Any:
    """What a field's metadata say; those of a field without any are the inherited one's."""
    for base in cls.__mro__:
        one: Field[Any] | None = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if one is not None and one.metadata:
            return one.metadata
    raise TypeError(f"{cls.__name__}.{name} does not say what it is for")
