from pathlib import Path

import numpy as np
import torch

from training.batches import Batches, Order
from training.config import DataConfig
from training.data import load_images


def make(images: Path, **options: object) -> Batches:
    loaded = load_images(
        DataConfig(source=str(images)), channels=1, side=8, num_classes=2, progress=False
    )
    settings: dict[str, object] = {
        "seed": 5,
        "T": 20,
        "flips": True,
        "null_label": 2,
        "label_dropout": 0.25,
        "labelled": True,
        "device": torch.device("cpu"),
    }
    return Batches(loaded, **(settings | options))  # type: ignore[arg-type]


def test_each_epoch_visits_every_image_once_in_a_new_order() -> None:
    order = Order(seed=1, length=100)
    first, second = order(np.arange(100)), order(np.arange(100, 200))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert not torch.equal(first, second)
    assert torch.equal(order(np.arange(90, 110)), torch.cat([first[90:], second[:10]]))


def test_a_batch_depends_on_its_positions_alone(images: Path) -> None:
    whole = make(images).at(0, 24)
    parts = [make(images).at(first, 8) for first in (0, 8, 16)]
    for name in ("x_start", "t", "eps", "class_label"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_timesteps_flips_and_dropped_labels_have_their_frequencies(images: Path) -> None:
    n = 12_000
    batch = make(images).at(0, n)
    counts = torch.bincount(batch.t, minlength=20)
    assert len(counts) == 20
    # Multinomial: each count has standard deviation √(n/20·19/20) ≈ 24.
    assert (counts - n / 20).abs().max() < 5 * 24
    assert batch.class_label is not None
    dropped = (batch.class_label == 2).float().mean()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
    plain = make(images, flips=False).at(0, n)
    flipped = (plain.x_start != batch.x_start).flatten(1).any(1).float().mean()
    assert abs(flipped - 0.5) < 5 * 0.5 / n**0.5
    assert abs(batch.eps.mean()) < 5 / (n * 64) ** 0.5
