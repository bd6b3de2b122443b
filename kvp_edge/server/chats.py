"""Every chat that the server knows: what was said, its tokens, and its cache with the KV log.

In memory, or each in a session file of a folder, where they survive the process. The least recently
used ones are forgotten when all of them take more than a number of bytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvp_edge import files, sessions
from kvp_edge.arrays import TokenIds
from kvp_edge.cache import session_file
from kvp_edge.cache.saved_state import SavedState
from kvp_edge.errors import SessionError
from kvp_edge.llama import Llama
from kvp_edge.text.retokenize import n_equal

Message = dict[str, Any]

#: So many equal tokens are worth more than a cache of its own for a new chat.
_WORTH_BRANCHING = 64

_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(eq=False)
class Chat:
    """One chat. What it holds changes only as a whole, by ``Chats``.

    Attributes:
        id: 16 hexadecimal digits.
        parent: the chat that it was branched from.
        messages: all of them, the last reply too; none of what was no chat (/v1/completions).
        tokens: int32, those that were read.
        kept: its cache, where it lies when it is not in cells; None: it must be read again.
        nbytes: of ``kept``.
        created, updated: seconds since 1970.
        busy: a worker is at it.
        deleted: somebody did, or it was the oldest.
        file: held while its file is read or written: another context may want to branch from it.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    parent: str | None = None
    messages: list[Message] = field(default_factory=list)
    tokens: TokenIds = field(default_factory=lambda: np.empty(0, np.int32))
    kept: SavedState | Path | None = None
    nbytes: int = 0
    created: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    busy: bool = False
    deleted: bool = False
    file: threading.Lock = field(default_factory=threading.Lock)

    @property
    def title(self) -> str:
        """The beginning of what its user said first."""
        said = next((m for m in self.messages if m["role"] == "user"), None)
        return " ".join(str(said["content"]).split())[:80] if said else ""


@dataclass(frozen=True)
class Place:
    """Where a request goes on.

    Attributes:
        chat: that it belongs to.
        source: the chat whose cache has its beginning; it may be the same; None: none does.
    """

    chat: Chat
    source: Chat | None


class Chats:
    """The store. Threads may share it.

    Args:
        folder: for session files; None: in memory.
        limit: bytes.
        forgot: called with each chat that was deleted because of it.

    Raises:
        SessionError: another server uses this folder.
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self, folder: Path | None, limit: int, forgot: Callable[[Chat], None] = lambda _: None
    ) -> None:
        self.folder, self._limit, self._forgot = folder, limit, forgot
        self._lock = threading.RLock()
        self._chats: dict[str, Chat] = {}  # the least recently used first
        self._held = contextlib.ExitStack()
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held.enter_context(_only_here(folder))

    def close(self) -> None:
        self._held.close()

    # -- what there is -----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._chats)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(chat.nbytes for chat in self._chats.values())

    def all(self) -> list[Chat]:
        """The newest first."""
        with self._lock:
            return sorted(self._chats.values(), key=lambda chat: -chat.updated)

    def get(self, id: str) -> Chat | None:
        return self._chats.get(id)

    def read_folder(self, llm: Llama) -> list[str]:
        """Take up what an earlier server left in the folder.

        Args:
            llm: chats of another model are left alone; those of other settings are read again when
                somebody goes on with them.

        Returns:
            A sentence for each file that cannot be used.
        """
        assert self.folder is not None
        problems = []
        made_with = sessions.settings(llm)
        for path in sorted(self.folder.glob("*.kvp")):
            try:
                chat = _of_file(path, made_with, llm)
            except SessionError as error:
                problems.append(str(error))
                continue
            self._chats[chat.id] = chat
        self._chats = {chat.id: chat for chat in reversed(self.all())}
        return problems

    # -- where a request belongs -------------------------------------------------------------

    def find(
        self, messages: Sequence[Message] | None, tokens: TokenIds, resident: str | None
    ) -> Place:
        """The chat that a request goes on with, which is busy from now on, or a new one.

        Args:
            messages: None: it is no chat.
            tokens: int32, of its prompt.
            resident: the chat in the cells, which is the first choice among equals.
        """
        with self._lock:
            chat = self._continued(messages, tokens)
            if chat is not None and not chat.busy:
                chat.busy = True
                return Place(chat, chat)
            parent = chat or self._parted_from(messages or [])
            new = Chat(parent=parent.id if parent else None, busy=True)
            return Place(new, self._alike(tokens, resident))

    def _continued(self, messages: Sequence[Message] | None, tokens: TokenIds) -> Chat | None:
        found, length = None, 0
        for chat in self._chats.values():
            if messages is None:
                fits = not chat.messages and _begins(tokens, chat.tokens)
                n = len(chat.tokens)
            else:
                fits = bool(chat.messages) and continues(messages, chat.messages)
                n = len(chat.messages)
            if fits and n >= length:
                found, length = chat, n
        return found

    def _parted_from(self, messages: Sequence[Message]) -> Chat | None:
        """The chat that shares most first messages, if the user's first is among them."""
        found, best = None, next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
        for chat in self._chats.values():
            n = n_same(messages, chat.messages)
            if n > best:
                found, best = chat, n
        return found

    def _alike(self, tokens: TokenIds, resident: str | None) -> Chat | None:
        """The chat with the longest equal beginning, if that is long enough; of several the one in
        the cells, or the newest."""
        found, best = None, _WORTH_BRANCHING - 1
        for chat in self._chats.values():
            if chat.kept is None and chat.id != resident:
                continue
            n = n_equal(tokens, chat.tokens)
            if n > best or (n == best and found is not None and found.id != resident):
                found, best = chat, n
        return found

    # -- what becomes of it ------------------------------------------------------------------

    def put(self, chat: Chat) -> None:
        """A chat was gone on with: it is the most recently used one, and no longer busy."""
        with self._lock:
            chat.busy = False
            if chat.deleted:
                return
            self._chats.pop(chat.id, None)
            self._chats[chat.id] = chat
            self._forget_the_oldest(chat)

    def release(self, chat: Chat) -> None:
        """Nothing came of it: as it was before."""
        with self._lock:
            chat.busy = False

    def delete(self, id: str) -> bool:
        """
        Returns:
            Whether there was one.
        """
        with self._lock:
            chat = self._chats.pop(id, None)
            if chat is None:
                return False
            chat.kept, chat.nbytes, chat.deleted = None, 0, True
            self._remove_file(chat)
            return True

    def _remove_file(self, chat: Chat) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.path_of(chat).unlink()

    def _forget_the_oldest(self, but: Chat) -> None:
        total = self.nbytes
        for chat in [*self._chats.values()]:
            if total <= self._limit:
                return
            if chat is not but and not chat.busy:
                total -= chat.nbytes
                self.delete(chat.id)
                self._forgot(chat)

    def path_of(self, chat: Chat) -> Path:
        assert self.folder is not None
        return self.folder / f"{chat.id}.kvp"

    def keep(self, chat: Chat, llm: Llama) -> None:
        """Keep the cache of a chat, which is in the cells, so that these are free for another.

        Raises:
            SessionError, KVCacheError: it cannot be kept as asked for.
        """
        kept: SavedState | Path
        if self.folder is not None:
            kept = self.path_of(chat)
            with chat.file:
                llm.save_session(kept, _facts(chat))
        else:
            kept = llm.save_state()
        with self._lock:
            if chat.deleted:  # while it was written
                self._remove_file(chat)
                return
            chat.kept, chat.nbytes = kept, _nbytes(kept, chat)


def _nbytes(kept: SavedState | Path, chat: Chat) -> int:
    if isinstance(kept, Path):
        return kept.stat().st_size
    return int(kept.llama_state_size) + chat.tokens.nbytes


def bring(llm: Llama, chat: Chat) -> None:
    """Have the cache of a chat in the cells, in place of what is there.

    Raises:
        KVPError: it cannot be read.
    """
    if isinstance(chat.kept, Path):
        with chat.file:
            llm.load_session(chat.kept)
    elif chat.kept is not None:
        llm.load_state(chat.kept)
    else:
        raise SessionError("its cache was not kept")


# -- comparing ------------------------------------------------------------------------------------


def continues(messages: Sequence[Message], known: Sequence[Message]) -> bool:
    """Whether a request's messages begin with these. What templates and clients change of a text on
    the way, spaces at its ends, does not count; nor do the ids of tool calls."""
    return len(known) <= len(messages) and n_same(messages, known) == len(known)


def n_same(messages: Sequence[Message], known: Sequence[Message]) -> int:
    """How many of the first messages are the same."""
    pairs = zip(messages, known, strict=False)
    return sum(1 for _ in takewhile(lambda pair: _same(*pair), pairs))


def _same(one: Message, other: Message) -> bool:
    return (
        one["role"] == other["role"]
        and str(one["content"]).strip() == str(other["content"]).strip()
        and _calls(one) == _calls(other)
    )


def _calls(message: Message) -> list[tuple[str, str]]:
    calls = message.get("tool_calls") or []
    return [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


def _begins(tokens: TokenIds, known: TokenIds) -> bool:
    return len(known) > 0 and n_equal(tokens, known) == len(known)


# -- files ----------------------------------------------------------------------------------------


def _facts(chat: Chat) -> dict[str, Any]:
    """What a session file holds of a chat besides its tokens and its cache."""
    return {
        "parent": chat.parent,
        "messages": chat.messages,
        "created": chat.created,
        "updated": chat.updated,
    }


def _of_file(path: Path, made_with: dict[str, Any], llm: Llama) -> Chat:
    """
    Raises:
        SessionError: it is no chat of this server's model.
    """
    header, arrays = session_file.read(path)
    session_file.require_conversation(f"'{path}'", header, arrays)
    extra = header["extra"]
    match extra:
        case {
            "parent": None | str() as parent,
            "messages": [*messages],
            "created": float(created),
            "updated": float(updated),
        } if _ID.fullmatch(path.stem) and all(map(_is_message, messages)):
            pass
        case _:
            raise SessionError(f"'{path}' was not saved by kvp-edge serve")
    if header["made_with"].get("model") != llm.model_identity:
        raise SessionError(f"'{path}' is a chat with another model")
    session_file.require_tokens(f"'{path}'", arrays["tokens"], llm.n_vocab())
    return Chat(
        id=path.stem,
        parent=parent,
        messages=messages,
        tokens=arrays["tokens"],
        kept=path if header["made_with"] == made_with else None,
        nbytes=path.stat().st_size,
        created=created,
        updated=updated,
    )


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


@contextlib.contextmanager
def _only_here(folder: Path) -> Any:
    """Inside, no other server uses the folder."""
    file: BinaryIO
    with open(os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        if not files.lock(file):
            raise SessionError(f"another server keeps its chats in '{folder}': name another folder")
        try:
            yield
        finally:
            files.unlock(file)
