"""Models of another type of weights, as llama.cpp's own quantiser writes them."""

from __future__ import annotations

from pathlib import Path

import llama_cpp

from kvp_edge.llamacpp.log import listen


def quantise(source: str | Path, target: Path, ftype: int) -> Path:
    """A copy of a model with weights of the type LLAMA_FTYPE_...; quantised ones are allowed."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = ftype, 1, True
    with listen(pass_on=False):
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    assert code == 0
    return target
