#!/usr/bin/env python3
"""What an eviction costs on a device whose memory the host cannot touch, against its floor.

    python scripts/bench_device.py [--cells 32768] [--keep 4096] [--decode]      # the first GPU
    python scripts/bench_device.py --rpc --cells 4096 --keep 1024 --layers 8     # llama.cpp's RPC
    python scripts/bench_device.py --cpu --cells 4096 --keep 1024 --layers 8     # host memory

A model with random weights has the cache of an 8B model (32 layers of 8 KV heads of 128 values,
f16, flash attention) and 4 queries to a KV head, but small matrices, so it fits where an 8B model
would not. The cache is filled by restoring a synthetic state, and that and llama.cpp's own take
twice the cache in host memory (32768 cells: 8 GiB): on a smaller machine ask for fewer --cells or
--layers. --rpc starts a server on this machine, whose device is this machine's processor.

Prints Markdown on stdout: medians of packing in place, of scoring --new tokens by a learned policy
(random weights, --hidden units, --context) and all held ones by keydiff, and of a whole eviction by
the learned policy, one of many (scripts/bench_common.py); the bytes that crossed between cache and
host; the same through llama.cpp's state; and the floor, the bytes that must at least be read and
written (keys and values of the tokens scored once; twice the kept rows) at the speed at which the
device copies memory (bytes read and written both count). With --decode also the speed of writing
and of reading, evictions included, against a plain context with as many cells that never evicts,
both holding as many tokens as a bounded cache does in the middle between two evictions.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as bindings
from tqdm import tqdm

import kvp_edge
from bench_common import bounded, fill, ms, read_ms, rows_to_keep, synthetic_state, write_ms
from kvp_edge.binding import rules
from kvp_edge.binding.cache import NativeCache
from kvp_edge.cache.limits import CELL_UNIT
from kvp_edge.policy_file import PolicyInfo, write_policy
from makers.devices import RpcServer, placed, rpc_device
from makers.gguf_models import ModelShape, write_model
from makers.plain_llama import PlainLlama
from makers.policies import random_weights

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_COPIED = 2**29  # bytes: so many that starting a copy does not count
_WAYS = ("in place", "through the state")


class _InitParams(ctypes.Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


def ggml(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the ggml libraries that libllama was loaded with (ggml.h, ggml-backend.h)."""
    function = getattr(bindings._lib, name)
    function.restype, function.argtypes = result, arguments
    return function


class Device:
    """Where the model goes: the first GPU, an RPC server's device, or host memory."""

    def __init__(self, cpu: bool, rpc: bool) -> None:
        self.is_host, self._is_rpc = cpu, rpc
        if rpc:
            self.pointer = rpc_device(RpcServer().endpoint)
            return
        by_type = ggml("ggml_backend_dev_by_type", _POINTER, ctypes.c_int)
        # enum ggml_backend_dev_type: the processor is 0; a GPU of its own 1, an integrated one 2
        found = next(filter(None, map(by_type, [0] if cpu else [1, 2])), None)
        if found is None:
            raise SystemExit("llama.cpp sees no GPU here: use --rpc or --cpu")
        self.pointer = found

    @property
    def name(self) -> str:
        parts = ("ggml_backend_dev_name", "ggml_backend_dev_description")
        name, description = (
            ggml(part, ctypes.c_char_p, _POINTER)(self.pointer).decode() for part in parts
        )
        return name if description == name else f"{description} ({name})"

    def finish(self) -> None:
        """Wait until it has done all it was told. An RPC server does not answer to most messages;
        to the question how much memory it has, it does, in turn. Other devices are waited for."""
        if self._is_rpc:
            pointers = [ctypes.POINTER(_SIZE)] * 2
            memory = ggml("ggml_backend_dev_memory", None, _POINTER, *pointers)
            memory(self.pointer, _SIZE(), _SIZE())

    def copy_speed(self, repeat: int) -> float:
        """Bytes that it reads and writes in a millisecond while it copies."""
        if self.is_host:
            source = np.ones(_COPIED, np.uint8)
            target = source.copy()
            times = [ms(np.copyto, target, source) for _ in range(repeat)]
            return 2 * _COPIED / statistics.median(times)
        tensor = ggml("ggml_new_tensor_1d", _POINTER, _POINTER, ctypes.c_int, ctypes.c_int64)
        params = _InitParams(2**20, None, True)
        context = ggml("ggml_init", _POINTER, _InitParams)(params)
        # 0: enum ggml_type's f32
        source, target = (tensor(context, 0, _COPIED // 4) for _ in range(2))
        node = ggml("ggml_cpy", _POINTER, *[_POINTER] * 3)(context, source, target)
        graph = ggml("ggml_new_graph", _POINTER, _POINTER)(context)
        ggml("ggml_build_forward_expand", None, _POINTER, _POINTER)(graph, node)
        backend = ggml("ggml_backend_dev_init", _POINTER, _POINTER, _POINTER)(self.pointer, None)
        allocate = ggml("ggml_backend_alloc_ctx_tensors", _POINTER, _POINTER, _POINTER)
        buffer = allocate(context, backend)
        if not buffer:
            raise SystemExit(f"{self.name} has no {2 * _COPIED} bytes left to copy")
        ggml("ggml_backend_buffer_clear", None, _POINTER, ctypes.c_uint8)(buffer, 0)
        compute = ggml("ggml_backend_graph_compute", ctypes.c_int, _POINTER, _POINTER)

        def copy() -> None:
            compute(backend, graph)
            self.finish()

        copy()
        times = [ms(copy) for _ in range(repeat)]
        ggml("ggml_backend_buffer_free", None, _POINTER)(buffer)
        ggml("ggml_backend_free", None, _POINTER)(backend)
        ggml("ggml_free", None, _POINTER)(context)
        return 2 * _COPIED / statistics.median(times)


class Costs:
    """Milliseconds and bytes of one thing, done in both ways."""

    def __init__(self, name: str, floor_bytes: float) -> None:
        self.name, self.floor_bytes = name, floor_bytes
        self.times: dict[str, list[float]] = {way: [] for way in _WAYS}
        self.bytes_transferred: dict[str, int] = {}

    def measure(
        self, way: str, cache: NativeCache, device: Device, action: Callable[..., Any], *args: Any
    ) -> None:
        def action_done() -> None:
            action(*args)
            device.finish()

        before = cache.location.bytes_transferred
        self.times[way].append(ms(action_done))
        self.bytes_transferred[way] = cache.location.bytes_transferred - before

    def ms(self, way: str) -> float:
        """The first time is left out: then graphs are made, and weights go to the device."""
        return statistics.median(self.times[way][1:])

    def row(self, bytes_per_ms: float) -> str:
        floor = self.floor_bytes / bytes_per_ms
        times = [f"{self.ms(way):.2f} | {size(self.bytes_transferred[way])}" for way in _WAYS]
        return (
            f"| {self.name} | {floor:.2f} | {times[0]} | {self.ms(_WAYS[0]) / floor:.1f} "
            f"| {times[1]} |"
        )


def size(n: float) -> str:
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"


def evictions(
    llm: kvp_edge.Llama, device: Device, state: np.ndarray, new: int, repeat: int
) -> list[Costs]:
    """The costs of packing, of scoring `new` tokens and all of them, and of a whole eviction."""
    kv = llm.kv
    cache, shape, limits = kv.cache, kv.cache.shape, kv.limits
    cells, kept, per_cell = limits.cells, limits.budget, shape.bytes_per_cell
    learned = rules.Network(kv.policy.network, np.arange(cells - new, cells, dtype=np.int32))
    plan = rows_to_keep(llm)
    pack = Costs(f"packing {cells} rows to {kept}", 2 * kept * per_cell)
    some = Costs(f"scoring {new} tokens, learned", new * per_cell)
    every = Costs(f"scoring {cells} tokens, keydiff", cells * per_cell / 2)  # K is half of it
    whole = Costs(
        f"a whole eviction, {cells - kept} new tokens, learned", (cells + 2 * kept) * per_cell
    )
    for _ in tqdm(range(1 + repeat), desc="evictions", disable=None):
        for way in _WAYS:
            before = cache.location

            def refill(way: str = way) -> None:
                fill(llm, cells, 2 * cells, state)
                if way == _WAYS[1]:
                    cache.forget_cells()  # where they are not known, it goes through the state

            refill()
            some.measure(way, cache, device, cache.score, learned, cells - new, cells, new)
            every.measure(way, cache, device, cache.score, rules.KeyDiff(), 0, cells, cells)
            pack.measure(way, cache, device, cache.pack, *plan)
            refill()
            whole.measure(way, cache, device, kv.make_room, 1)
            after = cache.location
            there = after.packed_in_place - before.packed_in_place
            through = after.packed_as_state - before.packed_as_state
            assert (there, through) == ((2, 0) if way == _WAYS[0] else (0, 2)), "another way"
    return [pack, some, every, whole]


def speeds(
    llm: kvp_edge.Llama, plain: llama_cpp.Llama, whole: Costs, tokens: int, repeat: int
) -> list[str]:
    """Rows of a table: milliseconds per token, writing and reading, without evictions and with."""
    limits = llm.kv.limits
    held = (limits.cells + limits.budget) // 2
    batch = min(limits.n_batch, limits.cells - held)
    state = synthetic_state(llm.kv.cache.shape, held)
    fill(llm, held, 2 * limits.cells, state)
    source = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    if llama_cpp.llama_state_seq_set_data(plain.ctx, source, len(state), 0) == 0:
        raise SystemExit("llama.cpp did not take the state")
    plain.n_tokens = held
    both = {"never evicts": plain, "bounded, between evictions": llm}
    writing: dict[str, list[float]] = {name: [] for name in both}
    reading: dict[str, list[float]] = {name: [] for name in both}
    for _ in tqdm(range(1 + repeat), desc="speed", disable=None):
        for name, one in both.items():
            writing[name].append(write_ms(one, tokens))
            reading[name].append(read_ms(one, batch))
    found = {
        name: [statistics.median(times[name][1:]) for times in (writing, reading)] for name in both
    }
    plain_ms, bounded_ms = found.values()
    for way in _WAYS:
        share = whole.ms(way) / limits.reserve  # of a token
        found[f"bounded, evictions {way}"] = [t + share for t in bounded_ms]
    return [
        f"| {name} | {w:.3f} | {plain_ms[0] / w:.3f} | {r:.3f} | {plain_ms[1] / r:.3f} |"
        for name, (w, r) in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--rpc", action="store_true", help="start an RPC server and use its device")
    where.add_argument("--cpu", action="store_true", help="host memory")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--cells", type=int, default=32768)
    parser.add_argument("--keep", type=int, default=4096)
    parser.add_argument("--new", type=int, default=512, help="tokens scored by the learned policy")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--context", type=int, default=9)
    parser.add_argument("--decode", action="store_true", help="also the speed of the model")
    parser.add_argument("--tokens", type=int, default=16, help="written in a row for --decode")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.cells % CELL_UNIT:
        parser.error(f"--cells must be a multiple of {CELL_UNIT}, not {args.cells}")
    if not 0 < args.new <= args.cells:
        parser.error(f"--new must be 1 to {args.cells} tokens (--cells), not {args.new}")

    device = Device(args.cpu, args.rpc)
    shape = ModelShape(
        n_layer=args.layers,
        n_embd=128,
        n_head=4 * args.heads,
        n_head_kv=args.heads,
        head_dim=args.head_dim,
        n_ff=128,
        n_ctx_train=4 * args.cells,
        weight_type="f16",
    )
    info = PolicyInfo(
        shape.arch, args.layers, args.heads, *[args.head_dim] * 2, args.hidden, args.context
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_models:
        model, policy = (str(Path(folder) / name) for name in ("model.gguf", "policy.gguf"))
        write_model(model, shape)
        write_policy(policy, info, random_weights(info))
        with placed([] if device.is_host else [device.pointer]):
            llm = bounded(
                model,
                args.cells,
                args.keep,
                args.threads,
                n_ctx=4 * args.cells,
                policy=policy,
                pack="device",
                flash_attn=True,
            )
            open_models.callback(llm.close)
            assert llm.kv.cache.location.on_device != device.is_host
            state = synthetic_state(llm.kv.cache.shape, args.cells)
            speed = device.copy_speed(1 + args.repeat)
            costs = evictions(llm, device, state, args.new, args.repeat)
            held = len(state)
            del state
            print(
                f"{device.name}, llama.cpp {llama_cpp.llama_version().decode()}, "
                f"{datetime.date.today()}. {args.layers} layers of {args.heads} KV heads of "
                f"{args.head_dim} values, f16, flash attention: {size(held)} in {args.cells} "
                f"cells. It copies {speed / 1e6:.1f} GB/s, read and written.\n"
            )
            print("| | floor ms | in place ms | transferred | of the floor | through the state ms "
                  "| transferred |\n|---|---|---|---|---|---|---|")  # fmt: skip
            for cost in costs:
                print(cost.row(speed))
            if args.decode:
                sys.stdout.flush()
                plain = PlainLlama(
                    model,
                    n_ctx=args.cells,
                    n_batch=llm.kv.limits.n_batch,
                    flash_attn=True,
                    verbose=False,
                    n_threads=args.threads,
                    n_threads_batch=args.threads,
                )
                open_models.callback(plain.close)
                print("\n| | writing, ms per token | speed | reading, ms per token | speed |")
                print("|---|---|---|---|---|")
                print("\n".join(speeds(llm, plain, costs[-1], args.tokens, args.repeat)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
