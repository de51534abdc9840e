"""Prometheus metrics: what this process counts, and what the store knows at each scrape."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from app.auth import key_name
from jobs.observed import ROWS, SECONDS, histograms
from jobs.states import ENDED
from jobs.store.reader import JobReader, QueueState
from jobs.version import VERSION

_OPENMETRICS = "application/openmetrics-text"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_openmetrics: Callable[[CollectorRegistry], bytes] = openmetrics.generate_latest


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
        self.rejections = Counter(
            "ddpm_http_rejections", "Requests answered by an error, by its code", ["code"],
            registry=self.registry,
        )  # fmt: skip
        build = Gauge(
            "ddpm_build_info", "1; of this software", ["version", "python"], registry=self.registry
        )
        build.labels(VERSION, platform.python_version()).set(1)
        ProcessCollector(registry=self.registry)
        self._store = _StoreCollector()
        self.registry.register(self._store)

    async def render(self, reader: JobReader, accept: str = "") -> tuple[bytes, str]:
        """The text of a scrape and its media type: OpenMetrics, which has the ids of requests as
        exemplars, where it is accepted."""
        models = await reader.cards()
        seconds, rows = await reader.observed()
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
        self._store.families += observed_metrics(seconds, rows)
        if _OPENMETRICS in accept:
            return _openmetrics(self.registry), openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


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
        "ddpm_jobs_recovered",
        "Executions that went on after the worker before had died",
        value=totals.get("recovered", 0),
    )
    yield CounterMetricFamily(
        "ddpm_image_steps", "Image-steps done", value=totals.get("image_steps", 0)
    )
    yield GaugeMetricFamily(
        "ddpm_output_bytes", "Bytes held or reserved for outputs", totals.get("output_bytes", 0)
    )
    yield GaugeMetricFamily("ddpm_workers", "Workers that spoke lately", workers)


def observed_metrics(
    seconds: Mapping[str, float], rows: Mapping[str, float]
) -> Iterable[HistogramMetricFamily]:
    """The histograms that workers keep in the store."""
    labels = ["kind", "model"]
    wait = HistogramMetricFamily(
        "ddpm_job_wait_seconds", "From admission to the first start of a job", labels=labels
    )
    run = HistogramMetricFamily(
        "ddpm_job_run_seconds", "From its first start to the success of a job", labels=labels
    )
    families = {"wait": wait, "run": run}
    for (what, *values), found in histograms(seconds, SECONDS).items():
        if what in families and len(values) == len(labels):
            families[what].add_metric(values, found.cumulative(SECONDS), found.sum)
    batches = HistogramMetricFamily(
        "ddpm_batch_rows", "Network rows of the steps of batches", labels=["model"]
    )
    for values_, found in histograms(rows, ROWS).items():
        if len(values_) == 1:
            batches.add_metric([*values_], found.cumulative(ROWS), found.sum)
    return wait, run, batches
