"""A small labelled set of real PNG files, and a configuration that trains on it in seconds."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = """
steps = 6
batch_size = 4
checkpoint_every = 2
sample_every = 0
sample_steps = 5
log_every = 1
device = "cpu"
precision = "fp32"

[data]
source = "{source}"

[network]
image_size = 8
in_channels = 1
channels = [8, 8]
attention = [false, true]
res_blocks = 1
groups = 4
num_classes = 2
null_class = true

[schedule]
kind = "linear"
T = 20

[optimizer]
learning_rate = 1e-3
warmup_steps = 2
"""


def write_images(folder: Path, count: int = 12, size: tuple[int, int] = (8, 8)) -> None:
    """Class "dark" and class "light", each a folder."""
    generator = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 200)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count // 2):
            pixels = generator.integers(low, low + 50, size[::-1], dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    write_images(folder)
    return folder


@pytest.fixture
def config_file(tmp_path: Path, images: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(source=images))
    return path
