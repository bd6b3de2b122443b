"""``Llama``: llama_cpp's class with a cache of fixed size that a policy keeps useful."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from llama_cpp.llama_chat_format import Llava15ChatHandler, MTMDChatHandler
from llama_cpp.llama_tokenizer import LlamaTokenizer

from kvp_edge import sessions
from kvp_edge.argument_checks import check_engine
from kvp_edge.arrays import TokenIndices
from kvp_edge.binding.model import read_model_shape, require_model_file
from kvp_edge.cache.choosing_types import choose_types
from kvp_edge.cache.limits import CacheLimits
from kvp_edge.cache.manager import EvictionManager
from kvp_edge.cache.opening import Opening, queries_needed
from kvp_edge.cache.options import CacheOptions
from kvp_edge.cache.protection import DEFAULT_SINKS
from kvp_edge.cache.recall import Choice, Recall
from kvp_edge.cache.saved_state import SavedState
from kvp_edge.cache.session_file import file_identity
from kvp_edge.cache.stats import Eviction, KVStats
from kvp_edge.cache.types import KVTypes
from kvp_edge.errors import (
    ContextLengthError,
    KVCacheError,
    SessionError,
    UnsupportedModelError,
)
from kvp_edge.llamacpp.base import BaseLlama, generate_arguments, tokens_beyond_context
from kvp_edge.llamacpp.log import listen
from kvp_edge.one_call import Calls
from kvp_edge.policies import Policy, get_policy
from kvp_edge.processor.repack import use_extra_buffers
from kvp_edge.text import transcript
from kvp_edge.text.chat_head import Head
from kvp_edge.text.chat_text import ChatText
from kvp_edge.text.growing_chat import remember_messages
from kvp_edge.text.plain_contents import PlainContents
from kvp_edge.text.retokenize import begin_as_known, n_equal
from kvp_edge.text.seals import new_seal
from kvp_edge.text.spans import Span
from kvp_edge.text.token_memory import WORTH_BYTES, PromptTokens, TokenMemory, marks

#: A reply writes so many tokens at least between two recalls.
_LEAST_WRITTEN = 16


class Llama(BaseLlama):
    """A llama_cpp.Llama whose KV cache never holds more than a fixed number of cells.

    Without ``kv_budget`` it is llama_cpp.Llama. With it, ``n_ctx`` is the LOGICAL context, the
    longest conversation, and the number of cells follows from ``kv_budget`` and ``reserve``: when
    the cells are full, the policy decides which tokens to drop. All arguments of llama_cpp.Llama
    are accepted and mean what they mean there.

    One object serves one call at a time; many objects may live in many threads. A call that comes
    while another one is running is refused (InUseError), whatever thread it comes from, and so is
    one from a callback (on_evict, a stopping criterion). What only reads (kv_stats, kv_indices,
    tokenize, n_ctx) can be called at any time, from anywhere; saving, at any time by the same
    thread. A stream is one call for each of its pieces: in between the model may be used, and once
    something else was read, the stream cannot continue. A stream may be abandoned at any time.
    After ``close`` every call is refused (ClosedError).

    Args:
        model_path: GGUF file.
        kv_budget, n_ctx, ..., n_batch: how the cache is bounded: help(kvp_edge.CacheOptions).
        kwargs: of llama_cpp.Llama.

    Attributes:
        options: the cache's options, as they were given.
        on_batch: called after every batch that ``eval`` reads into a bounded cache, with the
            numbers of its first token and of the one after its last.

    Raises:
        UnsupportedModelError: missing, truncated or foreign file, or a model whose cache cannot be
            bounded (recurrent, hybrid, encoder, M-RoPE...), or not in the way asked for; the
            message says what to ask for instead.
        BudgetError: numbers that contradict each other.
        OptionError: an option that has no such value.
        PolicyError: no such policy; PolicyFileError: one that cannot be read or is another model's.
        TypeError: a value of the wrong type.

        The methods raise ContextLengthError, KVCacheError, InUseError and ClosedError, those for
        sessions SessionError, and an eviction PolicyError if the policy returns no scores. All but
        TypeError are KVPError; which are ValueError and which RuntimeError: kvp_edge.errors.
    """

    on_batch: Callable[[int, int], None] | None = None

    _opening: Opening | None = None  # while a bounded cache comes about
    _kv: EvictionManager | None = None
    _rescue: sessions.Rescue | None = None
    _head: Head | None = None  # of the chat that is completed just now
    _own_handlers: Sequence[Any] = ()  # those of llama_cpp's that render the file's templates
    _plain: PlainContents | None = None  # under the handler that was asked for last
    _lends_to: int | None = None  # the thread that gets the token memory's own list next
    _token_memory: TokenMemory | None = None
    _asks_from: int | None = None  # tokens from here on ask for older ones: see _logging_queries
    _question = range(0)  # the tokens of the last prompt that were new then
    _writes_from: int | None = None  # a reply is written: number of its first token since a recall
    _decoding = False  # so the end of a batch was not reached: see EvictionManager.follow
    _completing = False  # inside create_completion

    def __init__(
        self,
        model_path: str,
        *,
        kv_budget: int | str | None = None,
        kv_type: str = "auto",
        n_ctx: int | None = None,
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
        recall: str = "auto",
        recall_every: int = 64,
        kv_log: str | None = None,
        kv_log_limit: str = "2GiB",
        kv_log_type: str = "cache",
        on_recall: Callable[[Recall], None] | None = None,
        special_in_messages: bool = False,
        repack: str = "auto",
        n_batch: int | None = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        self._stack = contextlib.ExitStack()  # the base class closes it even if loading fails early
        self._seal = new_seal()
        self._calls = Calls()
        self.options = CacheOptions.among(locals())  # the arguments, before there is a variable
        check_engine(kwargs)
        model_path = os.fspath(model_path)
        if not os.path.exists(model_path):
            raise UnsupportedModelError(f"model file '{model_path}' not found")
        require_model_file(model_path)
        with listen(pass_on=verbose):
            if self.options.bounded:
                self._opening = Opening(self.options, model_path, kwargs)
                n_ctx = self._opening.cells
                kwargs |= self._opening.engine
            else:
                get_policy(policy)  # if there is one of this name
                if kv_type != "auto" and not kwargs.get("vocab_only"):
                    shape = read_model_shape(model_path)
                    kwargs |= choose_types(self.options, kwargs, shape).engine
            self._repacks = use_extra_buffers(
                repack,
                model_path,
                n_gpu_layers=kwargs.get("n_gpu_layers", 0),
                vocab_only=kwargs.get("vocab_only", False),
            )
        super().__init__(
            model_path,
            n_ctx=512 if n_ctx is None else n_ctx,
            n_batch=512 if n_batch is None else n_batch,
            verbose=verbose,
            **kwargs,
        )
        self._kv_bytes = self.reported.cells
        self._kv_type = str(KVTypes(self.context_params.type_k, self.context_params.type_v))
        if self._opening is not None:
            try:
                self._open(self._opening)
            except BaseException:
                self.close()
                raise

    def adjust_model(self, params: Any) -> None:
        params.use_extra_bufts = self._repacks

    def adjust_context(self, params: Any) -> None:
        if self._opening is not None:
            self._opening.adjust_context(params)

    def size_context(self, window: int) -> None:
        if self._opening is not None:
            self.n_batch = self._opening.size_context(self.context_params, window)

    def _open(self, opening: Opening) -> None:
        on_evict = self.options.on_evict
        kv = opening.open(
            self.ctx,
            self.context_params,
            self.find_spans,
            None if on_evict is None else self._calls.lent(on_evict),
            self.queries_to_log,
            self._stack,
        )
        if not kv.cache.shape.has_window:
            self._kv_bytes = kv.cache.shape.bytes_per_cell * self.n_cells
        self._n_ctx = opening.limits.n_ctx
        # read by other libraries (LlamaIndex) as what fits into the context, which exists by now
        self.context_params.n_ctx = self._n_ctx
        self.input_ids = np.ndarray((self._n_ctx,), dtype=np.intc)
        self._own_handlers = [h for h in self._chat_handlers.values() if remember_messages(h)]
        o = self.options
        self._chat_text = ChatText(
            self.vocab,
            self.chat_completion_handler,
            o.keep_whole,
            o.isolate_turns,
            self._guarded_tokens,
        )
        self._remembers = True  # as far as is known
        self._kv = kv

    def queries_to_log(self, policy: Policy, limits: CacheLimits) -> int:
        """How many of the newest tokens have their queries logged for this policy. A subclass may
        want more."""
        return queries_needed(policy, limits)

    # -- what it says ------------------------------------------------------------------------

    def n_ctx(self) -> int:
        """The logical context in tokens. The cells are ``kv_stats.cells``."""
        return int(self._n_ctx) if self._kv is not None else self.n_cells

    @property
    def kv(self) -> EvictionManager | None:
        """The eviction manager, None without ``kv_budget``. Who changes anything through it calls
        ``sync`` before."""
        return self._kv

    @cached_property
    def model_identity(self) -> str:
        """Tells this model file from others (session_file.file_identity)."""
        return file_identity(self.model_path)

    @property
    def kv_stats(self) -> KVStats:
        """What the cache holds and what eviction has cost so far."""
        with self._calls.look():
            if self._kv is not None:
                when = "off" if self._kv.log is None else self.options.recall
                when = "reply" if when == "auto" else when
                stats = self._kv.stats(self._kv_bytes, self.n_cells)
                return replace(stats, recall=when, kv_type=self._kv_type)
            n = int(self.n_tokens)
            return KVStats(
                n, n, 0, 0, cells=self.n_cells, kv_bytes=self._kv_bytes, kv_type=self._kv_type
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
            if special:
                return self._tokenize_special(text, add_bos)
            tokens: list[int] = super().tokenize(text, add_bos, special)
            return tokens

    def _tokenize_special(self, text: bytes, add_bos: bool) -> list[int]:
        plain = self._plain
        if plain is not None and plain.is_sealed(text):
            return plain.tokens(text, add_bos)
        tokens: list[int] = super().tokenize(text, add_bos, True)
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
                template = b"\0".join(self._chat_text.markers)
                cut_at = marks(self.vocab, template, whole=self._seal.encode())
                if cut_at:
                    self._token_memory = TokenMemory(self._tokenize_special, cut_at)
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
                f"{self.n_tokens} tokens were read, and {len(tokens)} more do not fit into "
                f"the logical context n_ctx={self._n_ctx}: load the model with a larger n_ctx"
            )
        self.sync()
        writes = self._writes_from is not None and self.n_tokens >= self._writes_from
        if writes:  # the newest token, and drafts; all before are sure
            tokens = self._recall_while_writing(kv, tokens)
        on_batch = self.on_batch and self._calls.lent(self.on_batch)
        at = 0
        while at < len(tokens):
            n = kv.make_room(len(tokens) - at)
            if self._asks_from is not None and not kv.complete:  # it asks for what was dropped
                kv.watch_queries(kv.seen >= self._asks_from)
                n = n if kv.seen >= self._asks_from else min(n, self._asks_from - kv.seen)
            self._decoding = True
            self.read_batch(list(tokens[at : at + n]), kv.seen - kv.shift)
            kv.append(n)
            self._decoding = False
            at += n
            if on_batch is not None:
                on_batch(kv.seen - n, kv.seen)
            if writes:  # llama.cpp has the logits of one batch: drafts that do not fit are left out
                break

    def sync(self) -> None:
        """Bring table and cells to ``n_tokens``, which the base class sets freely.

        Raises:
            KVCacheError: they cannot be brought there; ``reset`` and read the conversation again.
        """
        if self._kv is not None:
            self._kv.follow(self.n_tokens, self._decoding)
            self.remove_cells(self.n_tokens - self._kv.shift)
            self._decoding = False

    def reset(self) -> None:
        """Forget the conversation."""
        with self._calls.own("reset"):
            super().reset()
            self._question = range(0)
            self.sync()

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        with self._calls.own("sample", "cache"):
            return super().sample(*args, **kwargs)

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        with self._calls.own("embed"):
            return super().embed(*args, **kwargs)

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """As in llama_cpp.Llama. Equal beginnings are not read again, if the cache can go back to
        where the texts part: if no token was dropped since then, or those that were are in the KV
        log. Otherwise all is read again."""
        how = generate_arguments(self, tokens, args, kwargs)
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
            protected = self._chat_text.protected(self._head, tokens, self._kv.protectable)
            self._kv.protect_prefix(protected)
            if how.get("reset", True):
                # the base class would compare both texts again, number by number
                how["tokens"], how["reset"] = self._reuse_prefix(tokens)[self.n_tokens :], False
                if self._kv.log is not None:
                    self._read_prompt(self._kv, how["tokens"])
                    how["tokens"] = []
        writing = super().generate(**how)
        if self._kv is None:
            yield from writing
        else:
            yield from self._write(self._kv, writing, int(self.n_tokens) + len(how["tokens"]))

    def _write(
        self, kv: EvictionManager, writing: Generator[int, Sequence[int] | None, None], start: int
    ) -> Generator[int, Sequence[int] | None, None]:
        """``writing``, with what it recalls. Between two tokens others may use the model.

        Args:
            start: number of the reply's first token.
        """
        given = None
        try:
            while True:
                with self._asking_while_writing(kv, start):
                    self._writes_from = start
                    try:
                        token = writing.send(given)
                    except StopIteration:
                        return
                    finally:
                        start, self._writes_from = self._writes_from or start, None
                given = yield token
        finally:
            writing.close()

    # -- recall ------------------------------------------------------------------------------

    def _read_prompt(self, kv: EvictionManager, tokens: Sequence[int]) -> None:
        """Read the rest of a prompt, and bring back what its newest tokens ask for."""
        if self.n_tokens + len(tokens) <= kv.limits.cells and kv.complete:
            self.eval(tokens)  # nothing is dropped
            return
        start, end = int(self.n_tokens), int(self.n_tokens) + len(tokens)
        with self._logging_queries(kv, end - min(kv.recall_settings.n_queries, len(tokens))):
            if self._question.stop == end:  # most likely the same once more
                start = min(start, self._question.start)
            self._question = range(start, end)
            self.eval(tokens)
            self._recall(kv, end - start)

    @contextlib.contextmanager
    def _logging_queries(self, kv: EvictionManager, first: int) -> Iterator[None]:
        """Inside, the queries of the tokens from number ``first`` on are logged when they are
        read."""
        self._asks_from = first
        try:
            yield
        finally:
            self._asks_from = None
            kv.watch_queries(False)

    def recall(self) -> Recall | None:
        """Bring back, of what was dropped, what the newest tokens ask for, and read these again.
        Completions do this before every reply, with ``recall`` "reply" or "always"; who calls
        ``eval`` calls it before sampling.

        Returns:
            None: nothing was dropped, nothing that was is asked for, or ``recall`` is "off".

        Raises:
            KVCacheError: llama.cpp could not read the tokens again.
        """
        with self._calls.own("recall"):
            if self._kv is None or self._kv.log is None:
                return None
            self.sync()
            with self._logging_queries(self._kv, int(self.n_tokens)):
                return self._recall(self._kv, self._kv.recall_settings.n_queries)

    def _asking_while_writing(
        self, kv: EvictionManager, first: int
    ) -> contextlib.AbstractContextManager[None]:
        """With recall="always", as ``_logging_queries``."""
        asks = kv.log is not None and self.options.recall == "always"
        return self._logging_queries(kv, first) if asks else contextlib.nullcontext()

    def _recall_while_writing(self, kv: EvictionManager, tokens: Sequence[int]) -> Sequence[int]:
        """With recall="always": bring what the reply asks for by now, every ``recall_every``
        tokens, or when its queries have turned away from those that asked last.

        Args:
            tokens: what is read next: one token of the reply, and drafts of those after it.

        Returns:
            Those before the next recall.
        """
        assert self._writes_from is not None
        if self._asks_from is None:
            return tokens
        written, every = int(self.n_tokens) - self._writes_from, self.options.recall_every
        if written >= every or (written >= _LEAST_WRITTEN and kv.queries_turned_away()):
            self._writes_from = None  # what is read again is not written
            self._recall(kv, written)
            self._writes_from, written = int(self.n_tokens), 0
        return tokens[: every - written]

    def _recall(self, kv: EvictionManager, n_new: int) -> Recall | None:
        """The same, of a prompt whose last ``n_new`` tokens were read just now, while queries are
        logged."""
        n = kv.n_asking(n_new)
        if n == 0:
            return None
        end = int(self.n_tokens)
        tokens = self._input_ids[end - n :].tolist()
        self._asks_from = end - n
        before, found = kv.indices, list[Choice]()
        if not kv.logged_queries(n):
            self._go_back_to(end - n)
            self.eval(tokens)
        # a window may have moved on too far to go back again
        while len(found) < kv.recall_settings.passes and kv.can_rewind(end - n):
            choice = self._bring(kv, n)
            if self.n_tokens < end:
                self.eval(tokens)
            if choice is None:
                break
            found.append(choice)
        if not found:
            return None
        event = Recall.of(before, kv.indices, kv.seen, found)
        kv.count_recall(event)
        if self.options.on_recall is not None:
            self._calls.lent(self.options.on_recall)(event)
        return event

    def _bring(self, kv: EvictionManager, n: int) -> Choice | None:
        """Go back by ``n`` tokens, and bring what their queries choose.

        Returns:
            None: nothing was brought, though these tokens may have to be read again.
        """
        try:
            choice = kv.choose_by_queries(n)
            if choice is None:
                return None
            self._go_back_to(self.n_tokens - n)
            return replace(choice, ms=choice.ms + kv.bring(choice))
        except (MemoryError, UnsupportedModelError) as error:  # the cache holds what it held
            reason = str(error) or "out of memory"
            warnings.warn(f"no older tokens are recalled for this reply: {reason}", stacklevel=2)
            return None

    def _go_back_to(self, length: int) -> None:
        self.n_tokens = length
        self._requires_eval = True
        self.sync()

    def _reuse_prefix(self, tokens: list[int]) -> list[int]:
        """Go back to the longest equal beginning, or to nothing if that cannot be exact.

        Returns:
            The same text, perhaps in tokens that were read already; the first ``n_tokens`` were.
        """
        kv = self._kv
        assert kv is not None
        kv.notice_others(self.n_tokens, self._decoding)
        prefix = self._equal_beginning(tokens)
        if not kv.can_return(min(prefix, len(tokens) - 1)):
            known = self._input_ids[prefix:].tolist()
            tokens = tokens[:prefix] + begin_as_known(known, tokens[prefix:], self._chat_text.piece)
            prefix = self._equal_beginning(tokens, prefix)
        all_read = prefix == len(tokens)
        live = not self._requires_eval and kv.trusted
        if all_read and live and int(self.n_tokens) == prefix:
            return tokens  # the logits are there already
        if all_read:
            prefix -= 1  # one token is read again for its logits
        if prefix > 0 and kv.can_return(prefix):
            with contextlib.suppress(KVCacheError):  # no memory for what was dropped since
                self._go_back_to(prefix)
                return tokens
        self.reset()
        return tokens

    def _equal_beginning(self, tokens: list[int], start: int = 0) -> int:
        """How many of the first tokens are those that were read; the first ``start`` are."""
        known = self._input_ids
        n = min(len(known), len(tokens))
        ids = tokens.ids if isinstance(tokens, PromptTokens) else None
        if ids is None and self._token_memory is not None:
            ids = self._token_memory.ids(tokens)
        new = np.asarray(tokens[start:n], np.intc) if ids is None else ids[start:n]
        return start + n_equal(known[start:n], new)

    def evict(self) -> None:
        """Drop tokens now, down to the budget, and not only when the cells are full: after a long
        document, say, before the first question about it. No effect without ``kv_budget``."""
        with self._calls.own("evict", "cache"):
            if self._kv is not None:
                self.sync()
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
                n = tokens_beyond_context(error)
                if self._kv is not None and n is not None:
                    # the base class names the cells here, which are not the limit
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

    def chat_completion_handler(self) -> Any:
        """llama_cpp's chat completion handler that ``create_chat_completion`` calls. Unless
        ``special_in_messages``, what messages hold stays text under it (PlainContents)."""
        handler = super().chat_completion_handler()
        if not self._can_keep_plain(handler):
            return handler
        if self._plain is None or self._plain.handler is not handler:
            self._plain = PlainContents(handler, self.vocab, self._model.tokenize, self._seal)
        return self._plain.sealing

    def _can_keep_plain(self, handler: Any) -> bool:
        """Not if somebody else tokenizes: a tokenizer of the caller's, or a handler of pictures."""
        return (
            not self.options.special_in_messages
            and type(self.tokenizer_) is LlamaTokenizer
            and not isinstance(handler, (Llava15ChatHandler, MTMDChatHandler))
        )

    def _guarded_tokens(self) -> Mapping[int, bytes]:
        """The special tokens that only the chat template writes: token -> text."""
        self.chat_completion_handler()
        return {} if self._plain is None else self._plain.guarded

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """As in llama_cpp.Llama; the result, or the last chunk of a stream, has a ``kv_cache``
        field with ``kv_stats``. No text in ``messages``, ``tools`` and ``functions`` becomes a
        special token, unless ``special_in_messages``."""
        if self.lacks_chat_template:
            warnings.warn(
                f"'{os.path.basename(self.model_path)}' has no chat template; llama-cpp-python "
                "takes 'llama-2' then, which few such models know. Name another with chat_format "
                f'(\'{transcript.NAME}\' writes "User: ..." and "Assistant: ..."), or use '
                "create_completion",
                stacklevel=2,
            )
        head = None
        if self.options.protect_system:
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
        handler = super().chat_completion_handler()
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

    def find_spans(self, start: int, end: int) -> list[Span]:
        """Spans that hold any of the conversation's tokens [start, end), which evictions keep or
        drop as a whole; see SpanFinder."""
        return self._chat_text.spans(self.input_ids, start, end)

    # -- states and copies -------------------------------------------------------------------

    def save_state(self) -> Any:
        """As in llama_cpp.Llama. Of a bounded cache it is what ``save_session`` writes.

        Raises:
            SessionError: with a policy that needs queries.
            KVCacheError: llama.cpp's state is not that of the tokens read.
        """
        with self._calls.own("save_state", "nothing"):
            if self._kv is None:
                return super().save_state()
            return sessions.state(self, self._seed)

    def load_state(self, state: Any) -> None:
        """Continue where ``save_state`` was called, in place of the conversation read so far.

        As for ``load_session``, model, limits, policy and granularity must be those of the time,
        and ``n_ctx`` may differ. A state that does not fit and comes from a prompt cache
        (``set_cache``) is skipped with a warning, and the prompt is read.

        Raises:
            SessionError: a state of other settings; the conversation read so far is untouched.
                Without ``kv_budget`` only llama.cpp can tell, and nothing is read then.
            KVCacheError: llama.cpp took neither this state nor the old one back; nothing is read
                now.
        """
        with self._calls.own("load_state"):
            try:
                if self._kv is not None:
                    sessions.load_state(self, state)
                elif isinstance(state, SavedState):
                    raise SessionError(
                        "this state was saved with a bounded cache: load the model with the same "
                        "kv_budget"
                    )
                else:
                    super().load_state(state)
            except SessionError as error:
                if not self._completing:
                    raise
                warnings.warn(
                    f"the prompt cache has nothing usable, so the whole prompt is read: {error}",
                    stacklevel=2,
                )

    def save_session(self, path: str | os.PathLike[str], extra: Any = None) -> None:
        """Write the conversation and its cache to one file, which ``load_session`` reads.

        The file is replaced at once or not at all; saved again, to the file that was saved or
        loaded last, it grows by what is new. It holds the conversation's tokens in the clear, and
        the KV log.

        Args:
            extra: anything JSON can hold (a chat's messages, say), returned by ``load_session``.

        Raises:
            SessionError: the file cannot be written, or nothing was read yet.
            KVCacheError: llama.cpp's state is not that of the tokens read; no file was touched.
        """
        with self._calls.own("save_session", "nothing"):
            sessions.save(self, path, extra)

    def load_session(
        self, path: str | os.PathLike[str], *, accept: Callable[[Any], object] | None = None
    ) -> Any:
        """Continue where ``save_session`` was called, in place of the conversation read so far.

        The model file, the cache's types and limits, the policy and the granularity must be those
        of the time; llama.cpp's version too. ``n_ctx`` may differ, if the conversation fits.

        What ``rescue_to`` wrote is read again token by token, so only the model file must be the
        same and the conversation must fit; what is kept of it is decided again.

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
            return sessions.load(self, path, accept)

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
        if self._rescue is not None:
            self._rescue.stop()
        self._rescue = None
        if path is not None:
            where = path if callable(path) else partial(str, os.path.abspath(path))
            self._rescue = sessions.Rescue(self, where, extra)

    def rescue(self, reason: str) -> None:
        """Write now what ``rescue_to`` asks for, before the process ends for another reason.

        Raises:
            SessionError: the file cannot be written, or ``rescue_to`` was not called.
        """
        if self._rescue is None:
            raise SessionError("no file for the conversation: call rescue_to first")
        self._rescue.write(reason)

    def close(self) -> None:
        """Free the model and its cache, and rescue nothing any more. Closing again has no effect.

        Raises:
            InUseError: another call is at work.
        """
        self._calls.close()
        self.rescue_to(None)
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.update(self.options.asked(), n_ctx=self._n_ctx)
        if self.lacks_chat_template:
            state["chat_format"] = None  # the copy shall know that nobody asked for it
        return state
