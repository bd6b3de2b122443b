"""Policies: one scorer per file, named after it."""

from __future__ import annotations

from kvp_edge.policies.base import Policy
from kvp_edge.policies.keydiff import KeyDiff
from kvp_edge.policies.knorm import KNorm
from kvp_edge.policies.random import Random
from kvp_edge.policies.recency import Recency

#: name -> class, in the order in which they are presented.
POLICIES: dict[str, type[Policy]] = {p.name: p for p in (KeyDiff, KNorm, Recency, Random)}


def get_policy(policy: str | Policy) -> Policy:
    """The policy of that name, or the object itself when it is a Policy already.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"there is no policy '{policy}'; choose one of {', '.join(POLICIES)}")
    return POLICIES[policy]()


__all__ = ["POLICIES", "KNorm", "KeyDiff", "Policy", "Random", "Recency", "get_policy"]
