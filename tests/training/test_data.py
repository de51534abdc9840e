import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from jobs.uploads import decode
from tests.training.conftest import write_images
from training.config import DataConfig
from training.data import InMemoryImages, LazyImages, load_images
from training.sources import DataError

PICTURES = sorted((Path(__file__).parents[1] / "pictures").glob("*.[jp][pn]g"))


def open_images(
    source: Path | str, *, side: int = 8, **options: Any
) -> InMemoryImages | LazyImages:
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


def test_channels_that_no_picture_has_are_named_once(images: Path) -> None:
    with pytest.raises(DataError, match=r"^network.in_channels = 2: must be one of 1, 3, 4 for"):
        open_images(images, channels=2)


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
    table = tmp_path / "table"
    table.mkdir()
    datasets.load_dataset("imagefolder", data_dir=str(images), split="train").to_parquet(
        table / "train.parquet"
    )
    cases: list[tuple[Path | str, dict[str, Any], str]] = [
        (empty, {}, "empty holds no images"),
        (tmp_path / "absent", {}, "no such folder"),
        (tmp_path / "absent.parquet", {}, "no such file"),
        (images, {"side": 16}, "8×8 pixels, but network.image_size = 16; data.fit = 'pad'"),
        (images, {"side": 4, "fit": "pad"}, "8×8 pixels.* data.fit = 'resize' scales"),
        (images, {"num_classes": 3}, r"num_classes = 3: .* has 2 classes \(dark, light\)"),
        (images / "dark", {}, "has no folder for each class"),
        (images, {"split": "train"}, r"data.split = 'train'.* \(it has: dark, light\)"),
        (table, {"label_column": "kind"}, "'kind': .* has the columns image, label"),
        (table, {"image_column": "picture"}, "'picture': .* has the columns image, label"),
        (table, {"image_column": "label"}, "'label': holds no images"),
        (table, {"split": "test"}, r"no test\*.parquet \(it has train.parquet\)"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError, match=message):
            open_images(source, **options)


def test_every_unusable_picture_is_named_at_once(images: Path) -> None:
    (images / "light" / "3.png").write_bytes(b"\x89PNG no picture")
    whole = (images / "light" / "4.png").read_bytes()
    (images / "light" / "4.png").write_bytes(whole[:60])
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(images / "dark" / "2.png")
    shutil.copy(images / "dark" / "0.png", images / "loose.png")
    bomb = bytearray(whole)
    bomb[16:24] = (60_000).to_bytes(4) * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    (images / "dark" / "bomb.png").write_bytes(bomb)
    for in_memory in ("always", "never"):
        with pytest.raises(DataError) as error:
            open_images(images, in_memory=in_memory)
        text = str(error.value)
        assert "5 of 14 pictures cannot be used:" in text
        for line in (
            r"light/3\.png: not a PNG, JPEG, WebP, BMP, GIF or TIFF picture",
            r"light/4\.png: the picture cannot be read: ",
            r"dark/2\.png: 8×9 pixels, but network.image_size = 8",
            r"loose\.png: lies in no class folder",
            r"dark/bomb\.png: (more than|60000 × 60000)",
        ):
            assert re.search(rf"^  {line}", text, re.MULTILINE), text


def test_folders_called_like_splits_are_classes_until_one_is_asked_for(
    images: Path, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    for name in ("test", "train", "val"):
        shutil.copytree(images, root / name)
    shutil.copytree(images / "dark", root / "other")
    (root / ".ipynb_checkpoints").mkdir()
    shutil.copy(images / "dark" / "0.png", root / ".ipynb_checkpoints" / "0.png")
    loaded = open_images(root, num_classes=4)
    assert len(loaded) == 3 * 12 + 6
    assert loaded.class_names == ("other", "test", "train", "val")
    assert "test, train, val: taken for classes" in loaded.notes[0]
    assert len(open_images(root, num_classes=0)) == 42
    one = open_images(root, split="train")
    assert len(one) == 12 and one.class_names == ("dark", "light") and one.notes == ()


def test_files_called_like_splits_are_pictures(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("train", "test", "val_1", "cat"):
        shutil.copy(images / "dark" / "0.png", folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a picture")
    loaded = open_images(folder, num_classes=0)
    assert len(loaded) == 4 and loaded.notes == ("1 other files are left out: .txt",)


@pytest.mark.parametrize("lazily", ["always", "never"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_those_that_the_service_would_see(
    tmp_path: Path, channels: int, lazily: str
) -> None:
    for path in PICTURES:
        shutil.copy(path, tmp_path)
    found = open_images(
        tmp_path, side=32, channels=channels, num_classes=0, fit="pad", in_memory=lazily
    )
    pixels, _ = found.batch(torch.arange(len(PICTURES)))
    for path, ours in zip(PICTURES, pixels, strict=True):
        api = decode(path.read_bytes(), (channels, 32, 32), fit="pad", max_pixels=1024)
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), api), path.name
    colour = "2 of 7 pictures are in colour: seen in grey"
    assert (colour in found.notes) == (channels == 1)
    alpha = "2 of 7 pictures have an alpha channel: laid on black"
    assert (alpha in found.notes) == (channels != 4)


def test_the_size_is_known_where_it_is_one(images: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "small", size=(6, 4))
    assert open_images(tmp_path / "small", fit="pad").size == (4, 6)
    shutil.copy(images / "dark" / "0.png", tmp_path / "small" / "dark" / "larger.png")
    assert open_images(tmp_path / "small", fit="pad").size is None
