"""The images a model is evaluated on: which splits of a set, fitted and labelled for the model."""

from __future__ import annotations

from diffusion.model import Model
from training.config import DataConfig
from training.data import Images, load_images
from training.sources import DataError, is_picture_folder

ALL = "all"  # what a folder of pictures is called that no split was named of


def default_splits(data: str) -> tuple[str, ...]:
    """All of a folder of pictures; train and test of what has splits of its own."""
    return (ALL,) if is_picture_folder(data) else ("train", "test")


def load_split(data: DataConfig, model: Model, *, labelled: bool, progress: bool) -> Images:
    """Decode all of it. Raises DataError, also for labels that would mean other classes."""
    network = model.config.network
    images = load_images(
        data,
        channels=network.in_channels,
        side=network.image_size,
        num_classes=network.num_classes if labelled else 0,
        progress=progress,
    )
    ours, theirs = model.config.class_names, images.class_names
    if labelled and ours and theirs and tuple(ours) != tuple(theirs):
        raise DataError(
            f"{data.source}: its classes are {', '.join(theirs)}, the model's {', '.join(ours)}: "
            "labels would not mean the same"
        )
    return images
