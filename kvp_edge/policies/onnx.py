"""A learned policy run by onnxruntime (extra ``onnx``), on the CPU or on CUDA."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.errors import PolicyFileError
from kvp_edge.files.json_values import parse, require
from kvp_edge.policies.learned import FromFile, check_arrays, with_gaps
from kvp_edge.policies.view import CacheView
from kvp_edge.policy_file import check_sensitivity, info_of


class Onnx(FromFile):
    """Scores like ``Learned``, from the .onnx file that ``kvp-edge export --onnx`` writes."""

    name = "onnx"

    def __init__(self, path: str | os.PathLike[str], providers: list[str] | None = None) -> None:
        """Load the file.

        Args:
            providers: onnxruntime's; None: CUDA where this onnxruntime has it, then the CPU.

        Raises:
            PolicyFileError: missing, damaged, or not an exported policy.
        """
        try:
            import onnxruntime  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                "an ONNX policy needs onnxruntime: pip install 'kvp_edge[onnx]'"
            ) from error
        self.path = os.fspath(path)
        if not os.path.isfile(path):
            raise PolicyFileError(f"policy file '{self.path}' not found")
        if providers is None:
            here = onnxruntime.get_available_providers()
            wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
            providers = [provider for provider in wanted if provider in here]
        try:
            self._session = onnxruntime.InferenceSession(self.path, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions, one per way to fail
            raise PolicyFileError(f"onnxruntime cannot load '{self.path}': {error}") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "kvp.info" not in metadata:
            raise PolicyFileError(f"'{self.path}' is not a policy exported by kvp-edge export")
        try:
            self._info = info_of(parse(metadata["kvp.info"]))
            self.head_weights = self._per_head(metadata, "aggregate")
            self.sensitivity = None
            if "kvp.sensitivity" in metadata:
                self.sensitivity = self._per_head(metadata, "sensitivity")
            check_sensitivity(self.sensitivity, "it")
        except ValueError as error:
            raise PolicyFileError(
                f"the policy file '{self.path}' is damaged ({error}): export it again"
            ) from error

    def _per_head(self, metadata: Mapping[str, str], name: str) -> FloatArray:
        """A number for each (layer, KV head), f32.

        Raises:
            ValueError: it is missing, or something else.
        """
        found = parse(metadata.get(f"kvp.{name}", "0"))
        array = np.asarray(require({name: found}, {name: list[list[float]]})[name], np.float32)
        if array.shape != (self.info.n_layer, self.info.n_head_kv):
            raise ValueError(f"heads' {name} of shape {array.shape}")
        return array

    def identity(self) -> str:
        with open(self.path, "rb") as file:
            return f"{self.info.name}({hashlib.sha256(file.read()).hexdigest()[:16]})"

    def score(self, view: CacheView) -> FloatArray:
        keys, values = view.keys_and_values()
        indices = view.indices
        check_arrays(self.info, keys, values)
        at = with_gaps(indices, self.context)
        inputs = {
            "keys": np.ascontiguousarray(keys[:, :, at], np.float32),
            "values": np.ascontiguousarray(values[:, :, at], np.float32),
            # a negative position marks a token that is missing
            "positions": np.where(at < 0, -1, indices[at]).astype(np.int32),
        }
        (scores,) = self._session.run(["scores"], inputs)
        out: FloatArray = scores[:, :, at >= 0]
        return out
