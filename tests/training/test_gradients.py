"""Gradients of rows that are dealt to the cores."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion import cores
from diffusion.unet import UNet
from diffusion.unet_config import UNetConfig
from training.batches import Batch
from training.config import load_config
from training.dropout import what_is_kept
from training.gradients import Dealt, rows
from training.trainer import Trainer


def trained(config_file: Path, folder: Path, *overrides: str) -> Trainer:
    trainer = Trainer(load_config(config_file, overrides), folder, progress=False)
    trainer.run()
    return trainer


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["objective=vlb", "variance=learned", "network.learned_variance=true"],
        ["objective=vlb", "schedule.kind=learned"],
        ["precision=bf16"],
        ["network.dropout=0.3"],
    ],
)
def test_gradients_of_parts_are_those_of_the_whole(
    config_file: Path, tmp_path: Path, overrides: list[str], parts: int
) -> None:
    config = load_config(config_file, [*overrides, "batch_size=8"])
    trainer = Trainer(config, tmp_path / "run", progress=False)
    parameters = list(trainer.network.parameters())
    batch = trainer.batches.at(0, 8)
    threads: set[int] = set()

    def losses(some: Batch) -> Tensor:
        threads.add(threading.get_ident())
        return trainer.objective(trainer.network, some, dtype=trainer.dtype)

    whole = losses(batch)
    expected = torch.autograd.grad(whole.mean(), parameters, allow_unused=True)
    threads.clear()
    dealt = Dealt(parameters, parts=parts, threads=1, compiled=False)
    scale = torch.full([8], 1 / 8)
    found = []
    for _ in range(2):
        trainer.network.zero_grad()
        each = dealt.backward(losses, batch, scale)
        assert len(threads) == parts
        found.append([p.grad for p in parameters])
    near = 2e-2 if trainer.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(each, whole.detach(), rtol=near, atol=near)
    largest = max(float(g.abs().max()) for g in expected if g is not None)
    for one, again, gradient in zip(*found, expected, strict=True):
        if gradient is None:
            assert one is None
            continue
        assert one is not None and again is not None
        assert torch.equal(one, again)  # whichever part was done first
        torch.testing.assert_close(one, gradient, rtol=0, atol=near * largest)


def test_gradients_add_up(config_file: Path, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    dealt = Dealt([weight], parts=2, threads=1, compiled=False)
    batch = Batch(torch.ones(4, 1), torch.arange(4), torch.zeros(4, 1), None)
    for _ in range(2):
        dealt.backward(lambda some: (some.x_start * weight)[:, 0], batch, torch.arange(4.0))
    assert weight.grad == 2 * (0 + 1 + 2 + 3)


def test_rows_of_a_batch() -> None:
    batch = Batch(torch.zeros(4, 1), torch.arange(4), torch.zeros(4, 1), torch.arange(4) * 10)
    some = rows(batch, 1, 3)
    assert some.t.tolist() == [1, 2]
    assert some.class_label is not None and some.class_label.tolist() == [10, 20]


@pytest.mark.parametrize("timesteps", ["uniform", "importance"])
def test_a_run_does_not_depend_on_how_many_cores_there_are(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timesteps: str
) -> None:
    """To rounding; and on as many cores it is the same to the bit."""
    options = ["batch_size=8", f"timesteps={timesteps}", "accumulate=2"]
    ended = {}
    for name, count in (("one", 1), ("two", 2), ("two again", 2)):
        monkeypatch.setattr(cores, "_cores", count)
        trainer = trained(config_file, tmp_path / name, *options)
        assert trainer.dealt is not None and trainer.dealt.parts == count
        ended[name] = [p.detach() for p in trainer.network.parameters()]
    for one, two, again in zip(*ended.values(), strict=True):
        assert torch.equal(two, again)
        # Adam's first steps divide rounding noise by itself where a gradient is zero.
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3)


def test_what_a_network_drops_does_not_depend_on_the_cores(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    for count in (1, 2):
        monkeypatch.setattr(cores, "_cores", count)
        trainer = trained(config_file, tmp_path / str(count), "network.dropout=0.3")
        assert trainer.dealt is not None and trainer.dealt.parts == count
        ended.append([p.detach() for p in trainer.network.parameters()])
    for one, two in zip(*ended, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3)


NETWORK = UNetConfig(
    image_size=8, in_channels=1, channels=(8, 16), attention=(False, True), res_blocks=2, groups=4,
    dropout=0.25,
)  # fmt: skip


def test_what_is_kept_of_an_image_depends_on_its_seed_alone() -> None:
    seeds = torch.tensor([5, 2**32 - 1, 7, 5])
    whole = what_is_kept(NETWORK, seeds)
    for i in range(len(seeds)):
        for all_rows, one in zip(whole, what_is_kept(NETWORK, seeds[i : i + 1]), strict=True):
            assert torch.equal(all_rows[i], one[0])
            assert torch.equal(all_rows[0], all_rows[3])
            assert not torch.equal(all_rows[0], all_rows[1])
    many = torch.cat([part.flatten() for part in what_is_kept(NETWORK, torch.arange(200))])
    error = (0.25 * 0.75 / len(many)) ** 0.5
    assert abs(float(many.double().mean()) - 0.75) < 4 * error


def test_each_block_drops_what_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's dropout would, were that its draw."""
    torch.manual_seed(0)
    network = UNet(NETWORK).train()
    for parameter in network.parameters():  # nothing is near zero
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 9])
    kept = what_is_kept(NETWORK, torch.tensor([1, 2, 3]))
    drawn = iter(kept)
    found = network(x, t, None, kept)

    def dropout(h: Tensor, p: float, *_: object) -> Tensor:
        return h * next(drawn) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    torch.testing.assert_close(found, network(x, t))
    assert next(drawn, None) is None
    monkeypatch.undo()
    assert not torch.allclose(found, network.eval()(x, t))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_compiled_the_same_is_dropped(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_cores", 2)
    options = ["batch_size=8", "network.dropout=0.3", "steps=4"]
    ended = {
        compiled: trained(config_file, tmp_path / compiled, *options, f"compile={compiled}")
        for compiled in ("true", "false")
    }
    eager = ended["false"].network.parameters()
    for one, two in zip(ended["true"].network.parameters(), eager, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3)
