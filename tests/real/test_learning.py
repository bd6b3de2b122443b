"""The learned road with a real model: watched, learned from, exported, found, used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")
needs("onnxruntime", "onnx")
needs("onnx", "onnx")


from kvp_edge import Llama  # noqa: E402
from kvp_edge.cli import main  # noqa: E402
from kvp_edge.policies import get_policy  # noqa: E402
from kvp_edge.policies.policy_of_model import own_policy  # noqa: E402
from support.real_models import ALL, GEMMA, newest_logits, tokens_of  # noqa: E402

pytestmark = pytest.mark.real

#: As little as shows that the road goes all the way; what is learned is worth nothing.
TRACE = ["--tasks", "5", "--length", "256", "--threads", "1"]
TRAIN = {
    "kvp": "--hidden 8 --steps 3 --token-steps 2 --states 1 --eval-every 3",
    "global": "--hidden 8 --steps 3 --states 1 --eval-every 3 --distil-steps 1 --distil-tokens 64 "
    "--texts 1",
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("objective", "linked"), [("kvp", False), ("global", True)])
def test_a_policy_is_traced_trained_exported_and_used_by_chats(
    name: str,
    linked: bool,
    objective: str,
    real_model: Callable[[str], str],
    book: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    # as for a model that no policy comes with
    monkeypatch.setattr("kvp_edge.policies.policy_of_model._shipped", lambda: tmp_path / "nothing")
    model = tmp_path / "models" / "mine.gguf"
    model.parent.mkdir()
    (os.symlink if linked else os.link)(real_model(name), model)
    assert own_policy(model) is None
    traces, run = str(tmp_path / "traces"), str(tmp_path / "run")
    assert main(["trace", str(model), "--out", traces, *TRACE]) == 0
    settings = [*TRAIN[objective].split(), "--objective", objective, "--model", str(model)]
    assert main(["train", traces, "--out", run, *settings]) == 0
    capsys.readouterr()

    out = model.parent / "kvp-mine.gguf"
    options = ["--onnx", "--outtype", "f32", "--base", str(model), "--outfile", str(out)]
    assert main(["export", run, *options, "--traces", traces]) == 0  # parity, or an error
    *_, onnx, gguf = capsys.readouterr().out.splitlines()
    assert gguf == str(out)
    assert main(["inspect", gguf]) == 0
    assert objective in capsys.readouterr().out

    assert own_policy(model) == gguf
    held, logits = [], []
    for policy in ("auto", get_policy(gguf), get_policy(onnx)):
        budget = 512 if name == GEMMA else 100
        llm = Llama(
            str(model), n_ctx=2000, kv_budget=budget, recent=20, reserve=60, policy=policy,
            n_threads=1, n_threads_batch=1, verbose=False,
        )  # fmt: skip
        llm.eval(tokens_of(llm, book, llm.kv_stats.cells + 40))
        assert llm.kv_stats.evictions == 1
        assert llm.kv_stats.policy == ("onnx" if len(held) == 2 else "learned")
        held.append(llm.kv_indices)
        logits.append(newest_logits(llm))
        llm.close()
    assert (held[0] == held[1]).all()
    assert (logits[0] == logits[1]).all()
    assert (held[0] == held[2]).mean() > 0.99
