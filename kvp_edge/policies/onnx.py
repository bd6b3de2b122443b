"""A learned policy run by onnxruntime (extra ``onnx``), on the CPU or on CUDA."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from kvp_edge.arrays import FloatArray
from kvp_edge.errors import PolicyFileError
from kvp_edge.files.json_values import parse, require
from kvp_edge.policies.learned import FromFile, check_arrays, with_gaps
from kvp_edge.policies.view import CacheView
from kvp_edge.policy_file import info_of

_AGGREGATE = {"aggregate": list[list[float]]}


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
            found = require({"aggregate": parse(metadata.get("kvp.aggregate", "0"))}, _AGGREGATE)
            self.head_weights = np.asarray(found["aggregate"], np.float32)
            if self.head_weights.shape != (self.info.n_layer, self.info.n_head_kv):
                raise ValueError(f"heads' weights of shape {self.head_weights.shape}")
        except ValueError as error:
            raise PolicyFileError(
                f"the policy file '{self.path}' is damaged ({error}): export it again"
            ) from error

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
