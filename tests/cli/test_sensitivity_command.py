"""kvp-edge sensitivity: figures, their file, and the policy that they are stored in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.packages import needs

needs("torch", "train")

from conftest import DATA, RandomModel  # noqa: E402
from kvp_edge.binding.fingerprint import model_fingerprint, model_identity  # noqa: E402
from kvp_edge.cli import main  # noqa: E402
from kvp_edge.policies import Learned  # noqa: E402
from kvp_edge.policy_file import (  # noqa: E402
    PolicyInfo,
    outtype_of,
    read_policy,
    write_policy,
)
from makers.gguf_models import ModelShape  # noqa: E402
from makers.policies import random_weights  # noqa: E402

Maker = Callable[[ModelShape], RandomModel]
BOOK = str(DATA / "penelope_brandling.txt")
FEW = ["--text", BOOK, "--length", "80", "--texts", "2", "--threads", "1"]


@pytest.fixture
def model(random_model: Maker) -> str:
    return str(random_model(ModelShape()).path)


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_what_is_measured_is_shown_written_and_stored(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], outtype: str
) -> None:
    info = PolicyInfo(
        "llama", 2, 2, 32, 32, hidden=32, context=1, fingerprint=model_fingerprint(model)
    )
    policy, out = tmp_path / "policy.gguf", tmp_path / "heads.json"
    write_policy(policy, info, random_weights(info), outtype)
    before = read_policy(policy)[1].arrays()
    argv = ["sensitivity", model, *FEW, "--out", str(out), "--policy", str(policy)]
    assert main(argv) == 0
    told = json.loads(out.read_text())
    rise, weights = np.array(told["rise"]), np.array(told["weights"])
    assert rise.shape == (2, 2)
    np.testing.assert_allclose(weights, np.maximum(rise, 0) / np.maximum(rise, 0).mean(), rtol=1e-5)
    assert told["identity"] == model_identity(model)
    assert (told["length"], told["texts"], told["sinks"], told["exact"]) == (80, 2, 4, False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split()[:3] == ["0", f"{weights[0, 0]:.2f}", f"{weights[0, 1]:.2f}"]
    assert f"{rise.max():.4f} nats" in shown[-2]
    assert shown[-1] == f"stored in '{policy}'"

    stored = Learned(policy)
    np.testing.assert_array_equal(stored.sensitivity, weights.astype(np.float32))
    assert outtype_of(policy) == outtype
    after = read_policy(policy)[1].arrays()
    for name in before.keys() - {"sensitivity"}:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_a_policy_of_another_shape_is_refused_before_anything_is_measured(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PolicyInfo("llama", 3, 2, 32, 32, hidden=8, context=1)
    policy = tmp_path / "policy.gguf"
    write_policy(policy, info, random_weights(info))
    data = policy.read_bytes()
    out = tmp_path / "heads.json"
    assert main(["sensitivity", model, *FEW, "--out", str(out), "--policy", str(policy)]) == 2
    assert "is for a cache of 3 layers" in capsys.readouterr().err
    assert policy.read_bytes() == data
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--texts", "100000"], "fewer than 100000: lower --texts or --length"),
        (["--share", "2"], "--share must be from 0 to 1, not 2.0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    model: str, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    assert main(["sensitivity", model, "--text", BOOK, "--length", "80", *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_of_another_type_has_no_outtype(tmp_path: Path) -> None:
    from support.policy_files import rewrite

    info = PolicyInfo("llama", 1, 1, 8, 8, hidden=4, context=1)
    path = tmp_path / "policy.gguf"
    write_policy(path, info, random_weights(info), "f32")
    odd = rewrite(path, tmp_path / "odd.gguf", general__file_type=99)
    with pytest.raises(ValueError, match=r"has the general.file_type 99, which is none of f32"):
        outtype_of(odd)
