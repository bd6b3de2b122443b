"""The compiled library (native/kvp_edge.h): found, checked against what is installed, called.

Nothing but this module and structs.py knows ctypes: other modules give arrays, structs, handles and
numbers to ``call`` and ``create``. The header is the source of both; tests/binding/test_header.py
compares every function and every field with it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from kvp_edge.binding import structs
from kvp_edge.errors import KVCacheError, UnsupportedModelError

_ABI_VERSION = 12

_ERR_ARGUMENT, _ERR_FILE, _ERR_UNSUPPORTED, _ERR_MEMORY, _NOT_IN_PLACE = 1, 2, 3, 6, 7


# -- what the header's functions take ------------------------------------------------------------


class Handle:
    """An object of the library, freed with this one or by ``close``; afterwards it is NULL.

    Attributes:
        kind: its type in the header, "kvp_cache".
    """

    def __init__(self, kind: str, pointer: ctypes.c_void_p, free: Any) -> None:
        self.kind, self.pointer = kind, pointer
        # The finalizer holds the pointer alone, so it cannot keep this object alive.
        self._free = weakref.finalize(self, free, pointer)
        # At the end of the process another thread may still compute with it.
        self._free.atexit = False

    def close(self) -> None:
        """Twice is harmless."""
        self._free()
        self.pointer = ctypes.c_void_p()


class _Argument:
    """How an argument of a kind is given to ctypes; ``c`` is its type in the header, const left
    out."""

    #: What ctypes takes it for.
    type: Any = ctypes.c_void_p

    def __init__(self, c: str) -> None:
        self.c = c

    def convert(self, value: Any) -> Any:
        """An address: of what only llama.cpp knows."""
        return value if value is None else ctypes.cast(value, ctypes.c_void_p)


class _Size(_Argument):
    """A number of bytes, which ctypes does not tell from other integers."""

    type = ctypes.c_size_t

    def convert(self, value: int) -> ctypes.c_size_t:
        return ctypes.c_size_t(value)


class _Array(_Argument):
    """An array of numbers, numpy's, or None."""

    def __init__(self, c: str, of: Any) -> None:
        super().__init__(f"{c} *")
        self._of = np.dtype(of)

    def convert(self, value: np.ndarray | None) -> ctypes.c_void_p | None:
        return None if value is None else ctypes.c_void_p(structs.address(value, self._of))


class _Struct(_Argument):
    """A struct by its address, or None."""

    def __init__(self, c: str, kind: type[structs.Struct]) -> None:
        super().__init__(f"{c} *")
        self._kind = kind

    def convert(self, value: structs.Struct | None) -> Any:
        if value is not None and not isinstance(value, self._kind):
            raise TypeError(f"expected a {self.c}, not {type(value).__name__}")
        return None if value is None else ctypes.byref(value)


class _Structs(_Argument):
    """Structs of a kind, one after the other: an iterable of them, which are copied; or None."""

    def __init__(self, c: str, kind: type[structs.Struct]) -> None:
        super().__init__(f"{c} *")
        self._kind = kind

    def convert(self, value: Iterable[structs.Struct] | None) -> Any:
        if value is None:
            return None
        value = list(value)
        for struct in value:
            if not isinstance(struct, self._kind):
                raise TypeError(f"expected {self.c}, not {type(struct).__name__}")
        return ctypes.byref((self._kind * len(value))(*value))


class _Handle(_Argument):
    """An object of the library, or None."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind} *")
        self._kind = kind

    def convert(self, value: Handle | None) -> ctypes.c_void_p | None:
        if value is not None and value.kind != self._kind:
            raise TypeError(f"expected a {self._kind}, not a {value.kind}")
        return None if value is None else value.pointer


class _NewHandle(_Argument):
    """Where the library puts an object that it makes."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind} **")

    def convert(self, value: ctypes.c_void_p) -> Any:
        return ctypes.byref(value)


def _converting(function: Any, kinds: list[Any]) -> Any:
    """A function that converts its arguments before ctypes sees them. What is raised while ctypes
    has them converted (argtypes) becomes an ArgumentError, even Ctrl-C."""
    function.argtypes = [kind.type if isinstance(kind, _Argument) else kind for kind in kinds]

    def call(*args: Any) -> Any:
        try:
            converted = [
                kind.convert(value) if isinstance(kind, _Argument) else value
                for kind, value in zip(kinds, args, strict=True)
            ]
        except TypeError as error:
            raise ctypes.ArgumentError(str(error)) from error
        return function(*converted)

    return call


_I32, _U32, _U64 = ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64
_SIZE, _TEXT = _Size("size_t"), ctypes.c_char_p
_U8S, _U16S = _Array("uint8_t", ctypes.c_uint8), _Array("uint16_t", ctypes.c_uint16)
_I32S, _U32S = _Array("int32_t", ctypes.c_int32), _Array("uint32_t", ctypes.c_uint32)
_U64S, _SIZES = _Array("uint64_t", ctypes.c_uint64), _Array("size_t", ctypes.c_size_t)
_F32S, _CHARS = _Array("float", ctypes.c_float), _Array("char", ctypes.c_uint8)
_CONTEXT = _Argument("struct llama_context *")
_CALLBACK, _USER_DATA = _Argument("kvp_eval_callback"), _Argument("void *")
_OBSERVER, _CACHE, _POLICY, _QUERIES, _CAPTURE = (
    _Handle(f"kvp_{kind}") for kind in ("observer", "cache", "policy", "queries", "capture")
)
_ERROR = ctypes.POINTER(structs.Error)
_MODEL_SHAPE = _Struct("kvp_model_shape", structs.ModelShape)
_CACHE_SHAPE = _Struct("kvp_cache_shape", structs.CacheShape)
_CACHE_LOCATION = _Struct("kvp_cache_location", structs.CacheLocation)
_RULE = _Struct("kvp_rule", structs.Rule)
_POLICY_WEIGHTS = _Struct("kvp_policy_weights", structs.PolicyWeights)
_ROPE_SHIFT = _Struct("kvp_rope_shift", structs.RopeShift)
_LOG_LAYOUT = _Struct("kvp_log_layout", structs.LogLayout)
_LOG_BLOCKS = _Structs("kvp_log_block", structs.LogBlock)
_CAPTURE_PLAN = _Struct("kvp_capture_plan", structs.CapturePlan)
_QUERIES_SHAPE = _Struct("kvp_queries_shape", structs.QueriesShape)
_LOG_QUERIES = _Struct("kvp_log_queries", structs.LogQueries)

#: Functions that return a status and store an error in their last argument, which is left out.
_CALLS: dict[str, list[Any]] = {
    "kvp_model_shape_read": [_TEXT, _MODEL_SHAPE],
    "kvp_model_bytes_per_cell": [_MODEL_SHAPE, _I32, _I32, _U64S],
    "kvp_model_tensors": [_TEXT, _CHARS, _U64, _U64S],
    "kvp_observer_create": [_CALLBACK, _USER_DATA, _NewHandle("kvp_observer")],
    "kvp_cache_open": [_CONTEXT, _OBSERVER, _NewHandle("kvp_cache")],
    "kvp_cache_appended": [_CACHE, _I32, _U32],
    "kvp_cache_check_cells": [_CACHE, _I32S, _U32, _U32S],
    "kvp_cache_read": [_CACHE, _I32, _I32, _U32, _I32S, _F32S, _F32S],
    "kvp_cache_score": [_CACHE, _RULE, _I32, _I32, _U32, _F32S],
    "kvp_cache_remove": [_CACHE, _I32S, _U8S, _U32, _U32S],
    "kvp_cache_move": [_CACHE, _I32S, _I32S, _U32],
    "kvp_cache_check_packing": [_CACHE],
    "kvp_cache_pack": [_CACHE, _I32S, _U32, _I32S, _I32S, _U32, _ROPE_SHIFT],
    "kvp_cache_restore": [_CACHE, _U8S, _SIZE, _I32S, _U32],
    "kvp_cache_check_state": [_CACHE, _U8S, _SIZE, _I32S, _U32],
    "kvp_cache_log_layout": [_CACHE, _I32, _LOG_LAYOUT],
    "kvp_cache_log_rows": [_CACHE, _LOG_LAYOUT, _I32, _I32, _U32, _U8S],
    "kvp_cache_fill": [
        *(_CACHE, _I32S, _U32, _LOG_LAYOUT, _LOG_BLOCKS, _U32),
        *(_I32S, _I32S, _U32, _ROPE_SHIFT),
    ],
    "kvp_policy_create": [_POLICY_WEIGHTS, _NewHandle("kvp_policy")],
    "kvp_policy_score": [_POLICY, _F32S, _F32S, _I32S, _U32, _I32, _F32S],
    "kvp_choose_tokens": [_F32S, _U32, _I32S, _U8S, _U32, _U32, _U8S],
    "kvp_choose_rows": [_F32S, _I32S, _U8S, _U32, _U32, _U32, _I32S],
    "kvp_state_pack": [
        *(_U8S, _SIZE, _I32, _U32, _U32, _I32S, _U32, _I32S, _I32S, _U32),
        *(_ROPE_SHIFT, _U32, _SIZES),
    ],
    "kvp_log_score": [_LOG_LAYOUT, _LOG_BLOCKS, _U32, _LOG_QUERIES, _I32, _F32S, _F32S],
    "kvp_capture_create": [_OBSERVER, _NewHandle("kvp_capture")],
    "kvp_capture_begin": [_CAPTURE, _CAPTURE_PLAN],
    "kvp_capture_end": [_CAPTURE, _U32, _U16S, _U64],
    "kvp_queries_create": [_OBSERVER, _NewHandle("kvp_queries")],
    "kvp_queries_try": [_QUERIES, _U32],
    "kvp_queries_start": [_QUERIES, _CACHE_SHAPE, _F32S, _U32, _QUERIES_SHAPE, _F32S],
    "kvp_queries_append": [_QUERIES, _I32, _U32],
    "kvp_queries_watch": [_QUERIES, _I32],
    "kvp_queries_rewind": [_QUERIES, _I32],
    "kvp_queries_read": [_QUERIES, _U32, _F32S, _I32S],
}

#: All others: what they return, and their arguments.
_OTHERS: dict[str, tuple[Any, list[Any]]] = {
    "kvp_abi_version": (_I32, []),
    "kvp_built_for": (_TEXT, []),
    "kvp_built_llama_version": (_TEXT, []),
    "kvp_loaded_llama_version": (_TEXT, []),
    "kvp_observer_callback": (ctypes.c_void_p, []),
    "kvp_cache_get_shape": (None, [_CACHE, _CACHE_SHAPE]),
    "kvp_cache_get_location": (None, [_CACHE, _CACHE_LOCATION]),
    "kvp_cache_forget": (None, [_CACHE]),
    "kvp_queries_size": (_U32, [_QUERIES]),
}

#: What frees the objects of a kind.
_FREES = {
    "kvp_observer": "kvp_observer_free",
    "kvp_cache": "kvp_cache_close",
    "kvp_policy": "kvp_policy_free",
    "kvp_capture": "kvp_capture_free",
    "kvp_queries": "kvp_queries_free",
}


# -- the library ---------------------------------------------------------------------------------


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
            f"kvp_edge was built for llama-cpp-python {built_for}, but {installed} is "
            f"installed. To fix it:  pip install 'llama-cpp-python=={built_for}'  (or rebuild "
            "kvp_edge: pip install --force-reinstall --no-deps --no-cache-dir kvp_edge)"
        )
    if built_llama != loaded_llama:
        raise ImportError(
            f"kvp_edge was built for llama.cpp {built_llama}, but the llama.cpp library in "
            f"this process is {loaded_llama}. If LLAMA_CPP_LIB_PATH is set, unset it. "
            "Otherwise: pip install --force-reinstall --no-cache-dir "
            f"'llama-cpp-python=={built_for}'"
        )


def _load() -> ctypes.CDLL:
    path = _library_path()
    if not path.exists():
        raise ImportError(
            f"kvp_edge's native library is missing ({path}). Install kvp_edge to compile it: "
            "pip install . In a checkout, use pip install -e . or start from another folder"
        )
    # llama_cpp is imported above, so its llama.cpp is in the process already and the library's
    # references bind to that copy. Loading it must never bring in a second one.
    library = ctypes.CDLL(str(path))
    library.kvp_abi_version.restype = ctypes.c_int32
    if library.kvp_abi_version() != _ABI_VERSION:
        raise ImportError(
            f"kvp_edge's native library has interface {library.kvp_abi_version()}, but this "
            f"Python part needs {_ABI_VERSION}: they come from different versions. Reinstall "
            "kvp_edge: pip install --force-reinstall --no-deps kvp_edge"
        )
    functions = {name: (_I32, [*kinds, _ERROR]) for name, kinds in _CALLS.items()} | _OTHERS
    for name, (restype, kinds) in functions.items():
        getattr(library, name).restype = restype
        setattr(library, name, _converting(getattr(library, name), kinds))
    for name in _FREES.values():
        getattr(library, name).restype, getattr(library, name).argtypes = None, [ctypes.c_void_p]
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
    """Call a function of the header that returns a status.

    Args:
        args: all arguments but the last, ``kvp_error``: numpy arrays (contiguous, of the header's
            type; bool counts as uint8), structs, handles, numbers, None for NULL.

    Raises:
        ValueError, UnsupportedModelError, MemoryError, KVCacheError: what went wrong, by its code.
        ctypes.ArgumentError: an argument of another type than the header's.
    """
    reason = in_place(name, *args)
    if reason is not None:
        raise KVCacheError(reason)


def in_place(name: str, *args: Any) -> str | None:
    """The same for a function that may not be able to work where the cache lies.

    Returns:
        Why rows must be read for this (KVP_NOT_IN_PLACE), which is no error; None: it is done.
    """
    error = structs.Error()
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


def create(kind: str, name: str, *args: Any) -> Handle:
    """An object of a kind, "kvp_cache", that a function makes whose last argument but the error is
    where it goes. Raises what ``call`` does."""
    pointer = ctypes.c_void_p()
    call(name, *args, pointer)
    return Handle(kind, pointer, getattr(lib, _FREES[kind]))
