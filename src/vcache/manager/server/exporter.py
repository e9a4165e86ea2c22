"""Prometheus over HTTP: the manager's statistics as `vcache_manager_*`, in a registry of its own."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...errors import AddressInUseError, ConfigError
from ..api import StatsReply

logger = logging.getLogger("vcache.manager")

_PREFIX = "vcache_manager_"


class StatsCollector(Collector):
    """Turns a `StatsReply` into metrics at every scrape."""

    def __init__(self, stats: Callable[[], StatsReply]) -> None:
        """`stats` is called from the HTTP thread and may block for a moment."""
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering then needs no statistics yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily(f"{_PREFIX}epoch", "Epoch of this manager; differs after a restart.", value=stats.epoch)
        yield GaugeMetricFamily(f"{_PREFIX}uptime_seconds", "Seconds since the manager started.", value=stats.uptime)
        for name, value in sorted(stats.counters.items()):
            yield CounterMetricFamily(f"{_PREFIX}{name}", f"{name.replace('_', ' ')} since the manager started.", value=value)
        for name, value in sorted(stats.gauges.items()):
            yield GaugeMetricFamily(f"{_PREFIX}{name}", f"{name.replace('_', ' ')} now.", value=value)
        yield from self._segments(stats)
        sessions = GaugeMetricFamily(f"{_PREFIX}sessions_by_role", "Clients connected.", labels=["role"])
        for role in ("engine", "lender", "tool"):
            sessions.add_metric([role], sum(session.role == role for session in stats.sessions))
        yield sessions

    def _segments(self, stats: StatsReply) -> Iterator[Metric]:
        labels = ["segment", "kind", "device"]
        size = GaugeMetricFamily(f"{_PREFIX}segment_bytes", "Bytes lent by a segment.", labels=labels)
        used = GaugeMetricFamily(f"{_PREFIX}segment_used_bytes", "Bytes of a segment that hold chunks.", labels=labels)
        slots = GaugeMetricFamily(f"{_PREFIX}segment_slots", "Slots of a segment by state.", labels=[*labels, "state"])
        for segment in stats.segments:
            info = segment.info
            where = [info.uuid.hex(), info.kind, info.device]
            size.add_metric(where, info.nbytes)
            used.add_metric(where, segment.bytes_used)
            for state in ("free", "used", "processing", "quarantined"):
                slots.add_metric([*where, state], getattr(segment, f"slots_{state}"))
        yield from (size, used, slots)


class Exporter:
    """The HTTP endpoint, on a daemon thread of its own."""

    def __init__(self, host: str, port: int, stats: Callable[[], StatsReply]) -> None:
        """Raises `AddressInUseError` when somebody has the port, `ConfigError` when it cannot be had."""
        registry = CollectorRegistry()
        registry.register(StatsCollector(stats))
        try:
            self._server: WSGIServer
            self._thread: threading.Thread
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            kind = AddressInUseError if error.errno == errno.EADDRINUSE else ConfigError
            raise kind(f"manager.metrics_port: {host}:{port}: {error.strerror or error}") from None
        self.port: int = self._server.server_port
        logger.info("metrics at http://%s:%d/metrics", host, self.port)

    def close(self) -> None:
        """Blocks until a scrape under way is answered, at most half a second longer."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
