"""Exported files score like PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.packages import needs

needs("torch", "train")
needs("safetensors", "train")

from kvp_edge.cli import main  # noqa: E402
from kvp_edge.errors import PolicyFileError, TrainingError  # noqa: E402
from kvp_edge.export import export, policy_of  # noqa: E402
from kvp_edge.export.parity import check_parity, common_tokens  # noqa: E402
from kvp_edge.policies import ArrayView, Learned, get_policy  # noqa: E402
from kvp_edge.policy_file import read_policy, write_policy  # noqa: E402
from kvp_edge.training.checkpoint import load_agents  # noqa: E402
from kvp_edge.training.train import Settings, train  # noqa: E402
from kvp_edge.training.validate import agent_scorer  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402

TRACES = SyntheticTraces(6, "neighbour", shape=(2, 2, 32, 16))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = Settings(
        objective="kvp",
        hidden=16,
        context=5,
        steps=20,
        token_steps=5,
        states=2,
        tokens=128,
        eval_every=10,
    )
    train(TRACES, folder, settings, progress=False)
    return folder


@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_pytorch_numpy_and_onnx_agree(run: Path, tmp_path: Path, outtype: Any) -> None:
    needs("onnxruntime", "onnx")
    needs("onnx", "onnx")
    done = export(
        run, outfile=tmp_path / "p-{ftype}.gguf", outtype=outtype, onnx=True, traces=TRACES
    )
    assert done.gguf == tmp_path / f"p-{outtype}.gguf"
    parity = done.parity
    assert parity is not None
    assert parity.onnx is not None
    assert parity.onnx < 1e-4
    assert parity.executor < 1e-4
    assert parity.kept >= 0.999
    assert parity.rounding < {"f32": 1e-5, "f16": 1e-3, "q8_0": 3e-2}[outtype]

    # and through the front door: two policies of one checkpoint, also where tokens are missing
    assert done.onnx is not None
    learned, onnx = get_policy(str(done.gguf)), get_policy(str(done.onnx))
    trace = TRACES[5]
    some = np.r_[0:7, 9:40, 80:120]
    keys = trace.keys[:, :, some].astype(np.float32)
    values = trace.values[:, :, some].astype(np.float32)
    a, b = (p.score(ArrayView(keys, values, trace.indices[some])) for p in (learned, onnx))
    np.testing.assert_allclose(a, b, atol=3e-2 if outtype == "q8_0" else 1e-3)
    agents, _ = load_agents(run)
    whole = agent_scorer(agents)(trace, 100).reshape(2, 2, 100)
    np.testing.assert_allclose(onnx.score(_whole(trace, 100)), whole, atol=1e-4)


def _whole(trace: Any, n: int) -> ArrayView:
    keys, values = trace.keys[:, :, :n], trace.values[:, :, :n]
    return ArrayView(keys.astype(np.float32), values.astype(np.float32), trace.indices[:n])


def test_the_blind_agent_is_exported_too(tmp_path: Path) -> None:
    settings = Settings(
        objective="kvp",
        hidden=16,
        context=1,
        steps=6,
        token_steps=2,
        states=2,
        tokens=64,
        eval_every=6,
    )
    train(TRACES, tmp_path, settings, progress=False)
    parity = export(tmp_path, outtype="f32").parity
    assert parity is not None
    assert parity.executor < 1e-4


def test_names_are_derived_and_a_dry_run_writes_nothing(run: Path) -> None:
    before = set(run.iterdir())
    done = export(run, outtype="q8_0", onnx=True, dry_run=True)
    assert done.gguf.name == "kvp-synthetic-w5-Q8_0.gguf"
    assert done.onnx is not None
    assert done.onnx.name == "kvp-synthetic-w5.onnx"
    assert set(run.iterdir()) == before


def test_a_file_with_other_weights_is_found_out(run: Path, tmp_path: Path) -> None:
    agents, about = load_agents(run)
    info, weights = policy_of(agents, about)
    weights.conv[:, :, 0] += 0.05
    write_policy(tmp_path / "wrong.gguf", info, weights, "f32")
    _, right = policy_of(agents, about)
    parity = check_parity(agents, tmp_path / "wrong.gguf", right, None, TRACES)
    assert len(parity.failures) == 2


def test_common_tokens_are_counted_at_every_budget() -> None:
    a = [np.array([[4.0, 3.0, 2.0, 1.0]], np.float32)]
    b = [np.array([[4.0, 1.0, 2.0, 3.0]], np.float32)]
    common, kept = common_tokens(a, b)
    np.testing.assert_array_equal(kept, [1, 2, 3])
    np.testing.assert_array_equal(common, [1, 1, 2])


def test_what_the_training_knew_is_in_the_file(run: Path, tmp_path: Path) -> None:
    export(run, outfile=tmp_path / "p.gguf", license="mit", kv_type="q8_0/q4_0")
    info, _ = read_policy(tmp_path / "p.gguf")
    assert (info.architecture, info.base_model, info.fingerprint) == ("llama", "synthetic", "f00d")
    assert info.model_identity == "1dea"
    assert (info.context, info.hidden, info.license) == (5, 16, "mit")
    assert info.kv_type == "q8_0/q4_0"
    assert Learned(tmp_path / "p.gguf").context == 2


def test_a_checkpoint_without_a_model_needs_one(tmp_path: Path) -> None:
    traces = SyntheticTraces(4)
    traces.model = {}
    settings = Settings(objective="kvp", hidden=8, steps=2, states=1, eval_every=2)
    train(traces, tmp_path, settings, progress=False)
    with pytest.raises(TrainingError, match="--base MODEL.gguf"):
        export(tmp_path)
    assert export(tmp_path, architecture="qwen2").info.architecture == "qwen2"
    with pytest.raises(TrainingError, match="are from another model"):
        export(tmp_path, architecture="qwen2", traces=TRACES)


def test_the_command_s_last_line_names_the_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bundled_model: str
) -> None:
    out = tmp_path / "mine.gguf"
    assert main(["export", str(run), "--outfile", str(out), "--outtype", "f32"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert main(["export", str(run), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("kvp-synthetic-w5-F16.gguf")
    assert main(["export", str(tmp_path / "none")]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), "--kv-type", "q9_0"])
    assert "none' not found" in capsys.readouterr().err
    assert main(["export", str(run), "--base", bundled_model]) == 2
    assert "is for a cache of" in capsys.readouterr().err


def test_an_onnx_file_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    needs("onnxruntime", "onnx")
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(PolicyFileError, match="onnxruntime cannot load"):
        get_policy(str(tmp_path / "x.onnx"))
    with pytest.raises(PolicyFileError, match="policy file '.*none.onnx' not found"):
        get_policy(str(tmp_path / "none.onnx"))


def test_an_onnx_policy_with_damaged_metadata_is_refused(run: Path, tmp_path: Path) -> None:
    needs("onnxruntime", "onnx")
    onnx = needs("onnx", "onnx")
    done = export(run, outfile=tmp_path / "p.gguf", onnx=True, traces=TRACES)
    path, info = done.onnx, done.info
    assert path is not None
    assert get_policy(path).info == info
    written = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(written["kvp.info"]) == {**asdict(info), "statistics": 0}
    good = json.dumps(asdict(info))
    for about, aggregate in (
        ("{", "[[1]]"),
        ("[]", "[[1]]"),
        ("[" * 100_000, "[[1]]"),
        (json.dumps({**asdict(info), "n_layer": 0}), "[[1]]"),
        (json.dumps({**asdict(info), "n_layer": "2"}), "[[1]]"),
        (json.dumps({"n_layer": 2}), "[[1]]"),
        (good, "[[1]]"),
        (good, '[["a"]]'),
        (good, "7"),
    ):
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"kvp.info": about, "kvp.aggregate": aggregate})
        onnx.save(model, tmp_path / "bad.onnx")
        with pytest.raises(PolicyFileError, match="damaged|it has"):
            get_policy(tmp_path / "bad.onnx")
