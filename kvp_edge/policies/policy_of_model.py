"""The policy that was trained for a model, found without being named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path

from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.binding.model import ModelShape, read_model_shape
from kvp_edge.errors import PolicyFileError
from kvp_edge.policy_file import PolicyInfo, check_model, read_info, read_policy


def own_policy(model_path: str | os.PathLike[str]) -> str | None:
    """The policy file that was trained on this very model file, or else on another quantisation of
    the model (``model_identity``), or None.

    Looked for among the files kvp-*.gguf beside the model, the newest first, then beside the file
    that it is a link to, and among those that come with the package. A file that cannot be used,
    whatever is wrong with it, is skipped with a warning: the chat can continue without it.
    """
    fingerprint = cache(lambda: model_fingerprint(model_path))
    identity = cache(lambda: model_identity(model_path))
    shape = cache(lambda: read_model_shape(model_path))
    of_another_file: str | None = None
    for path in _candidates(model_path):
        try:
            info = read_info(path)
            is_exact = info.fingerprint == fingerprint()
            if not is_exact:
                # an identity takes reading all norms: not for policies of other architectures
                may_be = info.model_identity != "" and info.architecture == shape().architecture
                if of_another_file or not may_be or info.model_identity != identity():
                    continue
            read_policy(path)  # so that nothing is found out too late
            _check_fit(info, shape())
        except (PolicyFileError, MemoryError) as error:
            reason = str(error) or "it does not fit into memory"
            name = "" if str(path) in reason else f"'{path}': "
            warnings.warn(f"policy skipped: {name}{reason}", stacklevel=2)
            continue
        if is_exact:
            return str(path)
        of_another_file = str(path)
    return of_another_file


def _check_fit(info: PolicyInfo, model: ModelShape) -> None:
    """Raises:
    PolicyFileError: the policy is not of the model's shape, as far as its file tells: which layers
        have a window, and so are not in the base cache, it does not.
    """
    n_layer = min(info.n_layer, model.n_layer) if model.sliding_window else model.n_layer
    check_model(
        info,
        architecture=model.architecture,
        n_layer=n_layer,
        n_head_kv=info.n_head_kv if info.n_head_kv in model.n_head_kv else model.n_head_kv[0],
        head_size_k=info.head_size_k if model.sliding_window else model.head_size_k,
        head_size_v=info.head_size_v if model.sliding_window else model.head_size_v,
    )


def _shipped() -> Path:
    return Path(str(resources.files("kvp_edge") / "models"))


def _candidates(model_path: str | os.PathLike[str]) -> Iterator[Path]:
    # os.path, since pathlib fails on a link that points to itself
    model = os.path.realpath(model_path)
    beside = os.path.realpath(os.path.dirname(os.path.abspath(model_path)))
    for folder in dict.fromkeys((beside, os.path.dirname(model), os.path.realpath(_shipped()))):
        for path in sorted(Path(folder).glob("kvp-*.gguf"), key=_age, reverse=True):
            if os.path.realpath(path) != model:
                yield path


def _age(path: Path) -> tuple[int, str]:
    """Newer is larger; what cannot be looked at, a link to nothing say, is oldest."""
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name
