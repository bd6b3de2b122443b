"""One object, one call at a time: who is using a model, so that nobody else does.

llama.cpp's contexts belong to one thread at a time and check nothing. Here a second call is refused
with a sentence. It does not wait: the first may be a reply of minutes, or it may be the caller's
own, one callback further out, which would wait for itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any, Literal

from kvp_edge.errors import ClosedError, InUseError

CLOSED = "this model was closed: load it again"

#: What a call may change: nothing; the cache, but not what was read; the conversation.
Changes = Literal["nothing", "cache", "text"]


class Calls:
    """The calls at work on one object.

    - At most one ``own`` call is at work. It may call further methods, for its own purposes; all
      others, in whatever thread, are refused.
    - While it runs a function of the user's (``lent``), that may only ``look``, and call methods
      that change nothing.
    - ``look`` is possible in any thread at any time, until the object is closed.
    - ``close`` is possible when no call is at work; after it every call is refused.

    Calls at work are known by weak references, and nothing but their own frames holds them. So a
    call is over with its frame at the latest, even if an interrupt comes between any two steps.
    """

    def __init__(self) -> None:
        self.closed = False
        # Held for a few steps, never while a call is at work. Re-entrant: a signal handler or a
        # finalizer may come in between.
        self._lock = threading.RLock()
        self._owner: Callable[[], Own | None] = _nobody
        self._lookers: weakref.WeakSet[Look] = weakref.WeakSet()
        self._text: object = None  # another one whenever the conversation is changed; see steps

    def own(self, name: str, changes: Changes = "text") -> Own:
        """``with calls.own("eval"):`` around what the method ``eval`` does.

        Raises:
            InUseError: on entering, when another call is at work.
            ClosedError: likewise, when the object is closed.
        """
        return Own(self, name, changes)

    def look(self) -> Look:
        """``with calls.look():`` around what reads, in whatever state a call at work leaves it.

        Raises:
            ClosedError: on entering, when the object is closed.
        """
        return Look(self)

    def lent(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the user's, as own calls call it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            owner = self._owner()
            if owner is None:
                return function(*args, **kwargs)
            before, owner.lent = owner.lent, True
            try:
                return function(*args, **kwargs)
            finally:
                owner.lent = before

        return call

    def steps(self, name: str, generator: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        """A generator of which every step is an own call.

        Between steps the object may be used otherwise, and the generator may be forgotten. But when
        the conversation was changed by others, its next step is refused.
        """
        with self.own(name):
            text = (
                self._text
            )  # of this call, or of the step of another generator that it is part of
            piece, more = _next(generator, None)
        try:
            while more:
                value = yield piece
                with self.own(name, "cache"):
                    if self._text is not text:
                        raise InUseError(
                            f"'{name}' cannot continue: the model was used for something else "
                            "since the last piece. Start it again"
                        )
                    piece, more = _next(generator, value)
        finally:
            generator.close()

    def close(self) -> bool:
        """Refuse every call from now on.

        Returns:
            False if they were refused already.

        Raises:
            InUseError: a call is at work.
        """
        with self._lock:
            if self.closed:
                return False
            owner = self._owner()
            if owner is not None:
                raise owner.refusal("close")
            if self._lookers:
                raise InUseError("'close' was called while another thread reads the model's state")
            self.closed = True
            return True


class Own:
    """See Calls.own."""

    __slots__ = ("__weakref__", "_calls", "_changes", "_name", "_thread", "lent")

    def __init__(self, calls: Calls, name: str, changes: Changes) -> None:
        self._calls = calls
        self._name = name
        self._changes = changes
        self._thread = threading.get_ident()
        self.lent = False  # whether a function of the user's is running

    def __enter__(self) -> None:
        calls = self._calls
        with calls._lock:
            if calls.closed:
                raise ClosedError(CLOSED)
            owner = calls._owner()
            if owner is None:
                calls._owner = weakref.ref(self)
                if self._changes == "text":
                    calls._text = object()
            elif owner._thread != self._thread or (owner.lent and self._changes != "nothing"):
                raise owner.refusal(self._name)

    def __exit__(self, *_: object) -> None:
        calls = self._calls
        if calls._owner() is self:
            calls._owner = _nobody

    def refusal(self, name: str) -> InUseError:
        """Why ``name`` cannot be called meanwhile."""
        if self._thread != threading.get_ident():
            return InUseError(
                f"'{name}' was called while '{self._name}' is running in another thread. A "
                "model serves one call at a time: wait for it, or load one model per thread"
            )
        return InUseError(
            f"'{name}' was called inside '{self._name}', by a callback (on_evict, a stopping "
            "criterion, a logits processor...). Callbacks may read (kv_stats, kv_indices) "
            "and save the model, but not change it"
        )


class Look:
    """See Calls.look."""

    __slots__ = ("__weakref__", "_calls")

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __enter__(self) -> None:
        calls = self._calls
        with calls._lock:
            if calls.closed:
                raise ClosedError(CLOSED)
            calls._lookers.add(self)

    def __exit__(self, *_: object) -> None:
        self._calls._lookers.discard(self)


def _nobody() -> None:
    """In place of a weak reference to an Own."""


def _next(generator: Generator[Any, Any, None], value: Any) -> tuple[Any, bool]:
    """Its next piece, and whether there was one."""
    try:
        return generator.send(value), True
    except StopIteration:
        return None, False


class Closed:
    """Stands where a closed object's parts were."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError(CLOSED)
