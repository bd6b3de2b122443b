"""How one model file, and one model, is told from another without reading all of a file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from kvp_edge.binding.library import call
from kvp_edge.binding.model import read_model_shape

#: Bytes of every tensor that are looked at, from its start and from its middle.
_SAMPLE = 256
#: llama.cpp finds the parts of a split model by this form (``llama_split_path``, llama.h).
_PART = re.compile(r"(.*-)(\d{5})(-of-(\d{5})\.gguf)", re.DOTALL)
#: Of a block, what some converters add that comes from no training: RoPE's factors.
_ADDED = ("rope_freqs", "rope_factors", "attn_rot_embd")


def model_fingerprint(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over a GGUF file's architecture, shape, tensor names, types and sizes,
    and a sample of every tensor's bytes.

    Another quantisation or fine-tune of a model has another fingerprint; the metadata (name,
    template, licence) and the file's name do not count.

    Raises:
        UnsupportedModelError: missing, truncated or foreign file.
    """
    digest = hashlib.sha256(_shape_line(path))
    with open(path, "rb") as file:
        for tensor in _tensors(path):
            digest.update(f"{tensor.about} {tensor.size}\n".encode())
            for start in (0, tensor.size // 2):
                digest.update(tensor.read(file, start, _SAMPLE))
    return digest.hexdigest()


def model_identity(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over a model's architecture, shape, and the weights of its blocks that no
    quantisation changes; empty if these tell nothing.

    llama.cpp keeps one-dimensional weights (norms, biases) in f32 whatever type the others get, so
    all quantisations of one model have the same identity, however they were made, and however many
    parts the file was split into. Other models have another, also fine-tunes of all weights. A
    fine-tune that leaves norms and biases alone, as LoRA does, has that of its base model.

    Norms that are all 1 and biases that are all 0 were never trained. A model without others has no
    identity.

    Raises:
        UnsupportedModelError: missing, truncated or foreign file.
    """
    digest = hashlib.sha256(_shape_line(path))
    found: dict[str, bytes] = {}
    for part in _parts(path):
        with open(part, "rb") as file:
            for tensor in _tensors(part):
                if _is_kept(tensor):
                    found[tensor.name] = tensor.read(file, 0, tensor.size)
    for name in sorted(found):  # quantising may reorder tensors
        digest.update(f"{name} {len(found[name])}\n".encode())
        digest.update(found[name])
    trained = any(len(np.unique(np.frombuffer(data, np.float32))) > 1 for data in found.values())
    return digest.hexdigest() if trained else ""


def tensor_types(path: str | os.PathLike[str]) -> set[str]:
    """The types that the tensors of a GGUF file are stored in, as ggml names them ("q4_K").

    Raises:
        UnsupportedModelError: missing, truncated or foreign file.
    """
    return {tensor.kind for tensor in _tensors(path)}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a model file.

    Attributes:
        about: its name, type and dimensions, as the file has them.
        kind: its type, as ggml names it.
        offset, size: where it begins in the file, and its bytes.
    """

    about: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return self.about.rsplit(" ", 5)[0]

    @property
    def kind(self) -> str:
        return self.about.rsplit(" ", 5)[1]

    @property
    def is_one_dimensional(self) -> bool:
        return self.about.endswith(" 1 1 1")

    def read(self, file: BinaryIO, start: int, most: int) -> bytes:
        """Up to ``most`` of its bytes from the byte ``start`` on."""
        file.seek(self.offset + start)
        return file.read(min(most, self.size - start))


def _is_kept(tensor: _Tensor) -> bool:
    """Whether it is a weight that every quantisation of a model has, bit for bit.

    Some types bring scales of a tensor's own, which are called neither weight nor bias.
    """
    return (
        tensor.name.startswith("blk.")
        and tensor.name.endswith((".weight", ".bias"))
        and not any(added in tensor.name for added in _ADDED)
        and tensor.kind == "f32"
        and tensor.is_one_dimensional
    )


def _shape_line(path: str | os.PathLike[str]) -> bytes:
    shape = read_model_shape(path)
    return (
        f"{shape.architecture} {shape.n_layer} {shape.n_head_kv} {shape.head_size_k} "
        f"{shape.head_size_v}\n"
    ).encode()


def _parts(path: str | os.PathLike[str]) -> list[str]:
    """The files that a model consists of, as far as they are there."""
    name = os.fspath(path)
    split = _PART.fullmatch(name)
    if not split:
        return [name]
    others = (f"{split[1]}{i:05}{split[3]}" for i in range(1, int(split[4]) + 1))
    return [other for other in others if other == name or os.path.isfile(other)]


def _tensors(path: str | os.PathLike[str]) -> Iterator[_Tensor]:
    for line in _listed(path).splitlines():
        about, offset, size = line.rsplit(" ", 2)
        yield _Tensor(about, int(offset), int(size))


def _listed(path: str | os.PathLike[str]) -> str:
    needed = np.zeros(1, np.uint64)
    call("kvp_model_tensors", os.fsencode(path), None, 0, needed)
    text = np.zeros(int(needed[0]), np.uint8)
    call("kvp_model_tensors", os.fsencode(path), text, len(text), needed)
    return text.tobytes().split(b"\0", 1)[0].decode()
