"""The baseline does what llama.cpp's server does with a full context."""

from __future__ import annotations

from collections.abc import Iterator

import llama_cpp
import numpy as np
import pytest

from kvp_edge.bundled import bundled_model
from kvp_edge.llamacpp.context_shift import ContextShift

CELLS = 256
N_KEEP = 1  # llama.cpp's default keeps nothing but the token that begins the text


@pytest.fixture(scope="module")
def model() -> Iterator[llama_cpp.Llama]:
    llm = llama_cpp.Llama(bundled_model(), n_ctx=CELLS, n_batch=64, verbose=False)
    yield llm
    llm.close()


@pytest.fixture
def shift(model: llama_cpp.Llama) -> ContextShift:
    shift = ContextShift(model)
    shift.reset()
    return shift


def text(n: int) -> list[int]:
    return [0, *np.random.default_rng(0).integers(300, 1500, n - 1).tolist()]


def newest_position(llm: llama_cpp.Llama) -> int:
    return int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0))


def last_logits(llm: llama_cpp.Llama) -> np.ndarray:
    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(logits, shape=(llm.n_vocab(),)).copy()


def server_rule(n_tokens: int, cells: int, n_keep: int) -> tuple[list[int], int]:
    """Indices of the text that are held after reading, and shifts, one token at a time as
    tools/server/server-context.cpp does it: shift if n_tokens + 1 >= n_ctx."""
    held: list[int] = []
    shifts = 0
    for i in range(n_tokens):
        if len(held) + 1 >= cells:
            discard = (len(held) - n_keep) // 2
            held = held[:n_keep] + held[n_keep + discard :]
            shifts += 1
        held.append(i)
    return held, shifts


def test_nothing_happens_before_the_context_is_full(
    model: llama_cpp.Llama, shift: ContextShift
) -> None:
    tokens = text(CELLS - 1)
    shift.read(tokens)
    logits = last_logits(model)
    assert (shift.shifts, shift.dropped, model.n_tokens) == (0, 0, CELLS - 1)

    model.reset()
    model.eval(tokens)
    np.testing.assert_allclose(logits, last_logits(model), atol=1e-4)


@pytest.mark.parametrize("n", [CELLS, CELLS + 127, CELLS + 128, 1000])
def test_the_tokens_held_are_those_of_the_servers_rule(
    model: llama_cpp.Llama, shift: ContextShift, n: int
) -> None:
    tokens = text(n)
    shift.read(tokens)
    held, shifts = server_rule(n, CELLS, N_KEEP)
    assert model.input_ids[: model.n_tokens].tolist() == [tokens[i] for i in held]
    assert (shift.shifts, shift.dropped) == (shifts, n - len(held))


def test_positions_are_moved_up_to_close_the_gap(
    model: llama_cpp.Llama, shift: ContextShift
) -> None:
    shift.read(text(CELLS))
    # 255 tokens, of which the first stays and 127 of the other 254 go; then one more
    assert model.n_tokens == 255 - 127 + 1
    assert newest_position(model) == model.n_tokens - 1


def test_after_a_shift_the_model_still_attends_to_what_is_left(
    model: llama_cpp.Llama, shift: ContextShift
) -> None:
    # Not the same logits as without the dropped tokens: the keys were computed in their presence.
    tokens = text(CELLS)
    told = model.tokenize(b" One of the magic numbers for cellar is 695078.", add_bos=False)
    tokens[-len(told) :] = told
    shift.read([*tokens, *told[:-2]])
    assert shift.shifts > 0
    assert int(last_logits(model).argmax()) == told[-2]


def test_n_keep_protects_the_first_tokens(model: llama_cpp.Llama) -> None:
    shift = ContextShift(model, n_keep=20)
    shift.reset()
    tokens = text(2000)
    shift.read(tokens)
    assert model.input_ids[:21].tolist() == tokens[:21]


def test_reset_forgets_text_and_counts(model: llama_cpp.Llama, shift: ContextShift) -> None:
    shift.read(text(600))
    shift.reset()
    assert (shift.shifts, shift.dropped, model.n_tokens) == (0, 0, 0)
    shift.read(text(10))
    assert newest_position(model) == 9
