"""What a policy is: a score for every token in every KV head. Larger means keep."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from kvp_edge.arrays import FloatArray, IntArray
from kvp_edge.binding.cache import NotInPlace

if TYPE_CHECKING:
    from kvp_edge.binding.cache import NativeCache
    from kvp_edge.binding.policy import NativePolicy
    from kvp_edge.binding.queries import Queries, QueryLog, SharedLog
    from kvp_edge.policy_file import PolicyInfo


#: As many queries as the cache has cells, which are at least all since the last eviction.
EVERY_QUERY = 2**31 - 1


_assigning = threading.Lock()


class Policy(ABC):
    """A scorer of cached tokens. Write ``score`` and, if needed, set the class attributes.

    An object may be given to several models, also in several threads, unless ``score`` itself
    remembers something from one call to the next.

    A policy only scores. When and how much to evict, and which tokens are protected whatever their
    score, is decided by ``kvp_edge.cache.manager``.
    """

    #: What users call it.
    name: ClassVar[str]

    #: What ``score`` looks at. With "indices" the cache is never read and the arrays of keys and
    #: values have a last axis of length 0.
    inputs: ClassVar[Literal["indices", "keys", "keys+values"]] = "keys+values"

    #: "token": a score depends on its own token alone, so every token is read and scored once.
    #: "cache": it depends on the other tokens held, so all are scored again at every eviction.
    scope: Literal["token", "cache"] = "token"

    #: What model the policy was made for; None: it fits every model. Llama checks it at load.
    info: PolicyInfo | None = None

    #: How many neighbours to either side a score looks at (scope "token" only). A token's score is
    #: final when that many later tokens are known; until then the recent window protects it.
    context: int = 0

    #: What computes the same numbers without copying keys to Python, if anything: a name in
    #: kvp_edge.binding.cache.SCORERS or a network. ``score`` stays the definition that it is tested
    #: by.
    native_scorer: str | NativePolicy | None = None

    #: f32 [n_layer, n_head_kv], see ``whole_tokens``.
    head_weights: FloatArray | None = None

    #: How many of the newest tokens' queries the policy wants to see, at most as many as the cache
    #: has cells; 0: none. With more than 0 ``scope`` is "cache", as the queries are others at every
    #: eviction.
    queries: int = 0

    #: Whether the log must know RoPE's frequencies (kvp_edge.binding.rope). A model in which they
    #: cannot be measured is then refused at load.
    needs_frequencies: ClassVar[bool] = False

    #: Where they are, if ``queries`` > 0: the log of the one model that the object serves.
    query_log: QueryLog | SharedLog | None = None

    def serving(self, log: QueryLog) -> Policy:
        """The policy for the model whose log this is, until ``released``: this object, or a copy
        (copy.copy) while this one serves another model."""
        with _assigning:
            policy = self if self.query_log is None else copy.copy(self)
            policy.query_log = log
            return policy

    def released(self) -> None:
        """Its model is gone."""
        self.query_log = None

    def logged(self) -> Queries:
        """The newest ``queries`` queries of the log, fewer if there are not so many.

        Raises:
            ValueError: nobody has set the log.
        """
        if self.query_log is None:
            raise ValueError(
                f"policy '{self.name}' looks at queries, which exist only in a bounded chat: load "
                "the model with kv_budget and this policy"
            )
        return self.query_log.read(self.queries)

    def identity(self) -> str:
        """What a saved session is checked against: the name, and all else that decides scores."""
        return self.name

    def worth(self, scores: FloatArray, ages: IntArray) -> FloatArray:
        """What tokens are worth at an eviction: the scores themselves, unless a policy's scores say
        how fast a token's worth decays.

        Args:
            scores: f32 [n_layer, n_head_kv, n], as ``score`` gave them.
            ages: int32, broadcast to that: tokens read since, the token itself included.

        Returns:
            f32 [n_layer, n_head_kv, n]; larger = keep.
        """
        return scores

    def whole_tokens(self, worth: FloatArray) -> FloatArray | None:
        """The worth of whole tokens, f32 [n] from [n_layer, n_head_kv, n]. None: the policy does
        not say, and it is the mean of the heads' standardised numbers."""
        if self.head_weights is None:
            return None
        total: FloatArray = np.einsum("lhn,lh->n", worth, self.head_weights)
        return total

    def score_in_place(self, cache: NativeCache, p0: int, p1: int, indices: IntArray) -> FloatArray:
        """What ``score`` returns, computed where the tokens at llama.cpp's positions [p0, p1) lie.

        Args:
            indices: as in ``score``.

        Raises:
            NotInPlace: that is not possible; then ``score`` is called. Nothing has changed.
        """
        if self.native_scorer is None:
            raise NotInPlace(f"the policy {self.name} computes on rows that it is given")
        # tokens that are scored once are the same in all heads, and others' indices do not matter
        tokens = indices if indices.ndim == 1 else indices[0, 0]
        return cache.score(self.native_scorer, p0, p1, tokens)

    @abstractmethod
    def score(self, keys: FloatArray, values: FloatArray, indices: IntArray) -> FloatArray:
        """Score tokens.

        Args:
            keys: f32 [n_layer, n_head_kv, n_tokens, head_size_k], as cached (RoPE included).
            values: f32 [n_layer, n_head_kv, n_tokens, head_size_v].
            indices: int32 [n_tokens], the tokens' indices in the conversation, ascending. With
                scope "cache" at head granularity, where every head holds its own tokens,
                [n_layer, n_head_kv, n_tokens].

        Returns:
            f32 [n_layer, n_head_kv, n_tokens]; larger = keep.
        """
