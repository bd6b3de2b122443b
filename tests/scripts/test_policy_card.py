"""Cards of policies: what they tell is what the files say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from support.packages import needs

torch = needs("torch", "train")
needs("safetensors", "train")

import kvp_edge  # noqa: E402
from kvp_edge.bundled import bundled_model  # noqa: E402
from kvp_edge.export import export  # noqa: E402
from kvp_edge.policies.policy_of_model import own_policy  # noqa: E402
from kvp_edge.policy_file import read_policy, write_policy  # noqa: E402
from kvp_edge.training.settings import Settings  # noqa: E402
from kvp_edge.training.train import train  # noqa: E402
from makers.synthetic_traces import SyntheticTraces  # noqa: E402
from scripts.train_policy.__main__ import RECIPES  # noqa: E402
from scripts.train_policy.card import card, main  # noqa: E402

SETTINGS = Settings(
    objective="kvp", hidden=16, context=5, steps=6, token_steps=2, states=2, tokens=64, eval_every=6
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    train(SyntheticTraces(6), folder, SETTINGS, progress=False)
    export(folder, outtype="q8_0", license="mit")
    return folder


def test_a_card_tells_file_model_texts_command_and_figures(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--texts", "six made-up texts", "--command", "kvp-edge train x --out y"])
    (path,) = run.glob("kvp-*.md")
    assert capsys.readouterr().out == f"{path}\n"
    told = path.read_text()
    report = json.loads((run / "report.json").read_text())
    for part in (
        "# kvp-synthetic-w5\n", "kvp-synthetic-w5-Q8_0.gguf", "Q8_0", "synthetic", "`f00d`",
        "`1dea`", "six made-up texts", "    kvp-edge train x --out y\n", "| licence | mit |",
        "`--objective kvp`", "`--hidden 16`", "`--token-steps 2`",
        "Measured on the validation traces of the run.",
        f"| keydiff | {np.mean(report['keydiff']['cost']):.2f} | "
        f"{np.mean(report['keydiff']['lost']):.3f} | {report['keydiff']['token_cost']:.2f} | "
        f"{report['keydiff']['token_lost']:.3f} |",
    ):  # fmt: skip
        assert part in told, part
    assert "`--lr" not in told  # the default
    assert "seconds" not in told
    rows = [line for line in told.splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0].strip("| *") for row in rows]
    assert names[names.index("policy") + 2] == "this policy"


def test_held_out_figures_come_before_those_of_validation(run: Path, tmp_path: Path) -> None:
    figures = {"policy": {"cost": [1.5, 2.5], "lost": [0.1], "token_cost": 3, "token_lost": 0.4}}
    held_out = run / "comparison.json"
    held_out.write_text(json.dumps(figures))
    try:
        main([str(run), "--texts", "x", "--command", "y"])
    finally:
        held_out.unlink()
    (path,) = run.glob("kvp-*.md")
    assert "| **this policy** | 2.00 | 0.100 | 3.00 | 0.400 |" in path.read_text()
    assert "Measured on held-out traces." in path.read_text()


def test_a_policy_that_knows_sensitive_heads_has_its_costs_weighed_by_them(
    run: Path, tmp_path: Path
) -> None:
    (made,) = run.glob("kvp-*.gguf")
    info, weights = read_policy(made)
    shape = (info.n_layer, info.n_head_kv)
    found = np.zeros(shape, np.float32)
    found[-1, -1], found[0, 0] = 0.75 * found.size, 0.25 * found.size
    costs = np.full(shape, 9.0)
    costs[-1, -1], costs[0, 0] = 2, 4
    path = tmp_path / "kvp-sensitive.gguf"
    write_policy(path, info, replace(weights, sensitivity=found))
    figures = {"cost": costs.ravel().tolist(), "lost": [0.1], "token_cost": 3, "token_lost": 0.4}
    told = card(path, {}, {"policy": figures}, texts="", command="", measured="")
    assert "cost, heads by their sensitivity |" in told
    assert f"| **this policy** | {costs.mean():.2f} | 0.100 | 3.00 | 0.400 | 2.50 |" in told
    assert f"| sensitive heads | 1 of {found.size} carry half of the loss; most is head " in told
    silent = card(made, {}, {"policy": figures}, texts="", command="", measured="")
    assert "sensitiv" not in silent


def test_a_folder_with_several_policies_needs_one_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = run / "kvp-second.gguf"
    second.write_bytes(b"")
    try:
        with pytest.raises(SystemExit):
            main([str(run), "--texts", "x", "--command", "y"])
    finally:
        second.unlink()
    assert "has 2 policy files: name one with --policy" in capsys.readouterr().err


def test_every_shipped_policy_has_a_card_that_is_true_of_it() -> None:
    folder = Path(own_policy(bundled_model()) or "").parent
    assert folder.is_relative_to(Path(kvp_edge.__file__).parent)
    policies = sorted(folder.glob("kvp-*.gguf"))
    assert policies
    for policy in policies:
        told = policy.with_suffix(".md").read_text()
        info, _ = read_policy(policy)
        settings = asdict(RECIPES[info.objective])
        again = card(policy, settings, {}, texts="", command="", measured="")
        facts = [line for line in again.splitlines() if line.startswith("| ")]
        for line in facts:
            if not line.startswith(("| trained on", "| policy")):
                assert line in told, line
