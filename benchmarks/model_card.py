"""Write a model card: what was trained, on what, how long, and how well.

    .venv/bin/python benchmarks/model_card.py MODEL [RUN…] [--quality QUALITY.json]
        [--evaluation RESULTS.json] [--evaluated "on …, date"] [--machine "…"]

MODEL is the checkpoint folder; it gets README.md, loss.png and samples.png, and keeps how it was
trained: stages.jsonl has each stage's configuration, metrics.jsonl what it logged. RUN… are the
folders of `ddpm train` that are to be added as its latest stages.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

import diffusion
from training.config import TrainConfig, load_config, parse_config
from training.pictures import grid
from training.quality import Cell, markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG, TUNING = "training/configs/mnist.toml", "training/configs/mnist-fast.toml"
STAGES, METRICS = "stages.jsonl", "metrics.jsonl"
SAMPLED: dict[str, Any] = {"sampler": "ddpm", "steps": 250, "variance": "small", "seed": 0}


@dataclass(frozen=True)
class Stage:
    """One run of the trainer."""

    config: TrainConfig
    metrics: list[dict[str, float]]

    @classmethod
    def of_run(cls, run: Path) -> Stage:
        """What `ddpm train` left in its folder, but for where the images lay on that machine."""
        config = json.loads((run / "train.json").read_text())
        config["data"]["source"] = load_config(base_of(config["objective"])).data.source
        return cls(parse_config(config, "train.json"), read_lines(run / METRICS))

    @classmethod
    def of_model(cls, model: Path) -> list[Stage]:
        """The stages that an earlier card of this model recorded."""
        if not (model / STAGES).exists():
            return []
        logged = read_lines(model / METRICS)
        return [
            cls(
                parse_config(config, STAGES),
                [
                    {key: value for key, value in row.items() if key != "stage"}
                    for row in logged
                    if row["stage"] == i
                ],
            )
            for i, config in enumerate(read_lines(model / STAGES), 1)
        ]

    def overrides(self) -> list[str]:
        """What the run's configuration changed of its base, as `ddpm train` takes it."""
        base_config = load_config(base_of(self.config.objective))
        own, base = (flat(config) for config in (self.config, base_config))
        changed = {key: value for key, value in own.items() if value != base[key]}
        shown = {k: json.dumps(v, separators=(",", ":")).strip('"') for k, v in changed.items()}
        return [f"{key}={value}" for key, value in shown.items()]

    @property
    def images(self) -> int:
        return int(self.metrics[-1]["step"]) * self.config.batch_size

    @property
    def seconds(self) -> float:
        """In training steps alone."""
        before = [{"step": 0}, *self.metrics]
        return sum(
            (m["step"] - p["step"]) * self.config.batch_size / m["images_s"]
            for m, p in zip(self.metrics, before, strict=False)
        )

    @property
    def last_loss(self) -> float:
        tail = self.metrics[-max(1, len(self.metrics) // 10) :]
        return sum(m["loss"] for m in tail) / len(tail)


def base_of(objective: str) -> str:
    """The configuration that a run of this objective changes."""
    return TUNING if objective == "consistency" else CONFIG


def sampled(model: diffusion.Model) -> tuple[dict[str, Any], str]:
    """How the card's picture is drawn, and in words: as a consistency model says, else SAMPLED."""
    own = model.config.sampling
    if own.sampler != "consistency":
        return SAMPLED, f"ancestral, {SAMPLED['steps']} steps, σ² small, no guidance, seed 0"
    evaluations = "1 evaluation" if own.steps == 1 else f"{own.steps} evaluations"
    return {"seed": 0}, f"{evaluations} each, no guidance, seed 0"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def flat(config: TrainConfig) -> dict[str, Any]:
    """Keys with dots, as on the command line."""
    found: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            found.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            found[key] = value
    return found


def commands(stages: list[Stage]) -> str:
    """How each stage was run, on from the weights of the one before; tuning, from `mnist`."""
    lines = []
    for i, stage in enumerate(stages, 1):
        config = base_of(stage.config.objective)
        first = ["--init mnist"] if config == TUNING else []
        begin = [f"--init runs/{i - 1}"] if i > 1 else first
        words = [f"ddpm train {config}", *begin, f"--out runs/{i}", *stage.overrides()]
        wrapped = textwrap.wrap(
            " ".join(words), 96, subsequent_indent="    ", break_on_hyphens=False
        )
        lines.append(" \\\n".join(wrapped))
    return "\n".join(lines)


def plot_loss(stages: list[Stage], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    seen = 0
    for i, stage in enumerate(stages):
        images = [(seen + m["step"] * stage.config.batch_size) / 1000 for m in stage.metrics]
        losses = [m["loss"] for m in stage.metrics]
        window = max(1, len(losses) // 40)
        smooth = [
            sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1])
            for i in range(len(losses))
        ]
        axes.plot(images, losses, color="0.75", linewidth=0.8)
        label = f"stage {i + 1}: {stage.config.objective}"
        axes.plot(images, smooth, color=f"C{i}", label=label)
        seen += stage.images
    axes.set(xlabel="thousand images", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="running mean; grey: of each log interval", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=110)


def training_facts(stages: list[Stage]) -> list[tuple[str, str]]:
    images = sum(stage.images for stage in stages)
    seconds = sum(stage.seconds for stage in stages)
    facts = [("images seen", f"{images:,} ({images / 60000:.2f} epochs of MNIST's 60,000)")]
    for i, stage in enumerate(stages, 1):
        steps = f"{stage.images // stage.config.batch_size:,} steps of {stage.config.batch_size}"
        loss = f"loss {stage.last_loss:.4f}, mean of the last tenth"
        facts.append((f"stage {i}", f"{steps}, objective `{stage.config.objective}`, {loss}"))
    return [
        *facts,
        ("time in training steps", f"{seconds / 60:.0f} minutes"),
        ("images/s", f"{images / seconds:.1f} on average"),
    ]


def evaluation_lines(path: Path | None, where: str) -> list[str]:
    """Bits/dim of each split, as `ddpm evaluate` found them; where: the machine and the date."""
    if path is None:
        return []
    report = json.loads(path.read_text())
    variance = report["variance"]
    lines = [
        "",
        f"Bits/dim without the label (`ddpm evaluate`, {report['dtype']}, σ² {variance}, "
        f"D = {report['dims']},",
        "the black border included; beside it, of the "
        f"{report['dims_unpadded']} pixels of a digit),",
        f"{where}, torch {report['torch']}:",
        "",
        "| split | how | images | bits/dim | L_0 | L_1 … L_{T−1} | L_T | of the digit's pixels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {"full": "all t", "monte_carlo": "importance-sampled t"}
    for split, found in report["splits"].items():
        for how, summary in found.items():
            row = summary[variance]
            error = row["standard_error"]  # None: of one image there is none
            spread = "" if error is None else f" ± {error:.4f}"
            lines.append(
                f"| {split} | {names[how]} | {summary['images']:,} "
                f"| {row['bits_per_dim']:.4f}{spread} | {row['L_0']:.4f} "
                f"| {row['L_1_to_T-1']:.4f} | {summary['L_T']:.6f} "
                f"| {row['bits_per_unpadded_dim']:.4f} |"
            )
    return lines


def quality_lines(path: Path | None) -> list[str]:
    if path is None:
        return ["Not measured for these weights: run `benchmarks/quality.py`."]
    report = json.loads(path.read_text())
    if "quality" in report:
        return table_lines(report["quality"]["cells"])
    lines = [
        f"A small classifier ({report['real_accuracy']:.2%} right on the real test set) and the",
        f"Fréchet distance in its 128 penultimate features (`benchmarks/quality.py`, drawn in "
        f"{report.get('dtype', 'bfloat16')}):",
        "",
        "| samples | recognised | Fréchet to the test set | as many training images |",
        "|---|---|---|---|",
    ]
    for name, row in report.items():
        if isinstance(row, dict):
            share, error = row["recognised"], row["standard_error"]
            lines.append(
                f"| {row['images']} × {name} | {share:.1%} ± {error:.1%} "
                f"| {row['frechet']:.2f} | {row['frechet_train']:.2f} |"
            )
    return lines


def table_lines(cells: list[dict[str, Any]]) -> list[str]:
    """Of a table of `ddpm evaluate --quality`."""
    found = [Cell(**cell) for cell in cells]
    return [
        f"{found[0].images} samples, in the features of the classifier of `benchmarks/quality.py`:",
        "Fréchet distance to the test set, as a ratio to that of as many training images, and the",
        "share recognised as the class asked for (`ddpm evaluate --quality`). The first line is of",
        "`mnist`, which this was tuned from:",
        "",
        markdown(found),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument(
        "--quality", type=Path, help="of quality.py, or of `ddpm evaluate --quality`"
    )
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument(
        "--evaluated", default="on 2 CPU cores", help="where, and when: of --evaluation"
    )
    parser.add_argument("--machine", default="2 CPU cores")
    arguments = parser.parse_args()
    stages = Stage.of_model(arguments.model)
    stages += [run for run in map(Stage.of_run, arguments.runs) if run not in stages]
    if not stages:
        parser.error(f"{arguments.model} records no stages yet: name the folders of its runs")
    config = stages[-1].config
    model = diffusion.load(arguments.model)
    plot_loss(stages, arguments.model / "loss.png")
    classes = config.network.num_classes
    labels = [i % classes for i in range(100)] if classes else None
    drawn, how = sampled(model)
    images = diffusion.sample(model, 100, class_label=labels, **drawn)
    grid(images, columns=10).save(arguments.model / "samples.png", optimize=True)
    rows = [{"stage": i, **m} for i, stage in enumerate(stages, 1) for m in stage.metrics]
    write_lines(arguments.model / METRICS, rows)
    write_lines(arguments.model / STAGES, [s.config.model_dump(mode="json") for s in stages])
    parameters = sum(p.numel() for p in model.network.parameters())
    facts = [
        ("parameters", f"{parameters:,}"),
        ("weights", f"moving average, decay {config.ema_decay}, float32"),
        *training_facts(stages),
        ("machine", arguments.machine),
        ("digest", f"`{model.digest}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    null = config.network.null_label
    evaluated = evaluation_lines(arguments.evaluation, arguments.evaluated)
    text = f"""# {arguments.model.name}

![Samples: one class a column]({"samples.png"})

100 samples, one class a column: {how}.

| | |
|---|---|
{table}

The data are MNIST (LeCun, Cortes, Burges), 28×28 grey digits padded with black to 32×32. Label
{null} means "no label": the model draws with a class, without one, or with guidance.
Each stage goes on from the weights of the one before:

```bash
{commands(stages)}
```

## How good

{chr(10).join(quality_lines(arguments.quality) + evaluated)}

## The loss

![Loss against images seen](loss.png)

## Draw

```bash
ddpm sample --model {arguments.model.name} --num-images 64 --out grid.png
```
"""
    (arguments.model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
