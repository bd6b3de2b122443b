"""One context of llama.cpp, and the chats that take turns in its cells."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvp_edge.arrays import TokenIds
from kvp_edge.errors import ContextLengthError, KVPError
from kvp_edge.server import chats, events
from kvp_edge.server.asked_by import Word, asked_by
from kvp_edge.server.chats import Chat, Chats
from kvp_edge.server.errors import Cancelled, bad_request
from kvp_edge.server.said import Said
from kvp_edge.server.served import ServedLlama, Turn
from kvp_edge.server.tools import Reply
from kvp_edge.text.chat_prompt import prompt_tokens

#: Seconds in which who looks at the cache looks again.
_LOOKS_AGAIN = 30.0

#: No text has so many characters for each of its tokens.
_CHARACTERS = 64

#: llama_cpp's name of the format that a model file's own template gives.
_OWN_TEMPLATE = "chat_template.default"

Send = Callable[[events.Event], None]


@dataclass(frozen=True)
class Ask:
    """What is asked of a context.

    Attributes:
        messages: of a chat, in OpenAI's form; None: ``prompt`` is a text.
        prompt: text, or token ids.
        how: keyword arguments of Llama.create_completion.
        tools: how tools are offered, and calls found; None: neither.
        n: replies.
        top_logprobs: see Turn.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] = ""
    how: dict[str, Any] = field(default_factory=dict)
    tools: Reply | None = None
    n: int = 1
    top_logprobs: int | None = None


class Context:
    """Serves requests, one after the other, in its own thread.

    Args:
        llm: nobody else's.
        store: of all contexts.
        keeps_at_once: chats are kept after every turn, not only when another one needs the cells.

    Attributes:
        chat: the one in the cells.
        tokens_per_second: at which the last reply was written.
        asked_by: the words that asked for what came back before it, if somebody watches.
    """

    def __init__(self, llm: ServedLlama, store: Chats, *, keeps_at_once: bool) -> None:
        self.llm, self._store, self._keeps_at_once = llm, store, keeps_at_once
        self.chat: Chat | None = None
        self.tokens_per_second: float | None = None
        self.asked_by: list[Word] = []
        self._question = ""  # what the user said last
        self._watched_until = 0.0
        self._is_kept = True

    def close(self) -> None:
        self._keep()
        self.llm.close()

    def watch(self) -> None:
        """Somebody looks at the cache; see ``explain``."""
        self._watched_until = time.monotonic() + _LOOKS_AGAIN
        self.llm.keeps_queries = True

    def explain(self, idle: Callable[[], bool]) -> None:
        """While nobody waits: find out which words asked for what came back last."""
        self.llm.keeps_queries = time.monotonic() < self._watched_until
        if self.llm.keeps_queries:
            self.asked_by = asked_by(self.llm, self._question, idle)

    # -- a request ---------------------------------------------------------------------------

    def serve(self, ask: Ask, cancelled: Callable[[], bool], send: Send) -> None:
        """Answer, in events. A reply that nobody waits for any more is kept as far as it was
        written.

        Raises:
            KVPError: nothing could be read or written.
            Cancelled: nobody waits any more.
        """
        llm = self.llm
        self._require_possible(ask)
        tokens = self._tokens_of(ask)
        if len(tokens) >= llm.n_ctx():
            raise ContextLengthError(
                f"the prompt has {len(tokens)} tokens, too many for this server's longest "
                f"conversation of {llm.n_ctx()}: shorten it, or start the server with a larger "
                "--n-ctx"
            )
        resident = self.chat.id if self.chat is not None else None
        place = self._store.find(ask.messages, tokens, resident)
        try:
            self._go_to(place.source, place.chat)
        except BaseException:
            self._store.release(place.chat)
            raise
        self.chat = place.chat
        self._reply(place.chat, ask, tokens, cancelled, send)

    def _require_possible(self, ask: Ask) -> None:
        """Refuse what is surely too long before it is tokenized, which takes seconds for
        megabytes.

        Raises:
            ContextLengthError: it is.
        """
        texts = [m["content"] for m in ask.messages] if ask.messages is not None else [ask.prompt]
        n, most = sum(map(len, texts)), _CHARACTERS * self.llm.n_ctx()
        if n > most:
            raise ContextLengthError(
                f"the prompt has {n} characters, too many for this server's longest conversation "
                f"of {self.llm.n_ctx()} tokens: shorten it, or start the server with a larger "
                "--n-ctx"
            )

    def _tokens_of(self, ask: Ask) -> TokenIds:
        if ask.messages is not None:
            shown = ask.tools.tools if ask.tools is not None else None
            how = {"tools": shown} if shown else {}
            try:
                messages = self._for_template(ask)
                return np.array(prompt_tokens(self.llm, messages, **how), np.int32)
            except KVPError:
                raise
            except Exception as error:  # a template is a program, and may fail in any way
                raise bad_request(
                    "the model's chat template cannot show these messages: "
                    f"{str(error) or type(error).__name__}",
                    "messages",
                ) from error
        if isinstance(ask.prompt, str):
            return np.array(self.llm.prompt_of(ask.prompt), np.int32)
        return np.array(ask.prompt, np.int32)

    def _for_template(self, ask: Ask) -> list[dict[str, Any]]:
        """The messages as the chat template can show them."""
        own = self.llm.chat_handler is None and self.llm.chat_format == _OWN_TEMPLATE
        template = self.llm.metadata.get("tokenizer.chat_template", "") if own else ""
        return (ask.tools or Reply()).messages(ask.messages or [], template)

    def _go_to(self, source: Chat | None, goes_on: Chat) -> None:
        """Have the cache of a chat in the cells, or none.

        Args:
            goes_on: the chat that will be in the cells from then on.
        """
        if source is not None and self._holds(source):
            if goes_on is not source:
                self._keep()
            return
        self._keep()
        self.chat = None
        if source is not None:
            try:
                chats.bring(self.llm, source)
                return
            except (KVPError, OSError, MemoryError) as error:
                warnings.warn(f"a chat is read again: {error}", stacklevel=2)
        self.llm.reset()

    def _holds(self, chat: Chat) -> bool:
        """Whether its cache is in the cells, unless another context has gone on with it since."""
        if chat is not self.chat:
            return False
        tokens = self.llm.input_ids[: self.llm.n_tokens]
        return chat.kept is None or np.array_equal(tokens, chat.tokens)

    def _keep(self) -> None:
        """Keep what is in the cells for later, if it is not."""
        chat = self.chat
        if self._is_kept or chat is None or chat.deleted:
            return
        try:
            self._store.keep(chat, self.llm)
        except (KVPError, OSError, MemoryError) as error:
            chat.kept = None
            problem = f"a chat cannot be kept, and will be read again: {error or 'out of memory'}"
            if self._store.folder is not None:
                problem += ". Its last turn is lost when the server ends"
            warnings.warn(problem, stacklevel=2)
        self._is_kept = True

    def _reply(
        self, chat: Chat, ask: Ask, tokens: TokenIds, cancelled: Callable[[], bool], send: Send
    ) -> None:
        llm = self.llm
        self.asked_by = []
        messages = list(ask.messages or [])
        asked = (m["content"] for m in reversed(messages) if m["role"] == "user")
        self._question = next(asked, "")
        turns, cached, said = list[Turn](), None, None
        self._is_kept = False
        try:
            for index in range(ask.n):
                turn = llm.turn = Turn(cancelled, ask.top_logprobs)
                turns.append(turn)
                said = Said(ask.tools)
                for text, ending in self._texts(ask, index):
                    if cached is None:
                        first = len(tokens) if turn.first is None else turn.first
                        cached = min(first, len(tokens))
                        send(events.Began(chat.id, len(tokens), cached))
                    deltas = said.add(text, ending)
                    send(events.Piece(index, deltas, said.new_tokens(turn), said.ending))
                self._measure(turn)
        except Cancelled:
            self._remember(chat, messages, said)
            raise
        except BaseException:
            self._fail(chat)
            raise
        self._remember(chat, messages, said)
        send(events.Done(len(tokens), cached or 0, turns, dict(llm.kv_stats)))

    def _texts(self, ask: Ask, index: int) -> Iterator[tuple[str, str | None]]:
        """Pieces of text, the last with the reason why it ends."""
        how = dict(ask.how)
        if index and how.get("seed") is not None:
            how["seed"] += index
        if ask.messages is None:
            for chunk in self.llm.create_completion(ask.prompt, stream=True, **how):
                choice = chunk["choices"][0]
                yield choice["text"], choice["finish_reason"]
            return
        if ask.tools is not None:
            how.update(ask.tools.arguments())
        for chunk in self.llm.create_chat_completion(self._for_template(ask), stream=True, **how):
            choice = chunk["choices"][0]
            yield choice["delta"].get("content") or "", choice["finish_reason"]

    def _measure(self, turn: Turn) -> None:
        if turn.began is not None and len(turn.written) > 1:
            seconds = time.perf_counter() - turn.began
            self.tokens_per_second = (len(turn.written) - 1) / max(seconds, 1e-9)

    def _remember(self, chat: Chat, messages: list[dict[str, Any]], said: Said | None) -> None:
        """The chat is what was read, with what was said."""
        llm = self.llm
        if llm.n_tokens == 0:  # nothing came of it
            self._fail(chat)
            return
        reply = said.message() if said is not None else None
        chat.messages = messages + ([reply] if reply and messages else [])
        chat.tokens = llm.input_ids[: llm.n_tokens].astype(np.int32)
        chat.updated = time.time()
        if self._keeps_at_once:
            self._keep()
        self._store.put(chat)  # last: another context may go on with it from here on

    def _fail(self, chat: Chat) -> None:
        """Nothing was answered: a chat that was there before is what it was, in as many tokens as
        are read of it by now; a new one is none."""
        if self.llm.n_tokens and self._store.get(chat.id) is chat:
            chat.tokens = self.llm.input_ids[: self.llm.n_tokens].astype(np.int32)
        else:
            self.chat = None
        self._store.release(chat)
