"""llama_cpp.Llama with doors where it has none: all that must know how that class works inside.

llama-cpp-python is pinned to one version (kvp_edge.binding.library), so its private parts do not
change under this file.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format

from kvp_edge.arrays import FloatArray
from kvp_edge.errors import KVCacheError, KVPError, SessionError, UnsupportedModelError
from kvp_edge.llamacpp.log import Footprint, listen
from kvp_edge.one_call import Closed

#: The base class sends stdout, stderr and the level of its logger somewhere else for the process
#: while a model is loaded, and back. Two at once would not find the way back.
_loading = threading.RLock()

_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)

#: What is kept of llama.cpp's objects, "_model" under another name.
_FREED = ("_loaded", "_ctx", "_batch", "tokenizer_")

#: Called with the number of the first token and the logits of it and those behind it.
SeeLogits = Callable[[int, FloatArray], None]


class BaseLlama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is untyped
    """A llama_cpp.Llama that subclasses can change while it is loaded, and drive batch by batch.

    While it is loaded, three methods are called in this order: ``adjust_model``,
    ``adjust_context`` and, when the model is there and its context is made next, ``size_context``.

    Args:
        engine: arguments of llama_cpp.Llama.

    Attributes:
        reported: what llama.cpp allocated, after its log.

    Raises:
        UnsupportedModelError: llama.cpp cannot load the model or the adapter; the message says why.
    """

    reported: Footprint

    # set by the base class
    n_tokens: int
    n_batch: int
    lora_path: str | None
    _lora_adapter: Any
    _logits_all: bool
    _n_vocab: int
    scores: Any
    _requires_eval: bool
    _see_logits: SeeLogits | None = None
    _fell_back = False  # neither the model file nor the caller has a chat template

    def __init__(self, model_path: str, *, verbose: bool = True, **engine: Any) -> None:
        # Quiet, llama_cpp would still print llama.cpp's warning that the cells are fewer than the
        # trained context, which is the point here; errors become the exception's message.
        with _loading, listen(pass_on=verbose) as log:
            try:
                super().__init__(model_path, verbose=verbose, **engine)
            except KVPError:  # of a method below
                self.close()
                raise
            except ValueError as error:
                reason = log.first_error()
                if reason is None:
                    raise
                raise UnsupportedModelError(f"'{model_path}' cannot be loaded: {reason}") from error
        self.reported = log.footprint()
        if self.lora_path and not self._lora_adapter:  # the base class does not notice
            path, reason = (
                self.lora_path,
                log.first_error() or "it is not an adapter for this model",
            )
            self._lora_adapter = None  # there is nothing to free
            self.close()
            raise UnsupportedModelError(f"the LoRA adapter '{path}' cannot be loaded: {reason}")
        asked = engine.get("chat_format") or engine.get("chat_handler")
        self._fell_back = not asked and "tokenizer.chat_template" not in self.metadata

    def close(self) -> None:
        """Free the model and its context; whoever uses them now gets a sentence (ClosedError)."""
        self._sampler = None
        super().close()
        for part in _FREED:
            setattr(self, part, Closed())

    # -- while it is loaded ------------------------------------------------------------------

    def adjust_model(self, params: Any) -> None:
        """Change llama_model_params, before any argument is put into them."""

    def adjust_context(self, params: Any) -> None:
        """Change llama_context_params, before any argument is put into them."""

    def size_context(self, window: int) -> None:
        """Change ``context_params`` and ``n_batch``, of which the context is made next. Only now it
        is known what llama.cpp makes of sliding windows: it ignores some that a file names (phi3),
        and knows some that no file does (llama4).

        Args:
            window: tokens that layers with a sliding window see; 0: there are none.
        """

    # The base class makes its parameters from llama.cpp's defaults, then puts arguments into them,
    # stores the model, and makes the context. It offers no way to come in between but that it
    # stores all of them.
    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.adjust_model(params)
        self._model_params = params

    @property
    def context_params(self) -> Any:
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self.adjust_context(params)
        self._context_params = params

    @property
    def _model(self) -> Any:
        return self._loaded

    @_model.setter
    def _model(self, model: Any) -> None:
        self._loaded = model
        self.size_context(int(llama_cpp.llama_model_n_swa(model.model)))

    # -- reading -----------------------------------------------------------------------------

    @property
    def n_cells(self) -> int:
        """Cells of llama.cpp's cache."""
        return int(llama_cpp.llama_n_ctx(self.ctx))

    @property
    def vocab(self) -> Any:
        """llama_vocab pointer."""
        return llama_cpp.llama_model_get_vocab(self.model)

    def read_batch(self, tokens: Sequence[int], position: int) -> None:
        """What ``eval`` does for one batch, at llama.cpp's positions from ``position`` on.

        Raises:
            KVCacheError: llama.cpp could not read it.
        """
        start, n = self.n_tokens, len(tokens)
        self._batch.set_batch(batch=tokens, n_past=position, logits_all=self._logits_all)
        # Until the batch counts, llama.cpp's logits may be those after tokens that were not read:
        # an interrupt while it decodes comes when it is done.
        self._requires_eval = True
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            raise KVCacheError(
                f"llama.cpp could not read {n} tokens after the first {start}: {error}. The "
                f"conversation ends after those {start}; load the model with verbose=True to "
                "see llama.cpp's messages"
            ) from error
        self.input_ids[start : start + n] = tokens
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n * self._n_vocab,))
            see = self._see_logits or self.keep_logits
            see(start, logits.reshape(n, -1))
        self.n_tokens += n
        self._requires_eval = False

    def remove_cells(self, position: int) -> None:
        """Remove llama.cpp's positions from this one on."""
        self._ctx.kv_cache_seq_rm(-1, position, -1)

    def take_over(self, tokens: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Go on after these tokens, which the cache holds since it was restored. There are no
        logits until another token is read."""
        self._requires_eval = True
        self.n_tokens = 0  # an interrupt in between leaves no mixture of two texts
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens = len(tokens)

    def load_state(self, state: Any) -> None:
        """Of llama_cpp's ``save_state``.

        Raises:
            SessionError: llama.cpp does not take it; nothing is read then.
        """
        try:
            super().load_state(state)
        except (RuntimeError, ValueError) as error:
            # whatever was changed by then; the base class has also taken over arrays of other sizes
            self.input_ids = np.ndarray((self._n_ctx,), dtype=np.intc)
            self.reset()
            raise SessionError(
                "llama.cpp rejects this state, which was saved with another model or other "
                f"settings ({error}). The conversation is empty now"
            ) from error

    @property
    def keeps_logits(self) -> bool:
        """Whether ``scores`` has the logits of all tokens read (logits_all, or a draft_model)."""
        return self._logits_all

    @contextlib.contextmanager
    def logits_to(self, see: SeeLogits) -> Iterator[None]:
        """Inside, ``see(first, logits)`` is called for every batch that ``read_batch`` reads:
        f32 [n, n_vocab], after each of the tokens from number ``first`` on, valid until ``see``
        returns. ``scores`` gets none of them."""
        usual = self._logits_all, self._see_logits
        self._logits_all, self._see_logits = True, see
        try:
            yield
        finally:
            self._logits_all, self._see_logits = usual

    def newest_logits(self) -> FloatArray:
        """f32 [n_vocab] after the last token read, valid until the next batch."""
        row = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(row, shape=(self._n_vocab,))

    def likeliest(self) -> int:
        """The likeliest token to come.

        Raises:
            KVCacheError: there is none.
        """
        logits = self.newest_logits()
        if not np.isfinite(logits).any():
            raise KVCacheError(
                "the model computes no finite probability for any token, so it cannot write"
            )
        return int(np.nanargmax(logits))

    def keep_logits(self, start: int, logits: FloatArray) -> None:
        """With ``logits_all``: put those of the tokens from ``start`` on, f32 [n, n_vocab], into
        ``scores``."""
        end = start + len(logits)
        if end > len(self.scores):
            self._make_rows(end)
        self.scores[start:end] = logits

    def _make_rows(self, n: int) -> None:
        """Let ``scores`` have rows for n tokens at least, and more than it had by half: the logical
        context may be far longer than there is memory for rows."""
        rows = min(self.n_ctx(), max(n, len(self.scores) * 3 // 2))
        try:
            scores = np.empty((rows, self._n_vocab), np.single)
        except MemoryError as error:
            raise MemoryError(
                f"the logits of {rows} tokens take {rows * self._n_vocab * 4 / 2**30:.1f} "
                "GiB, and logits_all and draft_model keep those of all tokens: leave both "
                "out, or read less (a lower n_ctx refuses longer texts at once)"
            ) from error
        scores[: len(self.scores)] = self.scores
        self.scores = scores

    # -- chat templates ----------------------------------------------------------------------

    @property
    def lacks_chat_template(self) -> bool:
        """The model file has no chat template, and none was asked for: it may be a base model,
        which continues texts. llama_cpp takes "llama-2" then."""
        return self._fell_back and self.chat_handler is None and self.chat_format == "llama-2"

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """As in llama_cpp.Llama, by ``chat_completion_handler``."""
        given = _CHAT.bind(self, messages, *args, **kwargs)
        given.apply_defaults()
        del given.arguments["self"]
        return self.chat_completion_handler()(llama=self, **given.arguments)

    def chat_completion_handler(self) -> Any:
        """llama_cpp's chat completion handler that ``create_chat_completion`` calls."""
        return (
            self.chat_handler
            or self._chat_handlers.get(self.chat_format)
            or llama_chat_format.get_chat_completion_handler(self.chat_format)
        )


def generate_arguments(llm: Any, tokens: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The arguments of ``generate``, by their names."""
    arguments = _GENERATE.bind(llm, tokens, *args, **kwargs).arguments
    del arguments["self"]
    return arguments


def tokens_beyond_context(error: ValueError) -> str | None:
    """How many tokens a prompt has of which llama_cpp says that it is too long; None if it says
    anything else."""
    text = str(error)
    return text.partition("(")[2].partition(")")[0] if "exceed context window" in text else None
