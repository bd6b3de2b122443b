"""kvp_edge: learned KV-cache eviction inside stock llama.cpp.

from kvp_edge import Llama
llm = Llama("model.gguf", n_ctx=32768, kv_budget=2048)
"""

from kvp_edge.errors import (
    BudgetError,
    ContextLengthError,
    InUseError,
    KVCacheError,
    SessionError,
    UnsupportedModelError,
)
from kvp_edge.llama import Llama
from kvp_edge.policies import POLICIES, Policy
from kvp_edge.stats import Eviction, KVStats

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "BudgetError",
    "ContextLengthError",
    "Eviction",
    "InUseError",
    "KVCacheError",
    "KVStats",
    "Llama",
    "Policy",
    "SessionError",
    "UnsupportedModelError",
    "__version__",
]
