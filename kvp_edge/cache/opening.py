"""From what was asked for to a bounded cache, while its model is loaded."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import llama_cpp

from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.fingerprint import model_fingerprint, model_identity
from kvp_edge.binding.model import ModelShape, read_model_shape
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.queries import QueryLog
from kvp_edge.binding.rope import KeyFrequencies, measure_frequencies
from kvp_edge.binding.structs import CacheLocation, CacheShape
from kvp_edge.cache.choosing_types import ChosenTypes, choose_types, types_of_policy
from kvp_edge.cache.kv_log import InMemory, KVLog, LogStore
from kvp_edge.cache.limits import CacheLimits, budget_bytes, memory_bytes
from kvp_edge.cache.log_file import LogFile
from kvp_edge.cache.manager import EvictionManager, SpanFinder
from kvp_edge.cache.options import CacheOptions
from kvp_edge.cache.recall import RecallSettings
from kvp_edge.cache.stats import Eviction
from kvp_edge.cache.table import Granularity
from kvp_edge.cache.types import PLAIN_TYPES, ggml_type
from kvp_edge.errors import BudgetError, PolicyFileError, UnsupportedModelError
from kvp_edge.policies import FALLBACK, Policy, get_policy
from kvp_edge.policy_file import check_model

#: Given a policy and the limits: of how many of the newest tokens queries are logged for it.
QueryCount = Callable[[Policy, CacheLimits], int]


def queries_needed(policy: Policy, limits: CacheLimits) -> int:
    """A QueryCount: what the policy needs."""
    return min(policy.n_queries, limits.cells)


class Opening:
    """What has been decided of one bounded cache so far. The steps, in their order:

    1. ``Opening(...)`` refuses what contradicts itself before the model is loaded, which may take
       long, and says how many ``cells`` there will be;
    2. ``adjust_context``, before the model is loaded;
    3. ``size_context``, when it is loaded and before its context is made: now ``limits`` are known;
    4. ``open``, when the context is there and empty.

    Args:
        options: with a ``kv_budget``.
        engine: arguments of llama_cpp.Llama.

    Attributes:
        cells: of the cache; more beside a sliding window.
        engine: arguments of llama_cpp.Llama that the cache's types need, in place of those given.
        limits: see ``size_context``.

    Raises:
        UnsupportedModelError: the model file cannot be read.
        PolicyError: there is no such policy.
        BudgetError: the numbers contradict each other.
        OptionError: the cache cannot have the types that ``kv_type`` names.
    """

    limits: CacheLimits

    def __init__(self, options: CacheOptions, model_path: str, engine: Mapping[str, Any]) -> None:
        self._options = options
        self._model_path = model_path
        self._policy = get_policy(options.policy, model_path)
        self._recalls = options.recall != "off"
        self._observed = options.pack != "state" or self._policy.n_queries > 0 or self._recalls
        self._observer: Observer | None = None
        self._granularity = options.granularity  # "auto" until it is settled
        self._n_ubatch = engine.get("n_ubatch", 512)
        if engine.get("embedding"):
            raise BudgetError(
                "embedding=True needs one sequence per text, but a bounded cache has only "
                "one: leave out kv_budget"
            )
        shape = read_model_shape(model_path)
        self._architecture = shape.architecture
        told = engine.get("kv_overrides") or {}
        trained = int(told.get(f"{shape.architecture}.context_length", shape.n_ctx_train))
        self._n_ctx = options.n_ctx or trained
        chosen = self._choose_types(engine, shape)
        try:
            self._count_cells(chosen, shape, trained)
        except BudgetError as error:
            if not chosen.by_itself:
                raise
            chosen = chosen.plain(f"then {error}")  # of the larger cells there are fewer
            self._count_cells(chosen, shape, trained)
        self.engine = chosen.engine
        if chosen.instead_of:
            warnings.warn(chosen.instead_of, stacklevel=2)

    def _choose_types(self, engine: Mapping[str, Any], shape: ModelShape) -> ChosenTypes:
        budget, asks = self._options.kv_budget, ""
        memory = budget_bytes(budget) if isinstance(budget, str) else None
        if memory is not None and self._options.kv_type == "auto":
            asks = types_of_policy(self._policy.info, self._model_path, self._architecture)
        return choose_types(
            self._options,
            engine,
            shape,
            budget_bytes=memory,
            n_ctx=self._n_ctx,
            of_policy=asks,
        )

    def _count_cells(self, chosen: ChosenTypes, shape: ModelShape, trained: int) -> None:
        """
        Raises:
            BudgetError: the numbers contradict each other.
        """
        types = chosen.types
        self._bytes_per_cell = shape.bytes_per_cell(types.keys, types.values)
        try:
            self.cells = self._plan().cells
        except BudgetError:
            if self._options.granularity == "head":  # name what the file's window needs, too
                self._plan(shape.sliding_window)
            raise
        if self._options.positions == "compact" and self.cells > trained:
            raise BudgetError(
                f"positions='compact' allows at most {trained} cells (the trained length), "
                f"not {self.cells}: lower kv_budget or reserve"
            )

    def _plan(self, window: int = 0) -> CacheLimits:
        o = self._options
        assert o.kv_budget is not None
        return CacheLimits.plan(
            n_ctx=self._n_ctx,
            kv_budget=o.kv_budget,
            sinks=o.sinks,
            recent=o.recent,
            reserve=o.reserve,
            n_batch=o.n_batch,
            bytes_per_cell=self._bytes_per_cell,
            window=window,
        )

    def adjust_context(self, params: Any) -> None:
        """Let a second sequence tag cells of the one cache (native/kvp_edge.h), which changes
        nothing for the first, and let those look on who must."""
        params.n_seq_max = 2
        params.kv_unified = True
        if self._observed:
            self._observer = Observer(params)

    def size_context(self, params: Any, window: int) -> int:
        """Decide how many cells the context gets.

        Args:
            params: llama_context_params of the context that is made next.
            window: tokens that its layers with a sliding window see; 0: it has none.

        Returns:
            The largest batch of the context; what is read at once is never more than
            ``limits.n_batch``.

        Raises:
            BudgetError: what was asked for has no room for the window.
        """
        if self._granularity == "token":
            window = 0  # whose tokens go, too
        try:
            self.limits = self._plan(window)
        except BudgetError:
            if self._granularity != "auto":
                raise
            self.limits, self._granularity = self._plan(), "token"
        # llama.cpp aborts when its micro-batch is smaller than the number of sequences, here 2
        n_batch = max(2, self.limits.n_batch)
        params.n_ctx, params.n_batch = self.limits.cells, n_batch
        params.n_ubatch = max(2, min(n_batch, self._n_ubatch))
        return n_batch

    def open(
        self,
        context: Any,
        params: Any,
        find_spans: SpanFinder,
        on_evict: Callable[[Eviction], None] | None,
        query_count: QueryCount,
        closing: contextlib.ExitStack,
    ) -> EvictionManager:
        """The manager of a context's cache.

        Args:
            context: llama_context pointer; its cache is empty, now and afterwards.
            params: it was made with.
            closing: is told what to do before the context is freed.

        Raises:
            UnsupportedModelError: the cache cannot be bounded, or not in the way asked for.
            PolicyFileError: the policy is another model's.
        """
        in_place = self._options.pack != "state"
        cache = NativeCache(context, self._observer if in_place else None)
        closing.callback(cache.close)
        policy, log = self._fitting_policy(cache.shape), None
        granularity = self._settle_granularity(cache)
        self._check_location(cache.location, granularity)
        compact_at, frequencies = self._plan_compaction(context, params, cache, granularity)
        if policy.n_queries and self._observer is not None:
            log = QueryLog(self._observer)
            if policy.needs_frequencies:
                log.frequencies = frequencies or _frequencies_for(policy, context, params)
            n = query_count(policy, self.limits)
            if self._recalls:
                n = max(n, RecallSettings().n_queries)
            log.start(context, cache, n)
        kv_log = None
        if self._recalls and self.limits.cells < self.limits.n_ctx:  # else nothing is ever dropped
            if log is None:
                log = self._queries_for_recall(context, cache)
            kv_log = None if log is None else self._open_log(cache, closing)
        return EvictionManager(
            self.limits,
            policy,
            cache,
            find_spans,
            on_evict,
            granularity=granularity,
            isolate_turns=self._options.isolate_turns,
            compact_at=compact_at,
            frequencies=frequencies,
            query_log=log,
            log=kv_log,
            n_threads=int(llama_cpp.llama_n_threads_batch(context)),
        )

    def _open_log(self, cache: NativeCache, closing: contextlib.ExitStack) -> KVLog:
        """The log of what is dropped.

        Raises:
            UnsupportedModelError: heads are no whole blocks of the log's type.
            OptionError: its file cannot be used.
        """
        o = self._options
        layout = cache.log_layout(None if o.kv_log_type == "cache" else ggml_type(o.kv_log_type))
        store: LogStore = InMemory(layout)
        if o.kv_log is not None:
            store = file = LogFile(o.kv_log, layout, {"model": os.path.basename(self._model_path)})
            closing.callback(file.close)
        return KVLog(layout, store, memory_bytes("kv_log_limit", o.kv_log_limit))

    def _queries_for_recall(self, context: Any, cache: NativeCache) -> QueryLog | None:
        """The log of the queries that recall asks; None where they cannot be had and nobody has
        asked for recall."""
        assert self._observer is not None
        log = QueryLog(self._observer)
        try:
            log.start(context, cache, RecallSettings().n_queries, "Use recall='off'")
        except UnsupportedModelError:
            if self._options.recall != "auto":
                raise
            return None
        log.watch(False)
        return log

    def _fitting_policy(self, shape: CacheShape) -> Policy:
        """The policy, or the fallback where one that nobody named does not fit: how many layers are
        in the base cache of a model with sliding windows is known only now.

        Raises:
            PolicyFileError: one that was named does not fit.
        """
        try:
            check_policy(self._policy, shape, self._architecture, self._model_path)
        except PolicyFileError as error:
            if self._options.policy != "auto":
                raise
            warnings.warn(f"policy skipped: {error}", stacklevel=2)
            return get_policy(FALLBACK)
        return self._policy

    def _settle_granularity(self, cache: NativeCache) -> Granularity:
        if self._granularity == "token":
            return "token"
        try:
            cache.check_packing()
        except UnsupportedModelError:
            if self._granularity == "auto":
                return "token"
            raise
        return "head"

    def _check_location(self, location: CacheLocation, granularity: Granularity) -> None:
        if self._options.pack != "device" or location.packs(granularity):
            return
        reason = location.where
        if location.known:
            reason = (
                "the head size in bytes is not a multiple of 4 with this cache type on "
                f"{location.where}"
            )
        raise UnsupportedModelError(
            f"pack='device' is not possible here: {reason}. Use pack='auto' or pack='state'"
        )

    def _plan_compaction(
        self, context: Any, params: Any, cache: NativeCache, granularity: Granularity
    ) -> tuple[int | None, KeyFrequencies | None]:
        """Where positions end, and RoPE's frequencies; None: they are not compacted."""
        if self._options.positions == "keep":
            return None, None
        if granularity == "head" and cache.shape.has_window:
            raise UnsupportedModelError(
                "positions='compact' is not possible at head granularity with a model that has "
                "sliding-window layers. Use granularity='token' or positions='keep'"
            )
        # llama.cpp's shift reads a null pointer when keys are quantised but not Hadamard-rotated
        # (build_rope_shift in src/llama-kv-cache.cpp), and shifts whole quantised heads only.
        if granularity == "token" and cache.shape.type_k not in PLAIN_TYPES:
            raise UnsupportedModelError(
                "positions='compact' at token granularity needs keys that are not quantised. Use "
                "granularity='head', an f16 type_k, or positions='keep'"
            )
        model = llama_cpp.llama_get_model(context)
        frequencies = measure_frequencies(model, params, own_shift=granularity == "token")
        return int(llama_cpp.llama_model_n_ctx_train(model)), frequencies


def check_policy(policy: Policy, shape: CacheShape, architecture: str, model_path: str) -> None:
    """That a policy was made for this model, if for any.

    Raises:
        PolicyFileError: for another one.
    """
    if policy.info is not None:
        fingerprint = model_fingerprint(model_path)
        is_its_file = policy.info.fingerprint == fingerprint
        check_model(
            policy.info,
            architecture=architecture,
            n_layer=shape.n_layer,
            n_head_kv=shape.n_head_kv,
            head_size_k=shape.head_size_k,
            head_size_v=shape.head_size_v,
            fingerprint=fingerprint,
            model_identity="" if is_its_file else model_identity(model_path),
        )


def _frequencies_for(policy: Policy, context: Any, params: Any) -> KeyFrequencies:
    model = llama_cpp.llama_get_model(context)
    try:
        return measure_frequencies(model, params, own_shift=False)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"policy '{policy.name}' must remove RoPE from queries, which is not possible "
            f"with this model ({error}). Choose another policy"
        ) from error
