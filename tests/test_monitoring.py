"""The alert rules and the dashboard ask for metrics that there are, in a form that can be asked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from jobs.store import keys
from tests.app.conftest import Worker, client, shared_server, store, worker
from tests.house import ROOT

__all__ = ["client", "shared_server", "store", "worker"]  # fixtures
FOLDER = ROOT / "docs" / "monitoring"
ALERTS = FOLDER / "alerts.yml"
RULES = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
EXPRESSIONS = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]
# What Prometheus itself adds, and what its histograms have.
OTHER_LABELS = {"le", "instance", "job"}


@pytest.fixture
def scraped(client: httpx.Client, worker: Worker, redis_url: str) -> dict[str, Any]:
    """The families of a scrape after a job of each fate."""
    ids = [client.post("/generate", json={}).json()["id"] for _ in range(2)]
    worker.finish(ids[0])
    client.post(f"/jobs/{ids[1]}/cancel")
    client.get("/nothing")
    with Redis.from_url(redis_url) as redis:
        redis.hset(keys.BATCHES, mapping={"mnist:0": 3, "mnist:sum": 3})
    text = client.get("/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


@dataclass
class Asked:
    """What an expression asks for: metrics, and labels by which it chooses, sums or joins them."""

    metrics: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)


def asked(expression: str) -> Asked:
    """By a parser of PromQL, which knows functions and types as well. Raises ValueError."""
    found = Asked()

    def visit(node: Any) -> bool:
        match node:
            case promql_parser.VectorSelector():
                found.metrics.add(str(node.name))
                found.labels |= {matcher.name for matcher in node.matchers.matchers}
            case promql_parser.AggregateExpr() if node.modifier is not None:
                found.labels |= {*node.modifier.labels}
            case promql_parser.BinaryExpr() if node.modifier and node.modifier.matching:
                found.labels |= {*node.modifier.matching.labels}
        return True

    # As Grafana does, which puts a time there that suits the panel.
    expression = expression.replace("$__rate_interval", "5m")
    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("sum(rate(ddpm_jobs_total[5m])", "unclosed left parenthesis"),
        ("rate(ddpm_jobs_total)", "expected type matrix"),
        ("sum(ddpm_jobs_total[5m])", "expected type vector"),
        ("raet(ddpm_jobs_total[5m])", "unknown function"),
        ("histogram_quantile(ddpm_wait)", "expected 2 argument"),
        ("ddpm_jobs_total[5m] > 1", "scalar and instant vector"),
        ("ddpm_jobs_total >", "invalid promql"),
    ],
)
def test_the_parser_knows_a_wrong_expression(wrong: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        asked(wrong)


def test_every_metric_that_is_asked_for_is_there(scraped: dict[str, Any]) -> None:
    known = {s.name: set(s.labels) for family in scraped.values() for s in family.samples}
    known |= {family.name: set() for family in scraped.values() if family.name not in known}
    unlabelled = {"ddpm_webhooks_total"}  # it has no sample before its first attempt
    for expression in EXPRESSIONS:
        wanted = asked(expression)
        found = wanted.metrics
        assert found, expression
        assert found <= known.keys() | unlabelled, expression
        labels = set.union(OTHER_LABELS, *(known.get(name, set()) for name in found))
        if found & unlabelled:
            labels |= {"outcome"}
        assert wanted.labels <= labels, expression


def test_metrics_are_named_as_prometheus_asks(scraped: dict[str, Any]) -> None:
    units = ("_seconds", "_bytes", "_total", "_info", "_ratio")
    for name, family in scraped.items():
        assert family.documentation, name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        if family.type == "counter":
            assert all(s.name.endswith(("_total", "_created")) for s in family.samples)
        assert not re.search(r"_(ms|millis|minutes|kb|mb|count|bucket)$", name), name
        # The client library's own series of when each counter began.
        if "second" in name and not name.endswith(("_per_second", "_created")):
            assert name.endswith(units) or family.type == "histogram", name


def test_every_alert_says_what_it_is() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names)) >= 8
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert re.search(rf"by \([^)]*\b{label}\b", rule["expr"])


def test_the_dashboard_has_a_place_for_each_panel() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(places) == len(set(places)) >= 10
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
    assert all(target["legendFormat"] for p in DASHBOARD["panels"] for target in p["targets"])


def test_promtool_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool here")
    done = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
