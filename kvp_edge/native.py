"""The native library (native/kvp_edge.h) as Python sees it: ctypes in, numpy and exceptions out."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvp_edge.errors import KVCacheError, UnsupportedModelError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

_ABI_VERSION = 1
_MAX_LAYERS = 512

_ERR_ARGUMENT, _ERR_FILE, _ERR_UNSUPPORTED, _ERR_MEMORY = 1, 2, 3, 6

#: Scorers that run inside the library: name -> enum kvp_scorer.
SCORERS = {"knorm": 0, "keydiff": 1}


class _Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 512)]


class ModelShape(ctypes.Structure):
    """What a GGUF file says of its model (struct kvp_model_shape)."""

    _fields_ = [
        ("_architecture", ctypes.c_char * 64),
        ("n_ctx_train", ctypes.c_uint32),
        ("n_layer", ctypes.c_uint32),
        ("head_size_k", ctypes.c_uint32),
        ("head_size_v", ctypes.c_uint32),
        ("sliding_window", ctypes.c_uint32),
        ("_n_head_kv", ctypes.c_uint32 * _MAX_LAYERS),
    ]

    n_ctx_train: int
    n_layer: int
    head_size_k: int
    head_size_v: int
    sliding_window: int

    @property
    def architecture(self) -> str:
        return bytes(self._architecture).decode()

    @property
    def n_head_kv(self) -> list[int]:
        return list(self._n_head_kv[: self.n_layer])

    def bytes_per_cell(self, type_k: int, type_v: int) -> int:
        """Bytes of one cell, K and V of all layers, for ggml types ``type_k``, ``type_v``."""
        size = ctypes.c_uint64()
        _call("kvp_model_bytes_per_cell", ctypes.byref(self), type_k, type_v, ctypes.byref(size))
        return size.value


class CacheShape(ctypes.Structure):
    """A base cache's layout, learned from a real state blob (struct kvp_cache_shape)."""

    _fields_ = [
        ("n_layer", ctypes.c_uint32),
        ("n_head_kv", ctypes.c_uint32),
        ("head_size_k", ctypes.c_uint32),
        ("head_size_v", ctypes.c_uint32),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("v_transposed", ctypes.c_uint32),
        ("has_window", ctypes.c_uint32),
        ("k_rotation", ctypes.c_uint32),
        ("v_rotation", ctypes.c_uint32),
        ("bytes_per_cell", ctypes.c_uint64),
    ]

    n_layer: int
    n_head_kv: int
    head_size_k: int
    head_size_v: int
    type_k: int
    type_v: int
    v_transposed: int
    has_window: int
    k_rotation: int
    v_rotation: int
    bytes_per_cell: int


_PTR = ctypes.c_void_p
_ERR = ctypes.POINTER(_Error)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "kvp_abi_version": (ctypes.c_int32, []),
    "kvp_built_for": (ctypes.c_char_p, []),
    "kvp_built_llama_version": (ctypes.c_char_p, []),
    "kvp_loaded_llama_version": (ctypes.c_char_p, []),
    "kvp_model_shape_read": (ctypes.c_int32, [ctypes.c_char_p, _PTR, _ERR]),
    "kvp_model_bytes_per_cell": (
        ctypes.c_int32,
        [_PTR, ctypes.c_int32, ctypes.c_int32, _PTR, _ERR],
    ),
    "kvp_cache_open": (ctypes.c_int32, [_PTR, _PTR, _ERR]),
    "kvp_cache_close": (None, [_PTR]),
    "kvp_cache_get_shape": (None, [_PTR, _PTR]),
    "kvp_cache_read": (
        ctypes.c_int32,
        [_PTR, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint32, _PTR, _PTR, _PTR, _ERR],
    ),
    "kvp_cache_score": (
        ctypes.c_int32,
        [_PTR, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint32, _PTR, _PTR, _ERR],
    ),
    "kvp_choose_tokens": (
        ctypes.c_int32,
        [_PTR, ctypes.c_uint32, _PTR, _PTR, ctypes.c_uint32, ctypes.c_uint32, _PTR, _ERR],
    ),
    "kvp_cache_remove": (ctypes.c_int32, [_PTR, _PTR, _PTR, ctypes.c_uint32, _PTR, _ERR]),
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


_lib = _load()

#: llama-cpp-python version the library was compiled for, and llama.cpp's name for itself.
BUILT_FOR: str = _lib.kvp_built_for().decode()
LLAMA_VERSION: str = _lib.kvp_loaded_llama_version().decode()


def _call(name: str, *args: Any) -> None:
    error = _Error()
    code: int = getattr(_lib, name)(*args, ctypes.byref(error))
    if code == 0:
        return
    message = bytes(error.message).decode(errors="replace")
    if code == _ERR_ARGUMENT:
        raise ValueError(message)
    if code in (_ERR_FILE, _ERR_UNSUPPORTED):
        raise UnsupportedModelError(message)
    if code == _ERR_MEMORY:
        raise MemoryError(message)
    raise KVCacheError(message)


def read_model_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Read a GGUF file's shape from its metadata; no tensor is loaded.

    Raises:
        UnsupportedModelError: missing, truncated or foreign file.
    """
    shape = ModelShape()
    _call("kvp_model_shape_read", os.fsencode(path), ctypes.byref(shape))
    return shape


def choose_tokens(
    scores: FloatArray, unit: IntArray, protected: BoolArray, budget: int
) -> BoolArray:
    """Which tokens stay: all protected ones, then the best by score until ``budget`` are kept.

    A token's score is the mean over layers and heads of its z-scores, each head standardised over
    the tokens that compete. See kvp_choose_tokens in native/kvp_edge.h.

    Args:
        scores: f32 [n_layer, n_head_kv, n], larger = keep; what is not finite is dropped first.
        unit: int32 [n]; neighbours with the same number stay or go together.
        protected: bool [n].
        budget: tokens to keep; more stay only if the protected units alone are more.

    Returns:
        bool [n].
    """
    n = scores.shape[2]
    if len(unit) != n or len(protected) != n:
        raise ValueError(f"{n} scores, but {len(unit)} units and {len(protected)} protected flags")
    scores = np.ascontiguousarray(scores, np.float32)
    unit = np.ascontiguousarray(unit, np.int32)
    protected = np.ascontiguousarray(protected, np.bool_)
    keep = np.empty(n, np.bool_)
    _call(
        "kvp_choose_tokens",
        scores.ctypes.data,
        scores.shape[0] * scores.shape[1],
        unit.ctypes.data,
        protected.ctypes.data,
        n,
        budget,
        keep.ctypes.data,
    )
    return keep


class NativeCache:
    """One llama.cpp context's KV cache: read, score and remove tokens of sequence 0.

    Opening decodes three tokens to prove that the cache can be read back and thinned, then clears
    it (see kvp_cache_open). Not thread-safe; must be closed before the context is freed.

    Raises:
        UnsupportedModelError: recurrent, hybrid, encoder or diffusion model, M-RoPE, or a cache
            that cannot lose tokens from its middle.
        KVCacheError: the state blob is laid out in an unknown way.
        ValueError: the context is not empty, or was made without n_seq_max >= 2.
    """

    def __init__(self, ctx: Any) -> None:
        self._handle = ctypes.c_void_p()
        _call("kvp_cache_open", ctypes.cast(ctx, ctypes.c_void_p), ctypes.byref(self._handle))
        self.shape = CacheShape()
        _lib.kvp_cache_get_shape(self._handle, ctypes.byref(self.shape))

    def close(self) -> None:
        if self._handle:
            _lib.kvp_cache_close(self._handle)
            self._handle = ctypes.c_void_p()

    def read(
        self, p0: int, p1: int, n: int, *, values: bool = True
    ) -> tuple[IntArray, FloatArray, FloatArray | None]:
        """Keys and values of the ``n`` tokens at positions [p0, p1), de-quantised, not rotated.

        Returns:
            positions int32 [n]; keys f32 [n_layer, n_head_kv, n, head_size_k], RoPE included;
            values f32 [n_layer, n_head_kv, n, head_size_v], or None if not asked for.
        """
        s = self.shape
        keys = np.empty((s.n_layer, s.n_head_kv, n, s.head_size_k), np.float32)
        out_values = (
            np.empty((s.n_layer, s.n_head_kv, n, s.head_size_v), np.float32) if values else None
        )
        positions = np.empty(n, np.int32)
        _call(
            "kvp_cache_read",
            self._handle,
            p0,
            p1,
            n,
            positions.ctypes.data,
            keys.ctypes.data,
            out_values.ctypes.data if out_values is not None else None,
        )
        return positions, keys, out_values

    def score(self, scorer: str, p0: int, p1: int, n: int) -> tuple[IntArray, FloatArray]:
        """Scores of the ``n`` tokens at positions [p0, p1) by a native scorer (see SCORERS).

        Returns:
            positions int32 [n]; scores f32 [n_layer, n_head_kv, n], larger = keep.
        """
        s = self.shape
        scores = np.empty((s.n_layer, s.n_head_kv, n), np.float32)
        positions = np.empty(n, np.int32)
        _call(
            "kvp_cache_score",
            self._handle,
            SCORERS[scorer],
            p0,
            p1,
            n,
            positions.ctypes.data,
            scores.ctypes.data,
        )
        return positions, scores

    def remove(self, present: IntArray, keep: BoolArray) -> int:
        """Remove the tokens at ``present[~keep]`` from every layer and head.

        Args:
            present: int32 [n], ascending: every position that sequence 0 holds.
            keep: bool [n]; the last entry must be True.

        Returns:
            The number of llama_memory_seq_rm calls made: the fewest that do it.
        """
        if len(present) != len(keep):
            raise ValueError(f"{len(present)} positions but {len(keep)} keep flags")
        present = np.ascontiguousarray(present, np.int32)
        flags = np.ascontiguousarray(keep, np.uint8)
        ranges = ctypes.c_uint32()
        _call(
            "kvp_cache_remove",
            self._handle,
            present.ctypes.data,
            flags.ctypes.data,
            len(present),
            ctypes.byref(ranges),
        )
        return ranges.value
