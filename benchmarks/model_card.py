"""Write a model card: what was trained, on what, how long, and how well.

    .venv/bin/python benchmarks/model_card.py RUN MODEL [--quality QUALITY.json] [--machine "…"]

RUN is a folder of `ddpm train` (configuration and metrics), MODEL the checkpoint folder that gets
README.md, loss.png and samples.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import matplotlib
import torch

import diffusion
from training.config import TrainConfig, parse_config
from training.pictures import grid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLED = {"sampler": "ddpm", "steps": 250, "variance": "small", "seed": 0}


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plot_loss(metrics: list[dict[str, float]], batch: int, path: Path) -> None:
    images = [m["step"] * batch / 1000 for m in metrics]
    losses = [m["loss"] for m in metrics]
    window = max(1, len(losses) // 40)
    smooth = [
        sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1])
        for i in range(len(losses))
    ]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.plot(images, losses, color="0.75", linewidth=0.8, label="mean of a log interval")
    axes.plot(images, smooth, color="tab:blue", label="running mean")
    axes.set(xlabel="thousand images", ylabel="$L_{simple}$", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


def training_facts(config: TrainConfig, metrics: list[dict[str, float]]) -> list[tuple[str, str]]:
    steps = int(metrics[-1]["step"])
    images = steps * config.batch_size
    gaps = [
        (m["step"] - p["step"], m["images_s"])
        for p, m in zip([{"step": 0}, *metrics], metrics, strict=False)
    ]
    seconds = sum(gap * config.batch_size / rate for gap, rate in gaps)
    tail = metrics[-max(1, len(metrics) // 10) :]
    loss = sum(m["loss"] for m in tail) / len(tail)
    return [
        ("images seen", f"{images:,} ({images / 60000:.2f} epochs of MNIST's 60,000)"),
        ("optimizer steps", f"{steps:,} of {config.batch_size}"),
        ("time in training steps", f"{seconds / 60:.0f} minutes"),
        ("images/s", f"{images / seconds:.1f} on average"),
        ("L_simple, mean of the last tenth", f"{loss:.4f}"),
    ]


def quality_lines(path: Path | None) -> list[str]:
    if path is None:
        return ["Not measured for these weights: run `benchmarks/quality.py`."]
    report = json.loads(path.read_text())
    lines = [
        f"A small classifier ({report['real_accuracy']:.2%} right on the real test set) and the",
        "Fréchet distance in its 128 penultimate features (`benchmarks/quality.py`):",
        "",
        "| samples | recognised | Fréchet to the test set | as many training images |",
        "|---|---|---|---|",
    ]
    for name, row in report.items():
        if isinstance(row, dict):
            lines.append(
                f"| {row['images']} × {name} | {row['recognised']:.1%} of {row['of']} "
                f"| {row['frechet']:.2f} | {row['frechet_train']:.2f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quality", type=Path)
    parser.add_argument("--machine", default="2 CPU cores")
    arguments = parser.parse_args()
    metrics = read_metrics(arguments.run)
    config = parse_config(json.loads((arguments.run / "train.json").read_text()), "train.json")
    model = diffusion.load(arguments.model)
    plot_loss(metrics, config.batch_size, arguments.model / "loss.png")
    classes = config.network.num_classes
    labels = [i % classes for i in range(100)] if classes else None
    images = diffusion.sample(model, 100, class_label=labels, **SAMPLED)
    grid(images, columns=10).save(arguments.model / "samples.png", optimize=True)
    shutil.copy(arguments.run / "metrics.jsonl", arguments.model / "metrics.jsonl")
    parameters = sum(p.numel() for p in model.network.parameters())
    facts = [
        ("parameters", f"{parameters:,}"),
        ("weights", f"moving average, decay {config.ema_decay}, float32"),
        *training_facts(config, metrics),
        ("machine", arguments.machine),
        ("digest", f"`{model.digest}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    text = f"""# {arguments.model.name}

![Samples: one class a column]({"samples.png"})

100 samples, one class a column: ancestral, {SAMPLED["steps"]} steps, σ² small, no guidance, seed 0.

| | |
|---|---|
{table}

The data are MNIST (LeCun, Cortes, Burges), 28×28 grey digits padded with black to 32×32. The
configuration is [`training/configs/mnist.toml`](../../training/configs/mnist.toml). Label
{config.network.null_label} means "no label": the model draws with a class, without one, or with
guidance.

## How good

{chr(10).join(quality_lines(arguments.quality))}

## The loss

![L_simple against images seen](loss.png)

## Draw

```bash
ddpm sample --model {arguments.model.name} --num-images 64 --out grid.png
```
"""
    (arguments.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
