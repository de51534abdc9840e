"""How good are the MNIST checkpoint's samples? A classifier's verdict and a Fréchet distance.

    .venv/bin/python benchmarks/quality.py --data FOLDER_WITH_MNIST_PARQUET

Trains a small classifier on the real training set (fixed seed, 128 features), draws
class-conditional samples without guidance, and prints: the share that the classifier recognises
as the class asked for, and the Fréchet distance in its penultimate features between the samples
and the real test set, beside that of as many real training images. Samples are kept in
runs/quality/*.npz; an interrupted run goes on where it was. The classifier goes to
runs/quality/judge.pt too, for `ddpm evaluate --quality --features`; --classifier makes that alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import diffusion
from diffusion.noise import Purpose, image_normals
from diffusion.samplers import build_table
from diffusion.sampling import chain
from diffusion.speed import fast_dtype, prepare
from diffusion.table import SamplerTable
from training.config import DataConfig
from training.data import load_images
from training.frechet import frechet_distance
from training.pictures import grid

BATCH = 50
FIRST = 1000  # also counted on their own: the samples of the aim at 50 DDIM steps


class Classifier(nn.Module):
    """Three convolutions, 128 features, ten classes; images [N, 1, 32, 32] in [−1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 32, 64]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.hidden = nn.Linear(64 * 4 * 4, 128)
        self.out = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


@dataclass(frozen=True)
class RealData:
    """Real images, uint8 [N, 1, 32, 32], with labels [N]."""

    pixels: Tensor
    labels: Tensor

    def images(self, where: slice | Tensor) -> Tensor:
        return self.pixels[where].float() / 127.5 - 1


def load_split(source: str, split: str) -> RealData:
    config = DataConfig(source=source, split=split, fit="pad")
    images = load_images(config, channels=1, side=32, num_classes=10)
    return RealData(*images.batch(torch.arange(len(images))))


def train_classifier(data: RealData, *, epochs: int = 5, batch: int = 100) -> Classifier:
    torch.manual_seed(0)
    network = Classifier()
    steps = epochs * (len(data.pixels) // batch)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = tqdm(total=steps, desc="classifier", unit="step")
    with bar:
        for _ in range(epochs):
            order = torch.randperm(len(data.pixels))
            for chosen in order.split(batch)[: len(data.pixels) // batch]:
                loss = F.cross_entropy(network(data.images(chosen)), data.labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return network.eval()


def classifier(train: RealData, folder: Path) -> Classifier:
    """The classifier of the folder, trained there first if need be."""
    path = folder / "classifier.safetensors"
    if not path.exists():
        save_file(train_classifier(train).state_dict(), path)
    return load_classifier(folder)


def load_classifier(folder: Path) -> Classifier:
    """The classifier that was trained in the folder."""
    network = Classifier()
    network.load_state_dict(load_file(folder / "classifier.safetensors"))
    return network.eval()


class Judge(nn.Module):
    """Features and logits together, as `ddpm evaluate --quality` wants them."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(x)
        return features, self.classifier.out(features)


def export(network: Classifier, path: Path) -> None:
    """Write the classifier as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Judge(network), torch.zeros(2, 1, 32, 32)).save(str(path))


@torch.inference_mode()
def evaluate(network: Classifier, images: Tensor) -> tuple[np.ndarray, Tensor]:
    """Features [N, 128] and predicted labels [N]."""
    parts = [network.features(part) for part in images.split(500)]
    features = torch.cat(parts)
    return features.numpy(), network.out(features).argmax(1)


def draw(model: diffusion.Model, path: Path, n: int, *, table: SamplerTable, name: str) -> Tensor:
    """n samples, image i of class i mod 10, kept in `path` batch by batch."""
    kept = np.load(path)["images"] if path.exists() else np.zeros((0, 1, 32, 32), np.uint8)
    bar = tqdm(total=n, initial=len(kept), desc=name, unit="image")
    with bar:
        while len(kept) < n:
            seed = len(kept)  # a batch is one seed, so that the draw can be resumed
            labels = torch.arange(seed, seed + BATCH) % 10
            x = image_normals(
                seed, torch.arange(BATCH), row=0, purpose=Purpose.X_T, shape=model.shape
            )
            for step in chain(model, table, x, seed=seed, class_label=labels):
                x = step.x_next
            pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
            kept = np.concatenate([kept, pixels])
            np.savez_compressed(path, images=kept, labels=np.arange(len(kept)) % 10)
            bar.update(BATCH)
    return torch.from_numpy(kept[:n])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/mnist")
    parser.add_argument("--data", required=True, help="folder with train-* and test-*.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--ancestral", type=int, default=500, help="samples at T = 1000")
    parser.add_argument("--ddim", type=int, default=5000, help="samples at DDIM 50")
    parser.add_argument("--classifier", action="store_true", help="make judge.pt and stop")
    parser.add_argument("--eager", action="store_true", help="do not compile the network")
    arguments = parser.parse_args()

    train = load_split(arguments.data, "train")
    arguments.out.mkdir(parents=True, exist_ok=True)
    network = classifier(train, arguments.out)
    export(network, arguments.out / "judge.pt")
    if arguments.classifier:
        return
    model = diffusion.load(arguments.model)
    dtype = fast_dtype(model)
    fast = prepare(model, dtype=dtype, compile=not arguments.eager)
    out = arguments.out / model.digest[:12]
    out.mkdir(parents=True, exist_ok=True)
    test = load_split(arguments.data, "test")
    real_features, predicted = evaluate(network, test.images(slice(None)))
    real_accuracy = float((predicted == test.labels).float().mean())
    report: dict[str, object] = {
        "digest": model.digest,
        "dtype": str(dtype).removeprefix("torch."),
        "real_accuracy": real_accuracy,
    }
    print(f"model {model.digest[:12]}; the classifier on the real test set: {real_accuracy:.2%}")
    print(
        f"| samples | recognised | of the first {FIRST} | Fréchet to test "
        "| as many training images | ratio |"
    )
    print("|---|---|---|---|---|---|")
    plans = [("ddpm", 1000, arguments.ancestral), ("ddim", 50, arguments.ddim)]
    for sampler, steps, n in plans:
        if not n:
            continue
        start = time.perf_counter()
        name = f"{sampler}-{steps}"
        table = build_table(model.schedule, sampler=sampler, steps=steps, variance="small")
        pixels = draw(fast, out / f"{name}.npz", n, table=table, name=name)
        seconds = time.perf_counter() - start
        images = pixels.float() / 127.5 - 1
        grid(images[:100], columns=10).save(out / f"{name}.png")
        features, labels = evaluate(network, images)
        right = (labels == torch.arange(n) % 10).float()
        share, first = float(right.mean()), float(right[:FIRST].mean())
        error = math.sqrt(share * (1 - share) / n)
        distance = frechet_distance(features, real_features)
        reference_features, _ = evaluate(network, train.images(slice(0, n)))
        reference = frechet_distance(reference_features, real_features)
        print(
            f"| {n} × {sampler} {steps} | {share:.1%} ± {error:.1%} | {first:.1%} "
            f"| {distance:.2f} | {reference:.2f} | {distance / reference:.2f} |",
            flush=True,
        )
        report[name] = {
            "images": n,
            "recognised": share,
            "standard_error": error,
            f"recognised_of_first_{min(n, FIRST)}": first,
            "frechet": distance,
            "frechet_train": reference,
            "seconds": round(seconds, 1),
        }
    (out / "quality.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
