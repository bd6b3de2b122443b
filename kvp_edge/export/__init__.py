"""From a policy checkpoint to what runs without PyTorch: GGUF (the policy file) and ONNX."""

from kvp_edge.export.convert import Exported, derived_name, export, policy_of
from kvp_edge.export.parity import Parity

__all__ = ["Exported", "Parity", "derived_name", "export", "policy_of"]
