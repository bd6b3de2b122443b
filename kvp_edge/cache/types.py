"""The types that the keys and values of a cache can have.

A type that ggml gains needs a name here, a row in ``can_be_written``
(native/state/convert.cpp) if ggml can quantise to it, and tests (tests/support/cache_types.py).
All else follows from ggml.
"""

from __future__ import annotations

from gguf import GGMLQuantizationType

#: What users call them, most exact first: --type-k, --type-v.
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

#: Numbers that are stored as they are, not in quantised blocks.
PLAIN_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def ggml_type(name: str) -> int:
    """The number in enum ggml_type of a name in ``CACHE_TYPES``."""
    return int(GGMLQuantizationType[name.upper()])
