#!/usr/bin/env python3
"""Fuzz the parser and packer of llama.cpp's state blobs, starting from real ones.

    python scripts/fuzz.py [--seconds 20] [--corpus FOLDER]

Run it in an environment where kvp_edge is installed with the dev extra, on Linux. With clang it
uses libFuzzer, which follows new code paths and keeps what it finds in --corpus; with g++ alone a
plain mutator. Both run under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    "fuzz/fuzz_state.cpp",
    *(
        f"state/{name}.cpp"
        for name in ("convert", "pack_plan", "pack_state", "rope_shift", "rows", "state_blob")
    ),
]
SANITIZE = "address,undefined"


def write_real_blobs(folder: Path) -> None:
    """States of small random models: flash attention on and off, quantised, with a window cache."""
    import llama_cpp  # noqa: PLC0415

    from makers import blobs  # noqa: PLC0415
    from makers.gguf_models import ModelShape, write_model  # noqa: PLC0415

    shapes = [
        ModelShape("llama", n_layer=1, n_embd=32, n_head=2, n_head_kv=2, n_ff=32),
        ModelShape(
            "gemma3", n_layer=2, n_embd=32, n_head=1, n_head_kv=1, n_ff=32, sliding_window=8
        ),
    ]
    kinds = [(0, 0, False), (1, 1, False), (1, 1, True), (8, 8, True), (2, 1, True)]
    for i, shape in enumerate(shapes):
        model = folder / "model.gguf"
        write_model(model, shape)
        for j, (type_k, type_v, flash_attn) in enumerate(kinds):
            llm = llama_cpp.Llama(
                str(model),
                n_ctx=256,
                type_k=type_k,
                type_v=type_v,
                flash_attn=flash_attn,
                verbose=False,
            )
            llm.eval(list(range(6, 16)))
            for turn in (0, 3):
                plan = bytes([i + 1, j, 7, 9, 1, shape.n_head_kv - 1, turn, 0])
                (folder / f"real-{i}-{j}-{turn}").write_bytes(plan + blobs.saved(llm.ctx))
            llm.close()
        model.unlink()


def build(target: Path, libfuzzer: bool) -> None:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    kind = (
        ["clang++", f"-fsanitize=fuzzer,{SANITIZE}"]
        if libfuzzer
        else ["g++", f"-fsanitize={SANITIZE}", "-DKVP_FUZZ_MAIN"]
    )
    command = [
        *kind,
        *("-std=c++17", "-O1", "-g", "-fno-sanitize-recover=undefined", "-Wall", "-Wextra"),
        *("-I", ROOT / "native", "-isystem", package.parent / "include"),
        *(ROOT / "native" / source for source in SOURCES),
        *("-L", package / "lib", f"-Wl,-rpath,{package / 'lib'}", "-lggml", "-lggml-base"),
        *("-o", target),
    ]
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--corpus", type=Path, help="where findings are kept (default: nowhere)")
    args = parser.parse_args()
    libfuzzer = shutil.which("clang++") is not None
    with tempfile.TemporaryDirectory() as scratch:
        real = Path(scratch) / "real"
        real.mkdir()
        write_real_blobs(real)
        target = Path(scratch) / "fuzz_state"
        build(target, libfuzzer)
        if libfuzzer:
            found = args.corpus or Path(scratch) / "found"
            found.mkdir(parents=True, exist_ok=True)
            # an input has a few KB, so nothing may ask for more than a few MB
            limits = ["-max_len=20000", "-malloc_limit_mb=64", "-rss_limit_mb=1024", "-timeout=10"]
            how = [
                f"-max_total_time={args.seconds}",
                "-verbosity=0",
                "-print_final_stats=1",
                *limits,
                found,
                real,
            ]
        else:
            how = [str(args.seconds), *sorted(real.iterdir())]
        environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
        return subprocess.run([target, *how], check=False, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
