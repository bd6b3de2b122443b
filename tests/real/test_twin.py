"""The PyTorch twin of real files computes what llama.cpp does, also after an eviction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")

from kvp_edge import Llama  # noqa: E402
from kvp_edge.training.twin import Twin  # noqa: E402
from support.cache_types import CACHE_TYPES  # noqa: E402
from support.closeness import difference  # noqa: E402
from support.real_models import ALL, GEMMA, newest_logits, tokens_of  # noqa: E402

pytestmark = pytest.mark.real

MORE = 10
"""Tokens that are read after the eviction."""


@pytest.mark.parametrize("name", ALL)
def test_the_twin_s_logits_are_llama_cpps_with_all_tokens_and_with_those_that_are_held(
    name: str, exact_model: Callable[[str], str], book: str
) -> None:
    """f32 weights and an f32 cache; gemma3's GELU is looked up in an f16 table."""
    torch.set_num_threads(1)
    limit = 0.02 if name == GEMMA else 1e-3
    budget, border = (520, 640) if name == GEMMA else (60, 150)
    type_k, type_v, flash_attn = CACHE_TYPES["f32"]
    llm = Llama(
        exact_model(name), n_ctx=2000, kv_budget=budget, recent=16, policy="keydiff",
        type_k=type_k, type_v=type_v, flash_attn=flash_attn, n_threads=1, n_threads_batch=1,
        verbose=False,
    )  # fmt: skip
    tokens = tokens_of(llm, book, border + MORE)
    llm.eval(tokens[:border])
    complete = newest_logits(llm)
    llm.evict()
    held = llm.kv_indices
    assert held.shape[-1] == budget
    llm.eval(tokens[border:])
    after = newest_logits(llm)
    llm.close()

    twin = Twin.load(exact_model(name))
    keep = torch.zeros(*held.shape[:2], len(tokens), dtype=torch.bool)
    keep[..., border:] = True
    keep.scatter_(2, torch.from_numpy(held).long(), True)

    def bias(layer: int, keys: Any, values: Any) -> Any:
        hidden = ~keep[layer][None, :, None].repeat(1, 1, len(tokens), 1)
        hidden[:, :, :border] = False  # what came before the eviction saw everything
        return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)

    with torch.no_grad():
        full, cut = (twin(torch.tensor([tokens]), b)[0].numpy() for b in (None, bias))
    assert difference(complete, full[border - 1]) < limit
    assert difference(after, cut[-1]) < limit
    assert difference(after, full[-1]) > 5 * limit
    assert np.isfinite(cut).all()
