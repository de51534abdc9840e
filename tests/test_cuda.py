"""The same numbers on a GPU as on a CPU: noise to the bit, all else within rounding.

Skipped where there is no CUDA device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

import diffusion
from diffusion import Model
from diffusion.device import pick_device
from diffusion.flow import flow_likelihood
from diffusion.graphs import WARM_UPS, Graphs
from diffusion.noise import Purpose, normals
from diffusion.operators import AveragePool
from diffusion.samplers import build_table
from diffusion.speed import prepare
from training.config import load_config
from training.trainer import Trainer
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Event, Failed, Finished, Images, Start, Task
from worker.network.network import Network

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
]

SHIPPED = Path(__file__).parents[1] / "models" / "mnist"
GREY_LEVEL = 2 / 255


@pytest.fixture(scope="module")
def on_cpu() -> Model:
    return diffusion.load(SHIPPED)


@pytest.fixture(scope="module")
def on_gpu() -> Model:
    return diffusion.load(SHIPPED, "cuda")


def digits(n: int) -> Tensor:
    """Something like digits: grey levels k/127.5 − 1."""
    rng = torch.Generator().manual_seed(3)
    image = torch.nn.functional.interpolate(torch.rand(n, 1, 6, 6, generator=rng), 32) > 0.6
    return image.float() * 2 - 1


def test_noise_is_the_same_to_the_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    seeds = torch.randint(2**53, (7,), generator=rng)
    indices, rows = (torch.randint(2**32, (7,), generator=rng) for _ in range(2))
    for shape in ((1, 32, 32), (3, 5, 7), (1, 1, 1)):
        for purpose in (Purpose.STEP, torch.arange(7)):
            here = normals(seeds, indices, rows=rows, purpose=purpose, shape=shape)
            there = purpose.cuda() if isinstance(purpose, Tensor) else purpose
            keys = (seeds.cuda(), indices.cuda())
            drawn = normals(*keys, rows=rows.cuda(), purpose=there, shape=shape)
            assert torch.equal(drawn.cpu(), here)


def inputs(model: Model, n: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n)
    t = torch.linspace(0, model.schedule.T - 1, n).long()
    return torch.randn(n, *model.shape, generator=rng), t, t % 11


@torch.inference_mode()
def test_the_network_agrees_in_float32(on_cpu: Model, on_gpu: Model) -> None:
    x, t, labels = inputs(on_cpu, 33)
    here = on_cpu.eps(x, t, labels)
    there = on_gpu.eps(x.cuda(), t.cuda(), labels.cuda()).cpu()
    assert (here - there).abs().max() < 2e-5 * here.abs().max(), "TF32 would be 1e-3"


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_recorded_evaluation_is_the_plain_one(
    on_gpu: Model, dtype: torch.dtype, compile: bool
) -> None:
    fast = prepare(on_gpu, dtype=dtype, compile=compile)
    assert isinstance(fast.evaluator, Graphs)
    for n in (1, 6):
        for turn in range(WARM_UPS + 3):  # plain, recorded, replayed with other input
            x, t, labels = (v.cuda() for v in inputs(on_gpu, n))
            x = x + turn
            wanted = on_gpu.eps(x, t, labels)
            found = fast.eps(x, t, labels)
            error = (found - wanted).norm() / wanted.norm()
            assert error < (2e-5 if dtype == torch.float32 else 2e-2)
    assert sum(graph is not None for graph in fast.evaluator._recorded.values()) == 2


def test_out_of_inference_mode_gradients_go_through(on_gpu: Model) -> None:
    fast = prepare(on_gpu)
    x, t, labels = (v.cuda() for v in inputs(on_gpu, 2))
    x.requires_grad_()
    fast.eps(x, t, labels).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any())


SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "ddpm", "steps": 50, "guidance": 2.0},
    {"sampler": "ddim", "steps": 20},
    {"sampler": "dpmpp_3m", "steps": 12, "spacing": "lambda"},
    {"sampler": "unipc", "steps": 12, "spacing": "karras"},
    {"sampler": "langevin", "steps": 20, "corrector_steps": 2},
]


@pytest.mark.filterwarnings("ignore::diffusion.samplers.FewStepsWarning")
@pytest.mark.parametrize("how", SAMPLERS, ids=lambda how: how["sampler"])
def test_chains_end_at_the_same_pictures(on_cpu: Model, on_gpu: Model, how: dict[str, Any]) -> None:
    options = {"num_images": 6, "seed": 5, "class_label": [0, 1, 2, 3, 4, 5], **how}
    here = diffusion.sample(on_cpu, dtype=torch.float32, **options)
    there = diffusion.sample(on_gpu, dtype=torch.float32, **options).cpu()
    difference = (here - there).abs()
    assert difference.max() < 2 * GREY_LEVEL
    assert difference.mean() < GREY_LEVEL / 50


def test_the_bound_agrees(on_cpu: Model, on_gpu: Model) -> None:
    x = digits(3)
    labels = torch.tensor([1, 2, 3])
    here = diffusion.likelihood(on_cpu, x, samples=40, class_label=labels)
    there = diffusion.likelihood(on_gpu, x.cuda(), samples=40, class_label=labels.cuda())
    assert there.bits_per_dim.cpu() == pytest.approx(here.bits_per_dim.numpy(), rel=1e-4)


def test_restoring_encoding_and_the_flow_agree(on_cpu: Model, on_gpu: Model) -> None:
    x = digits(1)
    y = AveragePool(4).forward(x)[0]
    for method in ("projection", "moment"):
        how: dict[str, Any] = {"method": method, "steps": 12, "dtype": torch.float32}
        here = diffusion.restore(on_cpu, y, AveragePool(4), 3, **how)
        there = diffusion.restore(on_gpu, y, AveragePool(4), 3, **how).cpu()
        assert (here - there).abs().mean() < GREY_LEVEL / 10
    here = diffusion.encode(on_cpu, x, steps=50, dtype=torch.float32)
    there = diffusion.encode(on_gpu, x.cuda(), steps=50, dtype=torch.float32).cpu()
    assert (here - there).abs().max() < 1e-2
    exact = flow_likelihood(on_cpu, x, draws=2, steps=20).bits_per_dim
    found = flow_likelihood(on_gpu, x.cuda(), draws=2, steps=20).bits_per_dim
    assert found.cpu() == pytest.approx(exact.numpy(), rel=1e-3)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        (tmp_path / "data" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / str(i % 2) / f"{i}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("objective", ["simple", "vlb", "consistency"])
def test_training_takes_the_same_steps(pictures: Path, tmp_path: Path, objective: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        AcceleratorState._reset_state(reset_partial_state=True)  # of a process, which has one run
        config = tmp_path / f"{device}.toml"
        config.write_text(
            f'steps = 6\nbatch_size = 16\nsample_every = 0\ndevice = "{device}"\n'
            f'objective = "{objective}"\nprecision = "fp32"\n'
            f"data = {{source = '{pictures}', flips = true}}\n"
            "network = {image_size = 8, in_channels = 1, channels = [8, 16], num_classes = 2, "
            "attention = [false, true], res_blocks = 1, groups = 4, null_class = true}\n"
            "schedule = {T = 100}\noptimizer = {learning_rate = 1e-3, warmup_steps = 0}\n"
        )
        trainer = Trainer(load_config(config), tmp_path / device, progress=False)
        assert trainer.device.type == device
        network, optimizer = trainer._prepare()
        losses[device] = [float(trainer._optimize(network, optimizer, 1e-3)[0]) for _ in range(6)]
        assert trainer.batches.images.batch(torch.tensor([0]))[0].device.type == device
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)


class Heard:
    """An engine ticked by hand on the GPU, and the pictures that it made."""

    def __init__(self, **options: Any) -> None:
        self.pictures: dict[str, dict[int, Tensor]] = {}
        self.ended: set[str] = set()
        self.engine = Engine(self._take, EngineOptions(**options))

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Images):
                found = self.pictures.setdefault(event.task_id, {})
                found.update(zip(event.indices, event.x.float().cpu(), strict=True))
            if isinstance(event, Finished):
                self.ended.add(event.task_id)

    def run(self, *tasks: Task) -> None:
        for task in tasks:
            self.engine.submit(task)
        while self.engine.tick():
            pass
        assert self.ended >= {task.id for task in tasks}


def chain_task(model: Model, name: str, n: int, **options: Any) -> Task:
    table = build_table(model.schedule, sampler="ddim", steps=15, eta=1.0)
    return Task(
        name, model, table, 7, tuple(Start(i, class_label=i % 10) for i in range(n)), **options
    )


def test_the_engine_draws_what_the_library_draws(on_cpu: Model, on_gpu: Model) -> None:
    heard = Heard(dtype=torch.float32)
    mates = [chain_task(on_gpu, f"mate{i}", i + 1) for i in range(5)]
    heard.run(chain_task(on_gpu, "ours", 5), *mates)
    options: dict[str, Any] = {"sampler": "ddim", "steps": 15, "eta": 1.0, "seed": 7}
    wanted = diffusion.sample(
        on_cpu, 5, class_label=[0, 1, 2, 3, 4], dtype=torch.float32, **options
    )
    found = torch.stack([heard.pictures["ours"][i] for i in range(5)])
    assert (found.clamp(-1, 1) - wanted).abs().max() < 2 * GREY_LEVEL


def test_a_deterministic_task_sees_no_mates(on_gpu: Model) -> None:
    alone, among = Heard(), Heard()
    alone.run(chain_task(on_gpu, "ours", 3, deterministic=True))
    mates = [chain_task(on_gpu, f"mate{i}", 2 * i + 1, deterministic=True) for i in range(4)]
    among.run(mates[0], chain_task(on_gpu, "ours", 3, deterministic=True), *mates[1:])
    for i in range(3):
        assert torch.equal(alone.pictures["ours"][i], among.pictures["ours"][i])


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Memory for a batch of some rows, and not for one of many."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3e8) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_a_batch_without_memory_is_halved(on_gpu: Model) -> None:
    heard = Heard(dtype=torch.float32, max_rows=256, capacity=256)
    heard.run(chain_task(on_gpu, "large", 256))
    assert len(heard.pictures["large"]) == 256
    lane = next(iter(heard.engine.lanes.values()))
    assert lane._max_rows < 256, "there was memory enough after all"


def test_a_worker_picks_the_gpu(on_gpu: Model) -> None:
    assert pick_device().type == "cuda"
    network = Network(on_gpu, dtype=torch.bfloat16, max_rows=64)
    assert math.isfinite(network.costs.seconds(network.shapes[-1]))
    assert network.in_process and network.tile(64) == network.tile(1), "one code for all sizes"
