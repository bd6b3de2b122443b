"""The whole export: read the checkpoint, write the files, check that they score like PyTorch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvp_edge.errors import PolicyFileError, TrainingError
from kvp_edge.export.onnx_graph import write_onnx
from kvp_edge.export.parity import Parity, check_parity
from kvp_edge.policy_file import (
    N_POSITION_FEATURES,
    OutType,
    PolicyInfo,
    PolicyWeights,
    read_policy,
    write_policy,
)
from kvp_edge.training.agent import Agents, AgentShape
from kvp_edge.training.checkpoint import About, load_agents
from kvp_edge.training.data import TraceSetLike


@dataclass(frozen=True)
class Exported:
    """What an export wrote (with ``dry_run``: would write) and how well it agrees with PyTorch."""

    info: PolicyInfo
    gguf: Path
    onnx: Path | None
    parity: Parity | None


def policy_of(
    agents: Agents,
    about: About,
    *,
    architecture: str = "",
    base_model: str = "",
    license: str = "",
    kv_type: str = "",
) -> tuple[PolicyInfo, PolicyWeights]:
    """The policy file's content for these agents: standardisation folded into the first layer.

    Raises:
        TrainingError: nobody said which architecture the policy is for.
    """
    shape, model, settings = about.shape, about.model, about.settings
    architecture = architecture or model.get("architecture", "")
    if not architecture:
        raise TrainingError("the traces do not name their model: give it with --base MODEL.gguf")
    base_model = base_model or model.get("name", "")
    objective = str(settings.get("objective", "kvp"))
    info = PolicyInfo(
        architecture=architecture,
        n_layer=shape.n_layer,
        n_head_kv=shape.n_head_kv,
        head_size_k=shape.head_size_k,
        head_size_v=shape.head_size_v,
        hidden=shape.hidden,
        context=shape.context,
        name=_stem(base_model, objective, shape),
        objective=objective,
        sinks=int(settings.get("sinks", 4)),
        recent=int(settings.get("recent", 32)),
        horizon=int(settings.get("horizon", PolicyInfo.horizon)),
        base_model=base_model,
        fingerprint=model.get("fingerprint", ""),
        model_identity=model.get("identity", ""),
        training_data=f"{settings.get('n_traces', 0)} traces",
        license=license,
        scope=shape.scope,
        kv_type=kv_type,
    )

    def per_layer(array: np.ndarray, *dims: int) -> np.ndarray:
        return np.ascontiguousarray(array.reshape(shape.n_layer, -1, *dims), np.float32)

    def per_network(array: np.ndarray) -> np.ndarray:
        return per_layer(array, *array.shape[1:])

    w = {name: p.detach().cpu().double().numpy() for name, p in agents.state_dict().items()}
    fc1 = w["fc1"] * w["scale"][:, :, None]
    bias = w["fc1_bias"] - np.einsum("nf,nfh->nh", w["mean"], fc1)
    rows = fc1.swapaxes(1, 2)  # [A, h, F], as ggml multiplies
    dk, dv = shape.heads_each * shape.head_size_k, shape.heads_each * shape.head_size_v
    out = np.broadcast_to(w["out"], (shape.n_agents, w["out"].shape[1]))
    place = slice(dk + dv, dk + dv + N_POSITION_FEATURES)
    return info, PolicyWeights(
        key=per_network(rows[..., :dk]),
        value=per_network(rows[..., dk : dk + dv]),
        position=per_network(rows[..., place]),
        fc1_bias=per_network(bias),
        conv=per_network(w["conv"].swapaxes(1, 2)),
        fc2=per_network(w["fc2"].swapaxes(1, 2)),
        fc2_bias=per_network(w["fc2_bias"]),
        out=per_layer(out, shape.heads_each, shape.hidden),
        aggregate=per_layer(np.exp(w["log_aggregate"])),
        ageing=per_layer(w["age"]) if shape.ageing else None,
    )


def _stem(base_model: str, objective: str, shape: AgentShape) -> str:
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", base_model).strip("-") or "model"
    kind = "" if objective == "kvp" else f"-{objective}"
    scope = "" if shape.scope == "head" else f"-{shape.scope}"
    return f"kvp-{slug}{kind}{scope}-w{shape.context}"


def derived_name(info: PolicyInfo, outtype: OutType) -> str:
    """kvp-<model>[-<objective>][-<scope>]-w<context width>-<OUTTYPE>.gguf; without objective: kvp,
    without scope: head"""
    return f"{info.name}-{outtype.upper()}.gguf"


def export(
    checkpoint: str | os.PathLike[str],
    *,
    outfile: str | os.PathLike[str] | None = None,
    outtype: OutType = "f16",
    onnx: bool = False,
    traces: TraceSetLike | None = None,
    architecture: str = "",
    base_model: str = "",
    license: str = "",
    kv_type: str = "",
    dry_run: bool = False,
) -> Exported:
    """Write the policy file of a checkpoint (or of the folder of a training run), and check it.

    Args:
        outfile: where to; ``{ftype}`` in it becomes the type. None: a derived name beside the
            checkpoint. ONNX lies beside it and is always f32.
        traces: what the parity check scores. None: random tokens like those of the training.
        architecture, base_model: of the model, where the traces did not say.
        kv_type: what ``kv_type="auto"`` chooses for the model, in place of the measured table; "":
            the table.

    Raises:
        TrainingError: no usable checkpoint.
        PolicyFileError: the files do not score like PyTorch. They are left for inspection.
    """
    agents, about = load_agents(checkpoint)
    info, weights = policy_of(
        agents,
        about,
        architecture=architecture,
        base_model=base_model,
        license=license,
        kv_type=kv_type,
    )
    if traces is not None:
        trace = traces[0]
        found = (*trace.keys.shape[:2], trace.keys.shape[3], trace.values.shape[3])
        if found != (info.n_layer, info.n_head_kv, info.head_size_k, info.head_size_v):
            raise TrainingError("the traces for the parity check are from another model")
    folder = Path(checkpoint)
    folder = folder if folder.is_dir() else folder.parent
    if outfile is None:
        path = folder / derived_name(info, outtype)
    else:
        path = Path(os.fspath(outfile).replace("{ftype}", outtype))
    onnx_path = path.with_name(re.sub(r"-(F32|F16|Q8_0)$", "", path.stem) + ".onnx")
    if dry_run:
        return Exported(info, path, onnx_path if onnx else None, None)
    write_policy(path, info, weights, outtype)
    if onnx:
        write_onnx(onnx_path, info, weights)
    _, stored = read_policy(path)
    parity = check_parity(agents, path, stored, onnx_path if onnx else None, traces)
    if parity.failures:
        raise PolicyFileError(
            f"'{path}' was written, but it does not score like PyTorch: "
            + "; ".join(parity.failures)
        )
    return Exported(info, path, onnx_path if onnx else None, parity)
