"""Policies with other parameters are compared like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvp_edge.evaluation.records import read_records
from kvp_edge.policies import GKV, POLICIES
from scripts.eval_variants import main, variant


def test_a_variant_is_the_policy_with_another_parameter() -> None:
    made = variant("gkv(balance=1.0)")()
    assert isinstance(made, GKV)
    assert (made.name, made.balance, made.decay) == ("gkv(balance=1.0)", 1.0, 0.8)
    assert variant("lazy-eviction(combine='sum')")().identity() == (
        "lazy-eviction(combine='sum')(threshold=0.0001, combine='sum')"
    )


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("gkv", ValueError, "'gkv' is not NAME"),
        ("none(a=1)", ValueError, "is not NAME"),
        ("gkv(balance=2)", ValueError, "balance is from 0 to 1, not 2"),
        ("gkv(colour=2)", TypeError, "colour"),
    ],
)
def test_what_is_no_variant_is_refused(text: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        variant(text)


def test_variants_are_measured_beside_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "gkv(balance=1.0)"
    monkeypatch.setitem(POLICIES, name, GKV)  # removed again when the test ends
    asked = f"--tasks fact --items 1 --lengths 512 --budgets 1/4 --threads 1 --policies gkv,{name}"
    assert main([name, "--", *asked.split(), "--out", str(tmp_path)]) == 0
    found = {r.policy for r in read_records(tmp_path / "records.jsonl")}
    assert found == {"none", "gkv", name}


def test_without_a_variant_it_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--", "--tasks", "fact"]) == 2
    assert "whose parameters are not the defaults" in capsys.readouterr().err
