"""What a caller may ask of ``Llama``: types and ranges, checked before anything is loaded.

llama.cpp takes numbers as they come, and some of them it does not survive.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from typing import Any

from kvp_edge.errors import BudgetError, OptionError, UnsupportedModelError

#: GGML_MAX_N_THREADS in ggml.h
MAX_THREADS = 512

#: llama.cpp's positions are int32.
MAX_CONTEXT = 2**31 - 1


def check_counts(**counts: Any) -> None:
    """Whole numbers of tokens, or None.

    Raises:
        TypeError: not a whole number.
        BudgetError: more than llama.cpp can count.
    """
    for name, count in counts.items():
        if count is not None and whole_number(name, count, "of tokens") > MAX_CONTEXT:
            raise BudgetError(
                f"{name}={count} is more than the {MAX_CONTEXT} tokens that llama.cpp can count"
            )


def check_engine(arguments: Mapping[str, Any]) -> None:
    """Arguments of llama_cpp.Llama that it would hand on to llama.cpp as they are.

    Raises:
        TypeError: not a whole number.
        OptionError: more threads than ggml can run.
        UnsupportedModelError: there is no such adapter.
    """
    check_threads(**{n: arguments.get(n) for n in ("n_threads", "n_threads_batch")})
    check_cache_types(**{n: arguments.get(n) for n in ("type_k", "type_v")})
    check_adapter_file(arguments.get("lora_path"))


def check_threads(**counts: Any) -> None:
    """Numbers of threads; None and 0 leave the choice to llama_cpp.

    Raises:
        TypeError: not a whole number.
        OptionError: negative, or more than ggml can run.
    """
    for name, count in counts.items():
        if count is not None and not 0 <= whole_number(name, count, "of threads") <= MAX_THREADS:
            raise OptionError(
                f"{name} must be from 1 to {MAX_THREADS} (ggml's limit), or 0 for the "
                f"default, not {count}"
            )


def check_cache_types(**types: Any) -> None:
    """Numbers of enum ggml_type, or None.

    Raises:
        TypeError: not a number.
    """
    for name, ggml_type in types.items():
        if ggml_type is not None:
            whole_number(name, ggml_type, "of ggml's types, such as llama_cpp.GGML_TYPE_Q8_0")


def check_callable(**functions: Any) -> None:
    """Functions, or None.

    Raises:
        TypeError: cannot be called.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not {function!r}")


def check_adapter_file(lora_path: str | os.PathLike[str] | None) -> None:
    """Raises:
    UnsupportedModelError: there is no such file.
    """
    if lora_path and not os.path.isfile(lora_path):
        raise UnsupportedModelError(f"LoRA adapter file '{os.fspath(lora_path)}' not found")


def whole_number(name: str, value: Any, unit: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number {unit}, not {value!r}") from None
