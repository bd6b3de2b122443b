"""How the native library is built, and what it checks by itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from kvp_edge import KVCacheError, Llama
from kvp_edge.binding.library import _library_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into ELF files")


def readelf(*what: str) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    command = ["readelf", "--wide", *what, str(_library_path())]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_the_loader_has_bound_is_read_only() -> None:
    assert "GNU_RELRO" in readelf("--program-headers")
    assert "NOW" in readelf("--dynamic")


def test_buffers_and_the_stack_are_guarded() -> None:
    symbols = readelf("--dyn-syms")
    assert "__stack_chk_fail" in symbols
    if "__asan_init" not in symbols and "__tsan_init" not in symbols:  # built without optimisation
        assert "_chk@" in symbols.replace("__stack_chk_fail@", "")


def test_a_state_is_checked_without_touching_the_cache(
    bundled_model: str, load: Callable[..., Llama]
) -> None:
    llm = load(bundled_model, n_ctx=999, kv_budget=128)
    llm.eval([1, 5, 6, 7, 8])
    cache, present = llm.kv.cache, np.arange(5, dtype=np.int32)
    state = cache.state()
    cache.check_state(state, present)
    for wrong in (present[:4], present + 1, np.empty(0, np.int32)):
        with pytest.raises(KVCacheError, match="does not match its table"):
            cache.check_state(state, wrong)
    with pytest.raises(KVCacheError):
        cache.check_state(state[:-1], present)
    np.testing.assert_array_equal(cache.state(), state)
