"""A policy serves other quantisations of the model that it was trained with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from kvp_edge import Llama
from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.binding.model import read_model_shape
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.policy_file import PolicyInfo, write_policy
from makers.policies import random_weights
from support.quantised import quantise
from support.real_models import ALL, SMOLLM2

pytestmark = pytest.mark.real


def test_a_policy_of_one_quantisation_serves_another(
    real_model: Callable[[str], str], tmp_path: Path
) -> None:
    """SmolLM2 from Q4_1 to Q8_0 and on to F16."""
    path = real_model(SMOLLM2)
    q8_0 = quantise(path, tmp_path / "q8_0.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    f16 = quantise(q8_0, tmp_path / "f16.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_F16)
    assert model_identity(path) == model_identity(q8_0) == model_identity(f16) != ""
    assert len({model_fingerprint(file) for file in (path, q8_0, f16)}) == 3
    s = read_model_shape(path)
    info = PolicyInfo(
        s.architecture, s.n_layer, s.n_head_kv[0], s.head_size_k, s.head_size_v, hidden=4,
        context=1, fingerprint=model_fingerprint(path), model_identity=model_identity(path),
    )  # fmt: skip
    policy = tmp_path / "kvp-smollm2.gguf"
    write_policy(policy, info, random_weights(info), "f32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own_policy(q8_0) == own_policy(f16) == str(policy)
        llm = Llama(
            str(q8_0), n_ctx=1000, kv_budget=100, recent=16, reserve=60, n_threads=1,
            n_threads_batch=1, verbose=False,
        )  # fmt: skip
    tokens = np.random.default_rng(0).integers(100, 10000, llm.kv_stats.cells + 40)
    llm.eval(tokens.tolist())
    assert llm.kv_stats.policy == "learned"
    assert llm.kv_stats.evictions > 0
    llm.close()
    q8_0.unlink()
    f16.unlink()


def test_a_shipped_policy_serves_its_model_in_another_quantisation(
    real_model: Callable[[str], str], tmp_path: Path
) -> None:
    path = real_model(SMOLLM2)
    q8_0 = quantise(path, tmp_path / "q8_0.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    shipped = own_policy(path)
    assert shipped is not None
    assert "SmolLM2-135M-Instruct" in Path(shipped).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own_policy(q8_0) == shipped
    q8_0.unlink()


def test_models_have_identities_of_their_own(real_model: Callable[[str], str]) -> None:
    found = {model_identity(real_model(getattr(name, "values", (name,))[0])) for name in ALL}
    assert len(found - {""}) == len(ALL)
