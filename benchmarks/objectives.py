"""The paper's Table 2 on MNIST at 16×16: the same small network and budget for every objective.

    .venv/bin/python benchmarks/objectives.py --data FOLDER_WITH_MNIST_PARQUET

Each row trains 0.28M parameters for the same number of steps, then measures bits/dim on the test
set (importance-sampled t) and the Fréchet distance of samples to the test set in the features of
the classifier of `quality.py`. Runs, samples and partial results are kept in --out, so that an
interrupted table goes on where it was. Rows run side by side, one process and one core each:
a network this small gains little from a second core. Writes objectives.json and objectives.md
there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import RealData, classifier, load_classifier
from torch import Tensor

import diffusion
from diffusion.samplers import build_table
from training.bits import choose, mean_and_error, measure
from training.config import DataConfig, TrainConfig, parse_config
from training.data import Images, load_images
from training.features import Draw, distance, draw_images, real, sampled
from training.pictures import grid
from training.state import find_state
from training.trainer import Trainer

SIDE = 16
BASE: dict[str, Any] = {
    "batch_size": 64,
    "precision": "fp32",  # with so few channels bfloat16 is slower, on AMX too
    "ema_decay": 0.999,
    "checkpoint_every": 200,
    "sample_every": 0,
    "log_every": 50,
    "network": {
        "image_size": SIDE,
        "in_channels": 1,
        "channels": [16, 32, 32],
        "attention": [False, True, False],
        "res_blocks": 1,
        "groups": 8,
    },
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100},
}


@dataclass(frozen=True)
class Row:
    """A line of the table: its name there, and what it changes of the base configuration."""

    title: str
    changes: dict[str, Any]
    learned_variance: bool = False


ROWS = {
    "mean-vlb-learned": Row(
        "μ̃, L, learned diagonal Σ",
        {"prediction": "mean", "objective": "vlb", "variance": "learned"},
        learned_variance=True,
    ),
    "mean-vlb-fixed": Row("μ̃, L, fixed Σ", {"prediction": "mean", "objective": "vlb"}),
    "mean-simple": Row("μ̃, ‖μ̃ − μ̃_θ‖²", {"prediction": "mean"}),
    "eps-vlb-learned": Row(
        "ε, L, learned diagonal Σ",
        {"objective": "vlb", "variance": "learned"},
        learned_variance=True,
    ),
    "eps-vlb-fixed": Row("ε, L, fixed Σ", {"objective": "vlb"}),
    "eps-simple": Row("ε, L_simple", {}),
    "eps-vlb-importance": Row(
        "ε, L, fixed Σ, importance-sampled t", {"objective": "vlb", "timesteps": "importance"}
    ),
    "eps-hybrid": Row(
        "ε, L_hybrid, learned Σ",
        {"objective": "hybrid", "variance": "learned"},
        learned_variance=True,
    ),
    "eps-min-snr": Row("ε, min-SNR-5", {"objective": "min_snr"}),
    "learned-beta": Row("ε, L, learned β", {"objective": "vlb", "schedule": {"kind": "learned"}}),
}


def config(row: Row, source: str, steps: int) -> TrainConfig:
    """The training configuration of a row."""
    network = {**BASE["network"], "learned_variance": row.learned_variance}
    raw = {
        **BASE,
        **row.changes,
        "steps": steps,
        "network": network,
        "data": {"source": source, "fit": "resize"},
    }
    return parse_config(raw, row.title)


def trained(row: Row, folder: Path, arguments: argparse.Namespace) -> diffusion.Model:
    """The row's model, trained in `folder` as far as it is not yet."""
    trainer = Trainer(config(row, arguments.data, arguments.steps), folder, progress=False)
    if find_state(folder) is not None:
        trainer.resume()
    if trainer.step < arguments.steps:
        trainer.run()
    if trainer.step < arguments.steps:  # a signal ended it
        raise SystemExit(f"{row.title}: interrupted at step {trainer.step}; run this again")
    return diffusion.load(folder)


def load_split(source: str, split: str) -> Images:
    data = DataConfig(source=source, split=split, fit="resize")
    return load_images(data, channels=1, side=SIDE, num_classes=10)


def enlarged(images: Tensor) -> Tensor:
    """16×16 to the classifier's 32×32: every pixel as a square of four."""
    return F.interpolate(images.float(), scale_factor=2.0, mode="nearest")


def train_judge(source: str, folder: Path) -> None:
    """Leave the classifier of `quality.py`, trained on enlarged images, in the folder."""
    if (folder / "classifier.safetensors").exists():
        return
    train = load_split(source, "train")
    pixels, labels = train.batch(torch.arange(len(train)))
    classifier(RealData(enlarged(pixels).to(torch.uint8), labels), folder)


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, then bits/dim and Fréchet distance of one row: the work of one process."""
    torch.set_num_threads(1)
    row, folder, began = ROWS[name], arguments.out / name, time.monotonic()
    test = load_split(arguments.data, "test")
    network = load_classifier(arguments.out)
    model = trained(row, folder, arguments)
    print(f"{name}: trained, {time.monotonic() - began:.0f} s", flush=True)
    variance = "learned" if row.learned_variance else "large"
    key = {"digest": model.digest}
    bits = measure(
        model,
        choose(test, arguments.images, seed=0),
        variances=(variance,),
        seed=0,
        samples=arguments.samples,
        path=folder / "partial" / "bits.npz",
        key=key,
        progress=False,
    )
    table = build_table(model.schedule, steps=arguments.sample_steps, variance=variance)
    draw = Draw(model, table, arguments.drawn, 0, None)

    def features(images: Tensor) -> Tensor:
        return network.features(enlarged(images))

    samples = sampled(
        features,
        draw,
        width=128,
        path=folder / "partial" / "features.npz",
        key={**key, "images": arguments.drawn},
        batch_size=50,
        progress=False,
    ).features
    grid(draw_images(draw, torch.arange(16))).save(folder / "samples.png")
    reference = real(
        features, choose(test, 10_000, seed=0), device=model.device, batch_size=500
    ).features
    mean, error = mean_and_error(bits.bits_per_dim(variance))
    print(f"{name}: measured, {time.monotonic() - began:.0f} s", flush=True)
    return {
        "title": row.title,
        "bits_per_dim": mean,
        "standard_error": error,
        "frechet": distance(samples, reference),
    }


def markdown(results: list[dict[str, Any]]) -> str:
    lines = ["| objective | bits/dim (test) | Fréchet distance |", "|---|---|---|"]
    lines += [
        f"| {r['title']} | {r['bits_per_dim']:.3f} ± {r['standard_error']:.3f} "
        f"| {r['frechet']:.2f} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with train-* and test-*.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--steps", type=int, default=3000, help="of training, each row")
    parser.add_argument("--images", type=int, default=500, help="for bits/dim")
    parser.add_argument("--samples", type=int, default=20, help="evaluations an image of it")
    parser.add_argument("--drawn", type=int, default=1000, help="samples for the distance")
    parser.add_argument("--sample-steps", type=int, default=250)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side")
    arguments = parser.parse_args()

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    train_judge(arguments.data, out)
    processes = min(arguments.processes, len(arguments.rows))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        rows = [pool.submit(measured, name, arguments) for name in arguments.rows]
        results = [row.result() for row in rows]
    machine = ("data", "out", "rows", "processes")
    settings = {k: v for k, v in vars(arguments).items() if k not in machine}
    report = {"settings": settings, "rows": results, "torch": torch.__version__}
    (out / "objectives.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (out / "objectives.md").write_text(markdown(results) + "\n", encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
