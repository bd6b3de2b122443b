"""What a GGUF file says of its model, without loading it."""

from __future__ import annotations

import os

import numpy as np

from kvp_edge.binding import structs
from kvp_edge.binding.library import call
from kvp_edge.errors import UnsupportedModelError
from kvp_edge.files import open_regular


class ModelShape(structs.ModelShape):
    """What a GGUF file says of its model."""

    def bytes_per_cell(self, type_k: int, type_v: int) -> int:
        """Bytes of one cell, K and V of all layers, for ggml types ``type_k``, ``type_v``."""
        size = np.zeros(1, np.uint64)
        call("kvp_model_bytes_per_cell", self, type_k, type_v, size)
        return int(size[0])


def require_model_file(path: str | os.PathLike[str]) -> None:
    """Refuse what llama.cpp could not open, or would wait for: it has no sentence for these.

    Raises:
        UnsupportedModelError: a folder, a pipe or a device, or a name that is no UTF-8.
    """
    name = os.fspath(path)
    if os.path.exists(name) and not os.path.isfile(name):
        what = "a folder" if os.path.isdir(name) else "a pipe or a device"
        raise UnsupportedModelError(f"'{name}' is {what}, not a GGUF file")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UnsupportedModelError(
            f"the name {name!a} of the model file is not UTF-8, which llama.cpp requires: "
            "rename the file or make a link to it"
        ) from None


def read_model_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Read a GGUF file's shape from its metadata; no tensor is loaded.

    Raises:
        UnsupportedModelError: missing, truncated or foreign file, or none at all but a FIFO, say.
    """
    require_model_file(path)
    try:
        open_regular(path).close()
    except OSError as error:
        raise UnsupportedModelError(f"cannot read '{path}': {error.strerror}") from error
    shape = ModelShape()
    call("kvp_model_shape_read", os.fsencode(path), shape)
    return shape
