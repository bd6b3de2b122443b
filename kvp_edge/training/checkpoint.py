"""Checkpoints: safetensors files whose metadata says what they are.

``best.safetensors`` is the policy: the averaged (EMA) agents that did best in validation.
``last.safetensors`` holds in addition what a run needs to go on exactly where it was.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kvp_edge.errors import TrainingError
from kvp_edge.training.agent import Agents, AgentShape

BEST, LAST = "best.safetensors", "last.safetensors"
_KIND = "kvp_edge policy checkpoint 1"


@dataclass(frozen=True)
class About:
    """What a checkpoint says beside its tensors."""

    shape: AgentShape
    settings: dict[str, Any]
    model: dict[str, str]
    step: int
    quality: dict[str, Any] = field(default_factory=dict)


def save(path: Path, tensors: dict[str, Tensor], about: About) -> None:
    """Write a checkpoint, whole or not at all; an older one stays until then.

    Raises:
        OSError: the disk is full, or the like; a sentence.
    """
    from safetensors.torch import save as as_bytes  # noqa: PLC0415

    metadata = {"kind": _KIND, **{k: json.dumps(v) for k, v in asdict(about).items()}}
    data = as_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    half = path.with_suffix(".part")
    try:
        half.write_bytes(data)
        os.replace(half, path)
    except BaseException as error:
        half.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write '{path}': {error.strerror}. What was there before is kept; make "
                "room, and the same command goes on from it"
            ) from error
        raise


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], About]:
    """Read a checkpoint.

    Raises:
        TrainingError: missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    path = Path(path)
    if not path.is_file():
        raise TrainingError(f"there is no checkpoint '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"the checkpoint '{path}' is damaged or cut short") from error
    if metadata.pop("kind", "") != _KIND:
        raise TrainingError(f"'{path}' is not a policy checkpoint of this version of kvp_edge")
    values = {key: json.loads(value) for key, value in metadata.items()}
    return tensors, About(**{**values, "shape": AgentShape(**values["shape"])})


def load_agents(path: str | os.PathLike[str]) -> tuple[Agents, About]:
    """The agents of ``best.safetensors``, or of the folder that it lies in."""
    path = Path(path)
    if path.is_dir():
        path = path / BEST
    tensors, about = load(path)
    if path.name == LAST:
        tensors = {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}
    agents = Agents(about.shape)
    try:
        agents.load_state_dict(tensors)
    except RuntimeError as error:
        raise TrainingError(f"the checkpoint '{path}' is damaged: {error}") from error
    return agents.eval(), about
