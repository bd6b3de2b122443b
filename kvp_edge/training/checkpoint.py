"""Checkpoints: safetensors files whose metadata says what they are.

``best.safetensors`` is the policy: the averaged (EMA) agents that did best in validation.
``last.safetensors`` also holds what a run needs to resume exactly.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from kvp_edge.errors import TrainingError
from kvp_edge.files import open_regular, write_whole
from kvp_edge.files.json_values import parse, require
from kvp_edge.training.agent import Agents, AgentShape

BEST, LAST = "best.safetensors", "last.safetensors"
_KIND = "kvp_edge policy checkpoint 1"
#: The settings that an export looks at.
_SETTINGS = {"objective": str, "sinks": int, "recent": int, "horizon": int, "n_traces": int}


@dataclass(frozen=True)
class About:
    """The metadata of a checkpoint."""

    shape: AgentShape
    settings: dict[str, Any]
    model: dict[str, str]
    step: int
    quality: dict[str, Any] = field(default_factory=dict)


def save(path: Path, tensors: dict[str, Tensor], about: About) -> None:
    """Write a checkpoint atomically; an older one is replaced only then.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    from safetensors.torch import save as as_bytes  # noqa: PLC0415

    metadata = {"kind": _KIND, **{k: json.dumps(v) for k, v in asdict(about).items()}}
    data = as_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    try:
        write_whole(path, data)
    except OSError as error:
        raise OSError(
            f"cannot write '{path}': {error.strerror}. The previous file is kept; make room "
            "and run the same command to resume"
        ) from error


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], About]:
    """Read a checkpoint.

    Raises:
        TrainingError: missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        open_regular(path).close()
    except FileNotFoundError as error:
        raise TrainingError(f"checkpoint '{path}' not found") from error
    except OSError as error:
        raise TrainingError(f"the checkpoint '{path}' cannot be read: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainingError(f"the checkpoint '{path}' is damaged or cut short") from error
    if metadata.pop("kind", "") != _KIND:
        raise TrainingError(f"'{path}' is not a policy checkpoint of this version of kvp_edge")
    try:
        return tensors, _about({key: parse(value) for key, value in metadata.items()})
    except ValueError as error:
        raise TrainingError(f"the checkpoint '{path}' is damaged: {error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _about(values: dict[str, Any]) -> About:
    """Raises:
    ValueError: something is missing, or of another type or range.
    """
    hints, of_about = {**_hints(AgentShape), "scope": str}, _hints(About)
    values = require(values, {**of_about, "shape": dict[str, Any]})
    sizes = {"scope": AgentShape.scope, **values["shape"]}  # the first runs said nothing of it
    shape = AgentShape(**{name: require(sizes, hints)[name] for name in hints})
    unknown = [name for name in sizes if name not in hints and sizes[name]]
    if unknown:  # what is 0 was not used
        raise ValueError(f"its agents have {unknown[0]}, which is unknown to this version")
    if values["step"] < 0:
        raise ValueError(f"its step is {values['step']}, below 0")
    # runs of older versions have fewer of them
    require(values["settings"], {k: v for k, v in _SETTINGS.items() if k in values["settings"]})
    return About(**{**{name: values[name] for name in of_about}, "shape": shape})


def load_agents(path: str | os.PathLike[str]) -> tuple[Agents, About]:
    """The agents of ``best.safetensors``, or of the folder that it lies in."""
    path = Path(path)
    if path.is_dir():
        path = path / BEST
    tensors, about = load(path)
    if path.name == LAST:
        tensors = {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}
    try:
        # compared first: what is made below is as large as the shape says
        for name, expected in about.shape.tensor_shapes().items():
            if name not in tensors or tuple(tensors[name].shape) != expected:
                raise ValueError(
                    f"its tensor {name} is missing or does not have the shape {expected}"
                )
        agents = Agents(about.shape)
        agents.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the checkpoint '{path}' is damaged: {error}") from error
    return agents.eval(), about
