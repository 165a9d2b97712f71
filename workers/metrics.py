"""A worker's /metrics, with vLLM's names; read when scraped, so that nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..bus.messages import WorkerCard
from .engines.base import CountsHandoffs, Engine, HandoffCounts
from .prefill import PrefillCounts


class WorkerCollector(Collector):
    """Asked from the metrics server's thread; what it reads are plain numbers."""

    def __init__(self, card: WorkerCard, engine: Engine, prefill: PrefillCounts | None) -> None:
        self._card = card
        self._engine = engine
        self._prefill = prefill

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load()
        used = 1.0 - load.kv_blocks_free / self._card.kv_blocks if self._card.kv_blocks else 0.0
        yield GaugeMetricFamily("num_requests_running", "Requests in the engine", value=load.running)
        yield GaugeMetricFamily("num_requests_waiting", "Requests that wait for a slot or blocks", value=load.waiting)
        yield GaugeMetricFamily("kv_cache_usage_perc", "Share of KV blocks in use, 1.0 is all", value=used)
        if self._prefill is not None:
            jobs = CounterMetricFamily("hocket_prefill_jobs", "Prefill jobs that ended here", labels=["outcome"])
            for outcome, count in dict(self._prefill.outcomes).items():
                jobs.add_metric([outcome], count)
            yield jobs
        if isinstance(self._engine, CountsHandoffs):
            yield from self._handoffs(self._engine.handoff_counts())

    def _handoffs(self, counts: HandoffCounts) -> Iterator[Metric]:
        transport = ",".join(sorted(set(counts.transports)))
        handoffs = CounterMetricFamily(
            "hocket_handoffs", "KV hand-offs that ended", labels=["direction", "outcome", "transport"]
        )
        for direction, outcomes in (("received", counts.received), ("sent", counts.sent)):
            for outcome, count in dict(outcomes).items():
                handoffs.add_metric([direction, outcome, transport], count)
        yield handoffs
        moved = CounterMetricFamily("hocket_kv_bytes", "KV bytes moved", labels=["direction", "transport"])
        moved.add_metric(["received", transport], counts.kv_bytes_received)
        moved.add_metric(["sent", transport], counts.kv_bytes_sent)
        yield moved


def serve_metrics(port: int, card: WorkerCard, engine: Engine, prefill: PrefillCounts | None) -> Callable[[], None]:
    """Serve /metrics on loopback; call the result to stop. Raises OSError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(WorkerCollector(card, engine, prefill))
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
