"""Writes and resumes a folder of traces; each file is written atomically."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.binding.library import BUILT_FOR, LLAMA_VERSION
from kvp_edge.errors import TraceError
from kvp_edge.files import read_regular, write_whole
from kvp_edge.traces.format import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MOST_TRACE_BYTES,
    PLAIN_VERSION,
    Json,
    metadata_of,
    read_manifest,
    safetensors_numpy,
)
from kvp_edge.traces.labels import LABELS, LATER, QUESTIONED, REPEATED, tokens_needed
from kvp_edge.traces.sources import Cut, Piece, Source, plan
from kvp_edge.traces.tracer import Captured, Tracer

#: The manifest is rewritten after this many traces; files that it does not list yet are found, too.
_SAVE_EVERY = 16
#: Most tokens of the model's questions about a text.
_WRITTEN = 128
#: Of what the model, or the source, makes of a text -> the label that it adds.
FUTURES: dict[str, str | None] = {
    "text": None,
    "greedy": None,
    "later": LATER,
    "repeat": REPEATED,
    "questions": QUESTIONED,
}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# -- writing -----------------------------------------------------------------------------------


def capture_traces(
    model_path: str | os.PathLike[str],
    sources: Sequence[Source],
    out_dir: str | os.PathLike[str],
    *,
    length: int = 1024,
    n_traces: int | None = None,
    seed: int = 0,
    future: str | Sequence[str] = "text",
    future_tokens: int | None = None,
    block: int | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    **engine: Any,
) -> Path:
    """Trace texts with a model. An interrupted run in ``out_dir`` is resumed.

    Args:
        model_path: GGUF file.
        sources: TextFile, ChatFile, Tasks (kvp_edge.traces.sources), or your own.
        out_dir: folder for the traces, made if need be.
        length: most tokens of a trace.
        n_traces: how many, drawn by ``seed`` from all that the sources make; None: all.
        seed: draws tasks and traces.
        future: one or several of FUTURES. "text": what follows in the source; "greedy": what the
            model writes, greedily. The others add labels (kvp_edge.traces.labels).
        future_tokens: tokens of a text, or of the model's own, that are the future; None: a
            quarter of ``length``. Also the most tokens of "questions"; None: 128.
        block: queries per block; None: the fewest with which a file has at most twice the bytes of
            its keys and values.
        progress: called with (traces done, traces planned, tokens of the last one).
        engine: arguments of llama_cpp.Llama (n_gpu_layers, n_threads, type_k...); see Tracer.

    Returns:
        The folder.

    Raises:
        TraceError: nothing to trace, or ``out_dir`` holds traces of another run.
        UnsupportedModelError: a model that cannot be traced.
        KVCacheError: a model whose numbers are not finite.
        OSError: the folder cannot be written, or the disk is full. Finished traces are kept.
    """
    safetensors_numpy()
    folder = Path(out_dir)
    plan = planned(
        model_path,
        sources,
        length=length,
        n_traces=n_traces,
        seed=seed,
        future=future,
        future_tokens=future_tokens,
        block=block,
        **engine,
    )
    try:
        manifest = plan.manifest
        _make_folder(folder)
        _refuse_another_run(folder, manifest)
        pieces = plan.pieces()
        manifest["planned"] = len(pieces)
        _trace_all(plan.tracer, pieces, folder, manifest, progress)
    finally:
        plan.tracer.close()
    return folder


@dataclass(frozen=True)
class Planned:
    """A model that is ready to trace, and what it will trace.

    Attributes:
        manifest: that of the traces, without any of them.
    """

    tracer: Tracer
    manifest: Json
    sources: Sequence[Source]
    cut: Cut
    n_traces: int | None

    def pieces(self) -> list[Piece]:
        """Raises:
        TraceError: the sources do not make so many.
        """
        return plan(self.sources, self.tracer, self.cut, self.n_traces)


def planned(
    model_path: str | os.PathLike[str],
    sources: Sequence[Source],
    *,
    length: int = 1024,
    n_traces: int | None = None,
    seed: int = 0,
    future: str | Sequence[str] = "text",
    future_tokens: int | None = None,
    block: int | None = None,
    **engine: Any,
) -> Planned:
    """Load the model; see ``capture_traces``. The caller closes the tracer."""
    future, labels = _parted((future,) if isinstance(future, str) else future)
    written = _WRITTEN if future_tokens is None else future_tokens
    future_tokens = length // 4 if future_tokens is None else future_tokens
    if not 1 <= future_tokens <= length - 8:
        raise TraceError(
            f"a trace of {length} tokens cannot have {future_tokens} of them in its future: at "
            "least 8 must come before, and 1 after"
        )
    model_path = os.fspath(model_path)
    engine.setdefault("verbose", False)
    about = [source.about() for source in sources]
    tracer = Tracer(model_path, length, block, labels=labels, written=written, **engine)
    try:
        settings: Json = {
            "length": length,
            "n_traces": n_traces,
            "seed": seed,
            "future": future,
            "future_tokens": future_tokens,
            "block": tracer.block,
            "type_k": tracer.shape.type_k,
            "type_v": tracer.shape.type_v,
            "flash_attn": tracer.flash_attn,
            "n_batch": tracer.n_batch,
            "n_gpu_layers": tracer.model_params.n_gpu_layers,
            "labels": labels,
        }
        if QUESTIONED in labels:
            settings["written"] = written
        manifest = _manifest(model_path, tracer, about, settings)
    except BaseException:
        tracer.close()
        raise
    return Planned(tracer, manifest, sources, Cut(length, future, future_tokens, seed), n_traces)


def claim_folder(folder: Path, manifest: Json) -> None:
    """Make a folder for a run that keeps no traces: it has their manifest alone.

    Raises:
        TraceError: it is another run's.
        OSError: it cannot be written.
    """
    _make_folder(folder)
    _refuse_another_run(folder, manifest)
    _save_manifest(folder, manifest)


def _parted(futures: Sequence[str]) -> tuple[str, list[str]]:
    """What follows the text, "text" or "greedy", and the labels besides.

    Raises:
        TraceError: these futures are none, or not for one run.
    """
    unknown = [name for name in futures if name not in FUTURES]
    if unknown or not futures:
        known = ", ".join(FUTURES)
        raise TraceError(
            f"the future must be one or several of {known}, not '{' '.join(unknown or futures)}'"
        )
    following = {name for name in futures if FUTURES[name] is None}
    if len(following) > 1:
        raise TraceError("the future is either text, which the source has, or greedy: choose one")
    wanted = {FUTURES[name] for name in futures}
    return (following or {"text"}).pop(), [name for name in LABELS if name in wanted]


def reach(length: int, future: str | Sequence[str], future_tokens: int | None) -> int:
    """The most tokens that the model reads in a row for a trace; see ``capture_traces``."""
    _, labels = _parted((future,) if isinstance(future, str) else future)
    return tokens_needed(length, labels, _WRITTEN if future_tokens is None else future_tokens)


def _manifest(path: str, tracer: Tracer, sources: list[Json], settings: Json) -> Json:
    """The manifest without traces. Nothing in it depends on when or how fast the run was."""
    from kvp_edge import __version__  # noqa: PLC0415  # the package imports this module

    meta, shape = tracer.metadata, tracer.shape
    model = {
        "architecture": meta.get("general.architecture", ""),
        "name": meta.get("general.name", ""),
        "file": os.path.basename(path),
        "fingerprint": model_fingerprint(path),
        "n_layer": shape.n_layer,
        "n_head_kv": shape.n_head_kv,
        "head_size_k": shape.head_size_k,
        "head_size_v": shape.head_size_v,
    }
    # Runs older than these entries were made without flash attention and labels, and resume so.
    version = FORMAT_VERSION if settings["labels"] else PLAIN_VERSION
    newer = ("flash_attn", "labels")
    settled = {name: value for name, value in settings.items() if name not in newer or value}
    # the file's name is for people; the fingerprint tells which file it is
    what = [version, LLAMA_VERSION, {**model, "file": ""}, sources, settled]
    run = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    identity = model_identity(path)  # not part of the run: older manifests lack it
    return {
        "format": FORMAT,
        "format_version": version,
        "complete": False,
        "planned": 0,
        "run": run,
        "kvp_edge": __version__,
        "llama_cpp": LLAMA_VERSION,
        "llama_cpp_python": BUILT_FOR,
        "model": {**model, "identity": identity},
        "sources": sources,
        "settings": settings,
        "traces": [],
    }


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder '{folder}': {error.strerror}") from error


def _refuse_another_run(folder: Path, manifest: Json) -> None:
    found = read_manifest(folder)
    if found is None or found["run"] == manifest["run"]:
        return
    differ = [
        f"{name} {_short(found['settings'].get(name))} instead of {_short(value)}"
        for name, value in manifest["settings"].items()
        if found["settings"].get(name, value) != value
    ]
    if found["model"].get("fingerprint") != manifest["model"]["fingerprint"]:
        differ.insert(0, f"model {found['model'].get('name') or found['model'].get('file')}")
    if found["sources"] != manifest["sources"]:
        differ.append("other sources")
    raise TraceError(
        f"'{folder}' has traces of another run ({', '.join(differ) or 'another version'}): "
        "choose another folder, or delete that one"
    )


def _short(value: Any) -> str:
    return "all" if value is None else str(value)


def _trace_all(
    tracer: Tracer,
    pieces: list[Piece],
    folder: Path,
    manifest: Json,
    progress: Callable[[int, int, int], None] | None,
) -> None:
    done: list[Json] = manifest["traces"]
    known = {e["file"]: e["sha256"] for e in (read_manifest(folder) or manifest)["traces"]}
    try:
        _save_manifest(folder, manifest)
        for index, piece in enumerate(pieces):
            path = folder / f"trace-{index:05}.safetensors"
            about = {"run": manifest["run"], "index": index, "source": piece.source}
            data = _finished(path, about, known.get(path.name))
            if data is None:
                got = tracer.capture(piece.tokens, piece.n_prompt, piece.n_generate)
                data = _file_bytes(got, {**about, "n_prompt": piece.n_prompt})
                _write_whole(path, data)
            done.append(_entry(path, piece, data))
            if len(done) % _SAVE_EVERY == 0:
                _save_manifest(folder, manifest)
            if progress is not None:
                progress(len(done), len(pieces), done[-1]["n_tokens"])
        manifest["complete"] = True
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise OSError(
            f"the disk is full ({error.strerror}): {len(done)} of {len(pieces)} traces are "
            f"finished and kept in '{folder}'. Make room and run the same command to resume"
        ) from error
    finally:
        _save_manifest(folder, manifest)


def _finished(path: Path, about: Json, sha256: str | None) -> bytes | None:
    """The trace that an earlier run has left, if it is whole and of this run."""
    try:
        data = read_regular(path, MOST_TRACE_BYTES)
        found = metadata_of(data)
        safetensors_numpy().load(data)  # refuses what is cut off
    except Exception:  # whatever is wrong with it, make it again
        return None
    same = all(found.get(key) == value for key, value in about.items())
    intact = sha256 is None or hashlib.sha256(data).hexdigest() == sha256
    return data if same and intact else None


def _file_bytes(got: Captured, about: Json) -> bytes:
    about |= {"block": got.blocks.size, "first": got.blocks.first, "scale": got.blocks.scale}
    arrays = {
        "keys": got.keys,
        "values": got.values,
        "positions": got.indices,
        "tokens": got.tokens,
        "attention": got.sums,
        **got.labels,
    }
    if got.labels:
        about |= {"labels": sorted(got.labels)}
    # one key: safetensors writes several in any order
    data: bytes = safetensors_numpy().save(arrays, {"kvp_trace": json.dumps(about, sort_keys=True)})
    return data


def _entry(path: Path, piece: Piece, data: bytes) -> Json:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {
        "file": path.name,
        "source": piece.source,
        "n_tokens": header["tokens"]["shape"][0],
        "n_prompt": piece.n_prompt,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _save_manifest(folder: Path, manifest: Json) -> None:
    _write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    try:
        write_whole(path, data, private=True)  # token ids are readable text
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise OSError(f"cannot write '{path}': {error.strerror}") from error
        raise
