"""Recall: rows that were dropped come back, the right ones, and as they were."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from support.histories import Maker, any_history
from support.properties import examples


@examples(12)
@given(data=st.data())
def test_after_any_history_with_recall_logits_are_those_of_what_heads_held(
    random_model: Maker, data: st.DataObject
) -> None:
    any_history(random_model, data, "host", recall=True)
