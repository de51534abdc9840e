from __future__ import annotations

import pytest

from worker.costs import FORGET_AFTER, CostModel, RateMeter, Shape

SHAPES = [Shape(rows) for rows in (1, 2, 4, 8, 16, 32, 64)]


def measured(seconds: dict[int, float]) -> CostModel:
    model = CostModel(clock=lambda: 0.0)
    for rows, value in seconds.items():
        for _ in range(2):
            model.record(Shape(rows), value)
    return model


def test_a_cpu_takes_the_smallest_batch_at_the_knee() -> None:
    costs = measured({1: 0.0074, 4: 0.0115, 16: 0.042, 32: 0.081, 64: 0.161})
    assert costs.best(64, SHAPES).rows == 16  # 381 rows/s, where 64 at once give 398


def test_a_gpu_takes_the_largest_batch() -> None:
    costs = measured({1: 0.002, 8: 0.002, 64: 0.0022})
    assert costs.best(64, SHAPES).rows == 64
    assert costs.best(5, SHAPES).rows == 8  # padding is cheaper than a second step


def test_linear_cost_prefers_a_full_smaller_batch_to_padding() -> None:
    costs = measured({rows: 0.01 * rows for rows in (1, 2, 4, 8, 16, 32, 64)})
    assert costs.best(37, SHAPES).rows <= 32


def test_shapes_that_were_never_run_are_tried() -> None:
    costs = measured({1: 0.01})
    assert costs.best(64, SHAPES).rows == 64


def test_the_first_run_of_a_shape_is_not_counted() -> None:
    costs = CostModel(clock=lambda: 0.0)
    costs.record(Shape(4), 100.0)
    costs.record(Shape(4), 0.1)
    assert costs.seconds(Shape(4)) == pytest.approx(0.1)


def test_an_old_measurement_is_forgotten() -> None:
    now = [0.0]
    costs = CostModel(clock=lambda: now[0])
    for _ in range(2):
        costs.record(Shape(1), 0.01)
        costs.record(Shape(64), 6.4)  # the machine was busy
    assert costs.best(64, SHAPES).rows < 64
    now[0] = FORGET_AFTER + 1
    assert costs.best(64, SHAPES).rows == 64


def test_compiled_code_is_tried_and_then_judged_by_its_time() -> None:
    costs = measured({16: 0.04})
    shapes = [Shape(16), Shape(16, compiled=True)]
    assert costs.best(16, shapes).compiled
    for _ in range(2):
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
