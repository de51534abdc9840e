"""Prometheus metrics: what this process counts, and what the store knows at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.auth import key_name
from jobs.states import ENDED
from jobs.store.reader import JobReader, QueueState

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


class Metrics:
    """One registry an application, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ddpm_http_requests", "HTTP requests", ["method", "route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.of_clients = Counter(
            "ddpm_client_requests", "HTTP requests by the name of their key", ["client"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "ddpm_http_request_seconds", "Time to the first byte of the response",
            ["method", "route"], buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.streams = Gauge(
            "ddpm_event_streams", "Open server-sent event streams", registry=self.registry
        )
        self.webhooks = Counter(
            "ddpm_webhooks", "Webhook attempts", ["outcome"], registry=self.registry
        )
        self.previews = Counter(
            "ddpm_previews", "Pictures encoded for event streams", registry=self.registry
        )
        self._store = _StoreCollector()
        self.registry.register(self._store)

    async def render(self, reader: JobReader) -> bytes:
        """The text of a scrape."""
        models = await reader.cards()
        self._store.families = list(
            store_metrics(
                queues=await reader.queues(),
                totals=await reader.totals(),
                workers=len(await reader.workers()),
                clients={
                    name: steps
                    for client, steps in (await reader.clients()).items()
                    if (name := key_name(client))
                },
                rates={model: await reader.rate(model) for model in models},
            )
        )
        return generate_latest(self.registry)


class _StoreCollector(Collector):
    def __init__(self) -> None:
        self.families: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        return self.families


def store_metrics(
    *,
    queues: Sequence[QueueState],
    totals: Mapping[str, int],
    workers: int,
    clients: Mapping[str, int],
    rates: Mapping[str, float | None],
) -> Iterable[Metric]:
    """What the store knows, as metric families."""
    jobs = GaugeMetricFamily("ddpm_queue_jobs", "Jobs in a queue", labels=["queue", "status"])
    work = GaugeMetricFamily("ddpm_queue_image_steps", "Image-steps not yet done", labels=["queue"])
    for queue in queues:
        jobs.add_metric([queue.name, "queued"], queue.queued)
        jobs.add_metric([queue.name, "running"], queue.running)
        work.add_metric([queue.name], queue.outstanding)
    ended = CounterMetricFamily("ddpm_jobs", "Jobs that ended", labels=["status"])
    for status in sorted(ENDED - {"expired"}):
        ended.add_metric([status], totals.get(f"jobs_{status}", 0))
    admitted = CounterMetricFamily("ddpm_jobs_admitted", "Jobs taken in", labels=["kind"])
    for name, value in sorted(totals.items()):
        if name.startswith("admitted_"):
            admitted.add_metric([name.removeprefix("admitted_")], value)
    speed = GaugeMetricFamily(
        "ddpm_model_image_steps_per_second", "Measured rate over all workers", labels=["model"]
    )
    for model, rate in rates.items():
        speed.add_metric([model], rate or 0.0)
    owed = GaugeMetricFamily(
        "ddpm_client_image_steps", "Image-steps not yet done, by the name of a key",
        labels=["client"],
    )  # fmt: skip
    for name, steps in sorted(clients.items()):
        owed.add_metric([name], steps)
    yield from (jobs, work, ended, admitted, speed, owed)
    yield CounterMetricFamily(
        "ddpm_image_steps", "Image-steps done", value=totals.get("image_steps", 0)
    )
    yield GaugeMetricFamily(
        "ddpm_output_bytes", "Bytes held or reserved for outputs", totals.get("output_bytes", 0)
    )
    yield GaugeMetricFamily("ddpm_workers", "Workers that spoke lately", workers)
