"""Conditioned chains in the engine, among all others, and as a worker runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffusion
from diffusion import Model, cores
from diffusion.condition import Condition, Measurement, Moment, Projection, condition
from diffusion.noise import Purpose, image_normals
from diffusion.operators import AveragePool, Blur, Identity, Mask, Operator
from diffusion.samplers import build_table
from diffusion.sampling import chain
from jobs.errors import SpecError
from jobs.kinds.operators import OperatorSpec
from jobs.kinds.restore import RestoreSpec
from jobs.kinds.table import admit
from jobs.pictures import from_bytes
from jobs.settings import Settings
from tests.house import ROOT
from worker.engine.chain_pool import ChainPool
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.runs import Sample
from worker.engine.tasks import Event, Images, Start, States, Task
from worker.kinds.restore import operator_of

Service = Any  # of conftest.py; tests cannot import it
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
HALF: dict[str, Any] = {"name": "mask", "boxes": ((0, 4, 8, 8),)}


def upper_half() -> Mask:
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[:4] = True
    return Mask(known)


OPERATORS: dict[str, Operator] = {
    "mask": upper_half(),
    "average_pool": AveragePool(4),
    "blur": Blur.gaussian(0.7, 8),
    "identity": Identity(),
}


def measurement(name: str, sigma: float = 0.0) -> Measurement:
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Measurement(OPERATORS[name], OPERATORS[name].forward(x), sigma)


def restore_task(model: Model, name: str, *, sigma: float = 0.0, n: int = 2, **more: Any) -> Task:
    table = build_table(model.schedule, sampler="ddim", eta=1.0, steps=6, travel=2)
    return Task(
        id=name,
        model=model,
        table=table,
        seed=7,
        starts=more.pop("starts", tuple(Start(i) for i in range(n))),
        condition=Projection(measurement(name, sigma)),
        **more,
    )


def generate_task(model: Model, name: str, **more: Any) -> Task:
    table = build_table(model.schedule, steps=9)
    starts = tuple(Start(i, class_label=1) for i in range(3))
    return Task(id=name, model=model, table=table, seed=2, starts=starts, **more)


def run(*tasks: Task, ticks: int = 100_000) -> tuple[Engine, dict[str, Tensor]]:
    """Every task's images, all having been stepped in one engine."""
    events: list[Event] = []
    engine = Engine(events.extend, EngineOptions(dtype=torch.float32))
    for task in tasks:
        engine.submit(task)
    while ticks and engine.tick():
        ticks -= 1
    found: dict[str, dict[int, Tensor]] = {}
    for event in events:
        if isinstance(event, Images):
            found.setdefault(event.task_id, {}).update(zip(event.indices, event.x, strict=True))
    return engine, {name: torch.stack([x[i] for i in sorted(x)]) for name, x in found.items()}


def by_library(model: Model, task: Task) -> Tensor:
    indices = torch.arange(len(task.starts))
    x = image_normals(task.seed, indices, row=0, purpose=Purpose.X_T, shape=model.shape)
    for step in chain(model, task.table, x, seed=task.seed, condition=task.condition):
        x = step.x_next
    return x


def test_a_mixed_batch_does_for_each_what_the_library_does_alone(model: Model) -> None:
    """Four operators and plain chains share every forward."""
    tasks = [restore_task(model, name, sigma=0.1 * i) for i, name in enumerate(OPERATORS)]
    engine, found = run(*tasks, generate_task(model, "plain"))
    for task in tasks:
        torch.testing.assert_close(found[task.id], by_library(model, task), rtol=0, atol=1e-4)
    [lane] = engine.lanes.values()
    assert max(lane.pool.network.uses) > 3  # more than any has chains
    _, alone = run(generate_task(model, "plain"))
    torch.testing.assert_close(found["plain"], alone["plain"], rtol=0, atol=1e-5)


def test_known_pixels_come_out_as_they_went_in(model: Model) -> None:
    given = measurement("mask")
    _, found = run(restore_task(model, "mask", n=3))
    assert given.distance(found["mask"]).max() < 1e-6
    assert (found["mask"][0] - found["mask"][1]).abs().max() > 0.01


@pytest.mark.parametrize("name", OPERATORS)
def test_deterministic_ones_are_the_same_to_the_bit_in_any_company(name: str, model: Model) -> None:
    task = restore_task(model, name, n=3, deterministic=True)
    _, alone = run(task)
    mates = [restore_task(model, other, deterministic=True) for other in OPERATORS if other != name]
    _, among = run(*mates, generate_task(model, "plain", deterministic=True), task)
    assert torch.equal(alone[name], among[name])


def test_a_resumed_chain_ends_as_an_undisturbed_one(model: Model) -> None:
    task = restore_task(model, "mask", deterministic=True)
    _, whole = run(task)
    engine, _ = run(task, ticks=5)
    [lane] = engine.lanes.values()
    states = lane.pool.states(lane.runs["mask"].samples)
    assert isinstance(states, States) and (states.rows == states.rows[0]).all() and states.rows[0]
    starts = tuple(
        Start(int(i), row=int(row), x_t=x)
        for i, row, x in zip(states.indices, states.rows, states.x_t, strict=True)
    )
    _, resumed = run(restore_task(model, "mask", starts=starts, deterministic=True))
    assert torch.equal(resumed["mask"], whole["mask"])


# Products with the Jacobian: a pool of its own


def moment_task(model: Model, name: str, *, solver_steps: int = 2, **more: Any) -> Task:
    task = restore_task(model, name, sigma=0.2, **more)
    given = measurement(name, 0.2)
    return replace(task, id=f"{name}-moment", condition=Moment(given, solver_steps))


def test_moment_chains_do_what_the_library_does_and_count_their_products(model: Model) -> None:
    tasks = [moment_task(model, name) for name in ("mask", "average_pool")]
    engine, found = run(*tasks, restore_task(model, "mask"), generate_task(model, "plain"))
    assert {key.mode for key in engine.lanes} == {"chains", "products"}
    for task in tasks:
        assert task.evaluations == 2 * 11 * (1 + 2)
        torch.testing.assert_close(found[task.id], by_library(model, task), rtol=0, atol=1e-3)
    _, plain = run(restore_task(model, "mask"))
    assert (plain["mask"] - found["mask-moment"]).abs().max() > 0.01


def test_guided_moment_chains_correct_the_guided_estimate(model: Model) -> None:
    starts = tuple(Start(i, class_label=label) for i, label in enumerate((0, None, 2)))
    task = moment_task(model, "identity", starts=starts, guidance=2.0)
    assert task.evaluations == 3 * 11 * 2 * 3
    _, found = run(task)
    labels = torch.tensor([0, 2])
    indices = torch.tensor([0, 2])
    x = image_normals(7, indices, row=0, purpose=Purpose.X_T, shape=model.shape)
    given = {"seed": 7, "indices": indices, "class_label": labels, "guidance": 2.0}
    for step in chain(model, task.table, x, condition=task.condition, **given):  # type: ignore[arg-type]
        x = step.x_next
    torch.testing.assert_close(found[task.id][[0, 2]], x, rtol=0, atol=1e-3)


def test_deterministic_moment_chains_stand_alone(model: Model) -> None:
    task = moment_task(model, "mask", n=2, deterministic=True)
    _, alone = run(task)
    _, among = run(moment_task(model, "average_pool", n=3, deterministic=True), task)
    assert torch.equal(alone[task.id], among[task.id])


def test_deterministic_moment_chains_do_not_see_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For few rows a team of cores would do one's sums in another order: the network is a real one,
    with sums that are long enough to have a team."""
    monkeypatch.setattr(cores, "count", lambda: 4)
    model = diffusion.load(ROOT / "models" / "mnist")
    x = torch.rand(1, *model.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    given = Measurement(AveragePool(4), AveragePool(4).forward(x), 0.2)
    task = Task(
        id="three",
        model=model,
        table=build_table(model.schedule, sampler="ddim", eta=1.0, steps=3),
        seed=7,
        starts=tuple(Start(i, class_label=1) for i in range(3)),
        deterministic=True,
        condition=Moment(given, 2),
    )
    _, three = run(task)
    for i in range(3):
        _, alone = run(replace(task, id="one", starts=task.starts[i : i + 1]))
        assert torch.equal(alone["one"][0], three["three"][i])


@pytest.mark.parametrize("by_moments", [False, True])
def test_jobs_that_differ_in_what_was_measured_are_corrected_together(
    by_moments: bool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as if alone, for all that they share one correction; another σ_y has one of its own."""

    def task(i: int, sigma: float) -> Task:
        x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(i)) * 2 - 1
        given = Measurement(upper_half(), upper_half().forward(x), sigma)  # a mask of its own
        made = Moment(given, 2) if by_moments else Projection(given)
        return replace(restore_task(model, "mask"), id=str(i), seed=i, condition=made)

    sizes = set()
    corrections = ChainPool._corrections

    def watched(self: ChainPool, samples: list[Sample]) -> tuple[tuple[Condition, Tensor], ...]:
        found = corrections(self, samples)
        sizes.add(tuple(sorted(len(at) for _, at in found)))
        return found

    monkeypatch.setattr(ChainPool, "_corrections", watched)
    tasks = [task(0, 0.2), task(1, 0.2), task(2, 0.2), task(3, 0.1)]
    _, found = run(*tasks)
    assert (2, 6) in sizes
    for each in tasks:
        torch.testing.assert_close(found[each.id], by_library(model, each), rtol=0, atol=1e-3)


# What a request says, and what it costs


@pytest.mark.parametrize("travel", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_rows_are_known_at_admission(
    running: Service, sampler: str, steps: int, travel: int
) -> None:
    spec = RestoreSpec(
        operator=OperatorSpec(**HALF), sampler=sampler, steps=steps, travel=travel, num_images=3
    )
    _, plan = admit(spec, running.card, Settings(), 1)
    schedule = diffusion.Schedule(np.asarray(running.card.betas))
    table = build_table(schedule, sampler=sampler, steps=steps, travel=travel)
    assert plan.evaluations == 3 * len(table)


@pytest.mark.parametrize(("solver_steps", "a_row"), [(None, 2), (0, 2), (1, 2), (3, 4)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_products_are_counted_at_admission(
    running: Service, solver_steps: int | None, a_row: int, guidance: float
) -> None:
    spec = RestoreSpec(
        operator=OperatorSpec(**HALF), method="moment", solver_steps=solver_steps, class_label=1,
        guidance=guidance, num_images=2,
    )  # fmt: skip
    filled, plan = admit(spec, running.card, Settings(), 1)
    assert plan.evaluations == 2 * 50 * a_row * (1 if guidance == 1 else 2)
    assert isinstance(filled, RestoreSpec) and filled.travel == 1
    given = condition(measurement("mask"), "moment", solver_steps=filled.solver_steps or 0)
    assert given.cost == a_row


def test_a_learned_variance_does_not_travel(running: Service) -> None:
    card = running.card.model_copy(update={"learned_variance": True})
    spec = RestoreSpec(operator=OperatorSpec(**HALF), sampler="ddpm", variance="learned")
    with pytest.raises(SpecError, match="/variance: learned: does not travel"):
        admit(spec, card, Settings(), 1)
    admit(spec.model_copy(update={"travel": 1}), card, Settings(), 1)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        (HALF, (1, 8, 8)),
        ({"name": "average_pool", "factor": 2}, (1, 8, 8)),
        ({"name": "average_pool", "factor": 2}, (3, 8, 8)),
        ({"name": "gray"}, (3, 8, 8)),
        ({"name": "gray", "weights": (0.5, 0.2, 0.3)}, (3, 8, 8)),
        ({"name": "blur", "deviation": 1.0}, (1, 8, 8)),
        ({"name": "blur", "kernel": ((0.2, 0.5, 0.3),)}, (1, 8, 8)),
        ({"name": "identity"}, (1, 8, 8)),
    ],
)
def test_the_operator_of_a_request_is_the_one_it_names(
    asked: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    """Its measurement has the shape that was promised, and no value above the bound."""
    spec = OperatorSpec(**asked)
    operator = operator_of(spec, shape)
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).sign()
    y = operator.forward(x)
    assert tuple(y.shape[1:]) == spec.measured(shape)
    assert float(y.abs().max()) <= spec.bound + 1e-6


# A real worker


def planes(service: Service, job_id: str, count: int) -> np.ndarray:
    outputs = service.outputs(job_id)
    return np.stack([from_bytes(outputs[f"i:{i}"], (1, 8, 8)) for i in range(count)])


def test_a_job_gives_the_images_of_the_library(running: Service) -> None:
    job = running.admit(
        kind="restore", inputs=PICTURE, operator=OperatorSpec(**HALF), num_images=3, steps=8,
        travel=2, seed=4, snapshots={"every": 5, "kinds": ("x_start",)}, noise=0.0,
    )  # fmt: skip
    record = running.ended(job)
    assert record.done == record.work == 3 * 15
    model = diffusion.load(running.models / "tiny")
    y = torch.from_numpy(PICTURE.reshape(1, 8, 8).astype(np.float32)) / 127.5 - 1
    y[:, 4:] = 0
    expected = diffusion.restore(
        model, y, upper_half(), 3, steps=8, travel=2, seed=4, dtype=torch.float32
    )
    found = planes(running, job, 3)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert record.provenance["rederive_eps"] is True


def test_a_job_by_moments_gives_the_images_of_the_library(running: Service) -> None:
    job = running.admit(
        kind="restore", inputs=PICTURE, operator=OperatorSpec(name="average_pool", factor=1),
        num_images=2, steps=5, seed=4, method="moment", solver_steps=2, noise=30.0, class_label=1,
    )  # fmt: skip
    record = running.ended(job)
    assert record.done == record.work == 2 * 5 * 3
    model = diffusion.load(running.models / "tiny")
    y = torch.from_numpy(PICTURE.reshape(1, 8, 8).astype(np.float32)) / 127.5 - 1
    expected = diffusion.restore(
        model, y, Identity(), 2, steps=5, seed=4, method="moment", solver_steps=2,
        sigma=30 / 127.5, class_label=1,
    )  # fmt: skip
    np.testing.assert_allclose(planes(running, job, 2), expected, atol=5e-3)


@pytest.mark.parametrize(
    ("signal", "method"),
    [
        (15, {"method": "projection", "steps": 100, "travel": 2}),
        pytest.param(9, {"method": "moment", "steps": 60}, marks=pytest.mark.slow),
    ],
    ids=["deploy", "kill"],
)
def test_a_job_survives_its_worker(service: Service, signal: int, method: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "kind": "restore", "inputs": PICTURE, "operator": OperatorSpec(**HALF),
        "num_images": 2, "seed": 2, "deterministic": True, **method,
    }  # fmt: skip
    first = service.worker(DDPM_DRAIN_S="0")
    job = service.admit(**options)
    service.until(lambda: service.record(job).done > 60)
    service.kill(first, signal)
    if signal == 15:
        assert service.record(job).status == "queued"
    service.worker()
    service.ended(job)
    whole = service.admit(**options)
    service.ended(whole)
    assert service.outputs(job) == service.outputs(whole)
