"""What a GPU gives: its own limits, training, and sampling beside diffusers.

    .venv/bin/python benchmarks/accelerator.py limits
    .venv/bin/python benchmarks/accelerator.py train [--batches 128,256,512]
    .venv/bin/python benchmarks/accelerator.py sample [--model FOLDER] [--batches 1,16,64,256,1024]

The network is the paper's for CIFAR-10 (35.7 million weights), with random ones unless a folder is
given. `--device cpu --small` rehearses everything on a small network without a GPU. The service:
`accelerator_service.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.checkpoint import load
from diffusion.diffusers.folder import export_diffusers
from diffusion.model import Model, ModelConfig
from diffusion.noise import Purpose, image_normals
from diffusion.samplers import SamplingDefaults, build_table
from diffusion.sampling import chain
from diffusion.speed import prepare
from diffusion.unet import UNet
from diffusion.unet_config import UNetConfig
from training.config import TrainConfig, load_config
from training.trainer import Trainer

SMALL = UNetConfig(channels=(8, 16), attention=(False, False), res_blocks=1, groups=4)


@dataclass(frozen=True)
class Place:
    """Where everything runs, and on which network."""

    device: torch.device
    network: UNetConfig

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Of one call: the median of `times`, each waited for, after three that are not counted."""
        for _ in range(3):
            call()
        found = []
        for _ in range(times):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def model(self, folder: Path | None) -> Model:
        """That of a folder, or one with random weights."""
        if folder is not None:
            return load(folder, self.device)
        torch.manual_seed(0)
        network = UNet(replace(self.network, dropout=0.0)).to(self.device).eval()
        with torch.no_grad():
            for parameter in network.parameters():  # closing layers would be zero
                if parameter.ndim > 1 and float(parameter.abs().max()) < 1e-4:
                    parameter.normal_(std=0.01)
        return Model(ModelConfig(network.config), network.requires_grad_(False))

    def flops(self) -> float:
        """Operations of one evaluation of one image."""
        model = Place(torch.device("cpu"), self.network).model(None)
        x, t = torch.zeros(1, *model.shape), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            model.network(x, t)
        return float(counter.get_total_flops())


def matrix_rate(place: Place) -> float:
    """Operations/s of a large matrix product in bfloat16, on random numbers."""
    n = 8192 if place.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=place.device).bfloat16() for _ in range(2))
    return 2 * n**3 / place.seconds(lambda: a @ b, 20)


def limits(place: Place) -> float:
    """Print what the device can do at most."""
    n = 1 << (32 if place.device.type == "cuda" else 24)
    a, b = (torch.empty(n // 2, dtype=torch.uint8, device=place.device) for _ in range(2))
    copied = n / place.seconds(lambda: b.copy_(a), 20)
    rate = matrix_rate(place)
    print(f"| copy, read and written | {copied / 1e12:.2f} TB/s |")
    print(f"| product of bfloat16 matrices | {rate / 1e12:.0f} TFLOP/s |")
    print(f"| one evaluation of one image | {place.flops() / 1e9:.2f} GFLOP |", flush=True)
    return rate


# Training


def trainer(place: Place, folder: Path, overrides: Iterable[str]) -> Trainer:
    """The CIFAR-10 configuration on random pictures."""
    config = load_config("cifar10", [f"data.source={folder}", *overrides])
    changed: dict[str, Any] = {"network": place.network, "device": place.device.type}
    return Trainer(TrainConfig.model_validate(dict(config) | changed), folder, progress=False)


def write_pictures(folder: Path, count: int) -> None:
    """Random ones, as a parquet file."""
    import io

    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        rows.append({"img": {"bytes": file.getvalue(), "path": None}, "label": 0})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-0.parquet")


def train(place: Place, batches: list[int], compiled: list[bool], steps: int) -> None:
    """Images/s of whole optimizer steps: batch, noise, forward, backward, clip, Adam, average."""
    flops, most = 3 * place.flops(), matrix_rate(place)
    print("| batch | code | ms a step | images/s | of the matrix products' rate |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch), 2048)
        for batch in batches:
            for compile in compiled:
                given = [f"batch_size={batch}", f"compile={str(compile).lower()}"]
                step = trainer(place, Path(scratch), given).stepper()
                began = time.perf_counter()
                step()
                place.wait()
                first = time.perf_counter() - began
                for _ in range(4):
                    step()
                place.wait()
                began = time.perf_counter()
                for _ in range(steps):
                    step()
                place.wait()
                each = (time.perf_counter() - began) / steps
                code = "compiled" if compile else "eager"
                share = batch / each * flops / most
                print(
                    f"| {batch} | {code} ({first:.0f} s at first) | {each * 1e3:.1f} "
                    f"| {batch / each:.0f} | {share:.2f} |",
                    flush=True,
                )


# Sampling


def chain_rate(place: Place, model: Model, batch: int, *, sampler: str, steps: int) -> float:
    """Image-steps/s of a chain in its middle: of 40 rows or as many as there are."""
    table = build_table(model.schedule, sampler=sampler, steps=steps)
    x = image_normals(
        0, torch.arange(batch, device=place.device), row=0, purpose=Purpose.X_T, shape=model.shape
    )
    measured, began = min(40, steps - 9), 0.0
    for step in chain(model, table, x):
        if step.row in (8, 8 + measured):
            place.wait()
            now = time.perf_counter()
            if step.row > 8:
                return batch * measured / (now - began)
            began = now
    raise AssertionError


@torch.inference_mode()
def forward_rate(place: Place, model: Model, batch: int) -> float:
    """Evaluations/s of the network alone."""
    x = torch.randn(batch, *model.shape, device=place.device)
    t = torch.arange(batch, device=place.device) % model.schedule.T
    return batch / place.seconds(lambda: model.eps(x, t), 10)


def diffusers_rate(place: Place, folder: Path, batch: int, dtype: torch.dtype) -> float:
    """Image-steps/s of diffusers' pipeline with the same weights."""
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(folder).to(place.device)
    pipeline.set_progress_bar_config(disable=True)
    steps = 20

    def draw() -> None:  # it turns its result into NumPy, which has no bfloat16
        with torch.autocast(place.device.type, dtype=dtype, enabled=dtype != torch.float32):
            pipeline(batch_size=batch, num_inference_steps=steps, output_type="np")

    draw()
    place.wait()
    began = time.perf_counter()
    draw()
    place.wait()
    return batch * steps / (time.perf_counter() - began)


def sample(place: Place, folder: Path | None, batches: list[int], peers: list[int]) -> None:
    """Images/s at T = 1000 and at DDIM 50 by batch, and what diffusers gives."""
    model = place.model(folder)
    flops, most = place.flops(), matrix_rate(place)
    print(
        "| batch | code | evaluations/s | of the matrix products' rate | images/s at T = 1000 "
        "| at DDIM 50 |\n|---|---|---|---|---|---|"
    )
    ours: dict[int, float] = {}
    for code in ("eager", "compiled"):
        fast = prepare(model, dtype=torch.bfloat16, compile=code == "compiled")
        for batch in batches:
            alone = forward_rate(place, fast, batch)
            ddpm = chain_rate(place, fast, batch, sampler="ddpm", steps=1000)
            ddim = chain_rate(place, fast, batch, sampler="ddim", steps=50)
            ours[batch] = max(ours.get(batch, 0.0), ddpm)
            share = alone * flops / most
            print(
                f"| {batch} | {code} | {alone:.0f} | {share:.2f} | {ddpm / 1000:.2f} "
                f"| {ddim / 50:.1f} |",
                flush=True,
            )
    print("\n| diffusers' DDPMPipeline | images/s at T = 1000 | ours |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        plain = replace(model.config, sampling=SamplingDefaults())  # diffusers lacks some
        export_diffusers(Model(plain, model.network), Path(scratch) / "peer")
        for dtype in (torch.float32, torch.bfloat16):
            for batch in peers:
                rate = diffusers_rate(place, Path(scratch) / "peer", batch, dtype)
                name = str(dtype).removeprefix("torch.")
                times = max(ours.values()) / rate
                print(f"| {name}, batch {batch} | {rate / 1000:.2f} | {times:.2f} × |", flush=True)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Place]:
    """What every one of these is asked: on which device, and on which network."""
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small network, to rehearse")
    arguments = parser.parse_args()
    network = SMALL if arguments.small else load_config("cifar10").network
    place = Place(torch.device(arguments.device), network)
    if place.device.type == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    return arguments, place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["limits", "train", "sample"])
    parser.add_argument("--batches", default="1,16,64,256,1024")
    parser.add_argument("--peers", default="64,256", help="batches of diffusers")
    parser.add_argument("--code", default="compiled", help="of training: compiled, eager or both")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps that are timed")
    arguments, place = parse(parser)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    if arguments.what == "limits":
        limits(place)
    elif arguments.what == "train":
        codes = {"compiled": [True], "eager": [False], "both": [False, True]}[arguments.code]
        train(place, batches, codes, arguments.steps)
    else:
        peers = [int(batch) for batch in arguments.peers.split(",") if batch]
        sample(place, arguments.model, batches, peers)


if __name__ == "__main__":
    main()
