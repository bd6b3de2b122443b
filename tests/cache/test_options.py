"""An option of the cache is declared once: everything that knows it takes it from there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvp_edge import BudgetError, CacheOptions, Llama, OptionError, sessions
from kvp_edge.cache.options import EVALUATED, OPTIONS
from kvp_edge.evaluation import grouping
from kvp_edge.evaluation.records import Record
from kvp_edge.evaluation.setting import Setting
from options_table import renewed
from support.cli_options import options_of

ROOT = Path(__file__).resolve().parents[2]
Loader = Callable[..., Llama]
OWN = ("self", "model_path", "verbose", "kwargs")


def test_the_signature_of_llama_has_every_option() -> None:
    """For editors and readers it is written out."""
    parameters = inspect.signature(Llama.__init__).parameters
    got = [(p.name, p.annotation, p.default) for p in parameters.values() if p.name not in OWN]
    assert got == [(o.name, o.type, o.default) for o in OPTIONS.values()]


def test_llama_keeps_the_options_it_was_given(bundled_model: str, load: Loader) -> None:
    others = {"kv_budget": 80, "n_ctx": 900, "recent": 7, "granularity": "token", "sinks": 2}
    others["recall"] = "reply"
    assert load(bundled_model, **others).options == CacheOptions(**others)
    llm = load(bundled_model, granularity="head", recall="auto")
    assert llm.options == CacheOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        llm.options.sinks = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", [o.name for o in OPTIONS.values() if o.choices])
def test_choices_are_checked(name: str) -> None:
    for choice in OPTIONS[name].choices:
        assert getattr(CacheOptions(**{name: choice}), name) == choice
    with pytest.raises(OptionError) as refused:
        CacheOptions(**{name: "fish"})
    for word in (name, "'fish'", *map(repr, OPTIONS[name].choices)):
        assert word in str(refused.value)


@pytest.mark.parametrize("name", [o.name for o in OPTIONS.values() if o.type.startswith("int")])
def test_numbers_are_checked(name: str) -> None:
    assert getattr(CacheOptions(**{name: 2**31 - 1}), name) == 2**31 - 1
    with pytest.raises(BudgetError, match=name):
        CacheOptions(**{name: 2**31})
    with pytest.raises(TypeError, match=name):
        CacheOptions(**{name: 1.5})


def test_a_log_that_nobody_asks_is_refused() -> None:
    with pytest.raises(OptionError, match="kv_log='chat.kvlog' is for what recall brings back"):
        CacheOptions(kv_log="chat.kvlog", recall="off")
    with pytest.raises(BudgetError, match="recall_every must be at least 1 token, not 0"):
        CacheOptions(recall_every=0)
    with pytest.raises(BudgetError, match="kv_log_limit is memory, a text like '256MiB', not '2'"):
        CacheOptions(kv_log_limit="2")


def test_functions_are_checked() -> None:
    wrong: Any = "print"
    with pytest.raises(TypeError, match="on_evict must be a function, not 'print'"):
        CacheOptions(on_evict=wrong)


def test_defaults_are_among_the_choices_and_explained() -> None:
    for option in OPTIONS.values():
        assert option.help
        assert not option.choices or option.default in option.choices
        assert (option.default is None) == bool(option.means), option.name


@pytest.mark.parametrize("command", ["chat", "run"])
def test_the_command_line_has_every_option(command: str) -> None:
    """But for those that say that they are none of it."""
    there = options_of(command)
    for option in OPTIONS.values():
        assert (option.flag in there) == option.command_line, option.name


def test_evaluations_compare_every_option_that_says_so() -> None:
    there = options_of("eval")
    for name in EVALUATED:
        assert OPTIONS[name].flag in there
        for one in (Setting, Record):
            (field,) = (f for f in dataclasses.fields(one) if f.name == name)
            assert field.type == OPTIONS[name].type
            assert field.default in (dataclasses.MISSING, OPTIONS[name].default)
        assert name in grouping.Setting._fields
        assert name == "granularity" or name in grouping._UNUSUAL


def test_sessions_are_checked_against_every_option_that_says_so(
    bundled_model: str, load: Loader
) -> None:
    llm = load(bundled_model, kv_budget=80, n_ctx=900)
    settings = sessions.settings(llm)
    asked = {o.name for o in OPTIONS.values() if o.session == "asked"}
    assert len(asked) > 1
    assert {name: settings[name] for name in asked} == llm.options.asked_of_sessions()
    settled = {o.name for o in OPTIONS.values() if o.session == "settled"}
    # the limits stand for two of them, the types of keys and values for another
    stands_for = {"kv_budget": "budget", "kv_type": "type_k", "reserve": "cells"}
    assert {stands_for.get(name, name) for name in settled} <= settings.keys()
    assert not {o.name for o in OPTIONS.values() if o.session == "any"} & settings.keys()


def test_a_copy_is_asked_for_the_same(bundled_model: str, load: Loader) -> None:
    llm = load(bundled_model, kv_budget=80, n_ctx=900, keep_whole="words", recent=9)
    state = llm.__getstate__()
    assert {name: state[name] for name in OPTIONS} == llm.options.asked()


def test_the_readme_has_the_table() -> None:
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    assert renewed(before) == before, "run: python scripts/options_table.py"
    for name in OPTIONS:
        assert f"| `{name}` |" in before


def test_what_the_options_say_of_themselves_names_all_of_them() -> None:
    about = inspect.getdoc(CacheOptions)
    assert about is not None
    for option in OPTIONS.values():
        assert f"{option.name}: {option.help}" in " ".join(about.split()), option.name
    assert "CacheOptions" in (inspect.getdoc(Llama) or "")
