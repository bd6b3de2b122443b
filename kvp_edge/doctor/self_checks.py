"""What kvp-edge doctor has done in a child process: whatever needs llama.cpp, and may end it.

The child writes lines of JSON: {"check": NAME} before each, then the same with "found", an object,
or with "fault", a sentence.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from kvp_edge.processor.buffer_types import leave_no_traces

Found = dict[str, Any]

_TEXT = "The old house stood on a hill above the sea, and nobody had lived in it for years. "
#: Tokens that a check reads; and logits that are further off than this share of their standard
#: deviation come from a broken kernel. Rounding to q8_0 makes 0.004 in the bundled model.
_N_TOKENS, _MOST_OFF = 96, 0.1
#: On one thread: these are short, and threads wait for each other on a machine that is busy.
_QUIET: Found = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}

_DEVICE_TYPES = ("CPU", "GPU", "integrated GPU", "accelerator", "several devices")


def _llama_cpp(_: str | None) -> Found:
    """Is llama-cpp-python there, and does its library load?"""
    llama_cpp = importlib.import_module("llama_cpp")
    return {
        "version": str(llama_cpp.__version__),
        "library": str(llama_cpp.llama_cpp._lib._name),
    }


def _native(_: str | None) -> Found:
    """Does the native part load, and does it fit?"""
    native = importlib.import_module("kvp_edge.binding.library")
    return {"built_for": native.BUILT_FOR, "llama_cpp": native.LLAMA_VERSION}


def _system(_: str | None) -> Found:
    """What llama.cpp was compiled for."""
    import llama_cpp  # noqa: PLC0415

    llama_cpp.llama_backend_init()
    info = llama_cpp.llama_print_system_info().decode(errors="replace")
    return {"system_info": " ".join(info.split())}


def _devices(_: str | None) -> Found:
    """Every device that llama.cpp sees."""
    from llama_cpp import llama_cpp  # noqa: PLC0415

    pointer, size = ctypes.c_void_p, ctypes.c_size_t

    def function(name: str, restype: Any, *argtypes: Any) -> Any:
        found = llama_cpp._lib[name]
        found.restype, found.argtypes = restype, argtypes
        return found

    count = function("ggml_backend_dev_count", size)
    get = function("ggml_backend_dev_get", pointer, size)
    name = function("ggml_backend_dev_name", ctypes.c_char_p, pointer)
    description = function("ggml_backend_dev_description", ctypes.c_char_p, pointer)
    kind = function("ggml_backend_dev_type", ctypes.c_int, pointer)
    memory = function("ggml_backend_dev_memory", None, pointer, *[ctypes.POINTER(size)] * 2)
    devices = []
    for i in range(count()):
        device = get(i)
        free, total = size(), size()
        memory(device, free, total)
        devices.append(
            {
                "name": name(device).decode(errors="replace"),
                "description": description(device).decode(errors="replace"),
                "type": dict(enumerate(_DEVICE_TYPES)).get(kind(device), "unknown"),
                "free_bytes": free.value,
                "total_bytes": total.value,
            }
        )
    return {"devices": devices}


def _logits(**options: Any) -> Any:
    """f64 [n_vocab], after a text, by the bundled model."""
    import llama_cpp  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from kvp_edge.bundled import bundled_model  # noqa: PLC0415
    from kvp_edge.llama import Llama  # noqa: PLC0415

    with closing(Llama(bundled_model(), n_ctx=256, **_QUIET, **options)) as llm:
        llm.eval(llm.tokenize((_TEXT * 8).encode())[:_N_TOKENS])
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return np.ctypeslib.as_array(logits, (llm.n_vocab(),)).astype(np.float64)


def _compare(**options: Any) -> Found:
    """How far logits are from those without the options."""
    import numpy as np  # noqa: PLC0415

    plain, other = _logits(), _logits(**options)
    off = float(np.sqrt(np.mean((other - plain) ** 2)) / np.std(plain))
    if not off <= _MOST_OFF:  # also when it is no number
        raise ValueError(
            f"with it the bundled model's logits differ by {off:.2g} standard deviations, where "
            f"{_MOST_OFF} are allowed"
        )
    return {"off": round(off, 6)}


def _flash_attention(_: str | None) -> Found:
    return _compare(flash_attn=True)


def _quantised_cache(_: str | None) -> Found:
    q8_0 = importlib.import_module("llama_cpp").GGML_TYPE_Q8_0
    return _compare(flash_attn=True, type_k=q8_0, type_v=q8_0)


def _bounded_cache(_: str | None) -> Found:
    """A long text in a small cache, by the policy of the bundled model."""
    from kvp_edge.bundled import bundled_model  # noqa: PLC0415
    from kvp_edge.llama import Llama  # noqa: PLC0415

    with closing(Llama(bundled_model(), n_ctx=2048, kv_budget=64, recent=16, **_QUIET)) as llm:
        llm.eval(llm.tokenize((_TEXT * 64).encode())[:1024])
        stats = llm.kv_stats
        if not (stats.evictions > 0 and stats.kept <= stats.cells):
            raise ValueError(f"{stats.kept} tokens are held in {stats.cells} cells")
        return {"evictions": stats.evictions, "policy": stats.policy, "pack": stats.pack}


def _model(path: str | None) -> Found:
    """What a model is, and whether its cache can be bounded."""
    from kvp_edge.binding.model import read_model_shape  # noqa: PLC0415
    from kvp_edge.cache.options import DEFAULT_BUDGET  # noqa: PLC0415
    from kvp_edge.errors import BudgetError, UnsupportedModelError  # noqa: PLC0415
    from kvp_edge.llama import Llama  # noqa: PLC0415
    from kvp_edge.llamacpp.log import listen  # noqa: PLC0415
    from kvp_edge.policies import FALLBACK  # noqa: PLC0415
    from kvp_edge.policies.policy_of_model import own_policy  # noqa: PLC0415

    assert path is not None
    with listen(pass_on=False):
        shape = read_model_shape(path)
    with closing(Llama(path, vocab_only=True, verbose=False)) as llm:
        template = llm.metadata.get("tokenizer.chat_template")
    try:
        bytes_per_token: int | None = shape.bytes_per_cell(1, 1)  # f16
    except UnsupportedModelError:
        bytes_per_token = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        own = own_policy(path)
    found: Found = {
        "architecture": shape.architecture,
        "file_bytes": os.path.getsize(path),
        "layers": shape.n_layer,
        "kv_heads": sorted(set(shape.n_head_kv)),
        "trained_tokens": shape.n_ctx_train,
        "window": shape.sliding_window,
        "chat_template": bool(template),
        "cache_bytes_per_token": bytes_per_token,
        "policy": own or FALLBACK,
        "warnings": [str(one.message) for one in warned],
    }
    reasons = {}
    for granularity in ("head", "token"):
        try:
            Llama(
                path,
                kv_budget=int(DEFAULT_BUDGET),
                granularity=granularity,
                policy="recency",
                repack="off",  # weights stay in the file, so that a large one is opened quickly
                **_QUIET,
            ).close()
        except (UnsupportedModelError, BudgetError) as error:
            reasons[granularity] = str(error)
            continue
        return {**found, "granularity": granularity, "why_not": reasons}
    return {**found, "granularity": None, "why_not": reasons}


CHECKS: dict[str, Callable[[str | None], Found]] = {
    "llama_cpp": _llama_cpp,
    "native": _native,
    "system": _system,
    "devices": _devices,
    "bounded cache": _bounded_cache,
    "flash attention": _flash_attention,
    "quantised cache": _quantised_cache,
    "model": _model,
}


def main(names: Sequence[str], model: str | None) -> None:
    """Carry out checks, in this process."""
    leave_no_traces()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    for name in names:
        line: Found = {"check": name}
        print(json.dumps(line), file=out, flush=True)
        try:
            line["found"] = CHECKS[name](model)
        except Exception as error:  # whatever it is, the others are not less wanted
            line["fault"] = str(error) or type(error).__name__
        print(json.dumps(line), file=out, flush=True)
    # a library that crashes as it is unloaded has answered all the same
    with contextlib.suppress(OSError):
        out.close()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[2:], sys.argv[1] or None)
