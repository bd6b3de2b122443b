"""``Llama``: llama_cpp's class with a cache of fixed size that a policy keeps useful."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import threading
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format
from llama_cpp.llama_tokenizer import LlamaTokenizer

from kvp_edge.arguments import (
    check_adapter_file,
    check_cache_types,
    check_callable,
    check_counts,
    check_threads,
)
from kvp_edge.arrays import FloatArray, TokenIndices
from kvp_edge.binding.cache import NativeCache
from kvp_edge.binding.fingerprint import model_fingerprint
from kvp_edge.binding.library import BUILT_FOR
from kvp_edge.binding.model import read_model_shape, require_model_file
from kvp_edge.binding.observer import Observer
from kvp_edge.binding.queries import QueryLog
from kvp_edge.binding.rope import KeyFrequencies, measure_frequencies
from kvp_edge.binding.structs import CacheLocation
from kvp_edge.cache import session_file as session
from kvp_edge.cache.limits import DEFAULT_SINKS, CacheLimits
from kvp_edge.cache.manager import EvictionManager
from kvp_edge.cache.saved_state import SavedState
from kvp_edge.cache.stats import Eviction, KVStats
from kvp_edge.cache.table import Granularity, Table
from kvp_edge.errors import (
    BudgetError,
    ContextLengthError,
    KVCacheError,
    PolicyFileError,
    SessionError,
    UnsupportedModelError,
)
from kvp_edge.llamacpp.abort_hook import before_abort
from kvp_edge.llamacpp.log import LlamaLog, listen
from kvp_edge.one_call import Calls, Closed
from kvp_edge.policies import FALLBACK, Policy, get_policy
from kvp_edge.policy_file import check_model
from kvp_edge.processor.repack import REPACK, use_extra_buffers
from kvp_edge.text import transcript
from kvp_edge.text.chat_head import Head
from kvp_edge.text.chat_markers import template_markers
from kvp_edge.text.growing_chat import remember_messages
from kvp_edge.text.pieces import token_text
from kvp_edge.text.retokenize import begin_as_known
from kvp_edge.text.spans import KEEP_WHOLE, LOOK_BACK, Span, find_spans
from kvp_edge.text.token_memory import WORTH_BYTES, PromptTokens, TokenMemory, marks

_GGML_TYPE_F16 = 1
#: Bytes of a session besides its tokens, keys and values.
_SESSION_OVERHEAD = 2**24
_PLAIN_TYPES = (0, 1, 30)  # f32, f16, bf16: enum ggml_type in ggml.h


@dataclass(frozen=True)
class _Bound:
    """What the caller asked for, kept for pickling."""

    kv_budget: int | str | None
    policy: str | Policy
    granularity: str
    positions: str
    keep_whole: str
    isolate_turns: bool
    sinks: int
    recent: int | None
    reserve: int | None
    protect_system: bool
    on_evict: Callable[[Eviction], None] | None
    pack: str
    repack: str


_GENERATE = inspect.signature(llama_cpp.Llama.generate)

#: What is kept of llama.cpp's objects, "_model" under another name.
_FREED = ("_loaded", "_ctx", "_batch", "tokenizer_")

#: The base class sends stdout, stderr and the level of its logger somewhere else for the process
#: while a model is loaded, and back. Two at once would not find the way back.
_loading = threading.RLock()


class Llama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is untyped
    """A llama_cpp.Llama whose KV cache never holds more than a fixed number of cells.

    Without ``kv_budget`` it is llama_cpp.Llama. With it, ``n_ctx`` is the LOGICAL context, the
    longest conversation, and the number of cells follows from ``kv_budget`` and ``reserve``: when
    the cells are full, the policy decides which tokens to drop. All arguments of llama_cpp.Llama
    are accepted and mean what they mean there.

    One object serves one call at a time; many objects may live in many threads. A call that comes
    while another one is at work is refused (InUseError), whatever thread it comes from, and so is
    one from a function that the other one calls (on_evict, a stopping criterion). What only tells
    (kv_stats, kv_indices, tokenize, n_ctx) can be called at any time, from anywhere; saving, at
    any time by the same thread. A stream is one call for each of its pieces: in between the model
    may be used, and once something else was read, the stream cannot go on. A stream may be
    forgotten at any time. After ``close`` every call is refused (RuntimeError).

    Args:
        model_path: GGUF file.
        n_ctx: logical context in tokens; 0, or None with ``kv_budget``: what the model was trained
            for. With ``positions="keep"`` a conversation beyond the trained length leaves what the
            model has learned, however small the cache.
        kv_budget: tokens kept after an eviction (int), or the memory of the cache ("256MiB").
        policy: a name in kvp_edge.policies.POLICIES, a policy file (.gguf), a Policy object, or
            "auto": the policy trained for this model if it lies beside it (kvp-*.gguf) or comes
            with the package, else "keydiff".
        granularity: "head": every (layer, KV head) keeps its own tokens. "token": a token is
            dropped from every layer and head at once. "auto": "head" where the model, the cache's
            types and a budget in memory allow it, else "token".
        positions: "keep": every token keeps its position for life. "compact": when positions would
            pass what the model was trained for, the tokens held are moved to the front, so that a
            conversation can go on for ever.
        keep_whole: what stays or goes as a whole, besides the markers of the chat template:
            "tokens" (nothing), "words" or "sentences" (kvp_edge.text.spans).
        isolate_turns: what was kept of a finished message is not thinned out again for new ones, as
            long as these find a quarter of the room (kvp_edge.cache.turns). A text without the
            markers of the chat template is one message.
        sinks: first tokens that are never dropped.
        recent: newest tokens that are never dropped; None: a quarter of the budget, at most 256.
        reserve: free cells after an eviction; None: a quarter of the budget, but at least 256 and
            n_batch; where the budget is memory, a fifth of the cells. More where a model's sliding
            window needs cells (kvp_edge.cache.limits).
        protect_system: never drop the system prompt of create_chat_completion, nor the definitions
            of tools that the chat template shows before the first message, if these fit as well.
        pack: "device": the cache is scored and packed where it lies, in host memory or on a device
            (CUDA, Metal, ...), where only cell numbers and scores cross to the host. "state": it
            goes through llama.cpp's state, out and back in. "auto": "device" where possible.
        on_evict: called with an Eviction after each eviction.
        repack: "on": weights on the CPU are laid out anew for this processor, as llama.cpp does by
            default; "off": they are not. "auto": "on" if that has been tried on this machine, in a
            child process, and works (kvp_edge.processor.repack).
        n_batch: most tokens decoded at once; None: 512, or what fits into the reserve and beside a
            sliding window.

    Raises:
        UnsupportedModelError: missing, truncated or foreign file, or a model whose cache cannot be
            bounded (recurrent, hybrid, encoder, M-RoPE...), or not in the way asked for; the
            message says what to ask for instead. It is a ValueError.
        BudgetError: numbers that contradict each other. It is a ValueError.
    """

    _kv: EvictionManager | None = None
    _query_log: QueryLog | None = None  # for a policy that looks at queries
    _observed = False  # whether somebody looks at what the context computes
    _observer: Observer | None = None
    _plan: Callable[..., CacheLimits] | None = None  # what was asked for; takes the window
    _limits: CacheLimits | None = None  # what came of it
    _query_shift = 0  # the table's when the logged queries were computed
    _rescue: tuple[Callable[[], str], Callable[[], Any] | None] | None = None  # where, what besides
    _stop_rescue: Callable[[], None] | None = None
    _head: Head | None = None  # of the chat that is completed just now
    _completing = False  # so a state that is loaded comes from a prompt cache
    _decoding = False  # a batch that the table may not have yet
    _own_handlers: Sequence[Any] = ()  # those of llama_cpp's that render the file's templates
    _lends_to: int | None = None  # the thread that gets the token memory's own list next
    _token_memory: TokenMemory | None = None
    _fell_back = False  # neither the model file nor the caller has a chat template

    # set by the base class
    n_tokens: int
    n_batch: int
    _requires_eval: bool
    lora_path: str | None
    _lora_adapter: Any
    _logits_all: bool
    _seed: int
    scores: FloatArray

    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int | None = None,
        kv_budget: int | str | None = None,
        policy: str | Policy = "auto",
        granularity: str = "head",
        positions: str = "keep",
        keep_whole: str = "tokens",
        isolate_turns: bool = False,
        sinks: int = DEFAULT_SINKS,
        recent: int | None = None,
        reserve: int | None = None,
        protect_system: bool = False,
        on_evict: Callable[[Eviction], None] | None = None,
        pack: str = "auto",
        repack: str = "auto",
        n_batch: int | None = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # the base class closes it even if loading fails early
        self._calls = Calls()
        self._bound = _Bound(
            kv_budget,
            policy,
            granularity,
            positions,
            keep_whole,
            isolate_turns,
            sinks,
            recent,
            reserve,
            protect_system,
            on_evict,
            pack,
            repack,
        )
        if granularity not in ("head", "token", "auto"):
            raise ValueError(f"granularity must be 'head', 'token' or 'auto', not '{granularity}'")
        if positions not in ("keep", "compact"):
            raise ValueError(f"positions must be 'keep' or 'compact', not '{positions}'")
        if keep_whole not in KEEP_WHOLE:
            raise ValueError(
                f"keep_whole must be 'tokens', 'words' or 'sentences', not '{keep_whole}'"
            )
        if pack not in ("auto", "device", "state"):
            raise ValueError(f"pack must be 'auto', 'device' or 'state', not '{pack}'")
        if repack not in REPACK:
            raise ValueError(f"repack must be 'auto', 'on' or 'off', not '{repack}'")
        self._granularity = granularity  # "auto" until it is settled
        # a budget may be memory, "256MiB", too
        tokens = {} if isinstance(kv_budget, str) else {"kv_budget": kv_budget}
        check_counts(
            n_ctx=n_ctx, sinks=sinks, recent=recent, reserve=reserve, n_batch=n_batch, **tokens
        )
        check_threads(**{n: kwargs.get(n) for n in ("n_threads", "n_threads_batch")})
        check_cache_types(**{n: kwargs.get(n) for n in ("type_k", "type_v")})
        check_callable(on_evict=on_evict)
        check_adapter_file(kwargs.get("lora_path"))
        model_path = os.fspath(model_path)
        if not os.path.exists(model_path):
            raise UnsupportedModelError(f"there is no model file '{model_path}'")
        require_model_file(model_path)

        with listen(pass_on=verbose):
            chosen = get_policy(policy, model_path if kv_budget is not None else None)
        self._observed = kv_budget is not None and (pack != "state" or chosen.n_queries > 0)
        self._n_ubatch = kwargs.get("n_ubatch", 512)
        cells, batch = 512 if n_ctx is None else n_ctx, 512 if n_batch is None else n_batch
        if kv_budget is not None:
            if kwargs.get("embedding"):
                raise BudgetError(
                    "embedding=True needs a sequence for every text, and a bounded cache has one: "
                    "leave kv_budget out"
                )
            with listen(pass_on=verbose):
                shape = read_model_shape(model_path)
            told = kwargs.get("kv_overrides") or {}
            n_ctx_train = int(told.get(f"{shape.architecture}.context_length", shape.n_ctx_train))
            self._plan = partial(
                CacheLimits.plan,
                n_ctx=n_ctx or n_ctx_train,
                kv_budget=kv_budget,
                sinks=sinks,
                recent=recent,
                reserve=reserve,
                n_batch=n_batch,
                bytes_per_cell=shape.bytes_per_cell(
                    _or_f16(kwargs.get("type_k")), _or_f16(kwargs.get("type_v"))
                ),
            )
            # What contradicts itself is refused before the model is loaded, which may take long.
            try:
                cells = self._plan().cells  # more for a window: _size_context
            except BudgetError:
                if granularity == "head":  # name what a window that the file tells of needs as well
                    self._plan(window=shape.sliding_window)
                raise
            if positions == "compact" and cells > n_ctx_train:
                raise BudgetError(
                    f"positions='compact' keeps positions below the {n_ctx_train} tokens "
                    f"that the model was trained for, and {cells} cells are more: lower kv_budget "
                    "or reserve"
                )

        with listen(pass_on=verbose):
            self._repacks = use_extra_buffers(
                repack,
                model_path,
                n_gpu_layers=kwargs.get("n_gpu_layers", 0),
                vocab_only=kwargs.get("vocab_only", False),
            )
        # Quiet, llama_cpp would still print llama.cpp's warning that the cells are fewer than the
        # trained context, which is the point here; errors become the exception's message.
        with _loading, listen(pass_on=verbose) as log:
            try:
                super().__init__(model_path, n_ctx=cells, n_batch=batch, verbose=verbose, **kwargs)
            except BudgetError:
                self.close()
                raise
            except ValueError as error:
                reason = log.first_error()
                if reason is None:
                    raise
                raise UnsupportedModelError(f"'{model_path}' cannot be loaded: {reason}") from error
            self._kv_bytes = _kv_bytes(log)
        self._require_adapter(log)
        asked = kwargs.get("chat_format") or kwargs.get("chat_handler")
        self._fell_back = not asked and "tokenizer.chat_template" not in self.metadata
        if self._limits is not None:
            self._bind(self._limits, chosen, shape.architecture)

    # The base class makes the context from what it says in context_params and n_batch right after
    # it has stored the model, and only then it is known what llama.cpp makes of sliding windows: it
    # ignores some that a file names (phi3), and knows some that no file does (llama4).
    @property
    def _model(self) -> Any:
        return self._loaded

    @_model.setter
    def _model(self, model: Any) -> None:
        self._loaded = model
        self._size_context(int(llama_cpp.llama_model_n_swa(model.model)))

    def _size_context(self, window: int) -> None:
        """Decide how many cells the context gets, now that the model is loaded.

        Args:
            window: tokens that its layers with a sliding window see; 0: it has none.

        Raises:
            BudgetError: what was asked for has no room for the window.
        """
        if self._plan is None:
            return
        if self._granularity == "token":
            window = 0  # whose tokens go, too
        try:
            limits = self._plan(window=window)
        except BudgetError:
            if self._granularity != "auto":
                raise
            limits, self._granularity = self._plan(), "token"
        self._limits = limits
        # llama.cpp aborts when its micro-batch is smaller than the number of sequences, here 2 (see
        # context_params); eval() still reads no more than limits.n_batch at once.
        self.n_batch = max(2, limits.n_batch)
        params = self.context_params
        params.n_ctx, params.n_batch = limits.cells, self.n_batch
        params.n_ubatch = max(2, min(self.n_batch, self._n_ubatch))

    # The base class makes its parameters from llama.cpp's defaults and offers no way to change
    # these, so they are set the moment it stores them.
    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.use_extra_bufts = self._repacks
        self._model_params = params

    # The two that are set here let a second sequence tag cells of the one cache
    # (native/kvp_edge.h), and change nothing for the first.
    @property
    def context_params(self) -> Any:
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        if self._bound.kv_budget is not None:
            params.n_seq_max = 2
            params.kv_unified = True
        if self._observed:
            self._observer = Observer(params)
        self._context_params = params

    def _bind(self, limits: CacheLimits, policy: Policy, architecture: str) -> None:
        try:
            observer = self._observer if self._bound.pack != "state" else None
            cache = NativeCache(self._ctx.ctx, observer)
        except BaseException:
            self.close()
            raise
        self._stack.callback(cache.close)  # runs before the context is freed
        if not cache.shape.has_window:
            self._kv_bytes = cache.shape.bytes_per_cell * super().n_ctx()
        try:
            self._architecture = architecture
            policy = self._fitting_policy(policy, cache)
            granularity = self._settle_granularity(cache)
            self._check_place(cache.location, granularity)
            compact_at, frequencies = self._plan_compaction(cache, granularity)
            if policy.n_queries and self._observer is not None:
                self._query_log = QueryLog(self._observer)
                self._start_query_log(self._query_log, policy, cache, limits, frequencies)
        except BaseException:
            self.close()
            raise
        self._kv = EvictionManager(
            limits,
            policy,
            cache,
            self._find_spans,
            None if self._bound.on_evict is None else self._calls.lent(self._bound.on_evict),
            granularity=granularity,
            isolate_turns=self._bound.isolate_turns,
            compact_at=compact_at,
            frequencies=frequencies,
            query_log=self._query_log,
        )
        self._n_ctx = limits.n_ctx
        # read by other libraries (LlamaIndex) as what fits into the context, which exists by now
        self.context_params.n_ctx = limits.n_ctx
        self.input_ids = np.ndarray((limits.n_ctx,), dtype=np.intc)
        self._own_handlers = [h for h in self._chat_handlers.values() if remember_messages(h)]
        self._markers: list[bytes] | None = None
        self._pieces: dict[int, bytes] = {}
        self._remembers = True  # as far as is known
        self._file_identity: str | None = None

    def _require_adapter(self, log: LlamaLog) -> None:
        """The base class does not notice an adapter that llama.cpp could not load."""
        if self.lora_path and not self._lora_adapter:
            path, reason = self.lora_path, log.first_error() or "it is no adapter for this model"
            self._lora_adapter = None  # there is nothing to free
            self.close()
            raise UnsupportedModelError(f"the LoRA adapter '{path}' cannot be loaded: {reason}")

    def _check_policy(self, policy: Policy, cache: NativeCache) -> None:
        """That it was made for this model, if for any."""
        if policy.info is not None:
            c = cache.shape
            check_model(
                policy.info,
                architecture=self._architecture,
                n_layer=c.n_layer,
                n_head_kv=c.n_head_kv,
                head_size_k=c.head_size_k,
                head_size_v=c.head_size_v,
                fingerprint=model_fingerprint(self.model_path),
            )

    def _fitting_policy(self, policy: Policy, cache: NativeCache) -> Policy:
        """The policy, or the fallback where one that nobody named does not fit: how many layers are
        in the base cache of a model with sliding windows is known only now.

        Raises:
            PolicyFileError: one that was named does not fit.
        """
        try:
            self._check_policy(policy, cache)
        except PolicyFileError as error:
            if self._bound.policy != "auto":
                raise
            warnings.warn(f"passed over as a policy: {error}", stacklevel=2)
            return get_policy(FALLBACK)
        return policy

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

    def _check_place(self, place: CacheLocation, granularity: Granularity) -> None:
        if self._bound.pack != "device" or place.packs(granularity):
            return
        reason = place.where
        if place.known:
            reason = f"heads of this cache's types are no whole 32-bit words on {place.where}"
        raise UnsupportedModelError(
            f"pack='device' is not possible here: {reason}. Use pack='auto' or pack='state'"
        )

    def _plan_compaction(
        self, cache: NativeCache, granularity: Granularity
    ) -> tuple[int | None, KeyFrequencies | None]:
        if self._bound.positions == "keep":
            return None, None
        if granularity == "head" and cache.shape.has_window:
            raise UnsupportedModelError(
                "positions='compact' is not possible at head granularity with a model that has "
                "sliding-window layers. Use granularity='token' or positions='keep'"
            )
        # llama.cpp's shift reads a null pointer when keys are quantised but not Hadamard-rotated
        # (build_rope_shift in src/llama-kv-cache.cpp), and shifts whole quantised heads only.
        if granularity == "token" and cache.shape.type_k not in _PLAIN_TYPES:
            raise UnsupportedModelError(
                "positions='compact' at token granularity needs keys that are not quantised. Use "
                "granularity='head', an f16 type_k, or positions='keep'"
            )
        model = self._model.model
        frequencies = measure_frequencies(
            model, self.context_params, own_shift=granularity == "token"
        )
        return int(llama_cpp.llama_model_n_ctx_train(model)), frequencies

    def _start_query_log(
        self,
        log: QueryLog,
        policy: Policy,
        cache: NativeCache,
        limits: CacheLimits,
        frequencies: KeyFrequencies | None,
    ) -> None:
        if policy.needs_frequencies:
            try:
                log.frequencies = frequencies or measure_frequencies(
                    self._model.model, self.context_params, own_shift=False
                )
            except UnsupportedModelError as error:
                raise UnsupportedModelError(
                    f"policy '{policy.name}' takes RoPE off queries, which is not possible with "
                    f"this model. Choose another policy (the reason: {error})"
                ) from error
        log.start(self._ctx.ctx, cache, self._queries_to_log(policy, limits))

    def _queries_to_log(self, policy: Policy, limits: CacheLimits) -> int:
        """Of how many of the newest tokens."""
        return min(policy.n_queries, limits.cells)

    # -- what it tells -----------------------------------------------------------------------

    def n_ctx(self) -> int:
        """The logical context in tokens. The cells are ``kv_stats.cells``."""
        return int(self._n_ctx) if self._kv is not None else int(super().n_ctx())

    @property
    def kv_stats(self) -> KVStats:
        """What the cache holds and what eviction has cost so far."""
        with self._calls.look():
            return self._kv_stats()

    def _kv_stats(self) -> KVStats:
        kv, cells = self._kv, int(super().n_ctx())
        if kv is None:
            n = int(self.n_tokens)
            return KVStats(
                n, n, 0, 0, cells, self._kv_bytes, 0.0, None, None, None, None, None, 0, 0
            )
        place = kv.cache.location
        return KVStats(
            seen=kv.seen,
            kept=kv.kept,
            dropped=kv.seen - kv.kept,
            evictions=kv.evictions,
            cells=cells,
            kv_bytes=self._kv_bytes,
            eviction_ms=kv.eviction_ms,
            budget=kv.limits.budget,
            policy=kv.policy.name,
            granularity=kv.granularity,
            pack="device" if kv.packs_in_place else "state",
            where=place.where,
            transferred_bytes=place.bytes_transferred,
            evictions_as_state=kv.evictions_as_state,
        )

    @property
    def kv_indices(self) -> TokenIndices:
        """Tokens that the cache holds, as their indices in the conversation, ascending: int32
        [kept]; at head granularity [n_layer, n_head_kv, kept], as every head holds its own."""
        with self._calls.look():
            if self._kv is None:
                return np.arange(self.n_tokens, dtype=np.int32)
            return self._kv.indices

    # -- text --------------------------------------------------------------------------------

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """As in llama_cpp.Llama. A chat that has grown since is not tokenized again."""
        with self._calls.look():
            if self._kv is not None and special and len(text) >= WORTH_BYTES:
                memory = self._memory()
                if memory is not None:
                    if self._lends_to == threading.get_ident():
                        self._lends_to = None
                        return memory.lend(text, add_bos)
                    return memory.tokens(text, add_bos)
            tokens: list[int] = super().tokenize(text, add_bos, special)
            return tokens

    def detokenize(self, *args: Any, **kwargs: Any) -> bytes:
        with self._calls.look():
            text: bytes = super().detokenize(*args, **kwargs)
            return text

    def _memory(self) -> TokenMemory | None:
        """None where texts cannot be cut at what the chat template writes."""
        if self._token_memory is None and self._remembers:
            self._remembers = False
            if type(self.tokenizer_) is LlamaTokenizer:
                cut_at = marks(self._model.vocab, b"\0".join(self._template_markers()))
                if cut_at:
                    tokenize = partial(self._model.tokenize, special=True)
                    self._token_memory = TokenMemory(tokenize, cut_at)
        return self._token_memory

    # -- reading -----------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Read tokens, making room before every batch.

        Raises:
            ContextLengthError: they do not fit into the logical context.
            KVCacheError: ``n_tokens`` was set back to where the cache cannot follow.
        """
        with self._calls.own("eval"):
            if self._kv is None:
                super().eval(tokens)
            else:
                self._eval(self._kv, tokens)

    def _eval(self, kv: EvictionManager, tokens: Sequence[int]) -> None:
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextLengthError(
                f"{self.n_tokens} tokens were read and {len(tokens)} more are too many for the "
                f"logical context n_ctx={self._n_ctx}: load the model with a larger n_ctx"
            )
        self._follow()
        at = 0
        while at < len(tokens):
            n = kv.make_room(len(tokens) - at)
            log = self._query_log
            if log is not None and kv.shift != self._query_shift:
                log.clear()  # the keys held were turned, each by another angle
                self._query_shift = kv.shift
            self._decoding = True
            self._decode(list(tokens[at : at + n]), kv.shift)
            if log is not None:
                log.append(kv.seen, n)
            kv.append(n)
            self._decoding = False
            at += n

    def _decode(self, tokens: list[int], shift: int) -> None:
        """What the base class's eval does for one batch, at positions of our own."""
        start, n = self.n_tokens, len(tokens)
        self._batch.set_batch(batch=tokens, n_past=start - shift, logits_all=self._logits_all)
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            raise KVCacheError(
                f"llama.cpp could not read {n} tokens after the {start} that it has read: {error}. "
                "The conversation goes up to these; more of llama.cpp's reason is shown with "
                "verbose=True"
            ) from error
        self.input_ids[start : start + n] = tokens
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n * self._n_vocab,))
            self._keep_logits(start, logits.reshape(n, -1))
        self.n_tokens += n
        self._requires_eval = False

    def _keep_logits(self, start: int, logits: FloatArray) -> None:
        """With ``logits_all``: those of the tokens from ``start`` on, f32 [n, n_vocab], which are
        valid until the next batch."""
        end = start + len(logits)
        if end > len(self.scores):
            self._make_rows(end)
        self.scores[start:end] = logits

    def _make_rows(self, n: int) -> None:
        """Let ``scores`` have rows for n tokens at least, and more than it had by half: the logical
        context may be far longer than there is memory for rows."""
        rows = min(self._n_ctx, max(n, len(self.scores) * 3 // 2))
        try:
            scores = np.empty((rows, self._n_vocab), np.single)
        except MemoryError as error:
            raise MemoryError(
                f"the logits of {rows} tokens take {rows * self._n_vocab * 4 / 2**30:.1f} GiB, and "
                "with logits_all or a draft_model those of all tokens are kept: leave them out, or "
                "read less (a lower n_ctx says so at once)"
            ) from error
        scores[: len(self.scores)] = self.scores
        self.scores = scores

    def _newest_logits(self) -> FloatArray:
        """f32 [n_vocab] after the last token read, valid until the next batch."""
        row = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(row, shape=(self._n_vocab,))

    def _likeliest(self) -> int:
        """The likeliest token to come.

        Raises:
            KVCacheError: there is none.
        """
        logits = self._newest_logits()
        if not np.isfinite(logits).any():
            raise KVCacheError("the model gives no token a finite likelihood: it cannot write")
        return int(np.nanargmax(logits))

    def _follow(self) -> None:
        """Bring table and cells to ``n_tokens``, which the base class sets freely."""
        kv = self._kv
        assert kv is not None
        self._notice_others()
        if self.n_tokens > kv.seen and kv.trusted:
            # An interrupt came between decoding and append(): n_tokens only grows after a decode.
            kv.append(self.n_tokens - kv.seen)
        kv.rewind(self.n_tokens)
        if self._query_log is not None:
            self._query_log.rewind(self.n_tokens)
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens - kv.shift, -1)
        self._decoding = False

    def _notice_others(self) -> None:
        """Trust the cache no longer if its newest token is not that of the conversation: then
        something else has used the context (a library that calls llama.cpp below this class). What
        it did is noticed only if it left another number of tokens."""
        kv = self._kv
        assert kv is not None
        if self.n_tokens == 0 or not kv.trusted:
            return
        there = kv.cache.newest_position() + 1 + kv.shift  # tokens, after llama.cpp
        if self._decoding:  # an interrupt or an error came: some of a batch may be there as well
            known = there >= self.n_tokens
        else:  # who sets n_tokens back may remove the cells, too
            known = there in (kv.seen, self.n_tokens) and there >= self.n_tokens
        kv.trusted = known

    def reset(self) -> None:
        """Forget the conversation."""
        with self._calls.own("reset"):
            super().reset()
            if self._kv is not None:
                self._follow()

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        with self._calls.own("sample", "cache"):
            return super().sample(*args, **kwargs)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        with self._calls.own("embed"):
            return super().embed(*args, **kwargs)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """As in llama_cpp.Llama. Equal beginnings are not read again, if the cache can go back to
        what it was where the texts part; if tokens were dropped since then, all is read again."""
        how = _GENERATE.bind(self, tokens, *args, **kwargs).arguments
        del how["self"]
        return self._calls.steps("generate", self._generate(how))

    def _generate(self, how: dict[str, Any]) -> Generator[int, Sequence[int] | None, None]:
        if how.get("stopping_criteria") is not None:
            how["stopping_criteria"] = self._calls.lent(how["stopping_criteria"])
        if how.get("logits_processor") is not None:
            how["logits_processor"] = [self._calls.lent(f) for f in how["logits_processor"]]
        if self._kv is not None:
            # in create_completion its own list, that nobody changes
            given = how["tokens"]
            tokens = given if isinstance(given, PromptTokens) else PromptTokens(given)
            self._protect_head(tokens)
            if how.get("reset", True):
                # the base class would compare both texts again, number by number
                how["tokens"], how["reset"] = self._reuse_prefix(tokens)[self.n_tokens :], False
        yield from super().generate(**how)

    def _reuse_prefix(self, tokens: list[int]) -> list[int]:
        """Go back to the longest equal beginning, or to nothing if that cannot be exact.

        Returns:
            The same text, perhaps in tokens that were read already; the first ``n_tokens`` were.
        """
        kv = self._kv
        assert kv is not None
        self._notice_others()
        prefix = self._equal_beginning(tokens)
        if not kv.can_return(min(prefix, len(tokens) - 1)):
            known = self._input_ids[prefix:].tolist()
            tokens = tokens[:prefix] + begin_as_known(known, tokens[prefix:], self._piece)
            prefix = self._equal_beginning(tokens, prefix)
        all_read = prefix == len(tokens)
        live = not self._requires_eval and kv.trusted
        if all_read and live and int(self.n_tokens) == prefix:
            return tokens  # the logits are there already
        if all_read:
            prefix -= 1  # one token is read again for its logits
        if prefix < 1 or not kv.can_return(prefix):
            self.reset()
        else:
            self.n_tokens = prefix
            self._requires_eval = True
            self._follow()
        return tokens

    def _equal_beginning(self, tokens: list[int], start: int = 0) -> int:
        """How many of the first tokens are those that were read; the first ``start`` are."""
        known = self._input_ids
        n = min(len(known), len(tokens))
        ids = tokens.ids if isinstance(tokens, PromptTokens) else None
        if ids is None and self._token_memory is not None:
            ids = self._token_memory.ids(tokens)
        new = np.asarray(tokens[start:n], np.intc) if ids is None else ids[start:n]
        differ = np.flatnonzero(known[start:n] != new)
        return start + int(differ[0]) if len(differ) else n

    def evict(self) -> None:
        """Drop tokens now, down to the budget, and not only when the cells are full: after a long
        document, say, before the first question about it. No effect without ``kv_budget``."""
        with self._calls.own("evict", "cache"):
            if self._kv is not None:
                self._follow()
                self._kv.evict()

    # -- completions -------------------------------------------------------------------------

    def _create_completion(self, *args: Any, **kwargs: Any) -> Generator[Any, None, None]:
        if kwargs.get("stopping_criteria") is not None:
            kwargs["stopping_criteria"] = self._calls.lent(kwargs["stopping_criteria"])
        return self._calls.steps("create_completion", self._complete(args, kwargs))

    def _complete(self, args: Any, kwargs: Any) -> Generator[Any, None, None]:
        prompt = kwargs.get("prompt") if self._kv is not None else None
        if isinstance(prompt, list) and not isinstance(prompt, PromptTokens):
            kwargs["prompt"] = PromptTokens(prompt)
        completion = super()._create_completion(*args, **kwargs)
        while True:
            self._completing = True
            try:
                result = next(completion)
            except StopIteration:
                return
            except ValueError as error:
                if self._kv is not None and "exceed context window" in str(error):
                    # the base class names the cells here, which are not the limit
                    n = str(error).partition("(")[2].partition(")")[0]
                    raise ContextLengthError(
                        f"the prompt has {n} tokens, too many for the logical context "
                        f"n_ctx={self._n_ctx}: load the model with a larger n_ctx"
                    ) from error
                raise
            finally:
                self._completing = False
            if result["choices"][0]["finish_reason"] is not None:
                result["kv_cache"] = dict(self.kv_stats)
            yield result

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """As in llama_cpp.Llama; the result, or the last chunk of a stream, has a ``kv_cache``
        field with ``kv_stats``."""
        if self.lacks_chat_template:
            warnings.warn(
                f"'{os.path.basename(self.model_path)}' has no chat template; llama-cpp-python "
                "takes 'llama-2' then, which few such models know. Name another with chat_format "
                f'(\'{transcript.NAME}\' writes "User: ..." and "Assistant: ..."), or use '
                "create_completion",
                stacklevel=2,
            )
        head = None
        if self._bound.protect_system:
            by_place = any(args[:3:2])  # (functions, function_call, tools, ...)
            tools = by_place or kwargs.get("functions") or kwargs.get("tools")
            head = Head.of(messages, bool(tools))
        # a stream is not begun here, but with its first piece
        streams = kwargs.get("stream", False)
        with self._calls.look() if streams else self._calls.own("create_chat_completion"):
            # a handler may complete more than once (tool_choice="auto" does)
            with contextlib.nullcontext() if streams else self._whole_chat(head):
                result = super().create_chat_completion(messages, *args, **kwargs)
            if isinstance(result, dict):
                result["kv_cache"] = dict(self.kv_stats)
                return result
        return self._calls.steps("create_chat_completion", self._chat(result, head))

    def _chat(self, chunks: Iterator[Any], head: Head | None) -> Generator[Any, None, None]:
        while True:
            with self._protecting(head):  # others may have chatted since the piece before
                chunk = next(chunks, None)
            if chunk is None:
                return
            if chunk["choices"] and chunk["choices"][0]["finish_reason"] is not None:
                chunk["kv_cache"] = dict(self.kv_stats)
            yield chunk

    @contextlib.contextmanager
    def _whole_chat(self, head: Head | None) -> Iterator[None]:
        """``_protecting``. What is tokenized first inside, by this thread, is the prompt, which
        llama_cpp reads and does not change, if the handler is its own."""
        handler = self.chat_completion_handler()
        with self._protecting(head):
            self._lends_to = threading.get_ident() if handler in self._own_handlers else None
            try:
                yield
            finally:
                self._lends_to = None
                if self._token_memory is not None:
                    self._token_memory.take_back()

    @contextlib.contextmanager
    def _protecting(self, head: Head | None) -> Iterator[None]:
        """Inside, what is completed begins with this head, which is protected."""
        self._head = head
        try:
            yield
        finally:
            self._head = None

    # -- chat templates ----------------------------------------------------------------------

    @property
    def lacks_chat_template(self) -> bool:
        """The model file has no chat template, and none was asked for: it may be a base model,
        which continues texts. llama_cpp takes "llama-2" then."""
        return self._fell_back and self.chat_handler is None and self.chat_format == "llama-2"

    def chat_completion_handler(self) -> Any:
        """llama_cpp's chat completion handler that ``create_chat_completion`` calls."""
        return (
            self.chat_handler
            or self._chat_handlers.get(self.chat_format)
            or llama_chat_format.get_chat_completion_handler(self.chat_format)
        )

    def _piece(self, token: int) -> bytes:
        """A token's text, special tokens included."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = token_text(self._model.vocab, token)
        return piece

    def _template_markers(self) -> list[bytes]:
        if self._markers is None:
            self._markers = template_markers(self.chat_completion_handler())
            if self._bound.isolate_turns and not self._markers:
                warnings.warn(
                    "isolate_turns has no effect: this model's chat template has no markers "
                    "between messages, so turns cannot be told apart",
                    stacklevel=2,
                )
        return self._markers

    def _find_spans(self, start: int, end: int) -> list[Span]:
        """Spans that hold any of the conversation's tokens [start, end); see SpanFinder."""
        markers = self._template_markers()
        # a marker that reaches into the range begins no more tokens before it than it has bytes
        first = max(0, start - max(LOOK_BACK, *map(len, markers), 0))
        pieces = [self._piece(int(t)) for t in self.input_ids[first:end]]
        found = find_spans(pieces, markers, self._bound.keep_whole, start - first)
        return [(first + a, first + b, kind) for a, b, kind in found]

    def _protect_head(self, tokens: list[int]) -> None:
        kv, head = self._kv, self._head
        assert kv is not None
        if head is not None and head.first is not None:
            with_tools = self._head_tokens(tokens, head)
            try:
                if with_tools is not None:
                    kv.protect_prefix(with_tools)
                    return
            except BudgetError as error:
                warnings.warn(f"the definitions of tools are not protected: {error}", stacklevel=2)
            head = head._replace(first=None)
        length = 0 if head is None else self._head_tokens(tokens, head)
        if length is None:
            warnings.warn(
                "the chat template does not show the system prompt to the model, so there is "
                "nothing to protect",
                stacklevel=2,
            )
        kv.protect_prefix(length or 0)

    def _head_tokens(self, tokens: list[int], head: Head) -> int | None:
        """How many of the first tokens of a chat hold its head; None if it is not there."""
        n = 128
        while True:  # it is one of the first things in a long chat
            pieces = [self._piece(t) for t in tokens[:n]]
            end = head.end(b"".join(pieces), self._template_markers())
            if end is not None:
                return bisect_left(list(accumulate(map(len, pieces))), end) + 1 if end else 0
            if n >= len(tokens):
                return None
            n *= 2

    # -- states and copies -------------------------------------------------------------------

    def save_state(self) -> Any:
        """As in llama_cpp.Llama. Of a bounded cache it is what ``save_session`` writes.

        Raises:
            SessionError: with a policy that looks at queries.
            KVCacheError: llama.cpp's state is not that of the tokens read.
        """
        with self._calls.own("save_state", "nothing"):
            if self._kv is None:
                return super().save_state()
            header, arrays = self._conversation("save_state")
            rows = self.n_tokens if self._logits_all else 0
            return SavedState(header, arrays, self.scores[:rows].copy(), self._seed)

    def load_state(self, state: Any) -> None:
        """Go on where ``save_state`` was called, in place of the conversation read so far.

        As for ``load_session``, model, limits, policy and granularity must be those of the time,
        and ``n_ctx`` may differ. A state that does not fit and comes from a prompt cache
        (``set_cache``) is passed over with a warning, and the prompt is read.

        Raises:
            SessionError: a state of other settings; the conversation read so far is untouched.
                Without ``kv_budget`` only llama.cpp can tell, and nothing is read then.
            KVCacheError: llama.cpp took neither this state nor the old one back; nothing is read
                now.
        """
        with self._calls.own("load_state"):
            try:
                self._load_state(state)
            except SessionError as error:
                if not self._completing:
                    raise
                warnings.warn(
                    f"what the prompt cache holds is of no use here, so all is read: {error}",
                    stacklevel=2,
                )

    def _load_state(self, state: Any) -> None:
        if self._kv is None:
            self._load_unbounded(state)
            return
        if not isinstance(state, SavedState):
            raise SessionError(
                "this state was saved without a bounded cache: it does not say which tokens it has"
            )
        scores = state.scores if self._logits_all else state.scores[:0]
        if len(scores) < state.n_tokens and self._logits_all:
            raise SessionError(
                "this state was saved without logits_all, and here the logits of all tokens are "
                "kept: a state can only be resumed with what it was made with"
            )
        self._resume("this state", state.header, state.arrays)
        self._seed = state.seed
        if len(scores):
            self._keep_logits(0, scores)

    def _load_unbounded(self, state: Any) -> None:
        if isinstance(state, SavedState):
            raise SessionError(
                "this state was saved with a bounded cache: load the model with the same kv_budget"
            )
        try:
            super().load_state(state)
        except (RuntimeError, ValueError) as error:
            # whatever was changed by then; the base class has also taken over arrays of other sizes
            self.input_ids = np.ndarray((self._n_ctx,), dtype=np.intc)
            self.reset()
            raise SessionError(
                "llama.cpp does not take this state: it was saved with another model or other "
                f"settings. Nothing is read now (the reason: {error})"
            ) from error

    def save_session(self, path: str | os.PathLike[str], extra: Any = None) -> None:
        """Write the conversation and its cache to one file, from which ``load_session`` goes on.

        The file is replaced at once or not at all. It holds the conversation's tokens in the clear.

        Args:
            extra: anything JSON can hold (a chat's messages, say), returned by ``load_session``.

        Raises:
            SessionError: the file cannot be written, or nothing was read yet.
            KVCacheError: llama.cpp's state is not that of the tokens read; no file was touched.
        """
        with self._calls.own("save_session", "nothing"):
            self._save_session(path, extra)

    def _save_session(self, path: str | os.PathLike[str], extra: Any) -> None:
        header, arrays = self._conversation("save_session")
        if len(arrays["tokens"]) == 0:
            raise SessionError("there is nothing to save: no token was read yet")
        session.write(path, {**header, "extra": extra}, arrays)

    def _conversation(self, name: str) -> tuple[dict[str, Any], dict[str, session.Array]]:
        """What was read and what is kept of it, for ``_resume``: header and arrays of a session."""
        kv = self._bounded(name)
        self._follow()
        table = kv.snapshot()
        header = {
            "made_with": self._session_settings(),
            "table": table.numbers(),
            "protected_prefix": kv.protected_prefix,
            "evictions": kv.evictions,
            "evictions_as_state": kv.evictions_as_state,
            "eviction_ms": kv.eviction_ms,
            "extra": None,
        }
        arrays = {"tokens": self.input_ids[: kv.seen].astype(np.int32), **table.arrays()}
        state = kv.cache.state() if kv.seen else np.empty(0, np.uint8)
        if kv.seen:
            kv.cache.check_state(state, table.llama_positions())
        return header, {**arrays, "state": state}

    def load_session(
        self, path: str | os.PathLike[str], *, accept: Callable[[Any], object] | None = None
    ) -> Any:
        """Go on where ``save_session`` was called, in place of the conversation read so far.

        The model file, the cache's types and limits, the policy and the granularity must be those
        of the time; llama.cpp's version too. ``n_ctx`` may differ, if the conversation fits.

        What ``rescue_to`` wrote is read again token by token, so only the model file must be the
        same and the conversation must fit; what is kept of it is decided anew.

        Args:
            accept: called with what will be returned, while the conversation read so far is still
                there; raising leaves it untouched.

        Returns:
            The ``extra`` given to ``save_session`` or ``rescue_to``.

        Raises:
            SessionError: a file that is missing, damaged, or from another model or other settings;
                the conversation read so far is untouched.
            KVCacheError: llama.cpp took neither this state nor the old one back; nothing is read
                now.
        """
        with self._calls.own("load_session"):
            return self._load_session(path, accept)

    def _load_session(
        self, path: str | os.PathLike[str], accept: Callable[[Any], object] | None
    ) -> Any:
        self._require_bounded("load_session")
        # a state has keys and values of no more than all cells, and a few numbers of each
        most = 2 * self._kv_bytes + 64 * self._n_ctx + _SESSION_OVERHEAD
        header, arrays = session.read(path, most)
        if accept is not None:
            accept(header.get("extra"))
        name = f"the session '{path}'"
        if "rescue" in header:
            return self._read_again(name, header, arrays)
        self._resume(name, header, arrays)
        return header["extra"]

    def _resume(self, name: str, header: dict[str, Any], arrays: dict[str, session.Array]) -> None:
        """Take over what ``_conversation`` gave, here or in another process.

        Args:
            name: what it is called in a sentence.

        Raises:
            SessionError, KVCacheError: see load_session.
        """
        kv = self._bounded("load_session")
        session.require_conversation(name, header, arrays)
        session.require_same(name, header["made_with"], self._session_settings())
        tokens, state = arrays.pop("tokens"), arrays.pop("state")
        self._require_tokens(name, tokens)
        try:
            table = Table.of(header["table"], arrays)
        except ValueError as error:
            raise SessionError(f"{name} does not add up: {error}") from error
        if table.seen == len(tokens) == 0:
            self.reset()
            return
        if table.seen != len(tokens) or not table.adds_up(kv.empty_table()):
            raise SessionError(f"{name} does not add up: its table of kept tokens")
        if table.kept > kv.limits.cells:
            raise SessionError(f"{name} does not add up: more rows than cells")
        protected = self._protectable(name, header["protected_prefix"])
        try:
            kv.restore_with(table, state)
        except (ValueError, KVCacheError) as error:
            if kv.trusted:
                raise SessionError(f"{name} does not fit: {error}") from error
            self.reset()
            raise
        self._requires_eval = True  # the logits were not saved
        self.n_tokens = len(tokens)
        self.input_ids[: len(tokens)] = tokens
        kv.evictions, kv.eviction_ms = header["evictions"], header["eviction_ms"]
        kv.evictions_as_state = header["evictions_as_state"]
        kv.protect_prefix(protected)

    def rescue_to(
        self,
        path: str | os.PathLike[str] | Callable[[], str] | None,
        extra: Callable[[], Any] | None = None,
    ) -> None:
        """Write the conversation down if a device that holds the model or the cache fails.

        llama.cpp ends the process then (kvp_edge.llamacpp.abort_hook). The conversation's tokens
        are written to ``path`` just before that, and at no other time; ``load_session`` reads them
        again. The cache is lost with its device, so this is possible with every policy.

        Args:
            path: replaces the one given before; None, or closing the model: write nothing. A
                function returns it when it is needed, in the thread that failed.
            extra: returns what else to write, anything JSON can hold. It is called in the thread
                that failed, and must not use the model.

        Raises:
            SessionError: the cache is not bounded.
        """
        if self._stop_rescue is not None:
            self._stop_rescue()
        self._rescue = self._stop_rescue = None
        if path is not None:
            self._require_bounded("rescue_to")
            self._model_identity()  # now, while the file can surely be read
            where = path if callable(path) else partial(str, os.path.abspath(path))
            self._rescue = where, extra
            self._stop_rescue = before_abort(partial(_write_rescue, weakref.ref(self)))

    def rescue(self, reason: str) -> None:
        """Write now what ``rescue_to`` asks for, before the process ends for another reason.

        Raises:
            SessionError: the file cannot be written, or ``rescue_to`` was not called.
        """
        if self._rescue is None:
            raise SessionError("there is nowhere to write the conversation to: see rescue_to")
        _write_rescue(weakref.ref(self), reason)

    def close(self) -> None:
        """Free the model and its cache, and rescue nothing any more. Closing again has no effect.

        Raises:
            InUseError: another call is at work.
        """
        self._calls.close()
        self.rescue_to(None)
        self._sampler = None
        super().close()
        for part in _FREED:  # whoever uses what was freed gets a sentence
            setattr(self, part, Closed())

    def _read_again(
        self, name: str, header: dict[str, Any], arrays: dict[str, session.Array]
    ) -> Any:
        """``load_session`` of what ``rescue_to`` wrote."""
        kv = self._require_bounded("load_session")
        session.require_rescued(name, header, arrays)
        session.require_same(name, header, {"model": self._model_identity()})
        tokens = arrays["tokens"]
        self._require_tokens(name, tokens)
        asked = header["protected_prefix"] if self._bound.protect_system else 0
        protected = self._protectable(name, asked)
        self.reset()
        kv.protect_prefix(protected)
        self.eval(tokens.tolist())
        return header["extra"]

    def _require_tokens(self, name: str, tokens: Any) -> None:
        if len(tokens) > self._n_ctx:
            raise SessionError(
                f"{name} holds {len(tokens)} tokens, too many for the logical "
                f"context n_ctx={self._n_ctx}: load the model with a larger n_ctx"
            )
        session.require_tokens(name, tokens, self._n_vocab)

    def _protectable(self, name: str, n_first: int) -> int:
        """How many first tokens a session's conversation protects here."""
        kv = self._require_bounded("load_session")
        try:
            return kv.protectable(n_first)
        except BudgetError as error:
            raise SessionError(f"{name} does not fit: {error}") from error

    def _require_bounded(self, name: str) -> EvictionManager:
        if self._kv is None:
            raise SessionError(
                f"{name} is for a bounded cache: load the model with kv_budget, or use save_state"
            )
        return self._kv

    def _bounded(self, name: str) -> EvictionManager:
        kv = self._require_bounded(name)
        self._require_no_queries(name)
        return kv

    def _require_no_queries(self, name: str) -> None:
        if self._kv is not None and self._query_log is not None:
            raise SessionError(
                f"{name} is not possible with policy '{self._kv.policy.name}': what it saw of "
                "queries is not kept. Choose a policy that does not look at queries"
            )

    def _model_identity(self) -> str:
        if self._file_identity is None:
            self._file_identity = session.file_identity(self.model_path)
        return self._file_identity

    def _session_settings(self) -> dict[str, Any]:
        """Everything that decides what the cache's numbers mean and how they go on."""
        kv = self._bounded("a session")
        limits, shape, params = kv.limits, kv.cache.shape, self.context_params
        lora = getattr(self, "lora_path", None)
        return {
            "llama-cpp-python": BUILT_FOR,
            "model": self._model_identity(),
            "lora": [session.file_identity(lora), self.lora_scale] if lora else None,
            "policy": kv.policy.identity(),
            "granularity": kv.granularity,
            "positions": self._bound.positions,
            "keep_whole": self._bound.keep_whole,
            "isolate_turns": self._bound.isolate_turns,
            "cells": limits.cells,
            "budget": limits.budget,
            "sinks": limits.sinks,
            "recent": limits.recent,
            "n_batch": limits.n_batch,
            "type_k": shape.type_k,
            "type_v": shape.type_v,
            "v_transposed": shape.v_transposed,
            "rotation": [shape.k_hadamard_block, shape.v_hadamard_block],
            "rope": [
                params.rope_scaling_type,
                params.rope_freq_base,
                params.rope_freq_scale,
                params.yarn_ext_factor,
                params.yarn_attn_factor,
                params.yarn_beta_fast,
                params.yarn_beta_slow,
                params.yarn_orig_ctx,
            ],
        }

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.update(vars(self._bound), n_ctx=self._n_ctx)
        if self.lacks_chat_template:
            state["chat_format"] = None  # the copy shall know that nobody asked for it
        return state


def _write_rescue(holder: weakref.ref[Llama], message: str) -> None:
    """What ``rescue_to`` has done before ggml ends the process; ``holder`` keeps no model alive."""
    llm = holder()
    if llm is None or llm._rescue is None or llm._kv is None:
        return
    where, extra = llm._rescue
    header = {
        "rescue": message,
        "model": llm._file_identity,
        "protected_prefix": llm._kv.protected_prefix,
        "extra": None,
    }
    tokens = llm.input_ids[: llm.n_tokens].astype(np.int32)
    try:
        if extra is not None:
            # what is no JSON fails here, and not when all is written
            header["extra"] = json.loads(json.dumps(extra(), allow_nan=False))
    finally:  # the tokens shall not be lost with what the caller adds to them
        # the name was free when it was chosen; who has put a link there since means no good
        session.write(where(), header, {"tokens": tokens}, follow_link=False)


def _or_f16(ggml_type: int | None) -> int:
    return _GGML_TYPE_F16 if ggml_type is None else ggml_type


def _kv_bytes(log: LlamaLog) -> int:
    return round(sum(mib for mib, _ in log.kv_mib()) * 2**20)
