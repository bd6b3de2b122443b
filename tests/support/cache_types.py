"""The types that a cache can have."""

from __future__ import annotations

import llama_cpp

F32, F16 = llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F16
BF16 = 30  # GGML_TYPE_BF16 in ggml.h; llama_cpp has no name for it
Q8_0 = llama_cpp.GGML_TYPE_Q8_0
Q5_0, Q5_1 = llama_cpp.GGML_TYPE_Q5_0, llama_cpp.GGML_TYPE_Q5_1
Q4_0, Q4_1 = llama_cpp.GGML_TYPE_Q4_0, llama_cpp.GGML_TYPE_Q4_1

CACHE_TYPES = {  # K, V, flash attention; V is only ever quantised with flash attention
    "f32": (F32, F32, False),
    "f32-fa": (F32, F32, True),
    "f16": (F16, F16, False),
    "f16-fa": (F16, F16, True),
    "bf16": (BF16, BF16, False),
    "bf16-fa": (BF16, BF16, True),
    "q8_0-f16": (Q8_0, F16, False),
    "q8_0-fa": (Q8_0, Q8_0, True),
    "q5_0-fa": (Q5_0, Q5_0, True),
    "q5_1-q8_0-fa": (Q5_1, Q8_0, True),
    "q4_0-fa": (Q4_0, Q4_0, True),
    "q4_1-f16-fa": (Q4_1, F16, True),
}
