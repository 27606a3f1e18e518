"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from vflax.generate.request import Stats
from vflax.serve.answers import Arrival
from vflax.serve.record import Record

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class Metrics:
    """A server's own registry.

    stats: how the engine stands; it is asked whenever the metrics are.
    """

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter(
            "vflax_http_requests", "Requests that were answered", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "vflax_http_request_seconds", "From a request's first byte to the end of its answer", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "vflax_time_to_first_token_seconds", "From a request's first byte to its first token",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "vflax_time_between_tokens_seconds", "From one token of an answer to the next",
            buckets=_BETWEEN, registry=registry,
        )  # fmt: skip
        self.gone = Counter(
            "vflax_clients_gone", "Requests whose client went away before the answer's end", registry=registry
        )
        registry.register(_EngineStats(stats))

    def text(self, accept: str | None) -> tuple[bytes, str]:
        """(the metrics, their media type): OpenMetrics for who accepts that."""
        encode, media_type = choose_encoder(accept or "")
        return encode(self._registry), media_type


class Pace:
    """Measures one request's tokens as they come."""

    def __init__(self, metrics: Metrics, record: Record) -> None:
        self._metrics, self._record = metrics, record
        self._last: dict[int, float] = {}

    def __call__(self, arrival: Arrival) -> None:
        number = len(arrival.delta.tokens)
        if not number:
            return
        if arrival.index in self._last:
            gap = (arrival.at - self._last[arrival.index]) / number
            for _ in range(number):
                self._metrics.between_tokens.observe(gap)
        else:
            seconds = arrival.at - self._record.start
            self._metrics.first_token.observe(seconds)
            self._record.first_token = self._record.first_token or seconds
        self._last[arrival.index] = arrival.at


class _EngineStats:
    """The engine's own counts, read when they are asked for."""

    _GAUGES = {
        "slots": "Requests that can run at a time",
        "running": "Requests that run",
        "waiting": "Requests that wait for a slot",
        "pages": "Pages of the key-value cache",
        "pages_used": "Pages that requests hold",
        "pages_cached": "Pages that are kept for prompts that begin alike",
    }
    _COUNTERS = {
        "prompt_tokens": "Tokens of prompts, images included",
        "cached_tokens": "Of those, tokens that were known from earlier requests",
        "answer_tokens": "Tokens of answers",
        "images": "Images of prompts",
        "cached_images": "Of those, images that were known from earlier requests",
    }

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in self._GAUGES.items():
            yield GaugeMetricFamily(f"vflax_{name}", text, value=getattr(stats, name))
        for name, text in self._COUNTERS.items():
            yield CounterMetricFamily(f"vflax_{name}", text, value=getattr(stats, name))
        finished = CounterMetricFamily(
            "vflax_finished", "Answers that ended, by the reason", labels=["reason"]
        )
        for reason in ("stop", "length", "cancelled", "failed"):
            finished.add_metric([reason], stats.finished.get(reason, 0))
        yield finished
