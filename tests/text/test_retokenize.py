"""The same text in other tokens is not read again."""

from __future__ import annotations

from collections.abc import Callable

import kvp_edge
from kvp_edge.text.retokenize import begin_as_known

PIECES = {1: b"a", 2: b"b", 3: b"ab", 4: b"c", 5: b"bc", 6: b"", 7: b"abc"}


def begin(known: list[int], tokens: list[int]) -> list[int]:
    result = begin_as_known(known, tokens, PIECES.__getitem__)
    text, wanted = (b"".join(PIECES[t] for t in ts) for ts in (result, tokens))
    assert text == wanted
    return result


def test_another_spelling_of_the_same_text_becomes_the_known_one() -> None:
    assert begin([1, 2, 4], [3, 4, 2]) == [1, 2, 4, 2]


def test_it_ends_where_the_texts_part() -> None:
    assert begin([1, 2, 4, 1], [3, 4, 2]) == [1, 2, 4, 2]


def test_it_ends_at_the_last_boundary_that_both_have() -> None:
    assert begin([1, 2, 4], [1, 5, 2]) == [1, 2, 4, 2]
    assert begin([1, 2], [1, 5]) == [1, 5]
    assert begin([7], [3, 1]) == [3, 1]


def test_nothing_known_or_nothing_new_changes_nothing() -> None:
    assert begin([], [1, 2]) == [1, 2]
    assert begin([1, 2], []) == []


def test_tokens_without_text_do_no_harm() -> None:
    assert begin([6, 1, 6, 2], [3, 4]) in ([6, 1, 6, 2, 4], [3, 4])


def test_after_an_eviction_a_reply_in_odd_tokens_is_not_read_again(
    load: Callable[..., kvp_edge.Llama], bundled_model: str
) -> None:
    llm = load(bundled_model, n_ctx=4096, kv_budget=64, recent=16)
    # letter by letter, as no tokenizer would write it
    letters = [llm.tokenize(bytes([c]), add_bos=False)[0] for c in b"the sea and the hill " * 40]
    prompt = llm.tokenize(b"<|user|>Hello.<|end|><|assistant|>", add_bos=True, special=True)
    llm.eval([*prompt, *letters])
    assert llm.kv_stats.dropped > 0

    text = llm.detokenize(letters)
    ordinary = [*prompt, *llm.tokenize(text, add_bos=False)]
    assert len(ordinary) < len(prompt) + len(letters)
    more = llm.tokenize(b"<|end|><|user|>What?<|end|><|assistant|>", add_bos=False, special=True)
    evictions, seen = llm.kv_stats.evictions, llm.kv_stats.seen
    next(llm.generate([*ordinary, *more], temp=0))
    assert llm.kv_stats.seen == seen + len(more)
    assert llm.kv_stats.evictions == evictions
