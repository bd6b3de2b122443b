"""What goes wrong is told in the words of the command line, and not in Python's."""

from __future__ import annotations

import argparse

import pytest

from kvp_edge.cli.option_names import with_options
from support.command_line import FEW_CELLS, Type

CHAT = argparse.Namespace(
    kv_budget="512", n_ctx=None, reserve=None, recent=None, granularity="head", type_k="f16"
)


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("kv_budget=100 is too little", "--kv-budget 100 is too little"),
        ("kv_budget=4.5MiB gives 256", "--kv-budget 4.5MiB gives 256"),
        ("context n_ctx=300: a larger n_ctx", "context --n-ctx 300: a larger --n-ctx"),
        ("use granularity='token', which", "use --granularity token, which"),
        ("Raise kv_budget to 9, or lower recent", "Raise --kv-budget to 9, or lower --recent"),
        ("raise reserve to 30", "raise --reserve to 30"),
        ("lower kv_budget or reserve", "lower --kv-budget or --reserve"),
        # ordinary words, what is an option already, and what the command has no option for
        ("the recent window, the reserve of 4", "the recent window, the reserve of 4"),
        ("(--kv-budget and --n-ctx)", "(--kv-budget and --n-ctx)"),
        ("lower n_batch, positions='keep'", "lower n_batch, positions='keep'"),
        ("my_n_ctx=3 and n_ctx_train", "my_n_ctx=3 and n_ctx_train"),
        ("", ""),
    ],
)
def test_arguments_become_options_and_ordinary_words_stay(sentence: str, told: str) -> None:
    assert with_options(sentence, CHAT) == told


def test_a_command_without_the_option_says_what_the_package_says() -> None:
    assert with_options("n_ctx=3", argparse.Namespace(length=4)) == "n_ctx=3"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--kv-budget", "100", "--recent", "150"],
            "Raise --kv-budget to 155 or more, or lower --",
        ),
        (["--kv-budget", "1KiB"], "--kv-budget 1KiB is too little"),
        (["--reserve", "0"], "reserve must be at least 1"),
        (
            ["--kv-budget", "9000", "--n-ctx", "20000", "--positions", "compact"],
            "--positions compact",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_options(
    kvp: Type, options: list[str], says: str
) -> None:
    got = kvp("chat", *options)
    assert got.status == 2
    assert says in got.err
    assert "_" not in got.err


def test_a_chat_names_options_too(kvp: Type) -> None:
    got = kvp("chat", *FEW_CELLS, "--n-ctx", "100", typed="many words " * 200 + "\n")
    assert "context --n-ctx 100: load the model with a larger --n-ctx" in got.err
