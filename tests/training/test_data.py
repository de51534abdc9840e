from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import write_images
from training.config import DataConfig
from training.data import DataError, Images, LazyImages, load_images


def open_images(source: Path | str, *, side: int = 8, **options: object) -> Images:
    channels = int(options.pop("channels", 1))  # type: ignore[call-overload]
    classes = int(options.pop("num_classes", 2))  # type: ignore[call-overload]
    config = DataConfig(source=str(source), **options)  # type: ignore[arg-type]
    return load_images(config, channels=channels, side=side, num_classes=classes, progress=False)


def test_a_folder_with_a_folder_a_class(images: Path) -> None:
    loaded = open_images(images)
    pixels, labels = loaded.batch(torch.arange(12))
    assert pixels.shape == (12, 1, 8, 8)
    assert loaded.class_names == ("dark", "light")
    means = pixels.float().mean(dim=(1, 2, 3))
    assert torch.equal(labels, (means > 100).long())
    one = np.asarray(Image.open(images / "dark" / "0.png"))
    assert any(np.array_equal(one, p[0].numpy()) for p in pixels)


def test_parquet_file_glob_and_folder_give_the_same(images: Path, tmp_path: Path) -> None:
    import datasets

    dataset = datasets.load_dataset("imagefolder", data_dir=str(images), split="train")
    folder = tmp_path / "parquet"
    folder.mkdir()
    dataset.shard(2, 0).to_parquet(folder / "train-0.parquet")
    dataset.shard(2, 1).to_parquet(folder / "train-1.parquet")
    wanted = open_images(images).batch(torch.arange(12))[0]
    for source in (folder, folder / "*.parquet"):
        found = open_images(source).batch(torch.arange(12))[0]
        assert torch.equal(found.flatten(1).sort(0)[0], wanted.flatten(1).sort(0)[0])
    assert len(open_images(folder / "train-0.parquet")) == 6


def test_lazy_decoding_gives_the_same_bytes(images: Path) -> None:
    lazy = open_images(images, in_memory="never")
    assert isinstance(lazy, LazyImages)
    eager = open_images(images, in_memory="always")
    picked = torch.tensor([3, 11, 0])
    assert all(
        torch.equal(a, b) for a, b in zip(lazy.batch(picked), eager.batch(picked), strict=True)
    )


def test_pad_centres_on_black_and_resize_fills(tmp_path: Path) -> None:
    write_images(tmp_path / "small", size=(6, 4))
    pixels, _ = open_images(tmp_path / "small", fit="pad").batch(torch.arange(12))
    inside = pixels[:, :, 2:6, 1:7]
    assert pixels.sum() == inside.sum() > 0
    resized, _ = open_images(tmp_path / "small", fit="resize").batch(torch.arange(12))
    assert resized[6:].min() > 150  # the light ones reach every border


def test_what_cannot_be_trained_on_is_named(images: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[Path | str, dict[str, object], str]] = [
        (empty, {}, "the folder holds no images"),
        (tmp_path / "absent", {}, "no such folder"),
        (tmp_path / "absent.parquet", {}, "no such file"),
        (images, {"channels": 3}, "mode L has 1 channel.* network.in_channels = 3"),
        (images, {"side": 16}, "8×8 pixels, but network.image_size = 16; data.fit = 'pad'"),
        (images, {"side": 4, "fit": "pad"}, "8×8 pixels.* data.fit = 'resize' scales"),
        (images, {"num_classes": 3}, "num_classes = 3: .* has 2 classes"),
        (images, {"label_column": "kind"}, "data.label_column = 'kind'"),
        (images, {"image_column": "picture"}, "data.image_column = 'picture'"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError, match=message):
            open_images(source, **options)


def test_a_corrupt_image_is_named(images: Path) -> None:
    (images / "light" / "3.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(DataError, match=r"3\.png\): not a readable image"):
        open_images(images)


def test_a_picture_of_another_size_is_named(images: Path) -> None:
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(images / "dark" / "2.png")
    with pytest.raises(DataError, match=r"2\.png\): 8×9 pixels"):
        open_images(images)
