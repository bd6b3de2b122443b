"""The command llm as a client of the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.one_chat import (
    QUESTION,
    Turn,
    assert_nothing_was_read_twice,
    assert_one_chat,
)
from support.packages import needs
from support.recipes import Recipe
from support.server import Server

pytestmark = pytest.mark.recipes

needs("llm", "recipes")


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """Of the environment: llm's own folder, and where the command is."""
    command = tmp_path / "bin" / "llm"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m llm \"$@\"\n")
    command.chmod(0o755)
    folder = tmp_path / "llm"
    folder.mkdir()
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return {"LLM_USER_PATH": str(folder), "PATH": path}


def llm(variables: dict[str, str], *argv: str) -> str:
    done = subprocess.run(
        ["llm", *argv], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_recipe_goes_on_with_its_chat(server: Server, variables: dict[str, str]) -> None:
    recipe = Recipe(server, "llm", "sh")
    first, second = recipe.shell(**variables).strip().split("\n")
    assert first
    assert second
    chat = assert_one_chat(server, recipe.first, 4)
    said = [m["content"] for m in server.ask(f"/kvp/chats/{chat}").body["messages"]]
    assert said == [recipe.first, first, QUESTION, second]
    llm(variables, "-c", "--no-stream", "Thank you.")
    assert chat == assert_one_chat(server, recipe.first, 6)
    assert_nothing_was_read_twice(
        map(turn, json.loads(llm(variables, "logs", "--json", "-n", "0")))
    )


def turn(logged: dict[str, Any]) -> Turn:
    usage = logged["response_json"]["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Turn(usage["prompt_tokens"], cached, usage["completion_tokens"])
