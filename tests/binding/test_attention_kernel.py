"""Each of the kernels that this processor can run, not only the one that is chosen."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NATIVE = Path(__file__).parents[2] / "native"

DOOR = """
#include "log/attention_kernel.h"
extern "C" const kvp::attention_kernel * kernel(int i) { return kvp::attention_kernels()[i]; }
"""

_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p
NO_LOGIT = -np.finfo(np.float32).max


class Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("from_halves", ctypes.CFUNCTYPE(None, _POINTER, _SIZE, _POINTER)),
        (
            "weigh",
            ctypes.CFUNCTYPE(
                *(None, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, ctypes.c_int32),
                *(_POINTER, _POINTER, _POINTER, _POINTER),
            ),
        ),
        (
            "reduce",
            ctypes.CFUNCTYPE(
                *(None, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER)
            ),
        ),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "door.cpp").write_text(DOOR)
    library = folder / "libkernel.so"
    strict = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    sources = [str(folder / "door.cpp"), str(NATIVE / "log" / "attention_kernel.cpp")]
    subprocess.run([compiler, *strict, "-I", str(NATIVE), "-o", library, *sources], check=True)
    door = ctypes.CDLL(str(library)).kernel
    door.restype = ctypes.POINTER(Kernel)
    found = {}
    for i in range(10):
        if not door(i):
            break
        found[door(i).contents.name.decode()] = door(i).contents
    return found


def at(array: np.ndarray | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def test_every_processor_has_a_kernel(kernels: dict[str, Any]) -> None:
    assert list(kernels)[-1] == "baseline"


def test_halves_are_converted_exactly(kernels: dict[str, Any]) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    off = np.zeros(2 * len(every) + 1, np.uint8)
    off[1:] = every.view(np.uint8)
    for kernel in kernels.values():
        out = np.empty(len(every), np.float32)
        kernel.from_halves(at(off[1:]), len(every), at(out))
        want = every.view(np.float16).astype(np.float32)
        number = ~np.isnan(want)
        np.testing.assert_array_equal(out[number], want[number])
        assert np.isnan(out[~number]).all()


@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 112])
@pytest.mark.parametrize("n", [1, 5, 6, 7, 128])
def test_attention_is_that_of_the_definition(kernels: dict[str, Any], n: int, width: int) -> None:
    """In two steps, of which the second sees larger logits in some columns."""
    rng = np.random.default_rng(n * width)
    head_size, first = 13, 40
    queries = rng.standard_normal((head_size, width)).astype(np.float32)
    keys = rng.standard_normal((2, n, head_size)).astype(np.float32)
    last = rng.integers(first, first + 2 * n + 3, width).astype(np.int32)
    last[3] = first - 1  # which sees nothing

    logits = np.concatenate(keys).astype(np.float64) @ queries.astype(np.float64)
    seen = first + np.arange(2 * n)[:, None] <= last
    weights = np.where(seen, np.exp(logits), 0)
    want = weights / np.maximum(weights.sum(axis=0), 1e-300)

    for name, kernel in kernels.items():
        got = np.empty((2, n, width), np.float32)
        factors = np.empty((2, width), np.float32)
        top, total = np.full(width, NO_LOGIT, np.float32), np.zeros(width, np.float32)
        room = np.empty((n, width), np.float32)
        for step in range(2):
            kernel.weigh(
                *(at(keys[step]), n, head_size, at(queries), width, at(last), first + step * n),
                *(at(room), at(got[step]), at(top), at(total)),
            )
            factors[step] = top
        share = np.divide(1, total, out=np.zeros_like(total), where=total > 0)
        largest, summed = np.zeros((2, n), np.float32), np.ones((2, n), np.float32)
        largest[0, 0] = 2  # as if other columns had paid more
        for step in range(2):
            kernel.reduce(
                *(at(got[step]), n, width, at(top), at(share), at(factors[step])),
                *(at(largest[step]), at(summed[step])),
            )
        best = want.max(axis=1)
        best[0] = 2
        tolerance = {"rtol": 1e-5, "atol": 1e-7}
        np.testing.assert_allclose(largest.ravel(), best, **tolerance, err_msg=name)
        np.testing.assert_allclose(summed.ravel(), 1 + want.sum(axis=1), **tolerance, err_msg=name)


def test_weights_are_those_of_doubles_down_to_the_smallest_numbers(kernels: dict[str, Any]) -> None:
    logits = -np.linspace(0, 87, 5000, dtype=np.float32)
    below = np.array([-87.5, -1000, NO_LOGIT, -np.inf], np.float32)
    keys = np.concatenate((logits, below))[:, None]
    n, queries = len(keys), np.ones((1, 16), np.float32)
    for kernel in kernels.values():
        got, room = np.empty((2, n, 16), np.float32)
        top, total = np.full(16, NO_LOGIT, np.float32), np.zeros(16, np.float32)
        kernel.weigh(
            at(keys), n, 1, at(queries), 16, None, 0, at(room), at(got), at(top), at(total)
        )
        want = np.exp(logits.astype(np.float64))
        np.testing.assert_allclose(got[: len(logits), 5], want, rtol=2.0**-22)
        assert not got[len(logits) :].any()
        assert (top == 0).all()


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf, 3e38])
def test_a_logit_that_is_no_number_is_not_seen(kernels: dict[str, Any], strange: float) -> None:
    keys = np.ones((7, 2), np.float32)
    keys[4] = strange
    for kernel in kernels.values():
        for sign in (1, -1):
            queries = np.full((2, 16), sign, np.float32)
            got, room = np.empty((2, 7, 16), np.float32)
            top, total = np.full(16, NO_LOGIT, np.float32), np.zeros(16, np.float32)
            kernel.weigh(
                *(at(keys), 7, 2, at(queries), 16, None, 0),
                *(at(room), at(got), at(top), at(total)),
            )
            wins = sign * strange > 0  # NaN does not
            assert (got[4] == wins).all()
            assert (np.delete(got, 4, axis=0) == (not wins)).all()
            assert (total == (1 if wins else 6)).all()
