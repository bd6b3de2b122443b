"""The compiled library (native/kvp_edge.h): found, checked against what is installed, called."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from kvp_edge.errors import KVCacheError, UnsupportedModelError

if TYPE_CHECKING:
    pass


_ABI_VERSION = 9

_ERR_ARGUMENT, _ERR_FILE, _ERR_UNSUPPORTED, _ERR_MEMORY, _NOT_IN_PLACE = 1, 2, 3, 6, 7


class _Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 512)]


PTR = ctypes.c_void_p
_ERR = ctypes.POINTER(_Error)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "kvp_abi_version": (ctypes.c_int32, []),
    "kvp_built_for": (ctypes.c_char_p, []),
    "kvp_built_llama_version": (ctypes.c_char_p, []),
    "kvp_loaded_llama_version": (ctypes.c_char_p, []),
    "kvp_model_shape_read": (ctypes.c_int32, [ctypes.c_char_p, PTR, _ERR]),
    "kvp_model_bytes_per_cell": (
        ctypes.c_int32,
        [PTR, ctypes.c_int32, ctypes.c_int32, PTR, _ERR],
    ),
    "kvp_watch_create": (ctypes.c_int32, [PTR, PTR, PTR, _ERR]),
    "kvp_watch_free": (None, [PTR]),
    "kvp_watch_callback": (PTR, []),
    "kvp_cache_open": (ctypes.c_int32, [PTR, PTR, PTR, _ERR]),
    "kvp_cache_close": (None, [PTR]),
    "kvp_cache_get_shape": (None, [PTR, PTR]),
    "kvp_cache_get_location": (None, [PTR, PTR]),
    "kvp_cache_appended": (ctypes.c_int32, [PTR, ctypes.c_int32, ctypes.c_uint32, _ERR]),
    "kvp_cache_forget": (None, [PTR]),
    "kvp_cache_check_cells": (ctypes.c_int32, [PTR, PTR, ctypes.c_uint32, PTR, _ERR]),
    "kvp_cache_move": (ctypes.c_int32, [PTR, PTR, PTR, ctypes.c_uint32, _ERR]),
    "kvp_cache_read": (
        ctypes.c_int32,
        [PTR, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint32, PTR, PTR, PTR, _ERR],
    ),
    "kvp_cache_score": (
        ctypes.c_int32,
        [PTR, PTR, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint32, PTR, _ERR],
    ),
    "kvp_policy_create": (ctypes.c_int32, [PTR, PTR, _ERR]),
    "kvp_policy_free": (None, [PTR]),
    "kvp_policy_score": (
        ctypes.c_int32,
        [PTR, PTR, PTR, PTR, ctypes.c_uint32, ctypes.c_int32, PTR, _ERR],
    ),
    "kvp_choose_tokens": (
        ctypes.c_int32,
        [PTR, ctypes.c_uint32, PTR, PTR, ctypes.c_uint32, ctypes.c_uint32, PTR, _ERR],
    ),
    "kvp_cache_remove": (ctypes.c_int32, [PTR, PTR, PTR, ctypes.c_uint32, PTR, _ERR]),
    "kvp_choose_rows": (
        ctypes.c_int32,
        [PTR, PTR, PTR, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, PTR, _ERR],
    ),
    "kvp_cache_check_packing": (ctypes.c_int32, [PTR, _ERR]),
    "kvp_cache_pack": (
        ctypes.c_int32,
        [PTR, PTR, ctypes.c_uint32, PTR, PTR, ctypes.c_uint32, PTR, _ERR],
    ),
    "kvp_cache_restore": (
        ctypes.c_int32,
        [PTR, PTR, ctypes.c_size_t, PTR, ctypes.c_uint32, _ERR],
    ),
    "kvp_cache_check_state": (
        ctypes.c_int32,
        [PTR, PTR, ctypes.c_size_t, PTR, ctypes.c_uint32, _ERR],
    ),
    "kvp_state_pack": (
        ctypes.c_int32,
        [
            *(PTR, ctypes.c_size_t, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint32),
            *(PTR, ctypes.c_uint32, PTR, PTR, ctypes.c_uint32),
            *(PTR, ctypes.c_uint32, PTR, _ERR),
        ],
    ),
}


def _library_path() -> Path:
    """The compiled library; KVP_EDGE_LIBRARY names another build of it (a sanitized one, say)."""
    override = os.environ.get("KVP_EDGE_LIBRARY")
    if override:
        return Path(override)
    name = {"win32": "kvp_edge.dll", "darwin": "libkvp_edge.dylib"}.get(
        sys.platform, "libkvp_edge.so"
    )
    # An editable installation has two folders: the sources and what was compiled.
    folders = [Path(folder) / "_native" for folder in sys.modules["kvp_edge"].__path__]
    return next((f / name for f in folders if (f / name).exists()), folders[0] / name)


def check_versions(built_for: str, installed: str, built_llama: str, loaded_llama: str) -> None:
    """Refuse a llama-cpp-python or llama.cpp that the library was not compiled against.

    Struct layouts and the state blob change between llama.cpp versions without notice, so anything
    but the same version is a refusal, not a warning.

    Raises:
        ImportError: with the command that mends it.
    """
    if built_for != installed:
        raise ImportError(
            f"kvp_edge was built for llama-cpp-python {built_for}, but {installed} is installed. "
            f"Mend it with:  pip install 'llama-cpp-python=={built_for}'  (or rebuild kvp_edge: "
            "pip install --force-reinstall --no-deps --no-cache-dir kvp_edge)"
        )
    if built_llama != loaded_llama:
        raise ImportError(
            f"kvp_edge was built for llama.cpp {built_llama}, but the llama.cpp library in this "
            f"process calls itself {loaded_llama}. If LLAMA_CPP_LIB_PATH is set, unset it; else: "
            f"pip install --force-reinstall --no-cache-dir 'llama-cpp-python=={built_for}'"
        )


def _load() -> ctypes.CDLL:
    path = _library_path()
    if not path.exists():
        raise ImportError(
            f"kvp_edge's native library is missing ({path}). Installing compiles it: pip install . "
            "If this is a checkout, another folder finds the installed package; or install it with "
            "pip install -e ."
        )
    # llama_cpp is imported above, so its llama.cpp is in the process already and the library's
    # references bind to that copy. Loading it must never bring in a second one.
    library = ctypes.CDLL(str(path))
    library.kvp_abi_version.restype = ctypes.c_int32
    if library.kvp_abi_version() != _ABI_VERSION:
        raise ImportError(
            f"kvp_edge's native library has interface {library.kvp_abi_version()}, this Python "
            f"part needs {_ABI_VERSION}: they come from different versions. Reinstall kvp_edge: "
            "pip install --force-reinstall --no-deps kvp_edge"
        )
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    check_versions(
        library.kvp_built_for().decode(),
        llama_cpp.__version__,
        library.kvp_built_llama_version().decode(),
        library.kvp_loaded_llama_version().decode(),
    )
    return library


lib = _load()

#: llama-cpp-python version the library was compiled for, and llama.cpp's name for itself.
BUILT_FOR: str = lib.kvp_built_for().decode()
LLAMA_VERSION: str = lib.kvp_loaded_llama_version().decode()


def call(name: str, *args: Any) -> None:
    """Call a function whose last argument is its error, and raise what it says."""
    reason = in_place(name, *args)
    if reason is not None:
        raise KVCacheError(reason)


def in_place(name: str, *args: Any) -> str | None:
    """Likewise, for functions that may not be able to work where the cache lies.

    Returns:
        Why rows must be read for this (KVP_NOT_IN_PLACE), which is no error; None: it is done.
    """
    error = _Error()
    code: int = getattr(lib, name)(*args, ctypes.byref(error))
    if code == 0:
        return None
    message = bytes(error.message).decode(errors="replace")
    if code == _NOT_IN_PLACE:
        return message
    if code == _ERR_ARGUMENT:
        raise ValueError(message)
    if code in (_ERR_FILE, _ERR_UNSUPPORTED):
        raise UnsupportedModelError(message)
    if code == _ERR_MEMORY:
        raise MemoryError(message)
    raise KVCacheError(message)
