"""What monitoring reads: GET /metrics, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from kvp_edge.server.events import Done

# when each counter began would be half of all lines
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

#: What is measured when it is asked for.
_NOW = {
    "queue": "requests that wait",
    "at_work": "requests that are served",
    "chats": "chats that are kept",
    "chat_bytes": "bytes of the chats that are not in cells",
    "tokens_seen": "tokens of the conversations in the cells",
    "tokens_resident": "of these, in the cells (of each head)",
    "tokens_logged": "of these, in the KV log",
    "log_bytes": "bytes of the KV logs of these conversations",
    "kv_bytes": "bytes of the cells",
}


class Metrics:
    """Counts since the server began, and what is there now.

    Args:
        now: name -> what it is now: see ``_NOW``.
    """

    def __init__(self, now: dict[str, Callable[[], float]]) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"kvp_{name}", help, labels, registry=registry)

        self._requests = counter("requests", "answers, by path and status", "path", "status")
        self._tokens = counter(
            "tokens", "prompt tokens, those of them not read again, and written ones", "kind"
        )
        self._evictions = counter("evictions", "evictions from the cells")
        self._recalled = counter("recalled", "tokens that came back before a reply")
        self._spent = counter("milliseconds", "spent on evictions and on recall", "on")
        self._first = Histogram(
            "kvp_first_token_seconds",
            "from a request to its first token, waiting included",
            buckets=_SECONDS,
            registry=registry,
        )
        assert now.keys() == _NOW.keys()
        for name, value in now.items():
            Gauge(f"kvp_{name}", _NOW[name], registry=registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def began(self, seconds: float) -> None:
        self._first.observe(seconds)

    def done(self, done: Done) -> None:
        self._tokens.labels("prompt").inc(done.n_prompt)
        self._tokens.labels("cached").inc(done.n_cached)
        self._tokens.labels("written").inc(done.n_written)
        for turn in done.turns:
            self._evictions.inc(turn.n_evictions)
            self._recalled.inc(turn.n_recalled)
            self._spent.labels("evictions").inc(turn.eviction_ms)
            self._spent.labels("recall").inc(turn.recall_ms)

    def text(self) -> tuple[bytes, str]:
        """The answer, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
