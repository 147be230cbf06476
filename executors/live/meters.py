"""What the service counts of itself, for Prometheus: base units, and no label that names a request or a user."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


class Meters:
    """The counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.ended = Counter("hybridsd_live_requests", "Requests ended", ["status", "reason"], registry=registry)
        self.restarts = Counter("hybridsd_live_restarts", "Requests whose worker died with them", registry=registry)
        self.sent_bytes = Counter("hybridsd_live_payload_sent_bytes", "Images and hand-overs sent", registry=registry)
        self.wait = Histogram("hybridsd_live_wait_seconds", "Waiting for a worker", buckets=_SECONDS, registry=registry)
        self.held = Histogram(
            "hybridsd_live_cloud_seconds", "A worker held by one request", buckets=_SECONDS, registry=registry
        )

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody looks."""
        Gauge(name, what, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
