"""What docs/serve.md says is there is there, and its recipes work as they are written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kvp_edge.cli import chat, serve
from support.one_chat import assert_one_chat
from support.packages import needs
from support.paths import ROOT
from support.recipes import PAGE, Recipe, recipes
from support.server import Server

#: Each is run by a test of its client.
RUN = {
    ("curl", "sh"): 2,
    ("OpenAI", "python"): 1,
    ("LangChain", "python"): 1,
    ("LlamaIndex", "python"): 1,
    ("llm", "sh"): 1,
    ("Tools and JSON", "python"): 1,
}


def test_every_recipe_of_the_page_is_run_by_a_test() -> None:
    assert {key: len(blocks) for key, blocks in recipes().items()} == RUN


def test_its_options_and_their_defaults_are_those_of_the_command() -> None:
    there = {one.name: one.default for one in fields(serve.Options)}
    own = there.keys() - {one.name for one in fields(chat.Options)}
    told = set()
    for row, default in re.findall(r"(?m)^\| (`--.*?) \|.*\| (.*?) \|$", PAGE.read_text()):
        for option in re.findall("`--([a-z-]+)`", row):
            name = option.replace("-", "_")
            told.add(name)
            assert name in there
            assert there[name] in (None, False) or str(there[name]) in default + " 127.0.0.1"
    assert own <= told


def test_its_metrics_are_those_of_the_server(server: Server) -> None:
    told = set(re.findall(r"`(kvp_[a-z_]+)`", PAGE.read_text()))
    there = set(re.findall(r"(?m)^# TYPE (kvp_\w+) \w+$", server.ask("/metrics").body))
    assert told == {name for name in there if not name.endswith("_created")}


def test_the_lines_at_its_start_are_what_the_server_says(server: Server) -> None:
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", PAGE.read_text())
    (said,) = (text for language, text in blocks if not language)
    assert said.replace("http://127.0.0.1:8080", server.url) in server.said


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@needs_curl
def test_curl_gets_a_reply(server: Server) -> None:
    recipe = Recipe(server, "curl", "sh")
    reply = json.loads(recipe.shell())
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["chat_id"] == assert_one_chat(server, recipe.first, 2)


@needs_curl
def test_curl_gets_a_stream_that_ends(server: Server) -> None:
    recipe = Recipe(server, "curl", "sh", which=1)
    *events, nothing = recipe.shell().replace("\r\n", "\n").split("\n\n")
    assert nothing == ""
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["kv_cache"]["seen"] > 0
    (chat,) = {chunk["chat_id"] for chunk in chunks}
    assert chat == assert_one_chat(server, recipe.first, 2)
    assert server.ask(f"/kvp/chats/{chat}").body["messages"][1]["content"] == said


def test_openais_client_goes_on_with_its_chat(server: Server) -> None:
    needs("openai", "dev")
    recipe = Recipe(server, "OpenAI", "python")
    printed, names = recipe.python()
    chat = assert_one_chat(server, recipe.first, 4)
    assert 20 < names["cached"] < names["reply"].usage.prompt_tokens
    assert f"chat {chat}: {names['cached']} of" in printed


def test_a_schema_of_pydantics_is_filled_in(server: Server) -> None:
    needs("openai", "dev")
    _, names = Recipe(server, "Tools and JSON", "python").python()
    parsed = names["parsed"].choices[0].message.parsed
    assert isinstance(parsed, names["Code"])
    assert parsed.place in ("harbour", "lighthouse")


# -- without a server -----------------------------------------------------------------------------


def test_the_notebook_goes_on_where_it_ended(tmp_path: Path, book: str) -> None:
    """docs/examples/notebook.py, with more told than fits into its cells."""
    file = tmp_path / "notes.kvp"

    def run(*lines: str) -> tuple[list[str], str]:
        command = [sys.executable, str(ROOT / "docs/examples/notebook.py"), str(file)]
        done = subprocess.run(
            command,
            input="\n".join([*lines, "", ""]),
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env={**os.environ, "OMP_THREAD_LIMIT": "1"},  # the cores may be busy
        )
        return done.stdout.splitlines(), done.stderr

    told = "The code for the harbour is 4711. Please remember it."
    pages = " ".join(book[20_000:22_900].split())
    first, said = run(told, pages)
    assert first[0] == "For the harbour: 4711."
    assert said.startswith("0 messages so far")
    second, said = run("What is the code for the harbour?")
    assert said.startswith("4 messages so far")
    assert "4711" in second[0]
    assert re.search(r"\((\d+) dropped tokens came back for this reply\)", said)
    kept, seen = map(int, re.search(r"\((\d+) of (\d+) tokens are in the cells", said).groups())
    assert kept < seen
