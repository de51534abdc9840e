"""The number format that is fastest here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from diffusion import cores
from diffusion.speed import AnyBatch, cost_of_bfloat16, prepare
from tests.diffusion.networks import TINY, build_model


@pytest.fixture
def busy_neighbours() -> Iterator[None]:
    """Three processes a core that never wait."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    neighbours = [
        subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3 * cores.usable())
    ]
    for neighbour in neighbours:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
    yield
    for neighbour in neighbours:
        neighbour.kill()
        neighbour.communicate()


def cost() -> float:
    return cost_of_bfloat16(torch.device("cpu"), 32, 32)


@pytest.fixture
def cost_alone() -> float:
    return min(cost() for _ in range(3))


@pytest.mark.usefixtures("cost_alone", "busy_neighbours")
def test_neighbours_have_no_say_in_the_format(cost_alone: float) -> None:
    """By the clock on the wall, bfloat16 was chosen where it takes 1.7 times as long."""
    for _ in range(5):
        assert cost_alone / 1.5 < cost() < cost_alone * 1.5


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_takes_a_network_whole(dtype: torch.dtype) -> None:
    """In pieces with Python between them it is half as fast on two cores."""
    config = dataclasses.replace(TINY, channels=(16, 32), groups=8)  # all kinds of our own layers
    fast = prepare(build_model(config), dtype=dtype)
    x, t = torch.zeros(4, *fast.shape), torch.zeros(4, dtype=torch.long)
    with torch.inference_mode():
        found = torch._dynamo.explain(fast.network)(x, t, t)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


def test_one_code_serves_calls_of_all_kinds() -> None:
    """35 images, 16 at once, took seven compilations, of a minute each."""
    compiled_for: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled_for.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    model = build_model(dataclasses.replace(TINY, image_size=32))
    network = prepare(model).network
    network.compile(backend=backend)
    evaluate = AnyBatch(network)
    x = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
    t, labels = torch.arange(8), torch.arange(8) % 3
    with torch.inference_mode():
        for rows, dtype in (
            (8, torch.int64),
            (5, torch.float64),
            (1, torch.int64),
            (2, torch.int64),
        ):
            for given in (
                x[:rows],
                x[-rows:].clone(),
                x.clone()[:rows],
            ):  # the first is no inference tensor
                found = evaluate(given, t[:rows].to(dtype), labels[:rows])
                expected = model.network(given, t[:rows], labels[:rows])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(compiled_for) == 1


def test_one_row_alone_has_code_of_its_own() -> None:
    """Not the work of two."""
    rows_of: list[int] = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, labels: None) -> torch.Tensor:
            rows_of.append(x.shape[0])
            return x

    evaluate: Any = AnyBatch(Network())  # type: ignore[arg-type]
    for rows in (1, 3, 1):
        assert evaluate(torch.zeros(rows, 2), torch.zeros(rows)).shape == (rows, 2)
    assert rows_of == [1, 3, 1]
