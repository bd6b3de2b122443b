"""The line in front of the contexts. Jobs here wait for the test, never for the clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.packages import needs

needs("fastapi", "server")

from kvp_edge.server.errors import APIError  # noqa: E402
from kvp_edge.server.workers import Line  # noqa: E402

LONG = 60.0  # seconds after which a test has failed


class Job:
    """Runs until ``go``, or until it is cancelled if it looks."""

    def __init__(self, done: list[Any], name: Any, *, looks: bool = False) -> None:
        self.cancelled = False
        self._done, self._name, self._looks = done, name, looks
        self.started, self.go, self.ended = (threading.Event() for _ in range(3))
        self.failed: Exception | None = None

    def run(self, worker: Any) -> None:
        self.started.set()
        while not self.go.wait(0.01 if self._looks else LONG):
            if self.cancelled:
                break
        self._done.append((self._name, worker))
        self.ended.set()

    def fail(self, error: Exception) -> None:
        self.failed = error
        self.ended.set()


Made = Callable[..., Line]


@pytest.fixture
def made() -> Iterator[Made]:
    lines = []

    def make(workers: list[Any], most: int) -> Line:
        lines.append(Line(workers, most, closed.append))
        return lines[-1]

    closed: list[Any] = []
    yield make
    for line in lines:
        line.end()


def busy(line: Line, done: list[Any]) -> Job:
    """A line whose only worker is at this job."""
    job = Job(done, "first")
    line.put(job)
    assert job.started.wait(LONG)
    return job


def wait(*jobs: Job) -> None:
    for job in jobs:
        assert job.ended.wait(LONG)


def test_jobs_are_done_in_the_order_in_which_they_came(made: Made) -> None:
    done: list[Any] = []
    line = made(["w"], 100)
    first = busy(line, done)
    jobs = [Job(done, i) for i in range(50)]
    for job in jobs:
        job.go.set()
        line.put(job)
    assert (line.waiting, line.at_work) == (50, 1)
    first.go.set()
    wait(first, *jobs)
    assert [name for name, _ in done] == ["first", *range(50)]


def test_exactly_so_many_may_wait_and_the_next_is_told_when_to_come_back(made: Made) -> None:
    done: list[Any] = []
    line = made(["w"], 3)
    first = busy(line, done)
    jobs = [Job(done, i) for i in range(3)]
    for job in jobs:
        job.go.set()
        line.put(job)
    with pytest.raises(APIError, match="3 requests are waiting, and no more may") as full:
        line.put(Job(done, "too many"))
    assert (full.value.status, full.value.code) == (503, "queue_full")
    assert full.value.headers is not None
    assert int(full.value.headers["Retry-After"]) >= 1
    first.go.set()
    wait(*jobs)
    last = Job(done, "last")
    last.go.set()
    line.put(last)  # there is room again
    wait(last)
    assert [name for name, _ in done] == ["first", 0, 1, 2, "last"]


def test_cancelled_jobs_make_room_and_are_passed_over(made: Made) -> None:
    done: list[Any] = []
    line = made(["w"], 2)
    first = busy(line, done)
    gone, stays, new = Job(done, "gone"), Job(done, "stays"), Job(done, "new")
    line.put(gone)
    line.put(stays)
    gone.cancelled = True
    assert line.waiting == 1
    line.put(new)
    assert line.waiting == 2
    for job in (first, stays, new):
        job.go.set()
    wait(first, stays, new)
    assert [name for name, _ in done] == ["first", "stays", "new"]
    assert not gone.started.is_set()


def test_a_job_cancelled_in_a_line_with_room_is_passed_over(made: Made) -> None:
    done: list[Any] = []
    line = made(["w"], 9)
    first = busy(line, done)
    gone, last = Job(done, "gone"), Job(done, "last")
    line.put(gone)
    line.put(last)
    gone.cancelled = True
    first.go.set()
    last.go.set()
    wait(last)
    assert not gone.started.is_set()


def test_each_worker_has_a_thread_of_its_own(made: Made) -> None:
    done: list[Any] = []
    line = made(["a", "b"], 1)
    one, other = Job(done, 1), Job(done, 2)
    line.put(one)
    assert one.started.wait(LONG)
    line.put(other)
    assert other.started.wait(LONG)  # while the first one still runs
    assert (line.at_work, line.waiting) == (2, 0)
    one.go.set()
    other.go.set()
    wait(one, other)
    assert {worker for _, worker in done} == {"a", "b"}


def test_the_end_stops_what_is_at_work_fails_what_waits_and_closes_workers() -> None:
    done: list[Any] = []
    closed: list[Any] = []
    line = Line(["a", "b"], 10, closed.append)
    at_work = [Job(done, i, looks=True) for i in range(2)]
    for job in at_work:
        line.put(job)
        assert job.started.wait(LONG)
    waiting = [Job(done, i) for i in range(2, 5)]
    for job in waiting:
        line.put(job)
    line.end()
    assert {name for name, _ in done} == {0, 1}
    assert sorted(closed) == ["a", "b"]
    for job in waiting:
        assert isinstance(job.failed, APIError)
        assert (job.failed.status, job.failed.code) == (503, "server_stopping")
        assert not job.started.is_set()
    with pytest.raises(APIError, match="the server is stopping"):
        line.put(Job(done, "late"))


def test_the_end_of_an_idle_line_closes_its_workers() -> None:
    closed: list[Any] = []
    Line(["a"], 1, closed.append).end()
    assert closed == ["a"]


def test_a_job_that_cannot_be_told_of_the_end_keeps_nobody_else_from_it() -> None:
    class Broken(Job):
        def fail(self, error: Exception) -> None:
            raise RuntimeError("its loop is closed")

    done: list[Any] = []
    line = Line(["w"], 10, lambda _: None)
    first = Job(done, "first", looks=True)
    line.put(first)
    assert first.started.wait(LONG)
    broken, waits = Broken(done, 1), Job(done, 2)
    line.put(broken)
    line.put(waits)
    line.end()
    assert waits.failed is not None
