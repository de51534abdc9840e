"""A kind of job made for this test alone, in three files of its own, served end to end.

What it shows: the files below and a line in each table are all that a new kind takes.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import diffusion
from diffusion import ScheduleConfig
from tests.diffusion.networks import build_model

SPEC = '''
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from jobs.kinds.common import Gift, Input, JobSpec, Plan
from jobs.kinds.table import KINDS


class MeanResult(BaseModel):
    """What a mean job answers."""

    brightness: float


class MeanSpec(JobSpec):
    """The mean of uploaded pictures."""

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures"})
    gives: ClassVar[frozenset[Gift]] = frozenset({"images", "numbers"})
    result_models: ClassVar[tuple[type[BaseModel], ...]] = (MeanResult,)
    runs_network: ClassVar[bool] = False

    kind: Literal["mean"] = "mean"
    gain: float = Field(1.0, ge=0, le=2, description="of the mean's contrast")

    def plan(self, card, num_inputs):
        return Plan(images=1, evaluations=0, output_bytes=card.plane_bytes)


KINDS["mean"] = MeanSpec
'''
FLIGHT = """
import mean_spec

from worker.engine.tasks import Images
from worker.flights import Flight, on_host
from worker.kinds.inputs import uploaded
from worker.kinds.table import FLIGHTS


class MeanFlight(Flight):
    def __init__(self, started, execution, served, *, spec, deadline):
        super().__init__(started, execution, served, spec=spec, deadline=deadline)
        self.mean = spec.gain * uploaded(started).mean(0, keepdim=True)

    @classmethod
    def provenance(cls, served, spec):
        return {"method": "arithmetic"}

    def run(self, emit, going):
        emit([Images(self.execution, (0,), self.mean)])

    def write(self, event, batch):
        if isinstance(event, Images):
            x = on_host(event.x)[0].clip(-1, 1)
            batch.image(self.record, self.execution, index=0, x=x)

    def result(self):
        return {"brightness": float(self.mean.mean())}


FLIGHTS["mean"] = MeanFlight
"""
WORDS = """
import mean_spec

from app.routes.words import WORDS, Words

WORDS["mean"] = Words("The arithmetic mean.", {"two": {"summary": "Of two", "value": {}}})
"""


@contextmanager
def process(code: str, folder: Path, redis_url: str) -> Iterator[None]:
    """A Python of its own, with the new kind's files beside ours."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "REDIS_URL": redis_url,
        "DDPM_MODELS": str(folder / "models"),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        child.terminate()
        child.wait(timeout=60)


@pytest.fixture
def client(tmp_path: Path, redis_url: str) -> Iterator[httpx.Client]:
    """The API and a worker that both know the kind."""
    for name, text in (("mean_spec", SPEC), ("mean_flight", FLIGHT), ("mean_words", WORDS)):
        (tmp_path / f"{name}.py").write_text(text)
    diffusion.save(build_model(schedule=ScheduleConfig(T=10)), tmp_path / "models" / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    api = f"import mean_words, ddpm; ddpm.main(['api', '--port', '{port}'])"
    worker = "import mean_flight, ddpm; ddpm.main(['worker', '--device', 'cpu'])"
    with (
        process(api, tmp_path, redis_url),
        process(worker, tmp_path, redis_url),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        wait_until_ready(client, tmp_path / "log")
        yield client


def wait_until_ready(client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if client.get("/readyz").json().get("workers"):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(log.read_text())


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_new_kind_is_three_files_and_a_line_in_the_tables(client: httpx.Client) -> None:
    files: list[Any] = [("image", ("a.png", picture(level))) for level in (0, 200)]
    reply = client.post("/mean", files=files, headers={"Prefer": "wait=60"})
    assert reply.status_code == 200, reply.text
    job = reply.json()
    assert job["kind"] == "mean" and job["status"] == "succeeded"
    assert job["result"]["brightness"] == pytest.approx(100 / 127.5 - 1, abs=1e-6)
    assert job["manifest"]["provenance"]["method"] == "arithmetic"
    found = np.asarray(Image.open(io.BytesIO(client.get(job["images"][0]["url"]).content)))
    assert (found == 100).all()
    grid = client.post("/mean", files=files, headers={"Accept": "image/png"})
    assert grid.headers["content-type"] == "image/png"
    assert [one["kind"] for one in client.get("/jobs").json()["data"]] == ["mean", "mean"]
    bad = client.post("/mean", files=files, data={"request": '{"gain": 3}'})
    assert bad.status_code == 422 and bad.json()["errors"][0]["pointer"] == "/gain"
    paths = client.get("/openapi.json").json()
    assert paths["paths"]["/mean"]["post"]["description"] == "The arithmetic mean."
    assert {"MeanBody", "MeanResult"} <= set(paths["components"]["schemas"])
