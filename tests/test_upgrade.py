"""A deploy: the last release and this version at work on one Redis, at the same time."""

from __future__ import annotations

import base64
import io
import itertools
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.older import build, save_model
from tests.released import REQUESTS, collect, picture, status, texts
from tests.stack import TODAY, Stack, Version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
Job = dict[str, Any]
WAITING = 16  # jobs that wait or run, at most: an old machine needs its time


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The last release, built from its commit."""
    return build(tmp_path_factory.mktemp("last"))


@pytest.fixture
def stack(redis_url: str, last: Version, tmp_path: Path) -> Iterator[Stack]:
    """An empty Redis, and a model as the last release wrote it."""
    save_model(last, tmp_path / "models" / "tiny")
    stack = Stack(redis_url, tmp_path / "models", tmp_path / "log")
    yield stack
    stack.close()


def test_the_last_release_reads_what_this_version_writes(stack: Stack, last: Version) -> None:
    written = collect(stack, TODAY)
    client = stack.api(last)
    worker = stack.worker(last)
    [waiting] = [written["records"][name]["id"] for name in ("queued",)]
    stack.until(lambda: status(stack, waiting) == "succeeded", worker)
    shown = {job["id"]: job for job in client.get("/jobs").json()["data"]}
    for name, fields in written["records"].items():
        job = client.get(f"/jobs/{fields['id']}").json()
        assert job["status"] == (fields["status"] if name != "queued" else "succeeded"), job
        assert job["kind"] == fields["kind"] and job["id"] in shown
        said = REQUESTS.get(name, {"seed": 7})
        for field in said.keys() - {"images", "snapshots"}:
            assert job["request"][field] == said[field]
    for path in ("/readyz", "/queue", "/models", "/metrics"):
        assert client.get(path).status_code == 200, path
    assert worker.poll() is None


def x_t() -> str:
    """An x_t as a client uploads it: npy, base64."""
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(0).standard_normal((1, 8, 8)).astype(np.float32))
    return base64.b64encode(buffer.getvalue()).decode()


# What both versions draw alike, so that it does not matter here who ran it: in the steps of a
# chain, and in estimates of a likelihood, a seed draws something else now (`diffusion.noise`).
MIX: list[tuple[str, Job]] = [
    ("generate", {"sampler": "ddim", "steps": 40, "num_images": 2, "seed": 1}),
    ("generate", {"sampler": "dpmpp_2m", "steps": 20, "seed": 2, "class_label": 1}),
    ("generate", {"sampler": "ddim", "steps": 100, "num_images": 4, "seed": 3}),
    ("interpolate",
     {"sampler": "ddim", "steps": 30, "t": 600, "lambdas": [0, 1], "seed": 4,
      "images": [picture(1), picture(2)]}),
    ("reconstruct",
     {"sampler": "ddim", "steps": 30, "t": 600, "num_images": 2, "seed": 7,
      "images": [picture(5)]}),
    ("reconstruct",
     {"sampler": "ddim", "steps": 30, "t": 600, "seed": 8, "source": "x_t", "x_t": x_t()}),
    ("noise", {"t": [1, 500, 1000], "seed": 5, "images": [picture(3)]}),
    ("likelihood", {"mode": "full", "seed": 6, "images": [picture(4)]}),
]  # fmt: skip


def post(client: httpx.Client, n: int) -> str:
    """The n-th job of the mix; its id. Raises unless it was accepted."""
    kind, request = MIX[n % len(MIX)]
    reply = client.post(f"/{kind}", json={"deterministic": True, **request})
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


class Load:
    """Asks both APIs in turn, until it is stopped; some jobs always wait."""

    def __init__(self, stack: Stack, clients: list[httpx.Client]) -> None:
        self._stack = stack
        self._clients = clients
        self._stop = threading.Event()
        self.accepted: list[str] = []  # the n-th is MIX[n % len(MIX)]
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for n in itertools.count():
                # Each request goes to either API: an even number of kinds, two rounds.
                client = self._clients[(n + n // len(MIX)) % 2]
                self.accepted.append(post(client, n))
                while self._stop.wait(0.1) or self._waiting() > WAITING:
                    if self._stop.is_set():
                        return
        except BaseException as error:
            self.failure = error

    def _waiting(self) -> int:
        queues = [f"ddpm:queue:ddpm:{status}" for status in ("queued", "running")]
        return sum(int(self._stack.redis.zcard(queue)) for queue in queues)

    def more(self, jobs: int) -> None:
        """Wait until so many more have been accepted."""
        wanted = len(self.accepted) + jobs
        self._stack.until(lambda: self.failure or len(self.accepted) >= wanted)
        assert self.failure is None, self.failure

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def outcome(stack: Stack, client: httpx.Client, job_id: str) -> Any:
    """What a job made: hashes of the pixels, of the snapshots, or its numbers."""
    job = client.get(f"/jobs/{job_id}").json()
    result = json.loads(json.dumps(job.get("result")), parse_float=lambda x: round(float(x), 4))
    planes = stack.redis.hgetall(f"ddpm:job:{job_id}:outputs")
    return [image["sha256"] for image in job["images"]], sorted(planes.items()), result


def test_a_rolling_upgrade_under_load_loses_nothing(
    stack: Stack, last: Version, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward, worker by worker, and back again, as after a deploy that disappointed."""
    clients = [stack.api(last)]
    versions: dict[str, str] = {}

    def start(version: Version) -> subprocess.Popen[bytes]:
        before = set(texts(stack, "ddpm:workers"))
        process = stack.worker(version, DDPM_DRAIN_S="0.5")
        [name] = set(texts(stack, "ddpm:workers")) - before
        versions[name] = "this version" if version is TODAY else "the last release"
        return process

    running = [start(last), start(last)]
    clients.append(stack.api(TODAY))
    load = Load(stack, clients)
    try:
        load.more(20)
        for version in (TODAY, TODAY, last, TODAY):
            running.append(start(version))
            load.more(10)
            assert stack.stop(running.pop(0)) == 0
            load.more(10)
    finally:
        load.stop()
    assert load.failure is None, load.failure
    ids = load.accepted
    stack.until(lambda: not {status(stack, i) for i in ids} & {"queued", "running"}, seconds=600)

    undisturbed = [post(clients[1], n) for n in range(len(MIX))]
    stack.until(lambda: {status(stack, i) for i in undisturbed} == {"succeeded"})
    expected = [outcome(stack, clients[1], job_id) for job_id in undisturbed]
    ends = Counter(status(stack, job_id) or "lost" for job_id in ids)
    different = sum(
        outcome(stack, clients[n % 2], job_id) != expected[n % len(MIX)]
        for n, job_id in enumerate(ids)
        if status(stack, job_id) == "succeeded"
    )
    by = Counter(versions[texts(stack, f"ddpm:job:{job_id}")["worker"]] for job_id in ids)
    with capsys.disabled():
        sys.stdout.write(
            "\naccepted, lost, failed, different: "
            f"{len(ids)}, {ends['lost']}, {ends['failed']}, {different}; ended by {dict(by)}\n"
        )
    assert ends == {"succeeded": len(ids)} and different == 0
    assert set(by) == {"this version", "the last release"}
    assert all(process.poll() is None for process in running)
