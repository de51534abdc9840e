"""Encoding as a worker runs it, and interpolation on the sphere between encodings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import diffusion
from diffusion.encoding import encoding_table, slerp
from diffusion.spacings import spaced_timesteps
from jobs.kinds.encode import EncodeSpec
from jobs.kinds.interpolate import PairSource
from jobs.kinds.table import admit
from jobs.pictures import from_bytes
from jobs.settings import Settings
from worker.kinds.inputs import x_start_of

Service = Any  # of conftest.py; tests cannot import it
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)


def planes(service: Service, job_id: str, *fields: str) -> np.ndarray:
    outputs = service.outputs(job_id)
    return np.stack([from_bytes(outputs[field], (1, 8, 8)) for field in fields])


def test_x_T_is_that_of_the_library_and_leads_to_the_sphere(running: Service) -> None:
    options: dict[str, Any] = {"kind": "encode", "inputs": PICTURES, "steps": 12}
    job = running.admit(iterations=2, class_label=1, **options)
    record = running.ended(job)
    assert record.done == record.work == 2 * 12 * 3
    model = diffusion.load(running.models / "tiny")
    x_start = x_start_of(PICTURES)
    expected = diffusion.encode(
        model, x_start, steps=12, iterations=2, class_label=1, dtype=torch.float32
    )
    x_T = planes(running, job, "s:1000:x_t:0", "s:1000:x_t:1")
    np.testing.assert_allclose(x_T, expected, atol=2e-2, rtol=1e-2)
    between = running.admit(
        kind="interpolate", inputs=x_T, source=PairSource(job=job), path="sphere", t=1000,
        lambdas=(0.0, 0.4, 1.0), steps=12, class_label=1, snapshots={"at": (1000,)},
    )  # fmt: skip
    assert running.ended(between).spec.sampler == "ddim"
    starts = planes(running, between, *(f"s:1000:x_t:{i}" for i in range(3)))
    a, b = torch.from_numpy(x_T)
    np.testing.assert_allclose(starts[0], x_T[0], atol=1e-5)
    np.testing.assert_allclose(starts[1], slerp(a, b, 0.4), atol=1e-5)
    np.testing.assert_allclose(starts[2], x_T[1], atol=1e-5)


def test_an_encoding_goes_to_any_t_and_by_the_second_order(running: Service) -> None:
    job = running.admit(
        kind="encode", inputs=PICTURES[:1], t=400, steps=7, order=2, snapshots={"every": 3}
    )
    record = running.ended(job)
    assert record.done == record.work == 7
    assert {"s:400:x_t:0"} < {*running.outputs(job)}


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(("t", "steps"), [(None, None), (300, 20), (1, 1)])
def test_rows_are_known_at_admission(
    running: Service, t: int | None, steps: int | None, iterations: int
) -> None:
    filled, plan = admit(
        EncodeSpec(t=t, steps=steps, iterations=iterations), running.card, Settings(), 3
    )
    assert isinstance(filled, EncodeSpec) and filled.t is not None and filled.steps is not None
    schedule = diffusion.Schedule(np.asarray(running.card.betas))
    ts = spaced_timesteps(filled.t, filled.steps)[::-1]
    assert plan.evaluations == 3 * len(encoding_table(schedule, ts, iterations=iterations))
