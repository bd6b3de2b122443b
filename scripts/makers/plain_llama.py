"""llama_cpp.Llama where it has to read on every processor."""

from __future__ import annotations

from typing import Any

import llama_cpp

from kvp_edge.processor.repack import use_extra_buffers


class PlainLlama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is untyped
    """llama_cpp.Llama, with weights laid out as kvp_edge.Llama does by default.

    llama_cpp offers no choice: with quantised weights it ends the process where a buffer type does
    not work, and elsewhere the two would be compared with different kernels.
    """

    def __init__(self, model_path: str, **kwargs: Any) -> None:
        self._extra = use_extra_buffers(
            "auto", model_path, n_gpu_layers=kwargs.get("n_gpu_layers", 0)
        )
        super().__init__(model_path, **kwargs)

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.use_extra_bufts = self._extra
        self._model_params = params
