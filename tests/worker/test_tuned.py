"""A tuned table through the service: which one it was is told, and no other stands in for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import diffusion
from diffusion.checkpoint import WEIGHTS_NAME
from diffusion.files import digest_of
from diffusion.tuned import Tuned, table_digest, write_tuned
from jobs.pictures import from_bytes
from jobs.settings import Settings
from tests.app.conftest import serving

Service = Any  # of conftest.py; tests cannot import it
ROWS = 100
ASKED = {"sampler": "tuned", "seed": 5, "deterministic": True}


def tune(folder: Path, *, first: float) -> None:
    """Tables that a folder may have learned: of three rows, and of many for a long chain."""
    weights = digest_of([folder / WEIGHTS_NAME])
    short = Tuned(
        (999.0, 400.5, 0.0), ((1.0, -0.3, first, 0.0), (1.0, -0.3, 0.4, 0.0), (0.9, -0.1, 0.5, 0.0))
    )
    times = tuple(np.linspace(999.0, 0.0, ROWS).tolist())
    long = Tuned(times, ((1.0, -0.01, first, 0.0), *((1.0, -0.01, 0.01, 0.0),) * (ROWS - 1)))
    write_tuned([short, long], folder, weights=weights)


def ended(client: httpx.Client, posted: httpx.Response) -> dict[str, Any]:
    assert posted.status_code == 202, posted.text
    job_id = posted.json()["id"]
    for _ in range(10):
        job = client.get(f"/jobs/{job_id}", params={"wait": 30}).json()
        if job["status"] not in ("queued", "running"):
            break
    return dict(job)


@pytest.fixture
def folder(service: Service, tmp_path: Path) -> Path:
    """Of the one model that the service's workers will serve, with tables."""
    folder = tmp_path / "models" / "tiny"
    shutil.copytree(service.models / "tiny", folder)
    tune(folder, first=0.5)
    service.models = folder.parent
    return folder


def is_of(image: bytes, folder: Path, steps: int) -> None:
    """Check the first image of a job against the library."""
    model = diffusion.load(folder)
    [made] = diffusion.sample(model, 1, sampler="tuned", steps=steps, seed=5, dtype=torch.float32)
    np.testing.assert_allclose(from_bytes(image, model.shape), made.numpy(), atol=1e-3)


def test_a_job_says_its_table(service: Service, folder: Path) -> None:
    service.worker()
    with serving(Settings(redis_url=service.url)) as client:
        job = ended(client, client.post("/generate", json={**ASKED, "steps": 3}))
        assert job["status"] == "succeeded", job
        is_of(service.outputs(job["id"])["i:0"], folder, 3)
        made_with = table_digest(diffusion.load(folder).tuned[3])
        assert job["manifest"]["provenance"]["table"] == made_with
        again = ended(client, client.post("/generate", json=job["manifest"]))
        assert again["images"][0]["sha256"] == job["images"][0]["sha256"]


@pytest.mark.slow
def test_no_other_table_stands_in_for_it(service: Service, folder: Path) -> None:
    """Neither in the middle of a chain, nor where a manifest is posted."""
    first = service.worker(DDPM_DRAIN_S="0")
    with serving(Settings(redis_url=service.url)) as client:
        job = ended(client, client.post("/generate", json={**ASKED, "steps": 3}))
        long = client.post("/generate", json={**ASKED, "steps": ROWS, "num_images": 64})
        long_id = long.json()["id"]
        service.until(lambda: service.record(long_id).done >= 64)
        service.kill(first)  # it gives the chains back, in the middle
        tune(folder, first=0.4)
        service.worker()
        other = ended(client, long)
        assert other["status"] == "succeeded", other
        is_of(service.outputs(long_id)["i:0"], folder, ROWS)
        now = table_digest(diffusion.load(folder).tuned[ROWS])
        assert other["manifest"]["provenance"]["table"] == now
        refused = client.post("/generate", json=job["manifest"])
        assert refused.status_code == 422, refused.text
        [error] = refused.json()["errors"]
        assert error["pointer"] == "/provenance/table"
        assert job["manifest"]["provenance"]["table"] in error["detail"]
