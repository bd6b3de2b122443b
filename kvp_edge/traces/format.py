"""Trace files: a model's keys and values of a text, and the attention that they received.

A trace is one text (or chat, or task) read by one GGUF model: keys, values, indices and tokens, and
the attention of every block of later queries to every token, so that an eviction can be placed at
any border between blocks. A folder of traces has

- ``manifest.json``: format, versions, model, sources, settings, and one entry for every trace;
- ``trace-00000.safetensors``, ...: one file for every trace, written whole or not at all.

A file holds, for L layers, H KV heads, T tokens, head sizes dk and dv:

==========  =======  ============  ================================================================
keys        float16  [L, H, T, dk]  with RoPE, as attention sees them
values      float16  [L, H, T, dv]
positions   int32    [T]            ascending
tokens      int32    [T]            the model's token ids
attention   float16  [L, H, P]      sums over blocks of queries, times ``scale``
later       float16  [L, H, P']     a label (kvp_edge.traces.labels), if it was asked for
repeated    float16  [L, H, T]      another
questioned  float16  [L, H, T]      another
==========  =======  ============  ================================================================

and, in its metadata under the one key "kvp_trace", JSON with run, index, source, n_prompt, block,
first, scale, and labels, where there are any. Queries are gathered in blocks: the first has
``first`` queries, the others ``block``, the last what is left; ``n_prompt`` is always a border.
``attention`` holds the blocks one after the other. A block of queries [s, e) has e values, one for
each token 0 to e - 1 that it can see: the sum over the block's queries of the largest attention
among the query heads of the group (Learning to Evict from Key-Value Cache, arXiv:2602.10238: the
maximum comes before the sum).

``later`` is laid out like ``attention``, with blocks of 32 queries from the first token on.

Version 2 of the format has labels. Traces without them are of version 1.

The same command makes the same bytes, whether it was interrupted or not.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import numpy as np

from kvp_edge.arrays import FloatArray, HalfArray, IntArray, TokenIds, TokenIndices
from kvp_edge.binding.blocks import Blocks
from kvp_edge.binding.fingerprint import model_fingerprint
from kvp_edge.errors import TraceError
from kvp_edge.files import open_regular, read_regular, size_of
from kvp_edge.files.json_values import parse, require, shortened
from kvp_edge.traces.labels import LABELS, NEAR, label_size

FORMAT = "kvp-traces"
#: Without labels, and with labels.
PLAIN_VERSION, FORMAT_VERSION = 1, 2
MANIFEST = "manifest.json"
_MOST_MANIFEST_BYTES = 2**28
MOST_TRACE_BYTES = 2**40

Json = dict[str, Any]

_TRACE_FILE = re.compile(r"[\w-][\w.-]*")
#: What a manifest, its model, its entries and the metadata of a trace must have.
_MANIFEST = {
    "complete": bool,
    "planned": int,
    "run": str,
    "model": Json,
    "sources": list[Json],
    "settings": Json,
    "traces": list[Json],
}
_MODEL = {"architecture": str, "name": str, "fingerprint": str}
_ENTRY = {
    "file": str,
    "source": str,
    "n_tokens": int,
    "n_prompt": int,
    "bytes": int,
    "sha256": str,
}
_ABOUT = {
    "run": str,
    "index": int,
    "source": str,
    "n_prompt": int,
    "block": int,
    "first": int,
    "scale": float,
}
_DTYPES = {
    "keys": np.float16,
    "values": np.float16,
    "positions": np.int32,
    "tokens": np.int32,
    "attention": np.float16,
}


# -- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """One text as the model saw it: L layers, H KV heads, T tokens.

    Attributes:
        keys: float16 [L, H, T, head_size_k], RoPE included.
        values: float16 [L, H, T, head_size_v].
        indices: int32 [T], ascending: each token's index in the conversation.
        tokens: int32 [T].
        attention: float16 [L, H, P], see the module.
        n_prompt: where the future begins, a border between blocks.
        blocks: how queries were gathered.
        scale: what ``attention`` was multiplied by.
        source: where the text is from.
        later: float16 [L, H, P'], see ``asked_later``; None if it was not asked for.
        repeated: float16 [L, H, T], the largest attention that a repetition of the text pays to
            each token; None if it was not asked for (kvp_edge.traces.labels).
        questioned: the same of the model's own questions and answers about the text.
    """

    keys: HalfArray
    values: HalfArray
    indices: TokenIndices
    tokens: TokenIds
    attention: HalfArray
    n_prompt: int
    blocks: Blocks
    scale: float
    source: str
    later: HalfArray | None = None
    repeated: HalfArray | None = None
    questioned: HalfArray | None = None

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.keys, self.values, self.indices, self.tokens, self.attention)
        labels = (self.repeated, self.questioned)
        return sum(array.nbytes for array in (*arrays, *labels) if array is not None)

    @property
    def block(self) -> int:
        """Queries in a block."""
        return self.blocks.size

    @cached_property
    def splits(self) -> IntArray:
        """The numbers n that ``importance`` answers exactly, ascending: the borders between
        blocks."""
        return np.array(self.blocks.ends(len(self))[:-1], np.int32)

    def importance(self, n: int, until: int | None = None) -> FloatArray:
        """The attention of the queries from ``n`` on to the tokens before ``n``.

        a[l, h, i] = sum over queries j >= n of max over the group's query heads of attn(j -> i):
        Learning to Evict from Key-Value Cache, arXiv:2602.10238, section 3.1.1.

        Exact to float16's rounding of each block's sum (2^-11 of it) when n is in ``splits``. For
        another n the queries between n and the next border are left out.

        Args:
            n: how many tokens there are at the moment of eviction, 1 <= n <= splits[-1].
            until: count the queries before this one only (rounded up likewise); None: all.

        Returns:
            float32 [L, H, n].

        Raises:
            ValueError: no whole block of queries comes after n.
        """
        self._check_split(n)
        return self.received(n, len(self) if until is None else until, n)

    def _check_split(self, n: int) -> None:
        last = int(self.splits[-1]) if len(self.splits) else 0
        if not 1 <= n <= last:
            raise ValueError(
                f"a split must be from 1 to {last}, the last border between blocks of {self.block} "
                f"queries in this trace of {len(self)} tokens, not {n}"
            )

    def peak(self, n: int) -> FloatArray:
        """The largest attention of one block of the queries from ``n`` on to each token before
        ``n``: a[l, h, i] = max over those blocks of what ``importance`` sums.

        ForesightKV (arXiv:2602.03203) labels a token by its largest mean over a later block, so a
        token needed for one answer counts like one that every sentence attends to a little.

        Args:
            n: as in ``importance``.

        Returns:
            float32 [L, H, n].
        """
        self._check_split(n)
        out = np.zeros((*self.keys.shape[:2], n), np.float32)
        for begin, _, sums in self._block_sums():
            if begin >= n:  # so the block has sums for all n tokens
                np.maximum(out, sums[:, :, :n], out=out)
        out /= self.scale
        return out

    def asked_later(self, n: int) -> FloatArray:
        """The largest attention that any query from ``n`` on pays to each token before ``n``, the
        maximum over the group: float32 [L, H, n].

        Args:
            n: rounded up to a multiple of labels.NEAR.

        Raises:
            ValueError: no query comes after n, or the label was not recorded.
        """
        if self.later is None:
            raise ValueError("the trace was recorded without --future later")
        if not 1 <= n <= (len(self) - 1) // NEAR * NEAR:
            raise ValueError(f"no piece of {NEAR} queries begins at {n} or later")
        out = np.zeros((*self.keys.shape[:2], n), np.float32)
        for begin, _, at in Blocks(NEAR, NEAR).spans(len(self)):
            if begin >= n:
                np.maximum(out, self.later[:, :, at : at + n], out=out)
        return out

    def received(self, start: int, stop: int, n_tokens: int | None = None) -> FloatArray:
        """Attention of the queries [start, stop) to the first ``n_tokens`` tokens (None: all), the
        largest of each group; both ends are rounded up to the next border.

        With stop = n it is known at an eviction: [0, n) is accumulated attention as in H2O, [n - w,
        n) a window as in SnapKV, but with the maximum over a group, not its mean.

        Returns:
            float32 [L, H, n_tokens].
        """
        n_tokens = len(self) if n_tokens is None else n_tokens
        out = np.zeros((*self.keys.shape[:2], n_tokens), np.float32)
        for begin, _, sums in self._block_sums():
            if start <= begin < stop:
                n = min(sums.shape[2], n_tokens)
                out[:, :, :n] += sums[:, :, :n]
        out /= self.scale
        return out

    def payments(self) -> Iterator[tuple[int, FloatArray]]:
        """Every block's first query, and the mean attention of its queries to the tokens before the
        block: float32 [L, H, first query]."""
        for begin, end, sums in self._block_sums():
            yield begin, sums[:, :, :begin].astype(np.float32) / (self.scale * (end - begin))

    def _block_sums(self) -> Iterator[tuple[int, int, HalfArray]]:
        """Every block of queries [begin, end), and its attention sums: float16 [L, H, end],
        scaled."""
        for begin, end, at in self.blocks.spans(len(self)):
            yield begin, end, self.attention[:, :, at : at + end]


class TraceSet(Sequence[Trace]):
    """A folder of traces, with ``len``, index and iteration. A trace is read on access.

    Args:
        path: the folder.
        partial: accept the finished traces of an interrupted run.
        model: a GGUF file that must be the one that was traced.

    Attributes:
        manifest: manifest.json as it is.
        model: architecture, name, fingerprint, n_layer, n_head_kv, head_size_k, head_size_v; and
            identity, but in traces made before there was one.

    Raises:
        TraceError: no traces there, of another format, incomplete, or of another model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        partial: bool = False,
        model: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise TraceError(f"'{self.path}' contains no traces: {MANIFEST} is missing")
        self.manifest = manifest
        self.model: Json = manifest["model"]
        self._entries: list[Json] = manifest["traces"]
        if not manifest["complete"] and not partial:
            raise TraceError(
                f"'{self.path}' has {len(self._entries)} of {manifest['planned']} traces: the "
                "run was interrupted. Run the same kvp-edge trace command to finish it, or "
                "use partial=True"
            )
        if model is not None and model_fingerprint(model) != self.model["fingerprint"]:
            raise TraceError(
                f"the traces in '{self.path}' are from another model than "
                f"'{os.fspath(model)}': {self.model['name'] or 'a model without a name'} "
                f"({self.model['architecture']}, fingerprint "
                f"{self.model['fingerprint'][:12]}). Trace this model as well"
            )

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Trace: ...

    @overload
    def __getitem__(self, index: slice) -> list[Trace]: ...

    def __getitem__(self, index: int | slice) -> Trace | list[Trace]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self._entries[index]
        return _load(self.path / entry["file"], entry)

    def __iter__(self) -> Iterator[Trace]:
        return (self[i] for i in range(len(self)))

    def check(self) -> None:
        """Read every file and compare its SHA-256 with the manifest's.

        Raises:
            TraceError: the first that is damaged.
        """
        for entry in self._entries:
            data = _read_file(self.path / entry["file"], entry)
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise TraceError(f"'{self.path / entry['file']}' was changed: {_AGAIN}")


_AGAIN = "delete it and run the same kvp-edge trace command"


def read_manifest(folder: Path) -> Json | None:
    path = folder / MANIFEST
    try:
        manifest = parse(read_regular(path, _MOST_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TraceError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise TraceError(f"'{path}' is damaged: it is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TraceError(
            f'\'{path}\' is not the manifest of traces: it has no "format": "{FORMAT}"'
        )
    if manifest.get("format_version") not in (PLAIN_VERSION, FORMAT_VERSION):
        raise TraceError(
            f"the traces in '{folder}' have format version "
            f"{shortened(manifest.get('format_version'))}, but this kvp_edge reads "
            f"{PLAIN_VERSION} and {FORMAT_VERSION}: record them again with kvp-edge trace"
        )
    missing = _MANIFEST.keys() - manifest.keys()
    if missing:
        raise TraceError(f"'{path}' is damaged: it has no {', '.join(sorted(missing))}")
    try:
        require(manifest, _MANIFEST)
        require(manifest["model"], _MODEL)
        for entry in manifest["traces"]:
            require(entry, _ENTRY)
            if not _TRACE_FILE.fullmatch(entry["file"]):  # no path out of the folder
                raise ValueError(f"{shortened(entry['file'])} is not the name of a trace")
    except ValueError as error:
        raise TraceError(f"'{path}' is damaged: {error}") from error
    return manifest


def _read_file(path: Path, entry: Json) -> bytes:
    try:
        with open_regular(path) as file:
            size = size_of(file)
            if size == entry["bytes"]:
                return file.read(size)
    except OSError as error:
        raise TraceError(f"cannot read '{path}': {error.strerror}") from error
    raise TraceError(
        f"'{path}' is damaged: it has {size} bytes instead of {entry['bytes']}: {_AGAIN}"
    )


def _load(path: Path, entry: Json) -> Trace:
    data = _read_file(path, entry)
    try:
        arrays = safetensors_numpy().load(data)
        about = metadata_of(data)
        if not 1 <= about["first"] <= about["block"]:
            raise ValueError(f"blocks of {about['block']} queries, the first of {about['first']}")
        if about["scale"] <= 0:
            raise ValueError(f"the scale {about['scale']}")
        labels = about.get("labels", [])
        if not isinstance(labels, list) or any(name not in LABELS for name in labels):
            raise ValueError(f"the labels {shortened(labels)}")
        trace = Trace(
            keys=arrays["keys"],
            values=arrays["values"],
            indices=arrays["positions"],
            tokens=arrays["tokens"],
            attention=arrays["attention"],
            n_prompt=about["n_prompt"],
            blocks=Blocks(about["block"], about["first"]),
            scale=float(about["scale"]),
            source=about["source"],
            **{name: arrays[name] for name in labels},
        )
    except ImportError:
        raise
    except Exception as error:  # safetensors has its own, KeyError, ValueError...
        raise TraceError(f"'{path}' is damaged ({error}): {_AGAIN}") from error
    heads, n = trace.keys.shape[:2], len(trace.tokens) if trace.tokens.ndim else -1
    fits = (
        all(arrays[name].dtype == dtype for name, dtype in _DTYPES.items())
        and all(arrays[name].dtype == np.float16 for name in labels)
        and all(arrays[name].shape == (*heads, label_size(name, n)) for name in labels)
        and trace.keys.shape == (*heads, n, trace.keys.shape[-1])
        and trace.values.shape == (*heads, n, trace.values.shape[-1])
        and trace.indices.shape == trace.tokens.shape == (n,)
        and 0 <= trace.n_prompt <= n
        and trace.attention.shape == (*heads, trace.blocks.n_sums(n))
    )
    if not fits:
        raise TraceError(f"'{path}' is damaged: its arrays do not fit together: {_AGAIN}")
    return trace


def metadata_of(data: bytes) -> Json:
    """The "kvp_trace" metadata. A safetensors file begins with the length of its JSON header."""
    header = parse(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = require(require(header, {"__metadata__": Json})["__metadata__"], {"kvp_trace": str})
    return require(parse(metadata["kvp_trace"]), _ABOUT)


def safetensors_numpy() -> ModuleType:
    try:
        import safetensors.numpy  # noqa: PLC0415  # only those who trace and train need it
    except ImportError as error:
        raise ImportError(
            "traces need the package safetensors: pip install 'kvp_edge[train]'"
        ) from error
    module: ModuleType = safetensors.numpy
    return module
