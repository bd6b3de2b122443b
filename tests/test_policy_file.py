"""Policy files: what is written comes back, what does not fit is refused by name; the numpy network
against the definition in docs/policy-format.md, written down here token by token."""

from __future__ import annotations

import math
import os
import resource
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvp_edge.binding.model import read_model_shape
from kvp_edge.cli import main
from kvp_edge.errors import PolicyFileError
from kvp_edge.policies import ArrayView, Learned, get_policy
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.policy_file import (
    FEATURES,
    PolicyInfo,
    PolicyWeights,
    check_model,
    info_of,
    read_policy,
    write_policy,
)
from makers.policies import random_sensitivity, random_weights
from support.policy_files import ARRAY_OF_2_TO_THE_40, rewrite

INFO = PolicyInfo(
    architecture="llama",
    n_layer=2,
    n_head_kv=3,
    head_size_k=32,
    head_size_v=64,
    hidden=32,
    context=5,
    name="kvp-test-w5",
    sinks=5,
    recent=40,
    base_model="Test 3M",
    fingerprint="f00d",
    model_identity="1dea",
    training_data="12 traces",
    license="mit",
    kv_type="q8_0/q4_0",
)


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.gguf"
    write_policy(path, INFO, random_weights(INFO), "f32")
    return path


def test_what_is_written_comes_back(policy_file: Path) -> None:
    info, weights = read_policy(policy_file)
    assert info == INFO
    for name, array in vars(random_weights(INFO)).items():
        np.testing.assert_array_equal(getattr(weights, name), array, err_msg=name)
    assert not list(policy_file.parent.glob("*.part"))


def test_a_file_from_before_there_was_an_identity_has_none(
    policy_file: Path, tmp_path: Path
) -> None:
    older = rewrite(policy_file, tmp_path / "older.gguf", drop="kvp.base_model.identity")
    info, _ = read_policy(older)
    assert info == replace(INFO, model_identity="")
    values = vars(INFO).copy()
    assert info_of(values) == INFO
    del values["model_identity"]
    assert info_of(values) == info


LAYER = replace(INFO, scope="layer")


@pytest.fixture
def layer_file(tmp_path: Path) -> Path:
    """A policy whose networks see whole layers."""
    path = tmp_path / "layer.gguf"
    write_policy(path, LAYER, random_weights(LAYER), "f32")
    return path


def test_a_network_for_all_heads_of_a_layer_comes_back_as_version_2(layer_file: Path) -> None:
    info, weights = read_policy(layer_file)
    assert info == LAYER
    assert weights.key.shape == (2, 1, 32, 3 * 32)
    assert weights.value.shape == (2, 1, 32, 3 * 64)
    assert weights.out.shape == (2, 1, 3, 32)
    for name, array in random_weights(LAYER).arrays().items():
        np.testing.assert_array_equal(getattr(weights, name), array, err_msg=name)
    reader = gguf.GGUFReader(layer_file)
    assert reader.fields["kvp.format_version"].contents() == 2
    dimensions = {t.name: t.shape.tolist() for t in reader.tensors}
    assert dimensions["blk.1.kvp_key.weight"] == [3 * 32, 32]
    assert dimensions["blk.1.kvp_out.weight"] == [32, 3]


def test_networks_of_heads_are_written_as_version_1_and_read_as_version_2(
    policy_file: Path, tmp_path: Path
) -> None:
    reader = gguf.GGUFReader(policy_file)
    assert reader.fields["kvp.format_version"].contents() == 1
    assert "kvp.scope" not in reader.fields
    changed = {"kvp__format_version": 2, "kvp__scope": "head"}
    info, weights = read_policy(rewrite(policy_file, tmp_path / "2.gguf", **changed))
    assert info == INFO
    np.testing.assert_array_equal(weights.out, random_weights(INFO).out)


@pytest.mark.parametrize("info", [INFO, LAYER], ids=lambda info: info.scope)
def test_how_sensitive_heads_are_comes_back_if_a_file_says_it(
    tmp_path: Path, info: PolicyInfo
) -> None:
    path, found = tmp_path / "p.gguf", random_sensitivity(info)
    write_policy(path, info, random_weights(info), "f16")
    assert Learned(path, native=False).sensitivity is None
    silent = Learned(path).identity()
    write_policy(path, info, replace(random_weights(info), sensitivity=found), "f16")
    policy = Learned(path)
    assert policy.sensitivity is not None
    np.testing.assert_array_equal(policy.sensitivity, found)
    assert policy.identity() == silent  # sessions go on with it


@pytest.mark.parametrize(
    ("sensitivity", "sentence"),
    [
        (np.ones((3, 2)), r"sensitivity weights of shape \[3, 2\], not \[2, 3\]"),
        (np.full((2, 3), 2.0), "with the mean 2; they must not be negative"),
        (np.array([[-1.0, 1, 1], [1, 1, 3]]), "sensitivities from -1 on, with the mean 1; they"),
        (np.full((2, 3), np.nan), "sensitivity weights that are not finite"),
    ],
)
def test_sensitivities_that_are_not_relative_are_refused(
    tmp_path: Path, sensitivity: np.ndarray, sentence: str
) -> None:
    wrong = replace(random_weights(INFO), sensitivity=sensitivity.astype(np.float32))
    with pytest.raises(PolicyFileError, match=sentence):
        write_policy(tmp_path / "p.gguf", INFO, wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drop": "kvp.scope"}, "lacks the key kvp.scope"),
        ({"kvp__scope": "head"}, r"kvp_key.weight of shape \[32, 96\].* \[3, 32, 32\]"),
        ({"kvp__scope": "model"}, "kvp.scope 'model', but this kvp_edge knows head, layer"),
        ({"kvp__format_version": 1}, r"kvp_key.weight of shape \[32, 96\].* \[3, 32, 32\]"),
        ({"kvp__head_count_kv": 4}, r"kvp_key.weight of shape \[32, 96\].* \[32, 128\]"),
        ({"kvp__head_count_kv": 2**31 - 1}, "kvp_key.weight of shape"),
        ({"kvp__key_length": 96}, "kvp_key.weight of shape"),
        ({"drop": "blk.1.kvp_out.weight"}, "lacks the tensor blk.1.kvp_out.weight"),
    ],
)
def test_a_layer_s_file_that_does_not_fit_is_refused_by_name(
    layer_file: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PolicyFileError, match=sentence):
        read_policy(rewrite(layer_file, tmp_path / "changed.gguf", **change))


@pytest.mark.parametrize(("outtype", "error"), [("f16", 1e-3), ("q8_0", 1e-2)])
def test_smaller_types_come_back_rounded(tmp_path: Path, outtype: Any, error: float) -> None:
    weights = random_weights(INFO)
    write_policy(tmp_path / "p.gguf", INFO, weights, outtype)
    _, back = read_policy(tmp_path / "p.gguf")
    assert 0 < np.abs(back.key - weights.key).max() < error
    np.testing.assert_array_equal(back.conv, weights.conv)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "p.gguf").tensors}
    assert types["blk.1.kvp_key.weight"] == outtype.upper()
    assert types["blk.1.kvp_position.weight"] == "F32"


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path: Path) -> None:
    info = replace(INFO, head_size_k=24)
    write_policy(tmp_path / "p.gguf", info, random_weights(info), "q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "p.gguf").tensors}
    assert types["blk.0.kvp_key.weight"] == "F16"
    assert types["blk.0.kvp_value.weight"] == "Q8_0"
    assert read_policy(tmp_path / "p.gguf")[0] == info


def by_definition(
    w: PolicyWeights, keys: np.ndarray, values: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Every token and head on its own, in f64. A network sees its heads side by side."""
    n_layer, n_head, n, _ = keys.shape
    n_networks, each = w.out.shape[1:3]
    index = {int(p): i for i, p in enumerate(positions)}
    half = w.conv.shape[2] // 2
    scores = np.zeros((n_layer, n_head, n))

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def first(layer: int, network: int, i: int) -> np.ndarray:
        heads = range(network * each, (network + 1) * each)
        p = int(positions[i])
        log = math.log2(1 + p)
        position = np.array([log / 16, math.sin(log), math.cos(log), 1 / (1 + p)])
        return (
            w.key[layer, network].astype(float) @ np.concatenate([keys[layer, h, i] for h in heads])
            + w.value[layer, network] @ np.concatenate([values[layer, h, i] for h in heads])
            + w.position[layer, network] @ position
            + w.fc1_bias[layer, network]
        )

    for layer, network, (i, p) in product(range(n_layer), range(n_networks), enumerate(positions)):
        x = np.zeros(w.conv.shape[3])
        for tap in range(-half, half + 1):
            if int(p) + tap in index:
                x += w.conv[layer, network, half + tap] * first(layer, network, index[p + tap])
        x = silu(w.fc2[layer, network] @ silu(x) + w.fc2_bias[layer, network])
        for head in range(each):
            scores[layer, network * each + head, i] = w.out[layer, network, head] @ x
    assert n_networks * each == n_head
    return scores


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("context", [1, 3, 7])
def test_scores_are_those_of_the_definition_also_where_tokens_are_missing(
    tmp_path: Path, context: int, scope: Any
) -> None:
    info = replace(INFO, context=context, scope=scope)
    write_policy(tmp_path / "p.gguf", info, random_weights(info), "f32")
    policy = get_policy(str(tmp_path / "p.gguf"))
    assert isinstance(policy, Learned)
    assert policy.context == context // 2
    rng = np.random.default_rng(1)
    positions = np.array([0, 1, 2, 5, 6, 8, 40, 41, 1000, 1001], np.int32)
    keys = rng.normal(size=(2, 3, len(positions), 32)).astype(np.float32)
    values = rng.normal(size=(2, 3, len(positions), 64)).astype(np.float32)
    got = policy.score(ArrayView(keys, values, positions))
    want = by_definition(policy.weights, keys, values, positions)
    np.testing.assert_allclose(got, want, atol=2e-5)
    # a score is final once `context` later tokens are known
    cut = len(positions) - 2
    shorter = policy.score(ArrayView(keys[:, :, :cut], values[:, :, :cut], positions[:cut]))
    final = positions[:cut] + policy.context < positions[cut]
    np.testing.assert_allclose(shorter[..., final], got[..., :cut][..., final], atol=1e-5)


def test_another_model_s_cache_is_refused_when_scored(policy_file: Path) -> None:
    policy = Learned(policy_file)
    keys = np.zeros((2, 3, 4, 16), np.float32)
    with pytest.raises(PolicyFileError, match="is for another model"):
        policy.score(ArrayView(keys, keys, np.arange(4, dtype=np.int32)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"general__type": "model"}, "not a policy: it is a GGUF file of type 'model'"),
        ({"adapter__type": "lora"}, "not a policy: it is a GGUF file of type 'lora'"),
        ({"kvp__format_version": 3}, "format version 3.*versions 1 and 2: update kvp_edge"),
        ({"kvp__format_version": 0}, "format version 0, but this kvp_edge reads versions 1 and 2$"),
        ({"kvp__format_version": 2}, "lacks the key kvp.scope"),
        ({"kvp__format_version": 2, "kvp__scope": "token"}, "kvp.scope 'token'.*knows head, layer"),
        ({"kvp__format_version": 2, "kvp__scope": 1}, "kvp.scope 1, which has the wrong type"),
        (
            {"kvp__format_version": 2, "kvp__scope": "layer"},
            r"kvp_key.weight of shape \[3, 32, 32\], but its keys require \[32, 96\]",
        ),
        ({"kvp__features": ["key", "query"]}, "scores by key, query"),
        ({"kvp__features": [*FEATURES, "log(1e-4+attention)"]}, r"'log\(1e-4.attention\)' is"),
        ({"kvp__features": list(FEATURES[::-1])}, "are from another version$"),
        ({"kvp__hidden_sizes": [32, 64]}, "kvp.hidden_sizes"),
        ({"kvp__hidden_sizes": [16, 16]}, "kvp_key.weight of shape"),
        ({"kvp__activation": "gelu"}, "kvp.activation 'gelu'"),
        ({"kvp__context_width": 4}, "must be odd"),
        ({"kvp__block_count": 3}, "lacks the tensor blk.2.kvp_key.weight"),
        ({"kvp__key_length": 64}, "kvp_key.weight of shape"),
        ({"drop": "kvp.head_count_kv"}, "lacks the key kvp.head_count_kv"),
        ({"kvp__block_count": 0}, "kvp.block_count 0; it must be at least 1"),
        ({"kvp__block_count": "2"}, "the kvp.block_count '2', which has the wrong type"),
        ({"kvp__head_count_kv": 0}, "kvp.head_count_kv 0; it must be at least 1"),
        ({"kvp__key_length": 0}, "kvp.key_length 0; it must be at least 1"),
        ({"kvp__hidden_sizes": ["a", "a"]}, "kvp.hidden_sizes .*, which has the wrong type"),
        ({"kvp__hidden_sizes": [0, 0]}, "kvp.hidden_sizes 0; it must be at least 1"),
        ({"kvp__hidden_sizes": "32"}, "kvp.hidden_sizes '32', which has the wrong type"),
        ({"kvp__features": [1, 2]}, "kvp.features .*, which has the wrong type"),
        ({"kvp__context_width": 0}, "kvp.context_width 0; it must be at least 1"),
        ({"kvp__context_width": 2**32 - 1}, "no more than 2147483647"),
        ({"kvp__protected__sinks": 2**32 - 1}, "4294967295 sinks, which is impossible"),
        ({"kvp__activation": 1}, "kvp.activation 1, which has the wrong type"),
        ({"kvp__objective": "magic"}, "kvp.objective 'magic'"),
        ({"kvp__objective": "global"}, "lacks the key kvp.retention.horizon"),
        (
            {"kvp__objective": "global", "kvp__retention__horizon": 0},
            "kvp.retention.horizon 0; it must be at least 1",
        ),
        ({"general__name": 5}, "general.name 5, which has the wrong type"),
        ({"general__license": ["a"]}, "general.license .*, which has the wrong type"),
        ({"kvp__base_model__fingerprint": 5}, "fingerprint 5, which has the wrong type"),
        ({"kvp__base_model__identity": 5}, "identity 5, which has the wrong type"),
        ({"kvp__kv_type": 8}, "kvp.kv_type 8, which has the wrong type"),
        ({"kvp__kv_type": "auto"}, "kvp.kv_type 'auto', which names no types of a cache"),
        ({"kvp__kv_type": "q8_0/q2_k"}, "kvp.kv_type 'q8_0/q2_k', which names no types"),
        ({"drop": "kvp_aggregate.weight"}, "lacks the tensor kvp_aggregate.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    policy_file: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PolicyFileError, match=sentence):
        read_policy(rewrite(policy_file, tmp_path / "changed.gguf", **change))


def test_a_damaged_file_is_refused(policy_file: Path, tmp_path: Path) -> None:
    whole = policy_file.read_bytes()
    for length in (2, 20, 200, len(whole) // 2, len(whole) - 400):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(PolicyFileError, match="cut short|not a GGUF"):
            read_policy(cut)
    with pytest.raises(PolicyFileError, match="policy file '.*none.gguf' not found"):
        read_policy(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(PolicyFileError, match="not a GGUF file"):
        get_policy(tmp_path / "text.gguf")


def test_what_is_no_file_or_lies_about_its_length_is_refused_at_once(
    policy_file: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    for path in (tmp_path / "fifo.gguf", tmp_path, Path("/dev/zero")):
        with pytest.raises(PolicyFileError, match="it is not a regular file"):
            read_policy(path)
    with pytest.raises(PolicyFileError, match="it is not a file name"):
        read_policy("a\0b.gguf")
    (tmp_path / "array.gguf").write_bytes(ARRAY_OF_2_TO_THE_40)
    with pytest.raises(PolicyFileError, match="damaged or cut short"):
        read_policy(tmp_path / "array.gguf")
    assert main(["inspect", str(tmp_path / "array.gguf")]) == 2


def test_more_weights_than_any_policy_has_are_refused_before_they_are_read(
    policy_file: Path, tmp_path: Path
) -> None:
    """A file with holes, as large as it says."""
    path = tmp_path / "large.gguf"
    data = bytearray(policy_file.read_bytes())
    name = b"blk.0.kvp_key.weight"
    at = data.index(name) + len(name) + 4  # behind the number of dimensions
    data[at : at + 8] = (2**32).to_bytes(8, "little")
    path.write_bytes(data)
    os.truncate(path, 2**42)
    with pytest.raises(PolicyFileError, match="at most 4294967296 are allowed"):
        read_policy(path)


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(
    policy_file: Path, tmp_path: Path
) -> None:
    before = policy_file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write '.*': File too large"):
            write_policy(policy_file, INFO, random_weights(INFO), "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert policy_file.read_bytes() == before
    assert not list(policy_file.parent.glob("*.part"))


def test_weights_that_are_not_numbers_are_refused(policy_file: Path, tmp_path: Path) -> None:
    broken = random_weights(INFO)
    broken.fc2[0, 1, 2, 3] = np.nan
    with pytest.raises(PolicyFileError, match="not finite"):
        write_policy(tmp_path / "p.gguf", INFO, broken, "f32")
    assert not list(tmp_path.glob("p.gguf*"))
    data = bytearray(policy_file.read_bytes())
    data[-200:-196] = np.float32(np.nan).tobytes()  # in the last tensors, which are f32
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(PolicyFileError, match="not finite"):
        read_policy(tmp_path / "nan.gguf")


def test_another_architecture_or_shape_is_refused_another_quantisation_a_warning() -> None:
    model: dict[str, Any] = {
        "architecture": "llama",
        "n_layer": 2,
        "n_head_kv": 3,
        "head_size_k": 32,
        "head_size_v": 64,
        "fingerprint": "f00d",
    }
    check_model(INFO, **model)
    with pytest.raises(PolicyFileError, match="architecture 'llama', but the model's is 'qwen2'"):
        check_model(INFO, **{**model, "architecture": "qwen2"})
    with pytest.raises(PolicyFileError, match=r"2 layers x 3 KV heads x 32\+64.*4 layers"):
        check_model(INFO, **{**model, "n_layer": 4})
    with pytest.warns(UserWarning, match="another quantisation"):
        check_model(INFO, **{**model, "fingerprint": "beef"})
    with pytest.warns(UserWarning, match="trained with another model file"):
        check_model(INFO, **{**model, "fingerprint": "beef", "model_identity": "cafe"})
    nameless = replace(INFO, model_identity="")
    with pytest.warns(UserWarning, match="trained with another model file"):
        check_model(nameless, **{**model, "fingerprint": "beef", "model_identity": ""})


def test_another_quantisation_of_the_same_model_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_model(
            INFO,
            architecture="llama",
            n_layer=2,
            n_head_kv=3,
            head_size_k=32,
            head_size_v=64,
            fingerprint="beef",
            model_identity="1dea",
        )


def test_the_bundled_policy_is_written_again_byte_for_byte(
    tmp_path: Path, bundled_model: str
) -> None:
    shipped = Path(own_policy(bundled_model) or "")
    write_policy(tmp_path / "again.gguf", *read_policy(shipped), "f16")
    assert (tmp_path / "again.gguf").read_bytes() == shipped.read_bytes()


def test_a_bundled_model_is_not_a_policy(bundled_model: str) -> None:
    with pytest.raises(PolicyFileError, match="is not a policy: it is a GGUF file of"):
        get_policy(bundled_model)


def test_a_policy_file_runs_in_a_bounded_chat_and_another_model_s_is_refused(
    bundled_model: str, tmp_path: Path, load: Callable[..., Any]
) -> None:
    shape = read_model_shape(bundled_model)
    own = replace(
        INFO,
        architecture=shape.architecture,
        n_layer=shape.n_layer,
        n_head_kv=shape.n_head_kv[0],
        head_size_k=shape.head_size_k,
        head_size_v=shape.head_size_v,
    )
    write_policy(tmp_path / "own.gguf", own, random_weights(own), "f16")
    limits = {"n_ctx": 4096, "kv_budget": 64, "recent": 16, "reserve": 64, "n_batch": 64}
    for granularity in ("token", "head"):
        llm = load(
            bundled_model, policy=str(tmp_path / "own.gguf"), granularity=granularity, **limits
        )
        llm.eval([1, *range(100, 600)])
        assert llm.kv_stats.evictions > 0
    other = replace(INFO, architecture=shape.architecture)
    write_policy(tmp_path / "other.gguf", other, random_weights(other), "f16")
    with pytest.raises(PolicyFileError, match="is for a cache of 2 layers"):
        load(bundled_model, policy=str(tmp_path / "other.gguf"), **limits)
    write_policy(tmp_path / "qwen.gguf", replace(own, architecture="qwen2"), random_weights(own))
    with pytest.raises(PolicyFileError, match="architecture 'qwen2'"):
        load(bundled_model, policy=str(tmp_path / "qwen.gguf"), **limits)


def test_a_saved_session_can_tell_two_policies_apart(policy_file: Path, tmp_path: Path) -> None:
    write_policy(tmp_path / "other.gguf", INFO, random_weights(INFO, seed=1), "f32")
    assert Learned(policy_file).identity() == Learned(policy_file).identity()
    assert Learned(policy_file).identity() != Learned(tmp_path / "other.gguf").identity()
    # no score depends on the cache's types that it proposes
    write_policy(tmp_path / "same.gguf", replace(INFO, kv_type=""), random_weights(INFO), "f32")
    assert Learned(policy_file).identity() == Learned(tmp_path / "same.gguf").identity()


def test_inspect_explains_a_file(
    policy_file: Path, layer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(policy_file)]) == 0
    told = capsys.readouterr().out
    for part in (
        "kvp-test-w5",
        "llama",
        "Test 3M",
        "2 layers x 3 KV heads",
        "12 traces",
        "mit",
        "1dea",
        "q8_0/q4_0",
    ):
        assert part in told
    assert "6 networks, one per KV head, of 32 + 32 hidden units" in " ".join(told.split())
    found = np.array([[0.5, 0.5, 0.5], [0.5, 3, 1]], np.float32)
    write_policy(layer_file, LAYER, replace(random_weights(LAYER), sensitivity=found))
    assert main(["inspect", str(layer_file)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2 networks, one per layer, for all of its KV heads, of 32 + 32 hidden units" in told
    assert "most is head 1 of layer 1, 3.0 times the mean" in told
    assert "1 of 6 carry half of the loss" in told
    assert "mean by layer 0.5 1.5 trained with" in told
    assert main(["inspect", "none.gguf"]) == 2
    assert "policy file 'none.gguf' not found" in capsys.readouterr().err
    assert len(FEATURES) == 6
