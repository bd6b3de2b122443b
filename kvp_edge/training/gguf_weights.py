"""The weights and numbers of a GGUF model file; it keeps track of what was read.

Metadata and tensors say what a model computes: soft caps, experts, attention sinks and RoPE scaling
each have a key or tensor of their own. So code that has read all it knows can refuse the rest,
instead of computing something different from llama.cpp.
"""

from __future__ import annotations

import os
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from kvp_edge.binding.model import ModelShape, read_model_shape
from kvp_edge.errors import TrainingError

#: Keys ({architecture}.*) that change nothing in what is computed for a text.
_DESCRIPTIVE = {
    "block_count",  # read by read_model_shape, as are the next ones
    "embedding_length",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "context_length",
    "vocab_size",
    "feed_forward_length",
    "rope.scaling.original_context_length",  # only YaRN and long-rope look at it
    "rope.scaling.finetuned",
}
#: Keys that change nothing while they have this value, like any key that is 0, false or empty.
_NEUTRAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}


class GGUFWeights:
    """An open model file; every key and tensor that is read counts as known.

    Attributes:
        shape: the sizes that kvp_edge reads from model files.
        architecture: ``general.architecture``.
        device: where tensors are put.

    Raises:
        UnsupportedModelError: missing or foreign file.
        TrainingError: damaged file.
    """

    def __init__(self, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> None:
        self.path, self.device = os.fspath(path), torch.device(device)
        self.shape: ModelShape = read_model_shape(path)
        self.architecture = self.shape.architecture
        prefix = self.architecture + "."
        try:
            reader = gguf.GGUFReader(self.path)
            self._keys: dict[str, Any] = {
                key.removeprefix(prefix): field.contents()
                for key, field in reader.fields.items()
                if key.startswith(prefix)  # not the vocabulary, which takes seconds to read
            }
        except Exception as error:  # the reader fails in many ways, all for this reason
            raise TrainingError(
                f"the model file '{self.path}' is damaged or cut short: copy or download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._asked: set[str] = set()

    def refusal(self, what: str) -> TrainingError:
        """An exception that says ``what`` of this file is in the way."""
        return TrainingError(
            f"the model file '{self.path}' (architecture '{self.architecture}') {what}, which "
            "the PyTorch twin does not compute: use a model without it"
        )

    def key(self, name: str, default: Any = None) -> Any:
        """The value of {architecture}.{name}.

        Raises:
            TrainingError: there is none, and no default.
        """
        self._asked.add(name)
        value = self._keys.get(name, default)
        if value is None:
            raise TrainingError(
                f"the model file '{self.path}' lacks the key {self.architecture}.{name}: not a "
                "complete language model"
            )
        return value

    def holds(self, tensor: str) -> bool:
        return tensor in self._tensors

    def tensor(self, name: str) -> Tensor:
        """A tensor, de-quantised: f32, the axis that lies together in memory last, so a matrix is
        [n_out, n_in].

        Raises:
            TrainingError: there is none, or it is of a type that gguf cannot de-quantise.
        """
        self._asked.add(name)
        if not self.holds(name):
            raise TrainingError(
                f"the model file '{self.path}' lacks the tensor {name}. If it is one of several "
                "parts, merge them with llama-gguf-split --merge"
            )
        tensor = self._tensors[name]
        try:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise TrainingError(
                f"the tensor {name} of '{self.path}' is of type {tensor.tensor_type.name}, which "
                "the package gguf cannot de-quantise: use another quantisation of the model"
            ) from error
        shape = tuple(int(n) for n in reversed(tensor.shape))
        # a copy: the file is mapped read-only
        return torch.from_numpy(np.array(data, np.float32).reshape(shape)).to(self.device)

    def check_all_known(self) -> None:
        """Refuse a file with a tensor or key that matters and was not read.

        Raises:
            TrainingError: naming the first such tensor or key.
        """
        for name in sorted(self._tensors.keys() - self._asked):
            raise self.refusal(f"has the tensor {name}")
        for name in sorted(self._keys.keys() - self._asked - _DESCRIPTIVE):
            value = self._keys[name]
            if value and value != _NEUTRAL.get(name):
                raise self.refusal(f"has {self.architecture}.{name} = {value}")
