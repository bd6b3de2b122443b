"""One object serves one call at a time: what is refused, what is not, and what survives."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvp_edge import InUseError
from kvp_edge import one_call as module
from kvp_edge.one_call import Calls
from support.interrupt import interrupted


@contextlib.contextmanager
def elsewhere(calls: Calls, name: str = "eval") -> Iterator[None]:
    """Another thread is inside an own call."""
    inside, leave = threading.Event(), threading.Event()

    def call() -> None:
        with calls.own(name):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def in_another_thread(do: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result(60)


def enter(calls: Calls, name: str = "eval", changes: Any = "text") -> None:
    with calls.own(name, changes):
        pass


def look(calls: Calls) -> None:
    with calls.look():
        pass


@pytest.mark.parametrize("changes", ["text", "cache", "nothing"])
def test_a_call_from_another_thread_is_refused_at_once_and_both_are_named(changes: Any) -> None:
    calls = Calls()
    with elsewhere(calls, "generate"):
        with pytest.raises(InUseError, match="'reset' .* while 'generate' .* in another thread"):
            enter(calls, "reset", changes)
        look(calls)
    enter(calls, "reset", changes)


def test_a_method_may_call_others_of_its_object() -> None:
    calls = Calls()
    with calls.own("create_completion"):
        enter(calls)
        with calls.own("generate"):
            enter(calls)
        with pytest.raises(InUseError):
            in_another_thread(lambda: enter(calls))  # the outer one is still at work
    in_another_thread(lambda: enter(calls))


def test_an_exception_ends_a_call() -> None:
    calls = Calls()
    with pytest.raises(KeyError), calls.own("eval"), calls.own("reset"):
        raise KeyError
    in_another_thread(lambda: enter(calls))


def test_a_function_of_the_users_may_look_and_save_but_not_change() -> None:
    calls, done = Calls(), []

    def callback(x: int) -> int:
        look(calls)
        enter(calls, "save_session", "nothing")
        for changes in ("text", "cache"):
            with pytest.raises(InUseError, match="'reset' was called inside 'eval'"):
                enter(calls, "reset", changes)
        done.append(x)
        return x + 1

    lent = calls.lent(callback)
    with calls.own("eval"):
        assert lent(1) == 2
        enter(calls, "reset")  # by a method again
        with pytest.raises(ZeroDivisionError):
            calls.lent(lambda: 1 / 0)()
        enter(calls, "reset")
        assert lent(x=2) == 3
    assert done == [1, 2]
    calls.lent(lambda: enter(calls))()  # nobody is at work


def count(calls: Calls, n: int) -> Generator[int, int | None, None]:
    for i in range(n):
        enter(calls)
        assert (yield i) != -1


def test_between_the_steps_of_a_generator_the_object_is_free_and_its_steps_are_calls() -> None:
    calls = Calls()
    steps = calls.steps("generate", count(calls, 3))
    assert next(steps) == 0
    in_another_thread(lambda: enter(calls, "evict", "cache"))
    enter(calls, "save", "nothing")
    assert steps.send(7) == 1
    with elsewhere(calls), pytest.raises(InUseError, match="'generate' was called while 'eval'"):
        next(steps)


def test_a_generator_goes_on_in_any_thread_and_ends() -> None:
    calls = Calls()
    steps = calls.steps("generate", count(calls, 3))
    assert [in_another_thread(lambda: next(steps)), *steps] == [0, 1, 2]
    assert list(calls.steps("generate", count(calls, 0))) == []
    in_another_thread(lambda: enter(calls))


def test_a_generator_does_not_go_on_in_another_conversation() -> None:
    calls = Calls()
    steps = calls.steps("generate", count(calls, 3))
    assert next(steps) == 0
    enter(calls, "reset")
    with pytest.raises(InUseError, match="'generate' cannot continue"):
        next(steps)
    first, second = (calls.steps(name, count(calls, 2)) for name in ("first", "second"))
    assert [next(first), next(second)] == [0, 0]
    with pytest.raises(InUseError, match="'first' cannot continue"):
        next(first)
    assert list(second) == [1]


def test_a_generator_may_be_part_of_another_one() -> None:
    calls = Calls()

    def outer() -> Generator[int, None, None]:
        yield from calls.steps("inner", count(calls, 3))

    steps = calls.steps("outer", outer())
    assert next(steps) == 0
    enter(calls, "evict", "cache")
    assert list(steps) == [1, 2]


def test_a_forgotten_generator_is_closed_and_leaves_the_object_free() -> None:
    calls, closed = Calls(), []

    def inside() -> Generator[int, None, None]:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    steps = calls.steps("generate", inside())
    next(steps)
    del steps
    gc.collect()
    assert closed == [True]
    assert calls.close()


def test_closing_needs_that_nobody_is_there_and_then_all_are_refused() -> None:
    calls = Calls()
    steps = calls.steps("generate", count(calls, 3))
    next(steps)
    with elsewhere(calls), pytest.raises(InUseError, match="'close' was called while 'eval'"):
        calls.close()
    with calls.own("eval"), pytest.raises(InUseError, match="'close' was called inside 'eval'"):
        calls.close()
    with calls.look(), pytest.raises(InUseError, match="another thread reads"):
        calls.close()
    assert not calls.closed
    enter(calls)
    assert calls.close()
    assert not calls.close()
    for use in (lambda: enter(calls), lambda: look(calls), lambda: next(steps)):
        with pytest.raises(RuntimeError, match="was closed"):
            use()


def nested(calls: Calls) -> None:
    with calls.own("eval"), calls.look(), calls.own("reset"):
        calls.lent(lambda: None)()


def stepwise(calls: Calls) -> None:
    list(calls.steps("generate", count(calls, 2)))


@pytest.mark.parametrize("work", [nested, stepwise])
def test_an_interrupt_at_any_moment_leaves_the_object_free(work: Callable[[Calls], None]) -> None:
    def survives(at: int) -> bool:
        calls = Calls()
        came = interrupted(lambda: work(calls), at, module.__file__)
        in_another_thread(lambda: enter(calls))
        assert calls.close()
        return came

    moments = next(at for at in range(1000) if not survives(at))
    assert moments > 10


def test_many_threads_are_inside_one_at_a_time() -> None:
    calls, inside, refused = Calls(), [0], []

    def tries() -> None:
        for _ in range(2000):
            try:
                with calls.own("eval"):
                    inside[0] += 1
                    assert inside[0] == 1
                    inside[0] -= 1
            except InUseError:
                refused.append(1)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(tries) for _ in range(4)]:
            done.result()
    assert inside == [0]
    assert len(refused) < 8000
