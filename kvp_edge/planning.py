"""What fits into so much memory: for every type of a cache the most cells beside the weights.

llama.cpp says what it takes (kvp_edge.llamacpp.dry_model); that it does take as much is tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvp_edge.binding.model import read_model_shape
from kvp_edge.cache.choosing_types import (
    asked_types,
    choose_types,
    full_bytes,
    obstacle,
    on_device,
    types_of_policy,
)
from kvp_edge.cache.limits import CELL_UNIT, CacheLimits, memory_bytes, round_up
from kvp_edge.cache.options import CacheOptions
from kvp_edge.cache.type_table import shipped_table
from kvp_edge.cache.types import KVTypes, bytes_of
from kvp_edge.errors import BudgetError
from kvp_edge.llama import Llama
from kvp_edge.llamacpp.dry_model import DryModel
from kvp_edge.llamacpp.log import Footprint, listen
from kvp_edge.policies import Policy, get_policy
from kvp_edge.processor.repack import use_extra_buffers

#: Compared in a plan, if the model can have them; types that the table chooses are, too.
COMPARED = ("f16", "q8_0/f16", "q4_0/f16", "q8_0", "q8_0/q4_0", "q5_1", "q5_0", "q4_1", "q4_0")

#: llama_cpp's default.
_N_UBATCH = 512


@dataclass(frozen=True)
class Fit:
    """The largest cache of some types that fits.

    Attributes:
        limits: its numbers.
        footprint: of the model with this cache.
        bytes_per_cell: of these types.
        log: bytes of the KV log in memory once the length planned for is read.
        lost: tokens of that length that the log has no room for.
    """

    types: KVTypes
    limits: CacheLimits
    footprint: Footprint
    bytes_per_cell: int
    log: int
    lost: int

    @property
    def total(self) -> int:
        return self.footprint.total + self.log

    @property
    def budget(self) -> str:
        """The ``kv_budget`` that makes these cells and no more."""
        n = self.limits.cells * self.bytes_per_cell
        mib = f"{n / 2**20:.2f}MiB"
        return mib if memory_bytes("kv_budget", mib) >= n else f"{n / 2**20 + 0.01:.2f}MiB"

    @property
    def compute_weighs(self) -> bool:
        """Whether the compute buffers take a quarter of what the cells do, or more."""
        return 4 * self.footprint.compute >= self.footprint.cells

    def kept(self, length: int) -> int:
        """Tokens of a text of this length that are in the cells when it is read."""
        return length if length <= self.limits.cells else self.limits.budget

    def share(self, full: int) -> float:
        """Of the bytes of a full f16 cache, as ``kv_type="auto"`` counts."""
        return self.limits.cells * self.bytes_per_cell / full if full else 1.0


@dataclass(frozen=True)
class Missing:
    """No cache of these types is possible, or none fits.

    Attributes:
        why: it is not possible; "": it needs memory.
        needs: bytes of everything with the smallest cache.
    """

    types: KVTypes
    why: str = ""
    needs: int = 0


class Planner:
    """
    Args:
        path: model file.
        options: of the cache; ``kv_budget`` does not count, ``n_ctx`` is given.
        engine: arguments of llama_cpp.Llama.
        length: tokens to plan for, at most n_ctx.

    Attributes:
        weights: bytes, as llama.cpp reports them. Of a model that is larger than ``memory`` or this
            machine's: as its file says.
        full: bytes of an f16 cache of ``n_ctx`` tokens.
        named: types that the options or the engine name; None: they leave the choice.

    Raises:
        UnsupportedModelError: the file cannot be read, or the model's cache cannot be bounded.
    """

    def __init__(
        self,
        path: str,
        options: CacheOptions,
        engine: Mapping[str, Any],
        *,
        length: int,
        memory: int,
    ) -> None:
        assert options.n_ctx is not None
        self.memory, self.length = memory, length
        self._path, self._options = path, options
        self._engine = {name: engine[name] for name in engine if name != "repack"}
        self._n_ctx = options.n_ctx
        with listen(pass_on=False):
            self._shape = read_model_shape(path)
        self._dry = self._dry_model()
        try:
            self._weigh()
        except BaseException:
            self.close()
            raise

    def _dry_model(self) -> DryModel:
        layers = self._engine.get("n_gpu_layers", 0)
        repacks = use_extra_buffers(self._options.repack, self._path, n_gpu_layers=layers)
        return DryModel(self._path, n_gpu_layers=layers, repacks=repacks)

    def _weigh(self) -> None:
        options, path = self._options, self._path
        self.weights = self._dry.weights
        self._window = self._dry.window if options.granularity != "token" else 0
        self._n_heads = sum(self._shape.n_head_kv)
        self._recalls = options.recall != "off"
        self.named = asked_types(options, self._engine)
        self.loaded = self.weights <= min(self.memory, _machine_memory())
        policy = self._load() if self.loaded else get_policy(options.policy, path)
        self.full = full_bytes(self._shape, self._n_ctx)
        self._of_policy = types_of_policy(policy.info, path, self._shape.architecture)

    def close(self) -> None:
        self._dry.close()

    def _load(self) -> Policy:
        """Load the model with a small cache, which shows whether that can be bounded.

        Returns:
            The policy it gets.
        """
        o = self._options
        least = o.sinks + (o.recent or 16) + 1
        small = replace(o, kv_budget=max(least, 64), kv_type="auto", kv_log=None)
        engine = {**self._engine, "verbose": False}
        llm = Llama(self._path, **small.asked(), **engine)
        try:
            self.weights = llm.reported.weights
            kv = llm.kv
            assert kv is not None
            self._n_heads = kv.cache.shape.n_layer * kv.cache.shape.n_head_kv
            if kv.granularity == "token":
                self._window = 0
            if kv.log is None and kv.limits.cells < kv.limits.n_ctx:
                self._recalls = False  # recall="auto" is off for this model
            return kv.policy
        finally:
            llm.close()

    def types(self) -> list[KVTypes]:
        """Those to compare, the largest first."""
        choices = shipped_table().choices(on_device=on_device(self._engine))
        some = [*COMPARED, *(one.types for one in choices), self._of_policy]
        every = {KVTypes.parse("types", one) for one in some if one}
        every |= {self.named} if self.named is not None else set()
        return sorted(every, key=lambda t: (-self._bytes_per_head(t), str(t)))

    def _bytes_per_head(self, types: KVTypes) -> float:
        sizes = self._shape.head_size_k, self._shape.head_size_v
        whole = [bytes_of(kind, n * 32) or 0 for kind, n in zip(_pair(types), sizes, strict=True)]
        return sum(whole) / 32

    def chosen(self, fits: list[Fit]) -> Fit | None:
        """The one that ``Llama`` would take for its budget by itself; None: there is none."""
        for fit in fits:
            chosen = choose_types(
                self._options,
                self._engine,
                self._shape,
                budget_bytes=memory_bytes("kv_budget", fit.budget),
                n_ctx=self._n_ctx,
                of_policy=self._of_policy,
            )
            if chosen.types == fit.types:
                return fit
        return None

    def fit(self, types: KVTypes) -> Fit | Missing:
        """The most cells of these types that fit beside everything else."""
        why = obstacle(types, self._options, self._engine, self._shape)
        if why:
            return Missing(types, why)
        per_cell = self._shape.bytes_per_cell(*_pair(types))
        most = round_up(self._n_ctx) // CELL_UNIT
        if self._options.positions == "compact":
            most = min(most, self._shape.n_ctx_train // CELL_UNIT)

        def of(units: int) -> Fit | None:
            return self._with_cells(types, units * CELL_UNIT, per_cell)

        least = _first(1, most, lambda units: of(units) is not None)
        if least is None:
            raise BudgetError(self._why_not(types, most * CELL_UNIT, per_cell))
        # where everything is kept there is no log, so that may fit though fewer cells do not
        whole = max(least, round_up(self.length) // CELL_UNIT)
        if whole <= most and self._fits(of(whole)):
            best = _last(whole, most, lambda units: self._fits(of(units)))
        else:
            best = _last(least, min(whole, most), lambda units: self._fits(of(units)))
        found = of(best) if best is not None else None
        if found is not None:
            return found
        smallest = of(least)
        assert smallest is not None
        return Missing(types, needs=smallest.total)

    def _fits(self, fit: Fit | None) -> bool:
        return fit is not None and fit.total <= self.memory

    def _limits(self, cells: int, per_cell: int) -> CacheLimits:
        o = self._options
        return CacheLimits.plan(
            n_ctx=self._n_ctx,
            kv_budget=f"{cells * per_cell / 2**10!r}KiB",
            sinks=o.sinks,
            recent=o.recent,
            reserve=o.reserve,
            n_batch=o.n_batch,
            bytes_per_cell=per_cell,
            window=self._window,
        )

    def _why_not(self, types: KVTypes, cells: int, per_cell: int) -> str:
        try:
            self._limits(cells, per_cell)
        except BudgetError as error:
            return str(error)
        return f"a cache of {types} is not possible with so small a context"

    def _with_cells(self, types: KVTypes, cells: int, per_cell: int) -> Fit | None:
        """None: too few cells for what is never dropped."""
        try:
            limits = self._limits(cells, per_cell)
        except BudgetError:
            return None
        flash = types.quantised_values or bool(self._engine.get("flash_attn"))
        n_batch = max(2, limits.n_batch)  # as in Opening.size_context
        footprint = self._dry.footprint(
            n_ctx=limits.cells,
            n_batch=n_batch,
            n_ubatch=max(2, min(n_batch, self._engine.get("n_ubatch", _N_UBATCH))),
            n_seq_max=2,
            kv_unified=True,
            type_k=types.keys,
            type_v=types.values,
            flash_attn_type=int(flash),
        )
        log, lost = self._log(types, limits)
        footprint = replace(footprint, weights=self.weights)
        return Fit(types, limits, footprint, per_cell, log, lost)

    def _log(self, types: KVTypes, limits: CacheLimits) -> tuple[int, int]:
        """Bytes of the KV log in memory, and how many tokens it has no room for."""
        o = self._options
        if not self._recalls or self.length <= limits.cells:
            return 0, 0
        if o.kv_log_type != "cache":
            types = KVTypes.parse("kv_log_type", o.kv_log_type)
        per_token = round(self._n_heads * self._bytes_per_head(types))
        most = memory_bytes("kv_log_limit", o.kv_log_limit)
        logged = min(self.length, most // per_token)
        return (0 if o.kv_log else logged * per_token), self.length - logged


def _pair(types: KVTypes) -> tuple[int, int]:
    return types.keys, types.values


def _first(low: int, high: int, true: Callable[[int], bool]) -> int | None:
    """The first number in [low, high] from which on it is true; None: it never is."""
    if low > high or not true(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if true(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _last(low: int, high: int, true: Callable[[int], bool]) -> int | None:
    """The last number in [low, high] up to which it is true; None: it never is."""
    if low > high or not true(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if true(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _machine_memory() -> int:
    """Bytes of this machine's memory; where they are not known, more than any model has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 2**63
