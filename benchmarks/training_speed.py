"""Images/s of our trainer against the same network in diffusers' plain fp32 training loop.

    .venv/bin/python benchmarks/training_speed.py

Both train the 1.6M-parameter network of models/mnist on the same 512 random pictures. The two
take turns, so that a machine whose speed drifts slows both; the ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from training.config import load_config
from training.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "training" / "configs" / "mnist.toml"


def write_pictures(folder: Path, count: int = 512) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        (folder / str(i % 10)).mkdir(exist_ok=True, parents=True)
        pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(i % 10) / f"{i}.png")


def our_step(folder: Path, batch: int, compiled: bool) -> Callable[[], None]:
    """One optimizer step of the trainer itself."""
    overrides = [f"data.source={folder}", f"batch_size={batch}", f"compile={str(compiled).lower()}"]
    trainer = Trainer(load_config(CONFIG, overrides), folder.parent / "run")
    return trainer.stepper()


def diffusers_step(folder: Path, batch: int) -> Callable[[], None]:
    """One step of the loop in diffusers' documentation, fp32, without EMA."""
    from diffusers import DDPMScheduler, UNet2DModel
    from torch.utils.data import DataLoader, TensorDataset

    images, labels = [], []
    for path in sorted(folder.rglob("*.png")):
        padded = np.pad(np.asarray(Image.open(path), np.float32), 2) / 127.5 - 1
        images.append(torch.from_numpy(padded)[None])
        labels.append(int(path.parent.name))
    dataset = TensorDataset(torch.stack(images), torch.tensor(labels))
    network: Any = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=None,
        num_class_embeds=11,
    )
    scheduler: Any = DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def forever():  # type: ignore[no-untyped-def]
        while True:
            yield from DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True)

    batches = forever()

    def step() -> None:
        clean, label = next(batches)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),))
        noisy = scheduler.add_noise(clean, noise, t)
        loss = F.mse_loss(network(noisy, t, class_labels=label, return_dict=False)[0], noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # they log it at every step

    return step


def rate(step: Callable[[], None], batch: int, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * batch / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        write_pictures(folder)
        ours = our_step(folder, arguments.batch, not arguments.eager)
        theirs = diffusers_step(folder, arguments.batch)
        for step in (ours, theirs):
            rate(step, arguments.batch, 2)  # warm up, compile
        rates = [
            (
                rate(ours, arguments.batch, arguments.steps),
                rate(theirs, arguments.batch, arguments.steps),
            )
            for _ in range(arguments.turns)
        ]
    print("| loop | images/s: min, median, max |\n|---|---|")
    for name, column in (("ddpm train", 0), ("diffusers, plain fp32", 1)):
        values = sorted(pair[column] for pair in rates)
        print(f"| {name} | {values[0]:.1f}, {statistics.median(values):.1f}, {values[-1]:.1f} |")
    print(f"| ratio | {statistics.median(a / b for a, b in rates):.2f} |")


if __name__ == "__main__":
    main()
