"""Chats as people have them, with models that people use, in caches small enough to evict."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LlamaGrammar

from kvp_edge import Llama
from kvp_edge.cache.recall import RecallSettings
from support.command_line import Terminal, Type

pytestmark = pytest.mark.real

Real = Callable[[str], str]
DAY = "On day 7 they walked past the mill and later wrote down what was said near the ferry. "
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
            },
        },
    }
]
#: What a recall brings back, the newest tokens are read on, each time that they ask.
READINGS = 1 + RecallSettings().passes
FORCED: Any = {"type": "function", "function": {"name": "get_weather"}}


class Reading(Llama):
    """Counts the tokens of prompts that are read."""

    read = 0

    def eval(self, tokens: Any) -> None:
        if len(tokens) > 1:
            self.read += len(tokens)
        super().eval(tokens)


def load(path: str, **options: Any) -> Any:
    small = {"n_ctx": 8192, "kv_budget": 128, "reserve": 128, "verbose": False}
    threads = {"n_threads": 1, "n_threads_batch": 1}
    return closing(Reading(path, **{**small, **threads, **options}))


def complete(llm: Llama, messages: Any, *, stream: bool = False, **how: Any) -> Any:
    """(content, arguments of the tool called, finish reason); a stream is put together."""
    result = llm.create_chat_completion(messages, stream=stream, temperature=0, **how)
    if not stream:
        choice = result["choices"][0]
        message = choice["message"]
        calls = message.get("tool_calls") or []
        arguments = "".join(call["function"]["arguments"] for call in calls)
        return message["content"] or "", arguments, choice["finish_reason"]
    content = arguments = ""
    for chunk in result:
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            arguments += call["function"]["arguments"]
        reason = chunk["choices"][0]["finish_reason"]
    assert chunk["kv_cache"]["seen"] == llm.kv_stats.seen
    return content, arguments, reason


@pytest.mark.parametrize("chat_format", [None, "chatml-function-calling"])
def test_tools_are_called_and_their_results_read_across_evictions(
    real_model: Real, chat_format: str | None
) -> None:
    events: list[Any] = []  # a conversation that is read again begins to count anew
    with load(
        real_model("qwen"),
        kv_budget=288,
        chat_format=chat_format,
        protect_system=True,
        on_evict=events.append,
    ) as llm:
        question = {"role": "user", "content": DAY * 16 + "What is the weather in Paris? (celsius)"}
        messages: list[Any] = [{"role": "system", "content": "You answer briefly."}, question]
        once = complete(llm, messages, tools=TOOLS, tool_choice=FORCED, max_tokens=60)
        assert llm.kv_stats.evictions > 0
        assert json.loads(once[1]) == {"city": "Paris", "unit": "celsius"}
        again = complete(llm, messages, tools=TOOLS, tool_choice=FORCED, max_tokens=60, stream=True)
        assert again[1] == once[1]

        call = {"name": "get_weather", "arguments": once[1]}
        messages += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": json.dumps({"log": DAY * 10})},
            {"role": "user", "content": DAY * 16 + "So, how is it?"},  # a format may hide results
        ]
        evictions = len(events)
        content, arguments, reason = complete(llm, messages, tools=TOOLS, max_tokens=8)
        assert len(events) > evictions
        assert content or arguments
        assert reason in ("stop", "length", "tool_calls")

        messages += [
            {"role": "assistant", "content": content},
            {"role": "user", "content": "And in Rome?"},
        ]
        llm.read, seen = 0, llm.n_tokens
        assert complete(llm, messages, tools=TOOLS, max_tokens=8, stream=True)
        assert llm.read < 100 < seen  # only what is new


@pytest.mark.parametrize("name", ["smollm2", "qwen"])
def test_json_schemas_and_grammars_hold_across_evictions(real_model: Real, name: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "tags": {
                "type": "array",
                "items": {"type": "string", "maxLength": 8},
                "minItems": 2,
                "maxItems": 2,
            },
        },
        "required": ["name", "tags"],
    }
    grammar = LlamaGrammar.from_string('root ::= ("yes" | "no") "."', verbose=False)
    with load(real_model(name)) as llm:
        messages = [{"role": "user", "content": DAY * 12 + "Describe a fruit as JSON."}]
        how = {"response_format": {"type": "json_object", "schema": schema}, "max_tokens": 80}
        content, _, _ = complete(llm, messages, **how)
        assert llm.kv_stats.evictions > 0
        fruit = json.loads(content)
        assert isinstance(fruit["name"], str)
        assert len(fruit["tags"]) == 2
        llm.reset()  # a prompt read in another batch is rounded otherwise
        assert complete(llm, messages, stream=True, **how)[0] == content
        messages += [
            {"role": "assistant", "content": content},
            {"role": "user", "content": "Is it sweet?"},
        ]
        llm.read = 0
        assert complete(llm, messages, grammar=grammar, max_tokens=8)[0] in ("yes.", "no.")
        assert llm.read < 60 * READINGS


def test_a_system_prompt_survives_long_code_and_many_evictions(real_model: Real) -> None:
    system = "You are Captain Brask of the ferry Halcyon. You always sign with your name."
    code = Path(__file__).parents[2].joinpath("kvp_edge", "cache", "manager.py").read_text()[:2600]
    with load(real_model("smollm2"), protect_system=True) as llm:
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": f"My code:\n```python\n{code}\n```\nWhat does it do?"},
        ]
        reply, _, _ = complete(llm, messages, max_tokens=8)
        assert llm.kv_stats.evictions > 3
        held = llm.kv_indices.reshape(-1, llm.kv_indices.shape[-1])
        head = llm.tokenize(f"<|im_start|>system\n{system}".encode(), add_bos=False, special=True)
        assert llm.input_ids[: len(head)].tolist() == head
        for positions in held:
            assert positions[: len(head)].tolist() == list(range(len(head)))
        messages += [
            {"role": "assistant", "content": reply},
            {"role": "user", "content": "Who are you?"},
        ]
        llm.read, evictions = 0, llm.kv_stats.evictions
        complete(llm, messages, max_tokens=4)
        assert llm.read < 40 * READINGS
        assert llm.kv_stats.evictions - evictions <= 1


def test_a_reply_cut_inside_a_character_is_whole_text_and_is_gone_on_from(
    real_model: Real,
) -> None:
    question = "Repeat: 👩‍👩‍👧‍👦🏴‍☠️ 北京"
    with load(real_model("qwen")) as llm:
        messages = [{"role": "user", "content": f"{DAY * 12}{question}"}]
        whole, _, _ = complete(llm, messages, max_tokens=10)
        assert llm.kv_stats.evictions > 0
        cuts = []
        for n in range(1, 10):
            cuts.append(complete(llm, messages, max_tokens=n, stream=n % 2 == 0)[0])
            assert whole.startswith(cuts[-1])
        assert len(set(cuts)) < len(cuts)  # a token more was no character more
        inside = next(a for a, b in pairwise(cuts) if a == b)
        complete(llm, messages, max_tokens=cuts.index(inside) + 2)
        messages += [
            {"role": "assistant", "content": inside},
            {"role": "user", "content": "请再说一遍。 اكتب"},
        ]
        llm.read = 0
        assert "\N{REPLACEMENT CHARACTER}" not in complete(llm, messages, max_tokens=4)[0]
        assert llm.read < 60
        text = llm.detokenize(llm.input_ids[: llm.n_tokens].tolist(), special=True)
        assert question.encode() in text
        assert f"<|im_start|>assistant\n{inside}<|im_end|>".encode() in text


def test_ctrl_c_inside_a_reply_of_another_script_leaves_a_chat_that_goes_on(
    real_model: Real, terminal: Callable[..., Terminal]
) -> None:
    model = real_model("qwen")
    t = terminal("chat", model, "--kv-budget", "256", "--threads", "1", "--max-tokens", "400")
    t.read_until("> ", 300)
    t.type("请用中文写一个很长的故事。\n")
    t.read_until("。", 300)
    t.type("\x03")
    assert "\N{REPLACEMENT CHARACTER}" not in t.read_until("t/s]", 300)
    t.read_until("> ", 300)
    t.type("/undo\n")
    assert "请用中文写一个很长的故事。" in t.read_until("> ", 300)
    t.type("/exit\n")
    assert t.exit_status() == 0


def test_a_base_model_chats_as_a_transcript_and_run_continues_its_text(
    kvp: Type, real_model: Real
) -> None:
    model = real_model("gemma")
    few = ["--threads", "1", "--temperature", "0", "--max-tokens", "24"]
    told = "My dog is called Rex and I live in Oslo.\nWhat is my dog called?\n"
    got = kvp("chat", model, *few, typed=told)
    assert got.status == 0
    assert "has no chat template, so it reads the conversation as a transcript" in got.err
    assert "Rex" in got.replies[-1]
    assert not any("User:" in reply or reply.startswith(" ") for reply in got.replies)
    assert got.stats[1]["read"] < 30
    got = kvp("run", model, *few, "-p", "The three primary colours are red, blue and")
    assert got.status == 0
    assert "continues the text" in got.err
    assert got.out.strip()
