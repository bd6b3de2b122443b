"""Policies: one scoring rule per file, named after it.

To add one: a file here, its class in ``POLICIES``, a row in docs/how-eviction-works.md, and
README's table of options made anew (scripts/options_table.py), which names all of them. The first
line of its docstring is what ``kvp-edge policies`` shows. ``score`` in numpy is its definition; to
run it in place as well, see native/cache/rules.cpp.
"""

from __future__ import annotations

import os

from kvp_edge.errors import PolicyError
from kvp_edge.policies.base import Policy
from kvp_edge.policies.expected_attention import ExpectedAttention
from kvp_edge.policies.gkv import GKV
from kvp_edge.policies.h2o import H2O
from kvp_edge.policies.keydiff import KeyDiff
from kvp_edge.policies.knorm import KNorm
from kvp_edge.policies.lagkv import LagKV
from kvp_edge.policies.lazy_eviction import LazyEviction
from kvp_edge.policies.learned import Learned
from kvp_edge.policies.onnx import Onnx
from kvp_edge.policies.policy_of_model import own_policy
from kvp_edge.policies.random import Random
from kvp_edge.policies.recency import Recency
from kvp_edge.policies.snapkv import SnapKV
from kvp_edge.policies.tova import TOVA
from kvp_edge.policies.value_range import ValueRange
from kvp_edge.policies.view import ArrayView, CacheView

#: The plain rules that tables compare with: name -> class.
HEURISTICS: dict[str, type[Policy]] = {p.name: p for p in (KeyDiff, KNorm, Recency, Random)}

#: All that can be asked for by name, in the order in which they are presented.
POLICIES: dict[str, type[Policy]] = {
    **HEURISTICS,
    **{p.name: p for p in (LagKV, ValueRange, SnapKV, TOVA, H2O, GKV, LazyEviction)},
    ExpectedAttention.name: ExpectedAttention,
}


#: What "auto" means for a model that no policy was trained for.
FALLBACK = KeyDiff.name


def get_policy(
    policy: str | os.PathLike[str] | Policy, model_path: str | os.PathLike[str] | None = None
) -> Policy:
    """The policy of that name or in that policy file (.gguf, .onnx), or the Policy object itself.

    Args:
        policy: "auto" is the policy trained for the model (see own_policy), else ``FALLBACK``.
        model_path: the model's file, which "auto" needs.

    Raises:
        PolicyError: unknown name; the message lists the known ones. Or a policy file that cannot be
            used (PolicyFileError).
    """
    if isinstance(policy, Policy):
        return policy
    policy = os.fspath(policy)
    if policy == "auto":
        policy = (own_policy(model_path) if model_path else None) or FALLBACK
    if policy.endswith(".gguf"):
        return Learned(policy)
    if policy.endswith(".onnx"):
        return Onnx(policy)
    if policy not in POLICIES:
        raise PolicyError(
            f"unknown policy '{policy}'; choose one of auto, {', '.join(POLICIES)}, or a "
            "policy file (.gguf, .onnx)"
        )
    return POLICIES[policy]()


__all__ = [
    "FALLBACK",
    "GKV",
    "H2O",
    "HEURISTICS",
    "POLICIES",
    "TOVA",
    "ArrayView",
    "CacheView",
    "ExpectedAttention",
    "KNorm",
    "KeyDiff",
    "LagKV",
    "LazyEviction",
    "Learned",
    "Onnx",
    "Policy",
    "Random",
    "Recency",
    "SnapKV",
    "ValueRange",
    "get_policy",
]
