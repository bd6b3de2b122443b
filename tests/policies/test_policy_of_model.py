"""Which policy a model gets when none is named."""

from __future__ import annotations

import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.binding.model import read_model_shape
from kvp_edge.cli.demo import Demo
from kvp_edge.errors import PolicyFileError
from kvp_edge.policies import FALLBACK, ArrayView, get_policy
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.policy_file import PolicyInfo, PolicyWeights, weight_shapes, write_policy
from makers.gguf_models import ModelShape
from support.policy_files import ARRAY_OF_2_TO_THE_40
from support.quantised import quantise


@pytest.fixture
def model(tmp_path: Path, random_model: Callable[..., Any]) -> Path:
    """A model file in a folder of its own."""
    path = tmp_path / "some-model.gguf"
    shutil.copy(random_model(ModelShape("llama", head_dim=32)).path, path)
    return path


def info_of(model: Path, **changed: Any) -> PolicyInfo:
    s = read_model_shape(model)
    info = PolicyInfo(s.architecture, s.n_layer, s.n_head_kv[0], 32, 32, hidden=4, context=1)
    prints = {"fingerprint": model_fingerprint(model), "model_identity": model_identity(model)}
    return replace(info, **(prints | changed))


def write(path: Path, info: PolicyInfo, **weights: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype("f") for n, s in weight_shapes(info).items()}
    arrays["conv"][:] = 1
    arrays["aggregate"] = np.abs(arrays["aggregate"])
    write_policy(path, info, PolicyWeights(**(arrays | weights)), "f32")
    return path


def test_without_a_policy_of_its_own_a_model_gets_the_fallback(
    model: Path, load: Callable[..., Any]
) -> None:
    assert own_policy(model) is None
    assert get_policy("auto", model).name == FALLBACK
    assert get_policy("auto").name == FALLBACK
    assert load(model, kv_budget=400, n_ctx=512).kv_stats.policy == FALLBACK


def test_the_policy_beside_a_model_is_used_unless_another_is_named(
    model: Path, load: Callable[..., Any]
) -> None:
    path = write(model.parent / "kvp-own.gguf", info_of(model))
    assert own_policy(model) == str(path)
    assert load(model, kv_budget=400, n_ctx=512).kv_stats.policy == "learned"
    named = load(model, kv_budget=400, n_ctx=512, policy="recency")
    assert named.kv_stats.policy == "recency"


def test_a_policy_may_lie_beside_a_link_to_the_model_or_beside_the_file_linked_to(
    model: Path, tmp_path: Path
) -> None:
    """Models that were downloaded from a hub are links to files in another folder."""
    link = tmp_path / "links" / "linked.gguf"
    link.parent.mkdir()
    link.symlink_to(model)
    assert own_policy(link) is None
    far = write(model.parent / "kvp-far.gguf", info_of(model))
    assert own_policy(link) == str(far)
    near = write(link.parent / "kvp-near.gguf", info_of(model))
    os.utime(near, (0, 0))  # though it is older
    assert own_policy(link) == str(near)
    assert own_policy(model) == str(far)


def test_a_policy_of_another_model_or_under_another_name_is_left_alone(model: Path) -> None:
    other = {"fingerprint": "f00d", "model_identity": "beef"}
    write(model.parent / "kvp-other.gguf", info_of(model, **other))
    write(model.parent / "kvp-older.gguf", info_of(model, **other | {"model_identity": ""}))
    write(model.parent / "kvp-any.gguf", info_of(model, fingerprint="", model_identity=""))
    write(model.parent / "mine.gguf", info_of(model))
    assert own_policy(model) is None


def test_a_policy_serves_every_quantisation_of_its_model(
    model: Path, load: Callable[..., Any]
) -> None:
    path = write(model.parent / "kvp-f32.gguf", info_of(model, base_model="Tiny"))
    small = quantise(model, model.parent / "small.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own_policy(small) == str(path)
        llm = load(small, kv_budget=400, n_ctx=512)
        load(small, kv_budget=400, n_ctx=512, policy=str(path))
    assert llm.kv_stats.policy == "learned"


def test_a_policy_of_the_very_file_comes_before_newer_ones_of_other_quantisations(
    model: Path,
) -> None:
    small = quantise(model, model.parent / "small.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    exact = write(model.parent / "kvp-a.gguf", info_of(small))
    for age, name in enumerate(("kvp-b.gguf", "kvp-c.gguf")):
        other = write(model.parent / name, info_of(model))
        os.utime(other, (2e9 + age, 2e9 + age))
    assert own_policy(small) == str(exact)
    exact.unlink()
    assert own_policy(small) == str(other), "the newest of the others"


def test_a_model_without_an_identity_gets_only_what_was_made_for_its_file(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model.parent / "kvp-older.gguf", info_of(model, fingerprint="f00d", model_identity=""))
    exact = write(model.parent / "kvp-exact.gguf", info_of(model, model_identity=""))
    os.utime(exact, (0, 0))
    monkeypatch.setattr("kvp_edge.policies.policy_of_model.model_identity", lambda path: "")
    assert own_policy(model) == str(exact)


def test_a_damaged_policy_is_passed_over_with_a_warning(model: Path) -> None:
    path = write(model.parent / "kvp-c.gguf", info_of(model))
    (model.parent / "kvp-a.gguf").write_bytes(b"GGUF and then nothing")
    shutil.copy(model, model.parent / "kvp-b.gguf")  # a model that is called like a policy
    os.utime(path, (0, 0))  # the newest come first
    with pytest.warns(UserWarning, match="policy skipped: .*kvp-[ab]") as warned:
        assert own_policy(model) == str(path)
    assert len(warned) == 2


def test_whatever_is_wrong_with_a_policy_beside_a_model_it_is_passed_over(
    model: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys and the fingerprint are right in all of them."""
    info, folder = info_of(model), model.parent
    bad = folder / "kvp-bad.gguf"

    def nan() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("kvp_edge.policy_file._check_weights", lambda *_: None)
            write(bad, info, out=np.full((info.n_layer, info.n_head_kv, 4), np.nan, np.float32))

    def without(tensor: bytes) -> None:
        write(bad, info)
        data = bad.read_bytes()
        bad.write_bytes(data.replace(tensor, tensor[:-1] + b"_"))

    def number(key: bytes, value: int) -> None:
        write(bad, info)
        data = bytearray(bad.read_bytes())
        at = data.index(key) + len(key) + 4
        data[at : at + 4] = value.to_bytes(4, "little")
        bad.write_bytes(data)

    makers: dict[str, Callable[[], object]] = {
        "NaN": nan,
        "a tensor is missing": lambda: without(b"blk.1.kvp_out.weight"),
        "another head count": lambda: number(b"kvp.head_count_kv", 7),
        "no layers": lambda: number(b"kvp.block_count", 0),
        "another model's shape": lambda: write(bad, replace(info, n_head_kv=1)),
        "another architecture": lambda: write(bad, replace(info, architecture="qwen2")),
        "cut short": lambda: bad.write_bytes(write(bad, info).read_bytes()[:-100]),
        "2^40 numbers": lambda: bad.write_bytes(ARRAY_OF_2_TO_THE_40),
        "a link to nothing": lambda: bad.symlink_to("nothing"),
        "a link to itself": lambda: bad.symlink_to(bad.name),
        "a FIFO": lambda: os.mkfifo(bad),
        "a folder": bad.mkdir,
        "a device": lambda: bad.symlink_to("/dev/zero"),
        "empty": bad.touch,
    }
    for name, make in makers.items():
        make()
        with pytest.warns(UserWarning, match="policy skipped: .*kvp-bad") as warned:
            assert own_policy(model) is None, name
        assert len(warned) == 1, name
        bad.rmdir() if bad.is_dir() else bad.unlink()

    bad.symlink_to("nothing")
    with pytest.warns(UserWarning, match="policy skipped"):
        assert load(model, kv_budget=400, n_ctx=512).kv_stats.policy == FALLBACK


#: kvp-edge demo's options.
DEMO: dict[str, Any] = {
    **{"items": 1, "length": 700, "kv_budget": "64", "seed": 0, "hf_repo": None, "hf_file": None},
    **{"threads": 1, "gpu_layers": 0, "flash_attn": False, "type_k": "f16", "type_v": "f16"},
    **{"repack": "off", "verbose": False},
}


def test_one_of_too_few_layers_beside_a_model_with_windows_is_passed_over_when_it_is_loaded(
    tmp_path: Path, random_model: Callable[..., Any], load: Callable[..., Any]
) -> None:
    """The file does not tell which of the model's layers have a window. One that was named is
    refused."""
    windows = ModelShape("gemma3", head_dim=64, n_head_kv=2, n_layer=6, sliding_window=24)
    model = tmp_path / "windows.gguf"
    shutil.copy(random_model(windows).path, model)
    shape = read_model_shape(model)
    info = PolicyInfo(shape.architecture, 2, 2, 64, 64, hidden=4, context=1)
    info = replace(info, fingerprint=model_fingerprint(model))
    path = write(tmp_path / "kvp-own.gguf", info)
    bound = {"n_ctx": 2000, "kv_budget": 100, "granularity": "head"}
    with pytest.warns(UserWarning, match="policy skipped: .* 2 layers"):
        llm = load(model, **bound)
    assert llm.kv_stats.policy == FALLBACK
    llm.eval([0, *np.random.default_rng(0).integers(6, 270, 900).tolist()])
    assert llm.kv_stats.evictions > 0
    with pytest.raises(PolicyFileError, match="2 layers"):
        load(model, policy=str(path), **bound)
    with pytest.warns(UserWarning, match="policy skipped"):
        demo = Demo(Namespace(**DEMO, model=str(model)))
    assert "7 rows" in demo.how_long()  # none for it


def test_at_token_granularity_heads_count_by_their_learned_weights(
    model: Path, load: Callable[..., Any]
) -> None:
    """With all weight on one head, the tokens that stay are that head's best."""
    weights = np.zeros((2, 2), np.float32)
    weights[1, 0] = 3.0
    path = write(model.parent / "kvp-own.gguf", info_of(model), aggregate=weights)
    llm = load(
        model, policy=str(path), granularity="token", n_ctx=512, kv_budget=100, recent=8,
        reserve=156, n_batch=32, sinks=2,
    )  # fmt: skip
    tokens = np.random.default_rng(1).integers(3, 60, 256).tolist()
    llm.eval(tokens)
    assert llm.kv_stats.evictions == 0
    _, keys, values = llm.kv.cache.read(0, 256, 256)
    view = ArrayView(keys, values, np.arange(256, dtype=np.int32))
    scores = get_policy(str(path)).score(view)[1, 0]
    llm.eval(tokens[:1])
    best = 2 + np.argsort(-scores[2:248], kind="stable")[: 100 - 10]
    expected = sorted({0, 1, *best.tolist(), *range(248, 257)})
    assert llm.kv.indices.tolist() == expected


def test_the_small_model_comes_with_a_policy_that_fits_it(
    bundled_model: str, load: Callable[..., Any]
) -> None:
    path = own_policy(bundled_model)
    assert path is not None
    assert Path(path).parent == Path(bundled_model).parent
    llm = load(bundled_model, n_ctx=4096, kv_budget=256)
    assert llm.kv_stats.policy == "learned"
    llm.eval([0, *np.random.default_rng(0).integers(300, 4000, 1200).tolist()])
    assert llm.kv_stats.evictions > 0
