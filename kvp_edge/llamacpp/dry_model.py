"""What llama.cpp would allocate for a model file, from llama.cpp itself, without allocating it.

llama.cpp reads the file's metadata and lays out its graphs as always ("no_alloc" in llama.h), so
its log tells the sizes of buffers that are never made.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import llama_cpp

from kvp_edge.errors import UnsupportedModelError
from kvp_edge.llamacpp.log import Footprint, listen


class DryModel:
    """A model without weights.

    Args:
        n_gpu_layers: layers on a device; -1: all.
        repacks: llama.cpp's ``use_extra_bufts``.

    Attributes:
        weights: bytes of its tensors, as the file says.
        window: tokens that its layers with a sliding window see; 0: it has none.

    Raises:
        UnsupportedModelError: llama.cpp cannot read the file; the message says why.
    """

    def __init__(self, path: str | os.PathLike[str], *, n_gpu_layers: int, repacks: bool) -> None:
        self._path = os.fspath(path)
        params = llama_cpp.llama_model_default_params()
        params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
        # llama_cpp's word for all of them
        params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers == -1 else n_gpu_layers
        params.use_extra_bufts = repacks
        llama_cpp.llama_backend_init()
        with listen(pass_on=False) as log:
            self._model: Any = llama_cpp.llama_model_load_from_file(self._path.encode(), params)
        if not self._model:
            raise UnsupportedModelError(
                f"'{self._path}' cannot be loaded: {log.first_error() or 'llama.cpp refuses it'}"
            )
        self.weights = int(llama_cpp.llama_model_size(self._model))
        self.window = int(llama_cpp.llama_model_n_swa(self._model))

    def close(self) -> None:
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def footprint(self, **params: Any) -> Footprint:
        """What the model would take with this context.

        Args:
            params: fields of llama_context_params that are not llama.cpp's defaults.

        Raises:
            UnsupportedModelError: llama.cpp makes no such context; the message says why.
        """
        made = llama_cpp.llama_context_default_params()
        for name, value in params.items():
            setattr(made, name, value)
        with listen(pass_on=False) as log:
            context = llama_cpp.llama_init_from_model(self._model, made)
        if not context:
            raise UnsupportedModelError(
                f"'{self._path}' has no context: {log.first_error() or 'llama.cpp makes none'}"
            )
        llama_cpp.llama_free(context)
        return replace(log.footprint(), weights=self.weights)
