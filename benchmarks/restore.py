"""How good are restored digits? A classifier's verdict, PSNR and calibration, at stated costs.

    .venv/bin/python benchmarks/restore.py --data FOLDER_WITH_MNIST_PARQUET

For test digits of which the lower half is unknown, that are pooled in blocks of 4 × 4, or noisy
with σ_y = 0.2, no label given, by each method at about equal cost in network evaluations: the share
of digits of which a sample is read by a classifier (that of quality.py) as the true digit, beside
that of the measurement itself; how far A x is from y; and, of the first digits, of which many
samples are drawn: PSNR of the samples' mean beside that of a single one, and the share of true
pixels inside their central 50 % and 90 %. Standard errors are over digits. It goes on where it was
interrupted, in rounds that each make all tables more exact; --tables alone prints what there is.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from quality import Classifier, RealData, classifier, evaluate, load_classifier, load_split
from torch import Tensor
from tqdm import tqdm

import diffusion
from diffusion.condition import Measurement, condition
from diffusion.noise import Purpose, image_normals, normals
from diffusion.operators import AveragePool, Identity, Mask, Operator
from diffusion.samplers import build_table
from diffusion.sampling import chain
from diffusion.speed import prepare
from diffusion.table import SamplerTable

SAMPLES = 16  # of the first digits
APART = 100_000  # keys of a digit's samples; there are fewer digits
DIFFERS = 0.05  # standard deviation from which a pixel counts as unsure
MEASUREMENT_SEED = 1


@dataclass(frozen=True)
class Way:
    """How a digit is restored, with DDIM of η = 1."""

    method: str
    steps: int
    travel: int = 1
    solver_steps: int = 1

    @property
    def cost(self) -> int:
        """Network evaluations an image, a product with the Jacobian counted as `PRODUCT_COST`."""
        rows = (self.steps - 1) * self.travel + 1
        measurement = Measurement(Identity(), torch.zeros(1))
        return rows * condition(measurement, self.method, solver_steps=self.solver_steps).cost

    def table(self, model: diffusion.Model) -> SamplerTable:
        """As `diffusion.restore` makes it."""
        return build_table(
            model.schedule, sampler="ddim", steps=self.steps, eta=1.0, travel=self.travel
        )


def ways(evaluations: int) -> dict[str, Way]:
    """Of about equal cost, at most `evaluations`."""

    def dearest(method: str, travel: int = 1, solver_steps: int = 1) -> Way:
        made = [Way(method, n, travel, solver_steps) for n in range(2, evaluations + 1)]
        return max((way for way in made if way.cost <= evaluations), key=lambda way: way.cost)

    return {
        "projection": dearest("projection"),
        "projection, travel 5": dearest("projection", travel=5),
        "moment, 1 step": dearest("moment"),
        "moment, 3 steps": dearest("moment", solver_steps=3),
    }


def lower_half() -> Mask:
    """Keeps the upper half of 32 × 32 pixels."""
    known = torch.zeros(32, 32, dtype=torch.bool)
    known[:16] = True
    return Mask(known)


TASKS: dict[str, tuple[Operator, float]] = {
    "lower half": (lower_half(), 0.0),
    "average_pool 4": (AveragePool(4), 0.0),
    "noise 0.2": (Identity(), 0.2),
}


def rounds(images: int, deep: int) -> list[tuple[str, range, range]]:
    """(task, digits, samples of each): each round adds to what the rounds before have drawn."""
    first, *others = TASKS
    few, half = range(min(20, deep)), images // 2
    plan = [(first, range(half), range(1)), (first, few, range(1, SAMPLES))]
    plan += [(task, range(images // 4), range(1)) for task in others]
    plan += [(task, few, range(1, SAMPLES)) for task in others]
    plan += [(first, range(half, images), range(1))]
    plan += [(task, range(images // 4, half), range(1)) for task in others]
    plan += [(task, range(len(few), deep), range(1, SAMPLES)) for task in TASKS]
    return plan + [(task, range(half, images), range(1)) for task in others]


def measured(task: str, truth: Tensor, digits: Tensor) -> Tensor:
    """y of digits [N, 1, 32, 32] with these numbers."""
    operator, sigma = TASKS[task]
    y = operator.forward(truth)
    if not sigma:
        return y
    seeds = torch.full_like(digits, MEASUREMENT_SEED)
    shape = tuple(y.shape[1:])
    return y + sigma * normals(
        seeds, digits, rows=torch.zeros_like(digits), purpose=Purpose.Q_SAMPLE, shape=shape
    )


def drawn(model: diffusion.Model, task: str, way: Way, *, y: Tensor, keys: Tensor) -> Tensor:
    """A sample of each measurement [N, ...], keyed by `keys`: [N, 1, 32, 32]."""
    operator, sigma = TASKS[task]
    y, keys = y.to(model.device), keys.to(model.device)
    x = image_normals(0, keys, row=0, purpose=Purpose.X_T, shape=model.shape)
    given = condition(Measurement(operator, y, sigma), way.method, solver_steps=way.solver_steps)
    for step in chain(model, way.table(model), x, indices=keys, condition=given):
        x = step.x_next
    return x.clamp(-1, 1).cpu()


class Drawn:
    """What was drawn, in files of a folder: one an evaluation budget, task, way, sample, digit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def missing(self, task: str, name: str, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Of these (digit, sample), what is not there."""
        kept = self.read(task, name)
        return [pair for pair in pairs if pair not in kept]

    def add(self, task: str, name: str, pairs: list[tuple[int, int]], x: Tensor) -> None:
        """Keep the samples x [N, 1, 32, 32]."""
        kept = self.read(task, name) | dict(zip(pairs, x.half().numpy(), strict=True))
        path, written = self._path(task, name), self._folder / "written.npz"
        np.savez(written, pairs=np.array(list(kept)), x=np.stack(list(kept.values())))
        written.replace(path)

    def read(self, task: str, name: str) -> dict[tuple[int, int], np.ndarray]:
        """(digit, sample) → x [1, 32, 32]."""
        path = self._path(task, name)
        if not path.exists():
            return {}
        with np.load(path) as file:
            pairs = (tuple(map(int, pair)) for pair in file["pairs"])
            return dict(zip(pairs, file["x"], strict=True))  # type: ignore[arg-type]

    def _path(self, task: str, name: str) -> Path:
        return self._folder / f"{task}; {name}.npz"


def go_on(
    model: diffusion.Model,
    kept: Drawn,
    truth: Tensor,
    *,
    evaluations: int,
    deep: int,
    batch: int,
    quiet: bool,
) -> None:
    """Draw what is missing, round by round, and of each round a batch by each way in turn."""
    for task, digits, samples in rounds(len(truth), deep):
        pairs = [(digit, sample) for digit in digits for sample in samples]
        batches = range(0, len(pairs), batch)
        for at in tqdm(batches, desc=f"{task}, {digits}, {samples}", disable=quiet):
            for name, way in ways(evaluations).items():
                left = kept.missing(task, name, pairs[at : at + batch])
                if left:
                    numbers, sample = torch.tensor(left).T
                    y = measured(task, truth[numbers], numbers)
                    x = drawn(model, task, way, y=y, keys=numbers + APART * sample)
                    kept.add(task, name, left, x)


@dataclass(frozen=True)
class Value:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Value:
        """Over digits, [N]."""
        values = values[values.isfinite()].double()
        return cls(float(values.mean()), float(values.std()) / math.sqrt(max(len(values), 1)))

    def told(self, form: str, scale: float = 1.0) -> str:
        return f"{self.mean * scale:{form}} ± {self.error * scale:{form}}"


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """Of images [N, ...] in [−1, 1], dB, [N]."""
    error = (found - truth).square().flatten(1).mean(1).clamp_min(1e-12)
    return 10 * torch.log10(4 / error)


def coverage(samples: Tensor, truth: Tensor, share: float) -> Tensor:
    """Share of a digit's pixels inside the central `share` of its samples [N, S, ...], [N].

    By the rank of the truth among them, in grey levels, ties broken at random (the expectation of
    that), so that samples of the right distribution have exactly `share`. Of pixels where samples
    and truth are not all about the same.
    """
    both = torch.cat([truth[:, None], samples], 1)
    unsure = both.std(1) > DIFFERS
    grey = ((both + 1) * 127.5).round()
    below = (grey[:, 1:] < grey[:, :1]).sum(1)
    ties = (grey[:, 1:] == grey[:, :1]).sum(1)
    ranks = both.shape[1]
    low, high = below / ranks, (below + ties + 1) / ranks
    edges = ((1 - share) / 2, (1 + share) / 2)
    inside = (high.clamp_max(edges[1]) - low.clamp_min(edges[0])).clamp_min(0) / (high - low)
    return (inside * unsure).flatten(1).sum(1) / unsure.flatten(1).sum(1)


def shown(task: str, y: Tensor) -> Tensor:
    """The measurement as a picture of the digit's size; black where nothing is known."""
    operator, _ = TASKS[task]
    if isinstance(operator, Mask):
        y = torch.where(operator.known, y, -1.0)
    return F.interpolate(y, size=(32, 32))


def table_row(judge: Classifier, test: RealData, task: str, found: dict) -> dict[str, Value]:  # type: ignore[type-arg]
    """What there is of one way. found: (digit, sample) → x."""
    numbers = torch.tensor(sorted(digit for digit, sample in found if sample == 0))
    one = torch.from_numpy(np.stack([found[int(n), 0] for n in numbers])).float()
    truth, labels = test.images(numbers), test.labels[numbers]
    operator, _ = TASKS[task]
    y = measured(task, truth, numbers)
    _, read = evaluate(judge, one)
    _, read_y = evaluate(judge, shown(task, y))
    row = {
        "digits": Value(len(numbers), 0),
        "read": Value.of((read == labels).float()),
        "read of the measurement": Value.of((read_y == labels).float()),
        "psnr of one": Value.of(psnr(one, truth)),
        "residual": Value.of(Measurement(operator, y).distance(one)),
    }
    deep = [n for n in numbers.tolist() if all((n, s) in found for s in range(SAMPLES))]
    if deep:
        many = np.stack([[found[n, s] for s in range(SAMPLES)] for n in deep])
        samples, truth = torch.from_numpy(many).float(), test.images(torch.tensor(deep))
        row |= {
            "digits of many samples": Value(len(deep), 0),
            "psnr of one of many": Value.of(psnr(samples[:, 0], truth)),
            "psnr of the mean": Value.of(psnr(samples.mean(1), truth)),
            "inside 50 %": Value.of(coverage(samples, truth, 0.5)),
            "inside 90 %": Value.of(coverage(samples, truth, 0.9)),
        }
    return row


def told(task: str, name: str, cost: int, row: dict[str, Value]) -> str:
    """A row of the printed table."""
    cells = [task, name, str(cost), f"{row['digits'].mean:.0f}", row["read"].told(".1f", 100)]
    cells += [row["psnr of one"].told(".2f"), f"{row['residual'].mean:.4f}"]
    if "digits of many samples" in row:
        cells += [f"{row['digits of many samples'].mean:.0f}"]
        cells += [row[f"psnr of {which}"].told(".2f") for which in ("one of many", "the mean")]
        cells += [row[f"inside {share} %"].told(".1f", 100) for share in (50, 90)]
    return "| " + " | ".join(cells) + " |"


HEAD = """
| unknown | way | cost | digits | read as the digit, % | PSNR of one, dB | residual | digits × 16 \
| of one | of the mean of 16 | inside 50 % | inside 90 % |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def report(judge: Classifier, test: RealData, kept: Drawn, chosen: dict[str, Way]) -> dict:  # type: ignore[type-arg]
    """Print the table of what there is; the numbers."""
    numbers = {}
    print(HEAD)
    for task in TASKS:
        for name, way in chosen.items():
            found = kept.read(task, name)
            if not found:
                continue
            row = table_row(judge, test, task, found)
            numbers[f"{task}: {name}"] = {k: [v.mean, v.error] for k, v in row.items()}
            print(told(task, name, way.cost, row))
        if found:
            print(f"| {task} | the measurement itself | | | ", end="")
            print(row["read of the measurement"].told(".1f", 100), "| | | | | | | |", flush=True)
    return numbers


def main() -> None:
    """Draw what is missing, print the tables, and keep the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--images", type=int, default=1000, help="digits")
    parser.add_argument("--deep", type=int, default=40, help=f"of which {SAMPLES} samples each")
    parser.add_argument("--evaluations", type=int, default=36, help="of the network, a sample")
    parser.add_argument("--folder", type=Path, default=Path("runs/restore"))
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--batch-size", type=int, default=50, help="chains stepped together")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--tables", action="store_true", help="draw nothing")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    test = load_split(asked.data, "test")
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = prepare(diffusion.load(asked.model, device))
    kept = Drawn(asked.folder / f"{model.digest[:12]}-{asked.evaluations}")
    if not asked.tables:
        truth = test.images(slice(0, asked.images))
        go_on(
            model,
            kept,
            truth,
            evaluations=asked.evaluations,
            deep=asked.deep,
            batch=asked.batch_size,
            quiet=asked.quiet,
        )
    if not (asked.folder / "classifier.safetensors").exists():
        classifier(load_split(asked.data, "train"), asked.folder)
    judge = load_classifier(asked.folder)
    numbers = report(judge, test, kept, ways(asked.evaluations))
    (asked.folder / f"results-{asked.evaluations}.json").write_text(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
