"""Labels by name: which attention they are of, and how rankings are made of it.

A name like ``later+repeated*value:wide`` is read from left to right:

- parts, joined by "+": each is divided by its mean over the tokens of its head, then all are added;
- ``*value``: every part times the norm of the token's value first, as what a query receives is
  attention times value;
- ``:shared``: heads decide together (kvp_edge.cache.recall.share);
- ``:wide``: what follows a token closely, or comes just before it, counts as much
  (kvp_edge.cache.recall.widen).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.cache.recall import share, widen
from kvp_edge.policies import CacheView, Policy
from kvp_edge.policies.base import EVERY_QUERY
from kvp_edge.traces.labels import LATER, QUESTIONED, REPEATED

#: What a label is made of; ``Subject.attention`` measures them. Labeller (kvp_edge.traces.labels)
#: has three of them.
LATER_SUM, CONTINUED, ASKED = "later-sum", "continued", "asked"
PARTS = {
    LATER: "the most attention that any later token of the text pays, 32 tokens on or more",
    LATER_SUM: "the sum of it",
    CONTINUED: "the most that the model's own greedy continuation pays, of 64 tokens",
    QUESTIONED: "the most that questions pay which the model writes about the text",
    REPEATED: "the most that a repetition of the text pays",
    ASKED: "the most that what is measured pays: no policy can know it (the upper bound)",
}

#: Those that every part is measured with, and the mixtures that looked best in small runs.
DEFAULT = (
    "later",
    "later*value",
    "later-sum*value",
    "continued*value",
    "questioned*value",
    "repeated",
    "repeated*value",
    "later+repeated*value",
    "later+repeated*value:wide",
    "later+repeated*value:shared",
    "later+repeated+questioned*value",
    "later+asked*value",
    "asked",
    "asked*value",
    "asked*value:wide",
)

_VALUE, _SHARED, _WIDE = "*value", "shared", "wide"

SHARED = 0.8
AFTER, BEFORE = 3, 1
_TINY = 1e-12


@dataclass(frozen=True)
class Label:
    """One way to rank tokens by the attention that they will get.

    Attributes:
        parts: of PARTS, at least one.
        value: each part counts times the norm of the token's value.
        shared: heads decide together.
        wide: neighbours count as much.
    """

    parts: tuple[str, ...]
    value: bool = False
    shared: bool = False
    wide: bool = False

    @classmethod
    def parse(cls, name: str) -> Label:
        """The label of that name, see the module.

        Raises:
            ValueError: there is none.
        """
        body, *marks = name.split(":")
        value = body.endswith(_VALUE)
        parts = tuple(body.removesuffix(_VALUE).split("+"))
        for part in parts:
            if part not in PARTS:
                raise ValueError(
                    f"no label '{part}' (of '{name}'): there are {', '.join(PARTS)}; join several "
                    f"with +, and add {_VALUE}, :{_SHARED} or :{_WIDE}"
                )
        for mark in marks:
            if mark not in (_SHARED, _WIDE):
                raise ValueError(f"':{mark}' of '{name}' is neither :{_SHARED} nor :{_WIDE}")
        if len(set(parts)) < len(parts) or len(set(marks)) < len(marks):
            raise ValueError(f"'{name}' says something twice")
        return cls(parts, value, _SHARED in marks, _WIDE in marks)

    @property
    def name(self) -> str:
        marks = (f":{_SHARED}" if self.shared else "") + (f":{_WIDE}" if self.wide else "")
        return "+".join(self.parts) + (_VALUE if self.value else "") + marks

    def scores(
        self, attention: Mapping[str, FloatArray], norms: FloatArray, sinks: int
    ) -> FloatArray:
        """How much every head wants each of n tokens.

        Args:
            attention: of each of the label's parts, f32 [n_layer, n_head_kv, n].
            norms: f32 [n_layer, n_head_kv, n], of the tokens' values.
            sinks: the first tokens, which are never evicted. They count as 0, so that what is
                divided by a mean or by the largest number compares the others.

        Returns:
            f32 [n_layer, n_head_kv, n], at least 0.
        """
        scores = np.zeros(norms.shape, np.float32)
        for name in self.parts:
            part = attention[name] * norms if self.value else attention[name].copy()
            part[:, :, :sinks] = 0
            if len(self.parts) > 1:
                part /= np.maximum(part[:, :, sinks:].mean(axis=-1, keepdims=True), _TINY)
            scores += part
        if self.shared:
            scores = share(scores, SHARED)
        return widen(scores, AFTER, BEFORE) if self.wide else scores


class Given(Policy):
    """Keeps the tokens that were given the highest scores.

    Args:
        scores: f32 [n_layer, n_head_kv, n], of the first n tokens of the conversation, all that are
            held when tokens are dropped.
    """

    name = "given"
    scope = "cache"

    def __init__(self, scores: FloatArray) -> None:
        self._scores = scores

    @property
    def n_queries(self) -> int:
        """All: labels are made of queries, so a model that makes them must log all."""
        return EVERY_QUERY

    def score(self, view: CacheView) -> FloatArray:
        held = np.broadcast_to(view.indices, view.shape).astype(np.int64)
        scores: FloatArray = np.take_along_axis(self._scores, held, axis=2)
        return scores
