"""Fréchet distance of a model's samples to a data set, in the features of any network.

The network is a TorchScript file that maps float32 images [N, C, H, W] in [−1, 1] to features
[N, F], or to a pair of features and the logits [N, classes] of a classifier; or `inception`:
torchmetrics' Inception v3 (2048 features), where its weights can be had.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import cores
from diffusion.files import digest_of
from diffusion.model import Model
from diffusion.noise import Purpose, image_normals
from diffusion.sampling import chain
from diffusion.schedule import Float64
from diffusion.table import SamplerTable
from training.bits import Chosen
from training.frechet import frechet_distance
from training.partial import PartialArrays

Features = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class FeatureError(ValueError):
    """A feature network that cannot be used; the message says why."""


def load_features(name: str, device: torch.device) -> Features:
    """The feature network of a name or file. Raises FeatureError."""
    if name == "inception":
        return _inception(device)
    try:
        with warnings.catch_warnings():
            # TorchScript is on its way out of torch, but it is what feature networks come in.
            warnings.simplefilter("ignore", DeprecationWarning)
            script = torch.jit.load(name, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, ValueError) as error:
        raise FeatureError(f"features = {name!r}: no TorchScript file: {error}") from error
    return lambda images: script(images)


def identity(name: str) -> str:
    """What the numbers of a feature network depend on: its weights, wherever they lie."""
    return name if name == "inception" else digest_of([Path(name)])


def _inception(device: torch.device) -> Features:
    try:
        metrics = importlib.import_module("torchmetrics.image.fid")
        network = metrics.NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except ImportError as error:
        raise FeatureError(
            "features = 'inception': needs torchmetrics and torch-fidelity: "
            "pip install 'ddpm-serve[fid]'"
        ) from error
    except OSError as error:
        raise FeatureError(
            f"features = 'inception': its weights cannot be fetched: {error}"
        ) from error
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        found: Tensor = network(pixels.expand(-1, 3, -1, -1))
        return found

    return features


@dataclass(frozen=True, eq=False)
class Looked:
    """What a network sees in images: features [N, F], and labels [N] if it classifies."""

    features: Float64
    labels: Float64 | None = None


def real(features: Features, chosen: Chosen, *, device: torch.device, batch_size: int) -> Looked:
    """What the network sees in the chosen images."""
    blocks = np.array_split(np.arange(len(chosen)), -(-len(chosen) // batch_size))
    return _joined([look(features, chosen.batch(block)[0].to(device)) for block in blocks])


@dataclass(frozen=True, eq=False)
class Draw:
    """How to draw: `n` samples of a table; labels [n], or None for none."""

    model: Model
    table: SamplerTable
    n: int
    seed: int
    labels: Tensor | None


def sampled(
    features: Features,
    draw: Draw,
    *,
    width: int,
    path: Path,
    key: dict[str, Any],
    batch_size: int,
    progress: bool,
    classified: bool = False,
) -> Looked:
    """Features [n, width] of samples 0..n−1, keeping what is done in `path`; labels if wanted."""
    shapes: dict[str, tuple[int, ...]] = {"features": (draw.n, width)}
    if draw.labels is not None:
        key = key | {"labels": hashlib.sha256(draw.labels.cpu().numpy().tobytes()).hexdigest()}
    partial = PartialArrays(path, shapes | ({"labels": (draw.n,)} if classified else {}), key)
    left = np.unique(partial.missing() // width)
    bar = tqdm(
        total=draw.n, initial=draw.n - len(left), desc=path.stem, unit="image", disable=not progress
    )
    with bar, partial.saved() as save_now_and_then:
        for first in range(0, len(left), batch_size):
            which = left[first : first + batch_size]
            images = draw_images(draw, torch.from_numpy(which))
            looked = look(features, images)
            partial.arrays["features"][which] = looked.features
            if classified and looked.labels is not None:
                partial.arrays["labels"][which] = looked.labels
            bar.update(len(which))
            save_now_and_then()
    return Looked(partial.arrays["features"], partial.arrays.get("labels"))


@torch.inference_mode()
def draw_images(draw: Draw, indices: Tensor) -> Tensor:
    """Samples of these indices, [N, C, H, W] in [−1, 1]: each depends on (seed, index) alone."""
    indices = indices.to(draw.model.device)
    x = image_normals(draw.seed, indices, row=0, purpose=Purpose.X_T, shape=draw.model.shape)
    labels = None if draw.labels is None else draw.labels.to(indices.device)[indices]
    for step in chain(
        draw.model, draw.table, x, seed=draw.seed, indices=indices, class_label=labels
    ):
        x = step.x_next
    return x.clamp(-1, 1)


def look(features: Features, images: Tensor) -> Looked:
    """What the network sees, each image for itself: on a CPU they are dealt to the cores."""
    return _joined(
        cores.dealt(len(images), lambda rows: _seen(features, images[rows]), device=images.device)
    )


def _joined(parts: Sequence[Looked]) -> Looked:
    labels = [part.labels for part in parts if part.labels is not None]
    return Looked(
        np.concatenate([part.features for part in parts]),
        np.concatenate(labels) if labels else None,
    )


@torch.inference_mode()
def _seen(features: Features, images: Tensor) -> Looked:
    found = features(images)
    found, logits = found if isinstance(found, tuple) else (found, None)
    for name, value in (("features", found), ("logits", logits)):
        if value is not None and value.ndim != 2:
            raise FeatureError(f"{name}: the network gave shape {list(value.shape)}, not [N, F]")
    labels = None if logits is None else logits.argmax(1).double().cpu().numpy()
    return Looked(found.double().cpu().numpy(), labels)


def distance(a: Float64, b: Float64) -> float:
    """The Fréchet distance. Raises FeatureError for fewer than two images on a side."""
    try:
        return frechet_distance(a, b)
    except ValueError as error:
        raise FeatureError(str(error)) from error
