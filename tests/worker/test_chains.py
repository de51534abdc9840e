"""Chains that start anywhere: reconstruction and interpolation, as a worker runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import diffusion
from diffusion.noise import Purpose, image_normals
from diffusion.samplers import SamplingDefaults, build_table, samplers_of
from diffusion.sampling import chain
from diffusion.spacings import SPACINGS
from diffusion.table import SamplerError
from jobs.kinds.reconstruct import ReconstructSpec
from jobs.kinds.table import admit
from jobs.pictures import from_bytes
from jobs.settings import Settings
from worker.kinds.inputs import x_start_of
from worker.kinds.noise import closed

Service = Any  # of conftest.py; tests cannot import it
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)


def planes(service: Service, job_id: str, *fields: str) -> np.ndarray:
    outputs = service.outputs(job_id)
    return np.stack([from_bytes(outputs[field], (1, 8, 8)) for field in fields])


def images(service: Service, job_id: str, count: int) -> np.ndarray:
    return planes(service, job_id, *(f"i:{i}" for i in range(count)))


@pytest.mark.parametrize("sampler", samplers_of(SamplingDefaults()))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("t", "steps"), [(1, 1), (17, 1), (17, 5), (17, 17), (50, 20)])
def test_the_table_starts_at_t_and_costs_what_was_admitted(
    running: Service, sampler: str, spacing: str, t: int, steps: int
) -> None:
    card = running.card.model_copy(update={"betas": running.card.betas[:50]})
    schedule = diffusion.Schedule(np.asarray(card.betas))
    table = build_table(
        schedule, sampler=sampler, spacing=spacing, steps=steps, corrector_steps=2, start=t - 1
    )
    assert table.t[0] == t - 1 and table.t.max() == t - 1 and table.t.min() >= 0
    fields = {"sampler": sampler, "spacing": spacing, "steps": steps, "corrector_steps": 2, "t": t}
    spec = ReconstructSpec.model_validate(fields)
    assert admit(spec, card, Settings(), 1)[1].evaluations == len(table)


def test_a_start_that_is_no_index_is_named(running: Service) -> None:
    schedule = diffusion.Schedule(np.asarray(running.card.betas))
    for start in (-1, 1000):
        with pytest.raises(SamplerError, match=f"start = {start}: must be 0..999"):
            build_table(schedule, start=start)


def test_a_branch_without_noise_ends_like_the_chain_it_left(running: Service) -> None:
    chain_options = {"sampler": "ddim", "steps": 1000, "deterministic": True, "class_label": 1}
    first = running.admit(seed=3, snapshots={"at": (40,)}, **chain_options)
    running.ended(first)
    x_t = planes(running, first, "s:40:x_t:0")
    options = {**chain_options, "steps": 40, "source": {"job": first, "t": 40}}
    kept = {"every": 13, "kinds": ("x_t", "x_start", "eps")}
    branch = running.admit(kind="reconstruct", inputs=x_t, num_images=2, snapshots=kept, **options)
    record = running.ended(branch)
    assert record.done == record.work == 80
    ended = images(running, branch, 2)
    np.testing.assert_array_equal(ended[0], ended[1])  # nothing is random after x_t
    np.testing.assert_allclose(ended[:1], images(running, first, 1), atol=1e-5)
    ts = {int(f.split(":")[1]) for f in running.outputs(branch) if f.startswith("s:")}
    assert ts == {40, 27, 14, 1}
    np.testing.assert_array_equal(planes(running, branch, "s:40:x_t:1"), x_t)


def test_a_branch_with_its_trunks_seed_goes_on_as_the_trunk_did(running: Service) -> None:
    """Its first row draws what the trunk drew there, and nothing that is in x_t already."""
    options = {"seed": 3, "variance": "small", "deterministic": True, "class_label": 1}
    first = running.admit(steps=1000, snapshots={"at": (40,)}, **options)
    running.ended(first)
    x_t = planes(running, first, "s:40:x_t:0")
    source = {"job": first, "t": 40}
    branch = running.admit(
        kind="reconstruct", inputs=x_t, num_images=2, steps=40, source=source, **options
    )
    running.ended(branch)
    same, other = images(running, branch, 2)
    np.testing.assert_allclose(same, images(running, first, 1)[0], atol=1e-5)
    assert np.abs(other - same).max() > 0.01  # the second has noise of its own


def test_an_image_is_noised_as_by_noise_then_sampled_as_by_the_library(running: Service) -> None:
    job = running.admit(
        kind="reconstruct", inputs=PICTURES[:1], t=300, steps=30, seed=7, num_images=3,
        snapshots={"at": (300,)}, variance="small",
    )  # fmt: skip
    running.ended(job)
    model = diffusion.load(running.models / "tiny")
    x_start = x_start_of(PICTURES[:1])
    [noised] = closed(model.schedule, x_start, [299], seed=7)
    x_t = planes(running, job, *(f"s:300:x_t:{i}" for i in range(3)))
    np.testing.assert_allclose(x_t, noised.x_t.expand(3, -1, -1, -1), atol=1e-6)
    table = build_table(model.schedule, steps=30, variance="small", start=299)
    walked = list(chain(model, table, noised.x_t.expand(3, -1, -1, -1), seed=7))
    found = images(running, job, 3)
    np.testing.assert_allclose(found, walked[-1].x_next.clamp(-1, 1), atol=1e-3)
    assert np.abs(found[0] - found[1]).max() > 0.01  # each sample has its own noise


def test_interpolation_mixes_two_states_and_shares_all_noise(running: Service) -> None:
    lambdas = (0.0, 0.5, 0.5, 1.0)
    options = {"t": 200, "steps": 20, "seed": 4, "deterministic": True}
    job = running.admit(
        kind="interpolate", inputs=PICTURES, lambdas=lambdas, snapshots={"every": 100}, **options
    )
    running.ended(job)
    x_t = planes(running, job, *(f"s:200:x_t:{i}" for i in range(4)))
    schedule = diffusion.load(running.models / "tiny").schedule
    index = torch.zeros(1, dtype=torch.long)
    eps = image_normals(4, index, row=0, purpose=Purpose.Q_SAMPLE, shape=(1, 8, 8)).numpy()
    signal, noise = schedule.alpha_bar(199) ** 0.5, schedule.one_minus_alpha_bar(199) ** 0.5
    a, b = x_start_of(PICTURES).numpy()
    for mixed, share in zip(x_t, lambdas, strict=True):
        x_start = (1 - share) * a + share * b
        np.testing.assert_allclose(mixed, signal * x_start + noise * eps[0], atol=1e-5)
    found = images(running, job, 4)
    np.testing.assert_array_equal(found[1], found[2])
    for end, place in ((0, 0), (1, 3)):
        alone = running.admit(kind="reconstruct", inputs=PICTURES[end : end + 1], **options)
        running.ended(alone)
        np.testing.assert_array_equal(images(running, alone, 1)[0], found[place])


@pytest.mark.slow
def test_a_chain_from_an_x_t_survives_its_worker(service: Service) -> None:
    """Stopped in mid-chain, it goes on with the next worker, and ends as if nothing had been."""
    x_t = np.random.default_rng(1).normal(size=(1, 1, 8, 8)).astype("<f4")
    options = {
        "kind": "reconstruct", "inputs": x_t, "source": "x_t", "t": 900, "steps": 900,
        "num_images": 2, "seed": 2, "deterministic": True,
    }  # fmt: skip
    first = service.worker(DDPM_DRAIN_S="0")
    job = service.admit(**options)
    service.until(lambda: service.record(job).done > 200)
    service.kill(first, 15)
    assert service.record(job).status == "queued"
    service.worker()
    service.ended(job)
    whole = service.admit(**options)
    service.ended(whole)
    assert service.outputs(job) == service.outputs(whole)
    assert int(service.redis.hget("ddpm:totals", "image_steps")) == 2 * 1800
