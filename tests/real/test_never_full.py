"""A cache that is never full changes nothing: what is written is llama_cpp's, token for token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvp_edge import Llama
from makers.plain_llama import PlainLlama
from support.cache_types import CACHE_TYPES
from support.real_models import ALL, PLAIN

pytestmark = pytest.mark.real

TURNS = [
    "My dog is called Rex and he is afraid of thunder.",
    "Name two things that I could do for him.",
    "What is my dog called?",
]
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
}
QUIET: dict[str, Any] = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}


def kind(types: str) -> dict[str, Any]:
    type_k, type_v, flash_attn = CACHE_TYPES[types]
    return {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("types", "sampling"), [("f16", "greedy"), ("f16-fa", "seeded"), ("q8_0-fa", "greedy")]
)
def test_a_chat_in_a_cache_that_is_never_full_is_llama_cpps(
    name: str, types: str, sampling: str, real_model: Callable[[str], str]
) -> None:
    said = []
    for llm in (
        Llama(real_model(name), n_ctx=2048, kv_budget=768, **kind(types), **QUIET),
        PlainLlama(real_model(name), n_ctx=2048, **kind(types), **QUIET),
    ):
        messages: list[Any] = []
        usage = []
        for turn in TURNS:
            messages.append({"role": "user", "content": turn})
            reply: Any = llm.create_chat_completion(messages, max_tokens=24, **SAMPLING[sampling])
            messages.append(reply["choices"][0]["message"])
            usage.append(reply["usage"])
        said.append((messages, usage, llm.input_ids[: llm.n_tokens].tolist()))
        llm.close()
    assert said[0] == said[1]
    assert len({m["content"] for m in said[0][0]}) == 6  # something was said each time


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("granularity", "types", "sampling"),
    [
        ("head", "f16", "seeded"),
        ("head", "f16-fa", "greedy"),
        ("head", "q8_0-f16", "greedy"),
        ("head", "q8_0-fa", "seeded"),
        ("token", "f16", "greedy"),
    ],
)
def test_a_text_is_continued_as_by_llama_cpp(
    name: str,
    types: str,
    granularity: str,
    sampling: str,
    real_model: Callable[[str], str],
    book: str,
) -> None:
    """Also at the limit: the last token that is read fills the last cell."""
    path = real_model(name)
    bounded = Llama(
        path, n_ctx=4096, kv_budget=200, recent=20, reserve=56, n_batch=56,
        granularity=granularity, **kind(types), **QUIET,
    )  # fmt: skip
    # in batches of another size sums are taken in another order, and rounding decides some choices
    n_ctx = bounded.kv_stats.cells + 256  # the prompt and one token more than the cells hold
    plain = PlainLlama(path, n_ctx=n_ctx, n_batch=56, **kind(types), **QUIET)
    cells, written = bounded.kv_stats.cells, 16
    prompt = plain.tokenize(book[:4000].encode(), add_bos=True)[: cells - written + 1]
    options = {"max_tokens": written, **SAMPLING[sampling]}
    got, want = (llm.create_completion(prompt, **options) for llm in (bounded, plain))
    assert got["choices"] == want["choices"]
    assert got["usage"] == want["usage"]
    assert bounded.kv_stats.kept == cells
    assert bounded.kv_stats.evictions == 0
    bounded.eval([int(bounded.input_ids[cells - 1])])
    assert bounded.kv_stats.evictions == 1
    for llm in (bounded, plain):
        llm.close()
