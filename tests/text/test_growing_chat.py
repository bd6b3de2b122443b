"""A chat that went on is not rendered again, and its text is what the whole template gives."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from kvp_edge import Llama
from kvp_edge.text.growing_chat import remember_messages
from support.properties import examples

Loader = Callable[..., Llama]
Message = dict[str, Any]
Render = Callable[..., str]

QWEN = """
{%- if tools %}{{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- tool_call.name }}{{- tool_call.arguments | tojson }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

REMEMBERED = {"qwen": QWEN, "gemma": GEMMA, "llama-3": LLAMA3, "smollm": SMOL}


def loop(body: str, head: str = "", over: str = "messages") -> str:
    return (
        head + "[{% for message in " + over + " %}" + body + "{% endfor %}]{{ messages[-1].role }}"
    )


SHOW = "{{ message.role }}{{ message.content }}"

#: What a loop's body may do whose text is not that of its message and number alone.
DEPENDENT = {
    "counts": loop("{% set ns.n = ns.n + 1 %}{{ ns.n }}" + SHOW, "{% set ns = namespace(n=0) %}"),
    "remembers in an object": loop("{{ c.next() }}" + SHOW, "{% set c = cycler('a', 'b') %}"),
    "looks back from the end": loop("{{ messages[-1].content }}" + SHOW),
    "looks back before the first": loop("{{ messages[loop.index0 - 2].content }}" + SHOW),
    "looks ahead": loop("{{ messages[loop.index0 + 3].content }}" + SHOW),
    "looks at a place far on": loop("{{ messages[9].content }}" + SHOW),
    "knows how many there are": loop("{{ loop.length }}{{ loop.revindex }}" + SHOW),
    "counts all messages": loop("{{ messages | length }}" + SHOW),
    "goes over all messages": loop("{% for m in messages %}{{ m.role }}{% endfor %}" + SHOW),
    "cuts the list": loop("{{ messages[:-1] | length }}" + SHOW),
    "looks at the next one": loop("{{ loop.nextitem }}{{ loop.previtem }}" + SHOW),
    "stops": loop("{% if message.content == 'b' %}{% break %}{% endif %}" + SHOW),
    "is told by the head": loop("{{ n }}" + SHOW, "{% set n = messages | length %}"),
    "is told by the head, of the last one": loop(
        "{% if message.content == last %}!{% endif %}" + SHOW,
        "{% set last = messages[-1].content %}",
    ),
    "calls a macro of the head": loop(
        "{{ show() }}" + SHOW, "{% macro show() %}{{ messages | length }}{% endmacro %}"
    ),
    "tells the tail": "{% set ns = namespace() %}"
    + loop("{% if loop.first %}{% set ns.x = message.content %}{% endif %}" + SHOW)
    + "{{ ns.x }}",
    "shows tools": loop("{{ tools | tojson }}" + SHOW),
    "shows the whole message": loop("{{ message }}"),
    "shows the whole message as JSON": loop("{{ message | tojson }}"),
    "shows keys": loop("{{ message | tojson }}{{ message.keys() | list }}{{ message }}"),
    "shows another one's keys": loop("{{ messages[0] }}" + SHOW),
    "goes on in a tail": loop(SHOW, over="messages") + "{% for m in messages %}{{ m }}{% endfor %}",
    "chooses": loop(SHOW, over="(messages if bos_token else [])"),
    "skips": loop(SHOW, over="messages[1:]"),
    "skips by a test": "{% for message in messages if message.role != 'user' %}"
    + SHOW
    + "{{ loop.index }}{% endfor %}",
    "goes backwards": loop(SHOW, over="messages[::-1]"),
    "the last ones only": loop(SHOW, over="messages[-3:]"),
    "sets for one item": loop(
        "{% if loop.first %}{% set x = 1 %}{% endif %}{{ x }}{% set y = x %}{{ y }}" + SHOW,
        "{% set x = bos_token %}",
    ),
    "uses before it sets": loop("{{ z }}{% set z = loop.index %}{{ z }}" + SHOW),
    "continues": loop("{% if loop.index is odd %}{% continue %}{% endif %}" + SHOW),
    "an inner loop": loop(
        "{% for c in message.content %}{{ loop.index }}{{ loop.last }}{% endfor %}{{ loop.index }}"
    ),
    "is the last": loop("{{ loop.last }}{{ loop.first }}{{ loop.index }}" + SHOW),
    "fails": loop("{% if message.content == 'b' %}{{ raise_exception('b') }}{% endif %}" + SHOW),
    "asks for other fields": loop("{{ message.get('name') }}{{ 'name' in message }}" + SHOW),
    "a field that is a method": loop("{{ message.items }}{{ message['values'] }}"),
    "no loop": "{{ messages | map(attribute='content') | join(',') }}",
    "filters": loop("{{ message.content | upper | replace('A', bos_token) | tojson }}"),
    "a name of ours": loop("{{ kvp_chat_start }}" + SHOW),
}


def renders(template: str) -> tuple[Render, Render]:
    """By the whole template, and by one that remembers."""
    both = []
    for remember in (False, True):
        formatter = Jinja2ChatFormatter(template=template, eos_token="</s>", bos_token="<s>")
        if remember:
            remember_messages(formatter.to_chat_handler())
        both.append(formatter)
    whole, growing = both

    def text(formatter: Jinja2ChatFormatter, **how: Any) -> str:
        try:
            return str(formatter(**how).prompt)
        except ValueError as error:
            return f"refused: {error}"

    return lambda **how: text(whole, **how), lambda **how: text(growing, **how)


def texts(n: int, system: bool = False) -> list[Message]:
    roles = ("user", "assistant")
    first = [{"role": "system", "content": "Be brief."}] if system else []
    return first + [{"role": roles[i % 2], "content": f" My dog {i} is Rex."} for i in range(n)]


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]),
            "content": st.sampled_from(["a", "b", "", " c\n", "1", None, 1, True, ["a"]]),
        },
        optional={"name": st.sampled_from(["Rex", None])},
    ),
    min_size=1,
    max_size=3,
)

TOOLS = [None, None, [{"a": 1, "b": 1}], [{"b": 1, "a": 1}], [{"a": True, "b": 1}]]


@pytest.mark.parametrize("name", [*REMEMBERED, *DEPENDENT])
def test_the_text_is_that_of_the_whole_template_however_the_chat_grew_and_was_edited(
    name: str,
) -> None:
    @examples(40)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        whole, growing = renders({**REMEMBERED, **DEPENDENT}[name])
        messages: list[Message] = []
        for _ in range(data.draw(st.integers(2, 6))):
            what = data.draw(st.sampled_from(["grow", "grow", "grow", "cut", "edit", "order"]))
            if what == "cut":
                del messages[data.draw(st.integers(0, len(messages))) :]
            elif what == "edit" and messages:
                at = data.draw(st.integers(0, len(messages) - 1))
                messages[at]["content"] = data.draw(st.sampled_from(["a", "b", True, 1]))
            elif what == "order" and messages:
                messages[0] = dict(reversed(messages[0].items()))
            messages += data.draw(MESSAGES)
            tools = data.draw(st.sampled_from(TOOLS))
            before = copy.deepcopy(messages)
            want = _or_error(whole, messages=messages, tools=tools)
            assert _or_error(growing, messages=messages, tools=tools) == want
            assert messages == before

    check()


def _or_error(render: Render, **how: Any) -> str:
    try:
        return render(**how)
    except Exception as error:  # of jinja2, from what no template expects
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", REMEMBERED)
def test_common_templates_show_old_messages_once(name: str, system: bool) -> None:
    whole, growing = renders(REMEMBERED[name])
    messages = texts(1, system)
    counts = []
    for n in range(1, 302, 2):
        messages += texts(n + 2)[n:]
        assert growing(messages=messages) == whole(messages=messages)
        if n in (51, 301):
            counts.append(calls(growing, messages=messages))
    assert counts[0] == counts[1]
    assert calls(whole, messages=messages) > 2 * counts[1]


@pytest.mark.parametrize(
    "body",
    [
        "{{ ['a', 'b'] | random }}",
        "{{ [['a', 'b']] | map('random') | first }}",
        "{{ strftime_now('%s') }}",
        "{{ message.content is sameas messages[0].content }}",
    ],
)
def test_what_is_another_text_every_time_is_shown_every_time(body: str) -> None:
    _, growing = renders(loop(body))
    counts = []
    for n in (51, 301):
        growing(messages=texts(n))
        counts.append(calls(growing, messages=texts(n)))
    assert counts[1] > counts[0] + 200


def test_an_earlier_message_that_was_edited_in_place_is_shown_anew() -> None:
    whole, growing = renders(SMOL)
    messages = texts(21)
    assert growing(messages=messages) == whole(messages=messages)
    messages[3]["content"] = "Who?"
    assert growing(messages=messages) == whole(messages=messages)
    assert "Who?" in growing(messages=messages)


def calls(function: Callable[..., Any], **how: Any) -> int:
    """How many functions are called meanwhile."""
    n = 0

    def count(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function(**how)
    finally:
        sys.setprofile(before)
    return n


def test_a_turn_is_as_much_work_after_500_turns_as_after_50(
    bundled_model: str, load: Loader
) -> None:
    llm = load(bundled_model, n_ctx=100_000, kv_budget=256, positions="compact", n_threads=1)
    messages: list[Message] = []
    work: dict[int, int] = {}

    def turn() -> None:
        llm.create_chat_completion(messages, max_tokens=1, temperature=0.0)

    for n in (50, 500):
        messages[:] = texts(2 * n)
        turn()
        counts = []
        for i in range(12):  # some have an eviction in them
            messages.append({"role": "user", "content": f" My dog {i % 10} is Rex. Who?"})
            counts.append(calls(turn))
            messages.append({"role": "assistant", "content": "I"})
        work[n] = min(counts)
    assert work[500] <= 1.05 * work[50]
