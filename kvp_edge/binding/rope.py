"""How far RoPE turns a model's keys for each position, measured on the model itself.

Position compaction turns cached keys to new positions. llama.cpp has many ways to arrive at the
angles (base, linear scaling, YaRN, long-rope factors, tensors of factors, some by layer), and most
of them cannot be asked for. They need not be: the key of one token that is alone in the cache is
the same vector at every position but for its rotation, in every layer. So each pair's frequency is
the difference of angles between two positions, and far positions give it to many digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvp_edge.arrays import FloatArray, RopePositions
from kvp_edge.binding.cache import NativeCache
from kvp_edge.errors import UnsupportedModelError

#: Largest error of a predicted key, relative to its norm, that still counts as merely turned.
#: llama.cpp's own angles are f32: they are off by 1e-7 of p * frequency, 0.003 at position 32,768.
TOLERANCE = 0.02

_ROPE_TYPE_NORM, _ROPE_TYPE_NEOX = 0, 2  # enum llama_rope_type


@dataclass(frozen=True)
class KeyFrequencies:
    """Frequencies of RoPE in the layers of the base cache.

    Attributes:
        radians: f64 [n_layer, n_pairs] per position; the first 2 * n_pairs values of a key turn.
        neox: pairs are (p, p + n_pairs) of a key; otherwise (2p, 2p + 1).
    """

    radians: npt.NDArray[np.float64]
    neox: bool

    def shifted(self, keys: FloatArray, positions: int | RopePositions) -> FloatArray:
        """Keys (or queries) as they would be so many positions later.

        Args:
            keys: f32 [n_layer, ..., head_size].
            positions: one number, or one for each key: [n] for keys [n_layer, ..., n, head_size].
        """
        by = np.asarray(positions, np.float64)
        angle = self.radians * by if by.ndim == 0 else self.radians[:, None] * by[:, None]
        return self.multiplied(keys, np.exp(1j * angle))

    def multiplied(self, keys: FloatArray, factor: npt.NDArray[np.complex128]) -> FloatArray:
        """Every pair of keys [n_layer, ..., head_size], read as a complex number, times its factor:
        complex [n_layer, n_pairs], or [n_layer, n, n_pairs] for keys [n_layer, ..., n, head_size].
        """
        n = self.radians.shape[1]
        first, second = _halves(n, self.neox)
        inner = factor.shape[1:]
        factor = factor.reshape(len(keys), *(1,) * (keys.ndim - 1 - len(inner)), *inner)
        z = (keys[..., first] + 1j * keys[..., second]) * factor
        out = keys.copy()
        out[..., first], out[..., second] = z.real, z.imag
        return out


def _halves(n_pairs: int, neox: bool) -> tuple[slice, slice]:
    if neox:
        return slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)
    return slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)


class _Probe:
    """A small context of the same model and RoPE settings, with an f32 cache that is exact."""

    def __init__(self, context: Any) -> None:
        self.cache = NativeCache(context)
        self._context = context
        self._memory = llama_cpp.llama_get_memory(context)

    def decode(self, position: int) -> None:
        token = (llama_cpp.llama_token * 1)(1)
        batch = llama_cpp.llama_batch_get_one(token, 1)
        batch.pos = (llama_cpp.llama_pos * 1)(position)
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise UnsupportedModelError(
                f"llama.cpp could not decode a token at position {position} to measure RoPE"
            )

    def key_at(self, position: int) -> FloatArray:
        """Keys of one and the same token, alone in the cache, [n_layer, n_head_kv, head_size_k]."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self.decode(position)
        return self._read(position)

    def key_shifted(self, start: int, to: int) -> FloatArray:
        """The same after llama.cpp's own K-shift from position ``start`` down to ``to``."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self.decode(start)
        llama_cpp.llama_memory_seq_add(self._memory, 0, start, start + 1, to - start)
        self.decode(to + 1)  # the shift is carried out before a batch
        return self._read(to)

    def _read(self, position: int) -> FloatArray:
        _, keys, _ = self.cache.read(position, position + 1, 1, values=False)
        return keys[:, :, 0]


@contextmanager
def _probe(model: Any, context_params: Any) -> Iterator[_Probe]:
    params = type(context_params).from_buffer_copy(context_params)
    # Long-rope models choose their factors by the context's size, see get_rope_factors in
    # src/llama-model.cpp; so a context beyond the original length must be probed at its own size.
    if params.n_ctx <= _original_context(model):
        params.n_ctx = 256
    params.n_batch = params.n_ubatch = 32
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # whoever observes the context that will be used has no business with this one
    params.cb_eval = type(params.cb_eval)()
    params.cb_eval_user_data = None
    context = llama_cpp.llama_init_from_model(model, params)
    if context is None:
        raise UnsupportedModelError(
            "llama.cpp could not make the small context in which RoPE is measured: free some "
            "memory, or use positions='keep'"
        )
    try:
        probe = _Probe(context)
        try:
            yield probe
        finally:
            probe.cache.close()
    finally:
        llama_cpp.llama_free(context)


def measure_frequencies(model: Any, context_params: Any, *, own_shift: bool) -> KeyFrequencies:
    """Measure how RoPE turns the keys of a loaded model.

    Args:
        model: llama_model pointer.
        context_params: of the context that will be used; one of its kind is made for a moment.
        own_shift: also require that llama.cpp's own K-shift turns keys exactly so.

    Raises:
        UnsupportedModelError: no RoPE, or keys change with position by more than a rotation, or
            llama.cpp's own shift does something else.
    """
    rope_type = int(llama_cpp.llama_model_rope_type(model))
    if rope_type not in (_ROPE_TYPE_NORM, _ROPE_TYPE_NEOX):
        raise UnsupportedModelError(
            "positions='compact' needs a model with plain RoPE, but llama.cpp reports RoPE "
            f"type {rope_type} for this one. Use positions='keep'"
        )
    arch = _meta(model, "general.architecture") or ""
    with _probe(model, context_params) as probe:
        n_rot = int(_meta(model, f"{arch}.rope.dimension_count") or probe.cache.shape.head_size_k)
        neox = rope_type == _ROPE_TYPE_NEOX
        first, second = _halves(n_rot // 2, neox)

        start = probe.key_at(0)
        z0 = start[..., first] + 1j * start[..., second]
        radians = np.zeros((len(start), n_rot // 2))
        longest = max(2, int(llama_cpp.llama_model_n_ctx_train(model)) - 1)
        p = 1
        while p <= longest:
            key = probe.key_at(p)
            z = key[..., first] + 1j * key[..., second]
            angle = np.angle((z * z0.conj()).sum(axis=1).astype(np.complex128))
            # how far this position is from what the nearer ones predict, less than half a turn
            off = np.angle(np.exp(1j * (angle - radians * p)))
            radians += off / p
            p *= 2
        found = KeyFrequencies(radians, neox)

        for position in (3, longest // 3, longest):
            if _error(found.shifted(start, position), probe.key_at(position)) > TOLERANCE:
                raise UnsupportedModelError(
                    f"positions='compact' is not possible with this model: between positions 0 and "
                    f"{position} its keys change by more than a rotation. Use positions='keep'"
                )
        if own_shift:
            far, near = longest - 1, longest // 5
            if _error(found.shifted(start, near), probe.key_shifted(far, near)) > TOLERANCE:
                raise UnsupportedModelError(
                    "positions='compact' at token granularity is not possible with this "
                    "model: llama.cpp's own position shift is not exact for it (YaRN?). Use "
                    "granularity='head' or positions='keep'"
                )
    return found


def _error(predicted: FloatArray, key: FloatArray) -> float:
    return float(np.max(np.linalg.norm(predicted - key, axis=-1) / np.linalg.norm(key, axis=-1)))


def _original_context(model: Any) -> int:
    arch = _meta(model, "general.architecture") or ""
    text = _meta(model, f"{arch}.rope.scaling.original_context_length")
    return int(text or llama_cpp.llama_model_n_ctx_train(model))


def _meta(model: Any, key: str) -> str | None:
    text = (llama_cpp.ctypes.c_char * 128)()
    n = llama_cpp.llama_model_meta_val_str(model, key.encode(), text, len(text))
    return text.value.decode() if n >= 0 else None
