"""kvp_edge: learned KV-cache eviction inside stock llama.cpp.

from kvp_edge import Llama
llm = Llama("model.gguf", n_ctx=32768, kv_budget=2048)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvp_edge.cache.options import CacheOptions
    from kvp_edge.cache.recall import Recall
    from kvp_edge.cache.stats import Eviction, KVStats
    from kvp_edge.errors import (
        BudgetError,
        ClosedError,
        ContextLengthError,
        InUseError,
        KVCacheError,
        KVPError,
        OptionError,
        PolicyError,
        PolicyFileError,
        RecordError,
        SessionError,
        TraceError,
        TrainingError,
        UnsupportedModelError,
    )
    from kvp_edge.llama import Llama
    from kvp_edge.policies import POLICIES, Policy

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "BudgetError",
    "CacheOptions",
    "ClosedError",
    "ContextLengthError",
    "Eviction",
    "InUseError",
    "KVCacheError",
    "KVPError",
    "KVStats",
    "Llama",
    "OptionError",
    "Policy",
    "PolicyError",
    "PolicyFileError",
    "Recall",
    "RecordError",
    "SessionError",
    "TraceError",
    "TrainingError",
    "UnsupportedModelError",
    "__version__",
]

#: Where each public name comes from. They are imported when they are asked for, so that
#: kvp-edge doctor can look at an installation whose native part cannot be imported.
_FROM = {
    "BudgetError": "errors",
    "ClosedError": "errors",
    "ContextLengthError": "errors",
    "InUseError": "errors",
    "KVCacheError": "errors",
    "KVPError": "errors",
    "OptionError": "errors",
    "PolicyError": "errors",
    "PolicyFileError": "errors",
    "RecordError": "errors",
    "SessionError": "errors",
    "TraceError": "errors",
    "TrainingError": "errors",
    "UnsupportedModelError": "errors",
    "Llama": "llama",
    "CacheOptions": "cache.options",
    "POLICIES": "policies",
    "Policy": "policies",
    "Eviction": "cache.stats",
    "Recall": "cache.recall",
    "KVStats": "cache.stats",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'kvp_edge' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"kvp_edge.{_FROM[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})
