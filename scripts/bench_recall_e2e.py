#!/usr/bin/env python3
"""What recall costs and saves with a model that people use: from the KV log to the first token.

    python scripts/bench_recall_e2e.py [--model MODEL.gguf] [--parts log recall write memory]
        [--lengths 8192 32768 131072] [--queries 20 64] [--kv-log FILE]

Long conversations are made, not read: some hundred tokens are read once, their rows are logged
again and again as those of later tokens, and every head holds some of these, chosen at random. So
times are those of so long a conversation. What a recall finds is not, and it happens always.

What is compared is measured in turn in one process, so that noise meets all; medians. Compare
numbers of one run only. Markdown tables on stdout, one for each part:

log     bytes of a token in the KV log, by its type, and the time to log it, which is part of an
        eviction, as a share of the time with reading and with writing the same tokens.
recall  the first token after a question, with recall and without, and where a recall spends its
        time. "choosing" and "filling" are all passes; of "filling", how much copies rows.
write   tokens per second at the end of a conversation, against llama_cpp.Llama with as many
        cells as tokens, and in a fresh chat. Lengths that the model was not trained for are left
        out.
memory  of a process that has recalled once: its own, and what it has mapped of files (the model,
        and a log that lies in a file; the system may take this memory back).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tqdm import tqdm

from bench_common import ms, read_ms, write_ms
from bench_models import N_READ, TEXT, Bench
from kvp_edge import Llama
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.model import read_model_shape
from kvp_edge.bundled import bundled_model
from kvp_edge.cache import asking, filling
from kvp_edge.cache.kv_log import Block
from kvp_edge.cache.manager import EvictionManager
from kvp_edge.cache.recall import Recall

UNLIMITED = "1000GiB"
PARTS = ("log", "recall", "write", "memory")


# -- conversations that nobody has read ----------------------------------------------------------


def manager_of(llm: Llama) -> EvictionManager:
    assert llm.kv is not None
    return llm.kv


def hold_read(bench: Bench, llm: Llama) -> int:
    """Let it hold tokens that were read. Returns how many."""
    n = min(N_READ, manager_of(llm).limits.budget)
    bench.fill_bounded(llm, n, n)
    return n


def log_read(kv: EvictionManager, n: int) -> None:
    """Log the first n tokens that the cells hold as the next ones."""
    assert kv.log is not None
    layout, table, end = kv.log.layout, kv.snapshot(), kv.log.end
    none = np.empty(0, np.uint8)
    block = Block(end, n, end, none, table.scores[:, :, :n], table.spans[:0])
    kv.log.append(block, lambda rows: kv.cache.log_rows(layout, 0, n, n, out=rows))
    if kv.log.lost:
        raise SystemExit(f"no room for the log: {kv.log.failure}")


def converse(bench: Bench, llm: Llama, n: int) -> None:
    """Make it a conversation of n tokens, all of them logged, in blocks as evictions log them."""
    kv = manager_of(llm)
    size = min(hold_read(bench, llm), kv.limits.reserve)
    kv.score()
    for first in tqdm(range(0, n, size), f"logging {n} tokens", leave=False, disable=None):
        log_read(kv, min(size, n - first))
    hold(llm, n)


def hold(llm: Llama, n: int) -> None:
    """Let every head hold rows of n logged tokens as after an eviction: chosen at random."""
    kv = manager_of(llm)
    assert kv.log is not None
    limits, empty = kv.limits, kv.empty_table()
    tail, n_packed = n - limits.recent, limits.budget - limits.recent
    if tail <= n_packed:
        raise SystemExit(f"a cache that keeps {limits.budget} tokens drops none of {n}")
    borders = np.linspace(0, tail, n_packed + 1).astype(np.int32)
    shape = (*empty.packed_indices.shape[:2], n_packed)
    chosen = np.random.default_rng(0).integers(borders[:-1], borders[1:], shape, np.int32)
    gone = replace(empty, seen=n, tail=n, marked=n)
    filled = filling.fill(
        gone,
        filling.rows_of(gone),
        chosen,
        np.zeros(shape, np.float32),
        tail,
        kv.log,
        None,
        scored=kv.policy.scope != "cache",
    )
    kv.cache.fill(
        kv.snapshot().llama_positions(),
        kv.log.layout,
        [block.native() for block in kv.log.blocks],
        filled.source,
        filled.llama_positions,
        filled.rope_shift,
    )
    kv.restore(filled.table, kv.log.held)
    llm.n_tokens = n
    llm.input_ids[:n] = 7


def recalling(bench: Bench, cells: int, found: list[Recall] | None = None, **options: Any) -> Llama:
    """A Llama that recalls before every reply, whether it finds much or little."""
    on_recall = None if found is None else found.append
    llm = bench.bounded(
        cells, recall="reply", kv_log_limit=UNLIMITED, on_recall=on_recall, **options
    )
    kv = manager_of(llm)
    kv.recall_settings = replace(kv.recall_settings, threshold=0.0)
    return llm


# -- the parts -----------------------------------------------------------------------------------


def log_part(bench: Bench, args: Any) -> None:
    print("| log | bytes per token | us per token logged | share, reading | share, writing |")
    print("|---|---|---|---|---|")
    for name in tqdm(args.types, "log", disable=None):
        kv_log_type = "cache" if name == "f16" else name
        with closing(recalling(bench, args.cells, kv_log_type=kv_log_type)) as llm:
            kv = manager_of(llm)
            assert kv.log is not None
            there = hold_read(bench, llm)
            kv.score()
            n = min(there, kv.limits.reserve)
            log, read, write = [], [], []
            log_read(kv, n)  # warm up
            for _ in range(args.repeat):
                kv.log.clear()
                log.append(ms(log_read, kv, n) / n)
                kv.log.clear()
                read.append(read_ms(llm, min(kv.limits.n_batch, kv.limits.cells - there)))
                write.append(write_ms(llm, args.tokens))
            logged = statistics.median(log)
            shares = (logged / (logged + statistics.median(of)) for of in (read, write))
            print(
                f"| {name} | {kv.log.layout.bytes_per_token:,} | {1e3 * logged:.1f} "
                f"| {next(shares):.2%} | {next(shares):.2%} |",
                flush=True,
            )


@contextmanager
def clocks() -> Iterator[list[tuple[str, float]]]:
    """Notes in order of their ends what recall calls, and the milliseconds that it took."""
    noted: list[tuple[str, float]] = []
    watched = (
        (asking, "score_log"),
        (EvictionManager, "choose_by_queries"),
        (EvictionManager, "bring"),
        (NativeCache, "fill"),
        (Llama, "read_batch"),
    )

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                noted.append((name, 1e3 * (time.perf_counter() - started)))

        return call

    with ExitStack() as stack:
        for owner, name in watched:
            patch = mock.patch.object(owner, name, clocked(name, getattr(owner, name)))
            stack.enter_context(patch)
        yield noted


def spent(noted: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of each part of a recall."""
    names = [name for name, _ in noted]
    first = names.index("score_log")  # what is read before is the question
    total = {name: sum(t for other, t in noted if other == name) for name in names}
    question = sum(t for name, t in noted[:first] if name == "read_batch")
    return {
        "reading": question,
        "scoring": total["score_log"],
        "choosing": total["choose_by_queries"] - total["score_log"],
        "filling": total["bring"],
        "copying": total["fill"],
        "again": total["read_batch"] - question,
    }


def first_token_ms(llm: Llama, n: int, question: list[int]) -> float:
    """Milliseconds to the first token after a question that follows n tokens."""
    prompt = llm.input_ids[:n].tolist() + question
    return ms(lambda: llm.create_completion(prompt, max_tokens=1, temperature=0.0))


def recall_part(bench: Bench, args: Any) -> None:
    print("| tokens | question | first token, ms | without recall | passes | reading | scoring "
          "| choosing | filling (copying) | reading again | else |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    found: list[Recall] = []
    options = {"kv_log_type": args.log_type, "kv_log": args.kv_log}
    with (
        closing(recalling(bench, args.cells, found, **options)) as llm,
        closing(bench.bounded(args.cells, recall="off")) as off,
    ):
        text = llm.tokenize(TEXT.read_bytes()[:20_000], add_bos=False)
        for n in args.lengths:
            converse(bench, llm, n)
            for m in args.queries:
                recall_row(bench, llm, off, found, n, text[:m], args.repeat)


def recall_row(
    bench: Bench,
    llm: Llama,
    off: Llama,
    found: list[Recall],
    n: int,
    question: list[int],
    repeat: int,
) -> None:
    with_recall, without, parts, held = [], [], [], manager_of(off).limits.budget
    for _ in tqdm(range(repeat), f"{n} tokens, {len(question)} ask", leave=False, disable=None):
        hold(llm, n)
        found.clear()
        with clocks() as noted:
            with_recall.append(first_token_ms(llm, n, question))
        if not found:
            raise SystemExit(f"nothing was recalled of {n} tokens")
        parts.append(spent(noted))
        bench.fill_bounded(off, held, n)
        without.append(first_token_ms(off, n, question))
    all_ = statistics.median(with_recall)
    of = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    rest = all_ - sum(of.values()) + of["copying"]
    print(
        f"| {n:,} | {len(question)} | {all_:.0f} | {statistics.median(without):.0f} "
        f"| {found[0].passes} | {of['reading']:.0f} | {of['scoring']:.0f} | {of['choosing']:.0f} "
        f"| {of['filling']:.0f} ({of['copying']:.0f}) | {of['again']:.0f} | {rest:.0f} |",
        flush=True,
    )


def write_part(bench: Bench, args: Any) -> None:
    print("| cache | cells | tokens/s written | ms per token | smallest, largest |")
    print("|---|---|---|---|---|")
    lengths = [n for n in args.lengths if n <= read_model_shape(bench.path).n_ctx_train]
    ways: dict[tuple[str, int], tuple[Any, Callable[[], None]]] = {}
    with ExitStack() as stack:
        bounded = stack.enter_context(closing(recalling(bench, args.cells)))
        limits = manager_of(bounded).limits
        for n in lengths:
            full = stack.enter_context(closing(bench.plain(n + 256, limits.n_batch)))
            ways[f"full, {n:,} tokens", n + 256] = (
                full,
                lambda llm=full, n=n: bench.fill_plain(llm, n),
            )
            ways[f"bounded, {n:,} tokens", limits.cells] = (
                bounded,
                lambda n=n: converse(bench, bounded, n),
            )
        fresh = stack.enter_context(closing(bench.plain(limits.cells, limits.n_batch)))
        ways["fresh chat, as many cells", limits.cells] = (
            fresh,
            lambda: bench.fill_plain(fresh, limits.budget),
        )
        short = min(N_READ, limits.budget) // 4
        ways[f"fresh chat, {short} tokens", limits.cells] = (
            fresh,
            lambda: bench.fill_plain(fresh, short),
        )
        times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
        for _ in tqdm(range(args.repeat), "writing", disable=None):
            for way, (llm, fill) in ways.items():
                fill()
                times[way].append(write_ms(llm, args.tokens))
    for (name, cells), per_token in times.items():
        median = statistics.median(per_token)
        print(
            f"| {name} | {cells:,} | {1e3 / median:.1f} | {median:.1f} "
            f"| {min(per_token):.1f}, {max(per_token):.1f} |",
            flush=True,
        )


def memory_part(args: Any) -> None:
    print("| tokens | log | of the log, MiB | process, MiB | its own | of files |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = args.kv_log or str(Path(folder) / "kv.log")
        for n in args.lengths:
            for way in tqdm(("off", "memory", "file"), f"{n} tokens", leave=False, disable=None):
                command = [sys.executable, __file__, "--model", args.model, "--only", way]
                command += ["--lengths", str(n), "--cells", str(args.cells), "--kv-log", path]
                command += ["--log-type", args.log_type, "--threads", str(args.threads)]
                command += ["--queries", str(args.queries[0])]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                mib = json.loads(done.stdout)
                print(
                    f"| {n:,} | {way} | {mib['log']:.0f} | {mib['own'] + mib['files']:.0f} "
                    f"| {mib['own']:.0f} | {mib['files']:.0f} |",
                    flush=True,
                )


def memory_of(way: str, args: Any) -> dict[str, float]:
    """MiB of this process after a recall (Linux)."""
    bench, n = Bench(args.model, False, args.threads), args.lengths[0]
    if way == "off":
        llm = bench.bounded(args.cells, recall="off")
        bench.fill_bounded(llm, manager_of(llm).limits.budget, n)
    else:
        path = args.kv_log if way == "file" else None
        llm = recalling(bench, args.cells, kv_log_type=args.log_type, kv_log=path)
        converse(bench, llm, n)
    question = llm.tokenize(TEXT.read_bytes()[:20_000], add_bos=False)[: args.queries[0]]
    first_token_ms(llm, n, question)
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    log_bytes = llm.kv_stats.log_bytes
    llm.close()
    return {
        "log": log_bytes / 2**20,
        "own": kib["RssAnon:"] / 1024,
        "files": (kib["RssFile:"] + kib["RssShmem:"]) / 1024,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=bundled_model(), help="GGUF file; default: the bundled")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="tokens logged"
    )
    parser.add_argument(
        "--queries", type=int, nargs="+", default=[20, 64], help="tokens of the question, that ask"
    )
    parser.add_argument("--cells", type=int, default=2048, help="of the bounded cache")
    parser.add_argument(
        "--types", nargs="+", default=["f16", "q8_0", "q4_0"], help="of the log, part log"
    )
    parser.add_argument("--log-type", default="cache", help="of the log, parts recall and memory")
    parser.add_argument(
        "--kv-log", metavar="FILE", help="the log of part recall lies here, not in memory"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="written at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps(memory_of(args.only, args)))
        return 0
    bench = Bench(args.model, False, args.threads)
    parts: dict[str, Callable[[], None]] = {
        "log": lambda: log_part(bench, args),
        "recall": lambda: recall_part(bench, args),
        "write": lambda: write_part(bench, args),
        "memory": lambda: memory_part(args),
    }
    print(f"{Path(args.model).stem}, {args.cells:,} cells, {args.threads} threads\n")
    for part in args.parts:
        parts[part]()
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
