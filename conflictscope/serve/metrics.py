"""What the server counts."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """What ``/metrics`` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        about: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("conflictscope_requests", "Requests by status", ["path", "status"], **about)
        self.tokens = Counter("conflictscope_generated_tokens", "Tokens by intervention", ["intervention"], **about)
        self.waiting = Gauge("conflictscope_waiting_requests", "Answers that wait to be begun", **about)
        self.batch = Gauge("conflictscope_batch_rows", "Rows that share the model's passes", **about)
        self.seconds = Histogram("conflictscope_generation_seconds", "Seconds of an answer, without waiting", **about)
