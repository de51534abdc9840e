"""POST /restore on Gaussian data with the exact denoiser: what comes out, against the exact chain.

API, worker, engine and Redis are the service's own; the network alone is a closed form.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from redis import Redis
from torch import Tensor

from diffusion.condition import Moment, Projection
from diffusion.samplers import build_table
from tests import closed_form
from tests.closed_form import CORRELATION, ROWS
from tests.diffusion.conditional import (
    KNOWN,
    PAPER,
    UNKNOWN,
    D,
    Moments,
    errors,
    posterior,
    propagated,
)
from tests.stack import TODAY, Stack

log = logging.getLogger(__name__)
UNITS = len(KNOWN)  # of y; a row of the image in each, again and again
WAYS: dict[str, Any] = {
    "projection": Projection,
    "pigdm": partial(Moment, steps=0),
    "moment": partial(Moment, steps=D),
}
REQUESTS: dict[str, dict[str, Any]] = {
    "projection": {"method": "projection"},
    "pigdm": {"method": "moment", "solver_steps": 0},
    "moment": {"method": "moment", "solver_steps": 5},
}
# Of a mean, and of the ratio of the variances: five steps of conjugate gradients solve nearly.
UNSOLVED = {"projection": 0.0, "pigdm": 0.0, "moment": 0.01}


@pytest.fixture(scope="module")
def client(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The service, with the closed form in its worker."""
    folder = tmp_path_factory.mktemp("gaussian")
    closed_form.save_model(folder / "models" / "gaussian")
    with Redis.from_url(redis_server) as redis:
        redis.flushall()
    with contextlib.closing(Stack(redis_server, folder / "models", folder / "log")) as stack:
        client = stack.api()
        stack.worker(replace(TODAY, module="tests.closed_form"))
        yield client


def npy(x: Tensor) -> str:
    buffer = io.BytesIO()
    np.save(buffer, x.numpy())
    return base64.b64encode(buffer.getvalue()).decode()


def array(client: httpx.Client, url: str, **query: str) -> Tensor:
    reply = client.get(url, params=query)
    assert reply.status_code == 200, reply.text
    return torch.from_numpy(np.load(io.BytesIO(reply.content)))


def unknown_boxes() -> list[list[int]]:
    """The columns of an image whose rows are those of the Gaussian, side by side."""
    columns = [start + i for start in range(0, closed_form.SIDE, D) for i in UNKNOWN]
    return [[x, 0, x + 1, closed_form.SIDE] for x in columns]


def restored(client: httpx.Client, way: str, *, images: int, seed: int, **more: Any) -> Tensor:
    """Samples given y = each unit vector in turn: [rows, UNITS, D], float64.

    The images themselves end at ±1; the last x̂_0, which is the image, does not.
    """
    y = torch.zeros(ROWS, D)
    y[:, KNOWN] = torch.eye(UNITS).repeat(ROWS // UNITS, 1)
    body = {
        "operator": {"name": "mask", "boxes": unknown_boxes()},
        "y": npy(closed_form.image_of(y)),
        "num_images": images,
        "seed": seed,
        "clip": False,
        "snapshots": {"at": [1], "kinds": ["x_start"]},
        **REQUESTS[way],
        **more,
    }
    reply = client.post("/restore", json=body, headers={"Prefer": "wait=20"})
    assert reply.status_code in (200, 202), reply.text
    job = reply.json()
    while job["status"] in ("queued", "running"):
        job = client.get(job["urls"]["self"], params={"wait": 20}).json()
    assert job["status"] == "succeeded", job
    kind = {"kind": "x_start"}
    at = f"/jobs/{job['id']}/snapshots/1"
    found = torch.stack([array(client, f"{at}/{i}.npy", **kind) for i in range(images)])
    first = array(client, f"/jobs/{job['id']}/images/0.npy")
    torch.testing.assert_close(first, found[0].clamp(-1, 1), rtol=0, atol=1e-6)
    return closed_form.rows_of(found).double().reshape(-1, UNITS, D)


def told(found: Tensor) -> Moments:
    """Mean map and covariance of samples [n, UNITS, D]."""
    centred = (found - found.mean(0)).reshape(-1, D)
    return Moments(found.mean(0).T, centred.T @ centred / (UNITS * (len(found) - 1)))


def check(found: Tensor, way: str, *, steps: int, travel: int) -> None:
    """Mean map and variance within error bars of the chain propagated exactly.

    Each entry; and the two figures that docs/restore.md has of each chain: --log-cli-level=INFO.
    """
    table = build_table(PAPER, sampler="ddim", eta=1.0, steps=steps, clip=False, travel=travel)
    exact, truth = propagated(table, CORRELATION, WAYS[way]), posterior(CORRELATION)
    seen, n = told(found), len(found)
    variances = exact.covariance.diagonal().clamp_min(0)
    off = (seen.mean_map - exact.mean_map).abs()
    assert (off <= 5 * (variances[:, None] / n).sqrt() + UNSOLVED[way] + 1e-3).all()
    ratios = seen.covariance.diagonal()[UNKNOWN] / variances[UNKNOWN]
    assert (ratios - 1).abs().max() < 5 * (2 / (n * UNITS)) ** 0.5 + 2 * UNSOLVED[way]

    size = float(torch.linalg.norm(truth.mean_map))
    wrong = exact.mean_map - truth.mean_map
    wrong /= torch.linalg.norm(wrong)  # the error along this is unbiased, that of the norm is not
    error = float(((seen.mean_map - truth.mean_map) * wrong).sum()) / size
    error_bar = float(torch.trace(wrong.T @ exact.covariance @ wrong) / n) ** 0.5 / size
    _, ratio = errors(seen, truth)
    unknown = exact.covariance[UNKNOWN][:, UNKNOWN]
    true_trace = float(truth.covariance.diagonal()[UNKNOWN].sum())
    ratio_bar = float(2 * unknown.square().sum() / (n * UNITS)) ** 0.5 / true_trace
    wanted = errors(exact, truth)
    log.info(
        f"| {way} | {steps} | {travel} | {wanted[0]:.3f} / {wanted[1]:.3f} | "
        f"{error:.3f} ± {error_bar:.3f} / {ratio:.3f} ± {ratio_bar:.3f} |"
    )
    assert abs(error - wanted[0]) < 5 * error_bar + UNSOLVED[way]
    assert abs(ratio - wanted[1]) < 5 * ratio_bar + 2 * UNSOLVED[way]


@pytest.mark.parametrize(("way", "travel"), [("projection", 2), ("pigdm", 1), ("moment", 1)])
def test_samples_have_the_moments_of_the_exact_chain(
    client: httpx.Client, way: str, travel: int
) -> None:
    found = restored(client, way, images=24, seed=1, steps=10, travel=travel)
    check(found, way, steps=10, travel=travel)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("steps", "travel"), [(50, 1), (250, 1), (1000, 1), (250, 5)])
@pytest.mark.parametrize("way", WAYS)
def test_the_table_of_the_documentation_by_samples(
    client: httpx.Client, way: str, steps: int, travel: int
) -> None:
    asked = {"images": 64, "steps": steps, "travel": travel}
    found = [restored(client, way, seed=seed, **asked) for seed in range(4)]
    check(torch.cat(found), way, steps=steps, travel=travel)
