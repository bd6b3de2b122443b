"""The policy that was trained for a model, found without being named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from kvp_edge.errors import PolicyFileError
from kvp_edge.fingerprint import model_fingerprint
from kvp_edge.policy_file import read_info


def own_policy(model_path: str | os.PathLike[str]) -> str | None:
    """The policy file that was trained on this very model file, or None.

    Looked for among the files kvp-*.gguf beside the model, the newest first, then beside the file
    that it is a link to, and among those that come with the package. A file that cannot be read is
    passed over with a warning: the chat can go on without.
    """
    fingerprint: str | None = None
    for path in _candidates(Path(model_path)):
        try:
            info = read_info(path)
        except (PolicyFileError, OSError) as error:
            warnings.warn(f"passed over as a policy: {error}", stacklevel=2)
            continue
        fingerprint = fingerprint or model_fingerprint(model_path)
        if info.fingerprint == fingerprint:
            return str(path)
    return None


def _shipped() -> Path:
    return Path(str(resources.files("kvp_edge") / "models"))


def _candidates(model: Path) -> Iterator[Path]:
    folders = (model.parent, model.resolve().parent, _shipped())
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        found = sorted(folder.glob("kvp-*.gguf"))
        for path in sorted(found, key=lambda file: file.stat().st_mtime_ns, reverse=True):
            if path.resolve() != model.resolve():
                yield path
