"""`ddpm bench`: each figure on a tiny network, and what is said of figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion import Model
from diffusion.speed import prepare
from worker.bench.command import Figures, forward_rate, machine, table, verdict
from worker.bench.limit import fastest, limit_rate, products
from worker.bench.load import EngineLoad, LoadError, service
from worker.network.network import example
from worker.network.networks import Networks


def test_products_are_all_convolutions_and_linear_layers(
    make_model: Callable[..., Model],
) -> None:
    fast = prepare(make_model())
    seen: list[torch.Tensor] = []
    layers = [m for m in fast.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.inference_mode():
        calls = products(fast.network, *example(fast, 4))
        expected = list(seen)
        found = [call() for call in calls]
    assert len(found) == len(expected) >= len(layers)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, torch.Tensor)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_every_part_is_measured(make_model: Callable[..., Model]) -> None:
    model = make_model()
    networks = Networks(torch.float32, 8)
    network = networks.prepare(model)
    assert limit_rate(prepare(model), 8, 0.01) > 0
    assert forward_rate(network, network.shapes[-1], 0.01) > 0
    assert EngineLoad(model, networks).rate(0.3) > 0
    assert fastest(lambda: None, 0.0) < 0.1
    assert "cores" in machine()


def test_the_verdict_is_in_words() -> None:
    good = Figures(400, 310, 305, 300, first_s=0.8, compiled=True)
    assert "| the engine | 305 | 0.98 |" in table(good)
    said = verdict(good)
    assert said[0] == "The network has 0.78 of the speed of torch's convolutions alone, as wanted."
    assert all(line.endswith("as wanted.") for line in said[:4])
    assert "6.0 pictures/s of 50 steps" in said[4]
    bad = verdict(Figures(400, 200, 100, 50, first_s=3.0, compiled=False))
    assert "uncompiled" in bad[1] and "longer than the 2 wanted" in bad[4]
    assert "the engine, short of the 0.90 wanted" in bad[3]
    on_a_gpu = Figures(0, 200, 190, 180, first_s=1, compiled=True)
    assert "convolutions" not in table(on_a_gpu) + " ".join(verdict(on_a_gpu))


def test_a_service_that_does_not_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no model in it"), service(tmp_path, tmp_path):
        pass
