"""What a policy is: a score for every token in every KV head. Larger means keep."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.policies.view import CacheView

if TYPE_CHECKING:
    from kvp_edge.policy_file import PolicyInfo

#: As many queries as the cache has cells, which are at least all since the last eviction.
EVERY_QUERY = 2**31 - 1


class Policy(ABC):
    """A scorer of cached tokens: write ``score`` and, if needed, set the class attributes.

    Parameters are the fields of a frozen dataclass, checked in ``__post_init__``. What ``score``
    needs comes with the view, and nothing of it stays in the policy: so one object may serve
    several models, also in several threads.

    A policy only scores. When and how much to evict, and which tokens are protected whatever their
    score, is decided by ``kvp_edge.cache.manager``.
    """

    #: What users call it.
    name: ClassVar[str]

    #: "token": a score depends on its own token alone, so every token is read and scored once.
    #: "cache": it depends on the other tokens held, so all are scored again at every eviction.
    #: "history": so it does, and on what they scored before (``CacheView.previous``).
    scope: ClassVar[Literal["token", "cache", "history"]] = "token"

    #: The shape of what ``score`` gives each token: (), one number; (2,), two numbers, and so on.
    #: Several numbers are what a policy of scope "history" keeps of a token from one eviction to
    #: the next. They follow it wherever it goes, and ``worth`` ranks tokens by them.
    score_shape: ClassVar[tuple[int, ...]] = ()

    #: Whether RoPE's frequencies are measured for ``CacheView.frequencies``. A model in which they
    #: cannot be is then refused at load.
    needs_frequencies: ClassVar[bool] = False

    @property
    def n_queries(self) -> int:
        """How many of the newest tokens' queries are logged for ``CacheView.queries``, at most as
        many as the cache has cells; 0: none. With more than 0 ``scope`` is not "token", as the
        queries are others at every eviction."""
        return 0

    @property
    def context(self) -> int:
        """How many neighbours to either side a score depends on (scope "token" only). A token's
        score is final when that many later tokens are known; until then the recent window protects
        it."""
        return 0

    @property
    def info(self) -> PolicyInfo | None:
        """The model that the policy was made for; None: it fits every model. Llama checks it at
        load."""
        return None

    def identity(self) -> str:
        """What a saved session is checked against: the name, and the parameters."""
        if not dataclasses.is_dataclass(self):
            return self.name
        compared = (field.name for field in dataclasses.fields(self) if field.compare)
        parameters = ", ".join(f"{name}={getattr(self, name)!r}" for name in compared)
        return f"{self.name}({parameters})" if parameters else self.name

    @abstractmethod
    def score(self, view: CacheView) -> FloatArray:
        """Score tokens.

        Returns:
            f32 [n_layer, n_head_kv, n, *score_shape], of all tokens in the view; larger = keep,
            unless ``worth`` says otherwise.
        """

    def worth(self, scores: FloatArray, ages: IntArray) -> FloatArray:
        """What tokens are worth at an eviction: the scores themselves, unless a policy's scores say
        how fast a token's worth decays, or have several numbers for a token.

        Args:
            scores: f32 [n_layer, n_head_kv, n, *score_shape], as ``score`` gave them.
            ages: int32, broadcast to [n_layer, n_head_kv, n]: tokens read since, the token itself
                included.

        Returns:
            f32 [n_layer, n_head_kv, n]; larger = keep.
        """
        return scores

    def whole_tokens(self, worth: FloatArray) -> FloatArray | None:
        """The worth of whole tokens, f32 [n] from [n_layer, n_head_kv, n]. None: the policy does
        not say, and it is the mean of the heads' standardised numbers."""
        return None
