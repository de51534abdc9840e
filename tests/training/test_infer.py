"""`ddpm train FOLDER`: what is inferred is shown, kept, and enough to go on with."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import diffusion
from tests.training.conftest import write_images
from training.commands import sample, serve_model, train
from training.config import ConfigError, load_config
from training.evaluate_command import evaluate
from training.infer import infer_config
from training.pictures import class_columns
from training.sources import DataError

ROOT = Path(__file__).parents[2]
SMALL = ["device=cpu", "network.channels=[8,8,8]", "network.groups=4", "network.res_blocks=1"]
SHORT = [*SMALL, "steps=3", "sample_every=3", "sample_steps=2", "batch_size=4", "precision=fp32"]


def pets(folder: Path, *, classes: tuple[str, ...] = ("cat", "dog", "owl")) -> Path:
    """Pictures of several sizes, some with alpha, some grey."""
    generator = np.random.default_rng(0)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k, channels in enumerate((3, 4, 3, 0)):
            shape = (40 + 4 * k, 36 + 8 * i, channels)[: 3 if channels else 2]
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(train, [*map(str, arguments), "--quiet"])


def test_a_folder_trains_by_itself_and_resumes_by_itself(tmp_path: Path) -> None:
    folder, out = pets(tmp_path / "pets"), tmp_path / "run"
    result = call(folder, "--out", out, *SHORT)
    assert result.exit_code == 0, result.output
    shown = result.stderr
    assert "12 pictures, in colour, 36×40 to 52×52 pixels, 3 classes (cat, dog, owl)" in shown
    assert "training at 32×32, 3 channel(s), 3 classes, data.fit = resize, 3 steps" in shown
    assert "3 of 12 pictures have an alpha channel: laid on black" in shown
    kept = json.loads((out / "train.json").read_text())
    assert kept["network"]["num_classes"] == 3 and kept["data"]["fit"] == "resize"
    assert diffusion.load(out).config.class_names == ("cat", "dog", "owl")
    with Image.open(out / "samples" / "step-0000003.png") as samples:
        assert samples.size == (6 * 34 - 2, 6 * 34 - 2)  # 36 of 3 classes
    more = call("--resume", out, "steps=4")
    assert more.exit_code == 0 and f"{out}: step 4 of 4" in more.output
    again = call(out / "train.json", "--out", tmp_path / "again", "steps=1")
    assert again.exit_code == 0, again.output
    for source in (folder, out):  # the run is there already
        result = call(source, "--out", out, *SHORT)
        assert result.exit_code == 1 and "--resume goes on with it" in result.output


@pytest.mark.parametrize(
    ("size", "side", "fit"),
    [
        ((28, 28), 28, "resize"),
        ((30, 30), 32, "pad"),
        ((20, 28), 20, "resize"),
        ((300, 200), 32, "resize"),
        ((5, 5), 8, "pad"),
    ],
)
def test_sizes(tmp_path: Path, size: tuple[int, int], side: int, fit: str) -> None:
    write_images(tmp_path / "set", size=size)
    config, _ = infer_config(tmp_path / "set", ("device=cpu",))
    network = config.network
    assert (network.image_size, config.data.fit) == (side, fit)
    assert (network.in_channels, network.num_classes, network.null_class) == (1, 2, True)
    larger, _ = infer_config(tmp_path / "set", ("network.image_size=64", "data.fit=error"))
    assert (larger.network.image_size, larger.data.fit) == (64, "error")


def test_folders_that_are_no_classes(images: Path, tmp_path: Path) -> None:
    for folder in (images / "dark", tmp_path / "one"):
        shutil.copytree(images / "dark", tmp_path / "one" / "only", dirs_exist_ok=True)
        config, found = infer_config(folder, ())
        assert config.network.num_classes == 0 and "no classes" in found.describe()
    shutil.copy(images / "dark" / "0.png", images / "loose.png")
    config, found = infer_config(images, ())
    assert config.network.num_classes == 0 and len(found.source) == 13
    assert "no classes: 1 pictures lie beside the folders" in found.describe()


def test_all_that_is_unusable_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    folder = pets(tmp_path / "pets")
    (folder / "cat" / "broken.jpg").write_bytes(b"no picture")
    whole = (folder / "owl" / "0.png").read_bytes()
    (folder / "owl" / "half.png").write_bytes(whole[: len(whole) // 2])
    result = call(folder, "--out", tmp_path / "run", *SHORT)
    assert result.exit_code == 1 and "2 of 14 pictures cannot be used" in result.output
    assert "cat/broken.jpg: not a PNG" in result.output
    assert "owl/half.png: the picture cannot be read" in result.output
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_inferred_is_named(tmp_path: Path, images: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="holds no images"):
        infer_config(empty, ())
    (empty / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"no picture can be read:\n  a\.png: not a PNG"):
        infer_config(empty, ())
    (empty / "train-0.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"ddpm train mnist data\.source="):
        infer_config(empty, ())
    for override, message in (
        ("data.sauce=x", "data.sauce: unknown key"),
        ("data=3", "data = 3"),
        ("network=3", "network = 3"),
        ("network.image_size=30", "image_size = 30: must be a multiple of 4"),
        ("network.image_size=big", "image_size = 'big'"),
    ):
        with pytest.raises(ConfigError) as error:
            infer_config(images, (override,))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("n", "classes", "columns"),
    [(64, 3, 9), (50, 10, 10), (36, 3, 6), (64, 2, 8), (5, 20, 20), (9, 0, None), (9, 21, None)],
)
def test_grids_have_a_class_a_column_and_are_nearly_square(
    n: int, classes: int, columns: int | None
) -> None:
    assert class_columns(n, classes) == columns


def test_a_shipped_configuration_has_a_name() -> None:
    assert load_config("mnist").network == load_config("mnist-fast").network
    with pytest.raises(ConfigError, match="the names cifar10, mnist, mnist-fast stand for"):
        load_config("minst")


def test_a_wheel_holds_the_configurations(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "ddpm.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("app", "diffusion", "jobs", "training", "worker"):
        shutil.copytree(ROOT / name, tmp_path / name)
    code = "import setuptools.build_meta as b; b.build_wheel('.')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"training/configs/mnist.toml", "training/configs/cifar10.toml"} <= names
    sources = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/**/*.lua")}
    assert {s for s in sources if not s.startswith("build/")} <= names


def test_the_page_on_own_data_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "own-data.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    write_images(tmp_path / "pictures", count=500, size=(20, 16))
    write_images(tmp_path / "pictures" / "train", count=8, size=(20, 16))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDPM_MODELS", raising=False)
    quickly = {
        train: [*SHORT, "schedule.T=20", "--quiet"],
        sample: ["--steps", "2", "--quiet"],
        evaluate: ["--batch-size", "256", "--quiet"],
        serve_model: [],
    }
    by_name = {str(command.name): command for command in quickly}
    assert [words[0] for words in commands] == [
        "train",
        "train",
        "train",
        "sample",
        "evaluate",
        "train",
        "serve-model",
    ]
    for name, *words in commands:
        extra = ["steps=4", "--quiet"] if "--resume" in words else quickly[by_name[name]]
        result = CliRunner().invoke(by_name[name], [*words, *extra])
        assert result.exit_code == 0, result.output
    assert json.loads(Path("runs/split/train.json").read_text())["data"]["split"] == "train"
    fast = diffusion.load("runs/pets-fast").config
    assert (fast.sampling.sampler, fast.prediction) == ("consistency", "v")
    assert diffusion.load("models/pets").digest == diffusion.load("runs/pets").digest
    assert Path("pets.png").is_file() and Path("runs/pets-bits/terms.png").is_file()
