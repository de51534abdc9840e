from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from diffusion.model import Model
from worker.network.costs import FORGET_AFTER, TRIALS, CostModel, RateMeter, Shape
from worker.network.network import Network

SHAPES = [Shape(rows) for rows in (1, 2, 4, 8, 16, 32, 64)]


def measured(seconds: dict[int, float]) -> CostModel:
    model = CostModel(clock=lambda: 0.0)
    for rows, value in seconds.items():
        run(model, Shape(rows), value)
    return model


def run(model: CostModel, shape: Shape, seconds: float) -> None:
    for _ in range(TRIALS + 1):
        model.record(shape, seconds)


def test_a_cpu_takes_the_smallest_batch_at_the_knee() -> None:
    costs = measured({1: 0.0074, 4: 0.0115, 8: 0.0216, 16: 0.042, 32: 0.081, 64: 0.161})
    assert costs.best(64, SHAPES).rows == 16  # 381 rows/s, where 64 at once give 398


def test_a_gpu_takes_the_largest_batch() -> None:
    costs = measured({rows: 0.002 + rows * 1e-6 for rows in (1, 2, 4, 8, 16, 32, 64)})
    assert costs.best(64, SHAPES).rows == 64
    assert costs.best(5, SHAPES).rows == 8  # padding is cheaper than a second step


def test_a_size_between_the_powers_of_two_is_taken_where_it_holds_all() -> None:
    costs = measured({rows: 0.01 + 0.005 * rows for rows in (1, 2, 4, 8)})
    shapes = [*SHAPES, Shape(6), Shape(7)]
    assert costs.best(6, shapes).rows == 6
    assert costs.best(64, shapes).rows != 7


def test_linear_cost_prefers_a_full_smaller_batch_to_padding() -> None:
    costs = measured({rows: 0.01 * rows for rows in (1, 2, 4, 8, 16, 32, 64)})
    assert costs.best(37, SHAPES).rows <= 32


def test_every_useful_shape_is_tried_before_any_is_judged() -> None:
    costs = CostModel(clock=lambda: 0.0)
    tried = []
    for _ in range(4 * (TRIALS + 1)):
        shape = costs.best(64, SHAPES)
        tried.append(shape.rows)
        costs.record(shape, 0.01 * shape.rows)
    assert tried == sorted(tried) and set(tried) == {8, 16, 32, 64}


def test_shapes_between_two_measured_ones_are_interpolated() -> None:
    costs = measured({16: 0.1, 32: 0.2})
    assert costs.seconds(Shape(24)) == pytest.approx(0.15)
    assert costs.seconds(Shape(64)) == pytest.approx(0.4)


def test_the_first_run_of_a_shape_is_not_counted() -> None:
    costs = CostModel(clock=lambda: 0.0)
    costs.record(Shape(4), 0.001)
    costs.record(Shape(4), 0.1)
    assert costs.seconds(Shape(4)) == pytest.approx(0.1)


def test_a_step_that_waited_for_the_processor_says_nothing() -> None:
    costs = measured({4: 0.1})
    costs.record(Shape(4), 30.0)
    assert costs.seconds(Shape(4)) == pytest.approx(0.1)


def test_an_old_measurement_is_forgotten() -> None:
    now = [0.0]
    costs = CostModel(clock=lambda: now[0])
    for rows, seconds in ((8, 0.08), (16, 1.6), (32, 3.2), (64, 6.4)):
        run(costs, Shape(rows), seconds)  # the machine was busy
    assert costs.best(64, SHAPES).rows == 8
    now[0] = FORGET_AFTER + 1
    for _ in range(4 * TRIALS):
        shape = costs.best(64, SHAPES)
        costs.record(shape, 0.01 * shape.rows**0.5)
    assert costs.best(64, SHAPES).rows == 64


def test_compiled_code_is_tried_and_then_judged_by_its_time() -> None:
    costs = measured({16: 0.04, 8: 0.02, 4: 0.01, 2: 0.005})
    shapes = [*SHAPES, Shape(16, compiled=True)]
    assert costs.best(16, shapes).compiled
    run(costs, Shape(16, compiled=True), 0.03)
    assert costs.best(16, shapes).compiled
    for _ in range(8):
        costs.record(Shape(16, compiled=True), 0.08)
    assert not costs.best(16, shapes).compiled


def test_a_guided_sample_needs_two_rows() -> None:
    costs = measured({1: 0.001, 2: 0.01})
    assert costs.best(2, SHAPES, at_least=2).rows >= 2


def test_rate_is_rows_over_busy_seconds() -> None:
    meter = RateMeter()
    assert meter.value == 0
    for _ in range(100):
        meter.add(16, 0.04)
    assert meter.value == pytest.approx(400)


def test_the_fastest_is_not_forgotten_while_little_is_to_do() -> None:
    """An estimate is about a queue, which fills batches; single samples say nothing of that."""
    now = 0.0
    costs = CostModel(clock=lambda: now)
    assert costs.fastest == 0.0
    run(costs, Shape(64), 0.16)
    now = FORGET_AFTER + 1
    run(costs, Shape(1), 0.01)
    assert costs.fastest == pytest.approx(400)
    run(costs, Shape(64), 0.32)
    now += 1
    assert costs.fastest >= 200


@pytest.mark.parametrize(("a_row", "tried"), [(0.0, {1, 4, 16, 64}), (0.02, {1, 4})])
def test_a_fresh_network_has_tried_full_batches_if_they_are_quick(
    a_row: float, tried: set[int], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimates of a worker that has run nothing yet are made with its rate."""

    def run_for(self: Network, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        time.sleep(0.002 + a_row * len(x))  # 0.002: as a GPU does, whatever the batch
        return x

    monkeypatch.setattr(Network, "eager", run_for)
    network = Network(model, dtype=torch.float32, max_rows=64)
    assert set(network.uses) == tried
    assert network.costs.fastest > (4_000 if 64 in tried else 20)
