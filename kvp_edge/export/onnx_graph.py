"""The policy as an ONNX graph, written out node by node: what docs/policy-format.md defines."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from typing import Any

import numpy as np

from kvp_edge.files import write_whole
from kvp_edge.policy_file import PolicyInfo, PolicyWeights

_OPSET = 17
_IR_VERSION = 8  # of opset 17, so that older runtimes take it


def _keys(info: PolicyInfo) -> dict[str, Any]:
    """The policy file's keys, and one that readers of the first files ask for, too: ``statistics``,
    how many queries a policy needs, always 0."""
    keys: dict[str, Any] = {}
    for name, value in asdict(info).items():
        keys[name] = value
        if name == "horizon":
            keys["statistics"] = 0
    return keys


class _Graph:
    """Collects nodes and constants; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, array: Any) -> str:
        from onnx import numpy_helper  # noqa: PLC0415

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        from onnx import helper  # noqa: PLC0415

        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output


def write_onnx(path: str | os.PathLike[str], info: PolicyInfo, weights: PolicyWeights) -> None:
    """Write the policy as ONNX, f32.

    Inputs: keys f32 [L, H, n, head_size_k], values f32 [L, H, n, head_size_v], positions int32 [n];
    n is dynamic. A negative position marks a token that is missing: it is not seen by its
    neighbours, and its score means nothing. Output: scores f32 [L, H, n]. The metadata holds the
    policy file's keys and what it says of the heads as JSON.
    """
    try:
        import onnx  # noqa: PLC0415
        from onnx import TensorProto, helper  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("ONNX export needs the package onnx: pip install onnx") from error

    n_layer, n_head, h, w = info.n_layer, info.n_head_kv, info.hidden, weights
    n_networks = info.n_networks
    one = np.float32(1)
    g = _Graph()
    positions = g("Max", "positions", g.constant(np.int32(0)))
    plus_one = g("Add", g("Cast", positions, to=TensorProto.FLOAT), g.constant(one))
    log = g("Mul", g("Log", plus_one), g.constant(np.float32(1 / math.log(2))))
    last = g.constant(np.array([-1], np.int64))
    features = g(
        "Concat",
        *(
            g("Unsqueeze", feature, last)
            for feature in (
                g("Mul", log, g.constant(np.float32(1 / 16))),
                g("Sin", log),
                g("Cos", log),
                g("Reciprocal", plus_one),
            )
        ),
        axis=-1,
    )

    def linear(x: str, weight: Any) -> str:
        return g("MatMul", x, g.constant(weight.swapaxes(2, 3)))

    def silu(x: str) -> str:
        return g("Mul", x, g("Sigmoid", x))

    def side_by_side(rows: str, size: int) -> str:
        """[L, 1, n, H * size] from rows [L, H, n, size], for a network that sees them all."""
        if n_networks == n_head:
            return rows
        by_token = g("Transpose", rows, perm=[0, 2, 1, 3])
        joined = g("Reshape", by_token, g.constant(np.array([0, 0, n_head * size], np.int64)))
        return g("Unsqueeze", joined, g.constant(np.array([1], np.int64)))

    keys = side_by_side("keys", info.head_size_k)
    values = side_by_side("values", info.head_size_v)
    x = g("Add", linear(keys, w.key), linear(values, w.value))
    x = g("Add", x, linear(features, w.position))
    x = g("Add", x, g.constant(w.fc1_bias[:, :, None]))
    if info.context > 1:
        there = g("GreaterOrEqual", "positions", g.constant(np.int32(0)))
        there = g("Unsqueeze", g("Cast", there, to=TensorProto.FLOAT), last)
        x = g("Transpose", g("Mul", x, there), perm=[0, 1, 3, 2])
        channels = n_layer * n_networks * h
        x = g("Reshape", x, g.constant(np.array([1, channels, -1], np.int64)))
        kernel = w.conv.swapaxes(2, 3).reshape(channels, 1, info.context)
        half = info.context // 2
        x = g("Conv", x, g.constant(kernel), group=channels, pads=[half, half])
        x = g("Reshape", x, g.constant(np.array([n_layer, n_networks, h, -1], np.int64)))
        x = g("Transpose", x, perm=[0, 1, 3, 2])
    x = silu(x)
    x = silu(g("Add", linear(x, w.fc2), g.constant(w.fc2_bias[:, :, None])))
    x = linear(x, w.out)  # [L, G, n, H/G]
    if n_networks == n_head:
        g("Squeeze", x, last, output="scores")
    else:
        by_head = g("Transpose", x, perm=[0, 1, 3, 2])
        g("Squeeze", by_head, g.constant(np.array([1], np.int64)), output="scores")

    def tensor(name: str, kind: int, *dims: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, list(dims))

    graph = helper.make_graph(
        g.nodes,
        info.name,
        [
            tensor("keys", TensorProto.FLOAT, n_layer, n_head, "n_tokens", info.head_size_k),
            tensor("values", TensorProto.FLOAT, n_layer, n_head, "n_tokens", info.head_size_v),
            tensor("positions", TensorProto.INT32, "n_tokens"),
        ],
        [tensor("scores", TensorProto.FLOAT, n_layer, n_head, "n_tokens")],
        g.constants,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="kvp_edge",
    )
    about = {
        "kvp.info": json.dumps(_keys(info)),
        "kvp.aggregate": json.dumps(w.aggregate.tolist()),
    }
    for name, array in (("sensitivity", w.sensitivity), ("ageing", w.ageing)):
        if array is not None:
            about[f"kvp.{name}"] = json.dumps(array.tolist())
    helper.set_model_props(model, about)
    onnx.checker.check_model(model, full_check=True)
    write_whole(path, model.SerializeToString())
