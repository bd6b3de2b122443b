"""Where the bundled model lies."""

from __future__ import annotations

from importlib import resources


def bundled_model() -> str:
    """Path of the bundled model.

    Raises:
        FileNotFoundError: the installation is damaged.
    """
    # GGUF files are mapped into memory by name, so the package must be installed as plain files
    folder = resources.files("kvp_edge") / "models"
    files = folder.iterdir() if folder.is_dir() else iter(())
    # kvp-*.gguf are policies (kvp_edge.policies.policy_of_model)
    names = (file for file in files if not file.name.startswith("kvp-"))
    found = [str(file) for file in names if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise FileNotFoundError(
            f"the package contains {len(found)} models instead of one: reinstall kvp_edge, or "
            "name a model file"
        )
    return found[0]
