"""How one model file is told from another without reading all of it."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from kvp_edge.binding.library import call
from kvp_edge.binding.model import read_model_shape

#: Bytes of every tensor that are looked at, from its start and from its middle.
_SAMPLE = 256


def model_fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over a GGUF file's architecture, shape, tensor names, types and sizes,
    and a sample of every tensor's bytes.

    Another quantisation or fine-tune of a model has another fingerprint; the metadata (name,
    template, licence) and the file's name do not count.

    Raises:
        UnsupportedModelError: missing, truncated or foreign file.
    """
    shape = read_model_shape(path)
    tensors = _tensors(path)
    digest = hashlib.sha256(
        f"{shape.architecture} {shape.n_layer} {shape.n_head_kv} {shape.head_size_k} "
        f"{shape.head_size_v}\n".encode()
    )
    with open(path, "rb") as file:
        for line in tensors.splitlines():
            about, offset, size = line.rsplit(" ", 2)
            digest.update(f"{about} {size}\n".encode())
            for start in (0, int(size) // 2):
                file.seek(int(offset) + start)
                digest.update(file.read(min(_SAMPLE, int(size) - start)))
    return digest.hexdigest()


def tensor_types(path: str | os.PathLike[str]) -> set[str]:
    """The types that the tensors of a GGUF file are stored in, as ggml names them ("q4_K").

    Raises:
        UnsupportedModelError: missing, truncated or foreign file.
    """
    return {line.rsplit(" ", 7)[1] for line in _tensors(path).splitlines()}


def _tensors(path: str | os.PathLike[str]) -> str:
    needed = np.zeros(1, np.uint64)
    call("kvp_model_tensors", os.fsencode(path), None, 0, needed)
    text = np.zeros(int(needed[0]), np.uint8)
    call("kvp_model_tensors", os.fsencode(path), text, len(text), needed)
    return text.tobytes().split(b"\0", 1)[0].decode()
