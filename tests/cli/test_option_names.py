"""Messages name what was typed: options, not Python's arguments."""

from __future__ import annotations

import pytest

from kvp_edge.cli import chat, inspect, train
from kvp_edge.cli.option_names import as_options
from support.command_line import FEW_CELLS, Type


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "kv_budget=5 must be larger than sinks + recent = 4 + 1 = 5. Raise kv_budget to 6 or "
            "more, or lower recent",
            "--kv-budget 5 must be larger than sinks + recent = 4 + 1 = 5. Raise --kv-budget to 6 "
            "or more, or lower --recent",
        ),
        ("positions='compact' needs n_ctx.", "--positions compact needs --n-ctx."),
        ("not with isolate_turns=True (n_ctx=7)", "not with --isolate-turns (--n-ctx 7)"),
        ("n_threads must be from 1 to 512", "--threads must be from 1 to 512"),
        ("sinks, recent and pack must be", "--sinks, --recent and --pack must be"),
        ("kv_budget=100 is too small", "--kv-budget 100 is too small"),
        ("kv_budget=4.5MiB gives 256", "--kv-budget 4.5MiB gives 256"),
        ("context n_ctx=300: a larger n_ctx", "context --n-ctx 300: a larger --n-ctx"),
        ("use granularity='token', which", "use --granularity token, which"),
        ("raise reserve to 30", "raise --reserve to 30"),
        ("lower kv_budget or reserve", "lower --kv-budget or --reserve"),
        # words of English, and of others
        ("the recent window, the reserve of 4", "the recent window, the reserve of 4"),
        ("(--kv-budget and --n-ctx)", "(--kv-budget and --n-ctx)"),
        ("lower n_batch, length=3", "lower n_batch, length=3"),
        ("my_n_ctx=3 and n_ctx_train", "my_n_ctx=3 and n_ctx_train"),
        ("", ""),
        ("the policy is for another model", "the policy is for another model"),
        ("model file 'my n_ctx=3' not found", "model file 'my n_ctx=3' not found"),
        ("cannot read 'n_ctx.txt' or ./n_ctx", "cannot read 'n_ctx.txt' or ./n_ctx"),
        ("recent messages are kept", "recent messages are kept"),
        ("with policy = keydiff", "with policy = keydiff"),
        ("eval_every, n_ctx_train and my_n_ctx", "eval_every, n_ctx_train and my_n_ctx"),
    ],
)  # fmt: skip
def test_a_message_names_the_options_of_chat(message: str, told: str) -> None:
    assert as_options(message, chat.Options) == told


def test_every_command_has_names_of_its_own() -> None:
    assert (
        as_options("steps, states, tokens and eval_every must be at least 1", train.Options)
        == "--steps, --states, --tokens and --eval-every must be at least 1"
    )
    assert (
        as_options("effort belongs to objective kvp or foresight, not global", train.Options)
        == "--effort belongs to objective kvp or foresight, not global"
    )
    assert as_options("file must be one; n_ctx=3", inspect.Options) == "file must be one; n_ctx=3"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--kv-budget", "100", "--recent", "150"],
            "Raise --kv-budget to 155 or more, or lower --",
        ),
        (["--kv-budget", "1KiB"], "--kv-budget 1KiB is too small"),
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
