"""``kvp-edge eval`` end to end against kvpress (extra ``kvpress``), on the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "kvpress")
needs("kvpress", "kvpress")


from kvp_edge.evaluation.run import prompts  # noqa: E402
from kvp_edge.evaluation.setting import Prompt  # noqa: E402
from kvp_edge.evaluation.tasks import TASKS  # noqa: E402
from kvp_edge.llama import Llama  # noqa: E402
from scripts.crosscheck_kvpress import (  # noqa: E402
    Transformers,
    compare,
    load,
    logit_difference,
    make_run,
)

LENGTH, BUDGET = 256, 64


@pytest.fixture(scope="module")
def llm(bundled_model: str) -> Iterator[Llama]:
    torch.set_num_threads(1)
    with closing(load(bundled_model, LENGTH, threads=1)) as llm:
        yield llm


@pytest.fixture(scope="module")
def theirs(llm: Llama) -> Transformers:
    return Transformers(llm)


@pytest.fixture(scope="module")
def items(llm: Llama) -> list[Prompt]:
    return prompts(llm, TASKS, ["niah_single_2"], LENGTH, 2, seed=0)


def test_transformers_computes_llama_cpps_logits(
    llm: Llama, theirs: Transformers, items: list[Prompt]
) -> None:
    for item in items:
        assert logit_difference(llm, theirs, item) < 0.05


@pytest.mark.parametrize("method", ["knorm", "keydiff", "tova"])
def test_an_evaluation_keeps_kvpresss_tokens_and_scores_its_replies_the_same(
    method: str, bundled_model: str, theirs: Transformers, items: list[Prompt]
) -> None:
    run = make_run(bundled_model, seed=0, threads=1)
    for ours, other in compare(run, theirs, method, BUDGET, LENGTH, items):
        assert (ours.kept.sum(axis=2) == BUDGET).all()
        assert np.mean(ours.kept == other.kept) >= 0.99
        assert ours.score == other.score
