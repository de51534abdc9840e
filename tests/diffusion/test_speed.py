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
from diffusion.speed import AnyBatch, CompileError, cost_of_bfloat16, prepare
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
    calls = {str(node.target) for graph in found.graphs for node in graph.graph.nodes}
    ours = any("winograd" in call for call in calls)
    assert ours == (dtype == torch.float32 and torch.get_num_threads() == 1)


DEEP = dataclasses.replace(  # the coarsest maps of which few rows are too few for Winograd's way
    TINY, image_size=32, channels=(16, 16, 32, 32), groups=8, attention=(False,) * 4
)


@pytest.mark.parametrize(
    ("sizes", "codes"), [((32, 17, 8, 3, 2, 1), 1), ((5, 8, 3, 1, 2), 1), ((1, 3, 8, 32), 3)]
)
def test_few_codes_serve_calls_of_all_kinds(sizes: tuple[int, ...], codes: int) -> None:
    """35 images, 16 at once, took seven compilations, of a minute each."""
    compiled_for: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled_for.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    model = build_model(DEEP)
    network = prepare(model).network
    network.compile(backend=backend)
    evaluate = AnyBatch(network)
    x = torch.randn(32, *model.shape, generator=torch.Generator().manual_seed(0))
    t, labels = torch.arange(32), torch.arange(32) % 3
    with torch.inference_mode():
        for rows, dtype in zip(sizes, (torch.int64, torch.float64) * 3, strict=False):
            expected = model.network(x[:rows], t[:rows], labels[:rows])
            for given in (
                x[:rows],  # no inference tensor
                x.flip(0).flip(0)[:rows],
                x[:rows].clone(memory_format=torch.channels_last),
            ):
                found = evaluate(given, t[:rows].to(dtype), labels[:rows])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(compiled_for) == codes


def test_what_fails_inside_of_a_compiler_is_said_in_one_line() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise ValueError("started\nfile.cpp:7: fatal error: no such header\nand more")

    network = prepare(build_model()).network
    network.compile(backend=backend)
    why = r"^torch.compile failed: ValueError: file.cpp:7: fatal error: no such header$"
    with pytest.raises(CompileError, match=why), torch.inference_mode():
        AnyBatch(network)(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2).long())


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
