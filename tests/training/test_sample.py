import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffusion
from diffusion import Model, ModelConfig, ScheduleConfig, UNet, UNetConfig
from jobs.marking import GENERATED
from training.commands import convert, sample


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=(8, 8),
        attention=(False, True),
        res_blocks=1,
        groups=4,
        num_classes=2,
        null_class=True,
    )
    torch.manual_seed(0)
    config = ModelConfig(network, ScheduleConfig(T=20), class_names=("dark", "light"))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    diffusion.save(Model(config, UNet(network)), folder)
    return folder


def call(model: Path, out: Path | str, *arguments: str) -> str:
    options = ["--model", str(model), "--out", str(out), "--steps", "5", "--quiet"]
    result = CliRunner().invoke(sample, [*options, "--dtype", "fp32", *arguments])
    return f"{result.output}{result.exit_code}"


def test_a_grid_is_what_the_library_draws(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    printed = call(model, out, "-n", "4", "--seed", "3", "--class-label", "light,0")
    warned = "warning: 5 evaluations are few for ddpm, which wants 20 or more here"
    assert printed == f"{warned}\n{out} (seed 3)\n0"
    images = diffusion.sample(
        diffusion.load(model), 4, steps=5, seed=3, class_label=[1, 0, 1, 0], dtype=torch.float32
    )
    picture = np.asarray(Image.open(out))
    assert picture.shape == (18, 18)
    corner = ((images[3, 0] + 1) * 127.5).round().numpy().astype(np.uint8)
    assert np.array_equal(picture[10:, 10:], corner)


def test_a_folder_films_and_a_chain_in_columns(model: Path, tmp_path: Path) -> None:
    call(model, tmp_path / "images", "-n", "3")
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
    ]
    for name in ("v1.0/", "old.png"):  # a folder by its slash, and one that is there
        if not name.endswith("/"):
            (tmp_path / name).mkdir()
        printed = call(model, f"{tmp_path}/{name}", "-n", "1")
        assert (tmp_path / name / "00000.png").is_file(), printed
    for name, options in (("chain.gif", []), ("chain.webp", ["--snapshots", "1"])):
        call(model, tmp_path / name, "-n", "2", *options)
        with Image.open(tmp_path / name) as film:
            assert getattr(film, "n_frames", 1) >= 5  # the image may equal the last x̂_0
    call(model, tmp_path / "columns.png", "-n", "2", "--snapshots", "2", "--kind", "x_t")
    with Image.open(tmp_path / "columns.png") as picture:
        assert picture.size == (4 * 10 - 2, 2 * 10 - 2)  # rows 0, 2, 4 and the image


def test_files_say_that_a_machine_made_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a.png", "a.webp", "many/00000.png", "film.gif", "film.webp", "columns.png")
    for name in names:
        out = f"{tmp_path}/many/" if name.startswith("many") else tmp_path / name
        films = name.startswith(("film", "columns"))
        call(model, out, "-n", "2", *(["--snapshots", "2"] if films else []))
        assert GENERATED.encode() in (tmp_path / name).read_bytes(), name
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert name.endswith("gif") or GENERATED in str(picture.info["xmp"])
    monkeypatch.setenv("DDPM_MARK_OUTPUTS", "0")
    call(model, tmp_path / "plain.png", "-n", "2")
    assert GENERATED.encode() not in (tmp_path / "plain.png").read_bytes()
    monkeypatch.setenv("DDPM_MARK_OUTPUTS", "perhaps")
    said = call(model, tmp_path / "x.png")
    assert "DDPM_MARK_OUTPUTS = 'perhaps': must be 1 or 0" in said and said.endswith("1")


def test_the_bar_counts_correctors(model: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--out", str(tmp_path / "x.png"), "--steps", "3", "-n", "2"]
    result = CliRunner().invoke(sample, [*options, "--corrector-steps", "2"])
    assert result.exit_code == 0, result.output
    assert "14/14" in result.stderr  # two images of 3 steps and 2·2 correctors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-label", "3"], "class_label = 3: must be 0..1"),
        (["--class-label", "grey"], "--class-label 'grey': must be one of dark, light"),
        (["--sampler", "euler"], "sampler = 'euler': must be one of ddpm, ddim"),
        (["--steps", "21"], "steps = 21: must be 1..20"),
        (["--eta", "2", "--sampler", "ddim"], "eta = 2.0"),
        (["--variance", "medium"], "variance = 'medium': must be one of large, small"),
        (["--spacing", "cubic"], "spacing = 'cubic'"),
        (["--eta", "0.5", "--sampler", "unipc"], "eta = 0.5: is for sampler ddim, not unipc"),
        (["--variance", "large", "--sampler", "ddim"], "is for sampler ddpm, not ddim"),
        (["--device", "foo"], "device = 'foo': cannot be used here: "),
        (["--seed", "-1"], "seed = -1"),
        (["--model", "nowhere"], "nowhere/config.json: no such file"),
        (["--out", "grid.tiff"], "must end in .png, .webp or .gif"),
    ],
)
def test_bad_options_are_named(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(
        sample,
        [
            "--model",
            str(model),
            "--out",
            str(tmp_path / "x.png"),
            "--quiet",
            "--steps",
            "5",
            *arguments,
        ],
    )
    assert result.exit_code == 1
    assert message in result.output


def test_an_output_that_is_not_finite_is_an_error(model: Path, tmp_path: Path) -> None:
    bad = diffusion.load(model)
    bad.network.conv_out.weight.fill_(0.0)
    bad.network.conv_out.weight[:, 0, 1, 1] = 3e38
    bad.network.conv_out.bias.fill_(3e38)
    diffusion.save(bad, tmp_path / "bad")
    options = ["--model", str(tmp_path / "bad"), "--out", str(tmp_path / "x.png"), "--quiet"]
    result = CliRunner().invoke(sample, [*options, "--steps", "3", "--dtype", "fp32"])
    assert result.exit_code == 1
    assert "ddpm sample: t = 20: the network's output is not finite" in result.output
    assert not (tmp_path / "x.png").exists()


def test_conversion_names_what_diffusers_lacks_and_takes_another(
    model: Path, tmp_path: Path
) -> None:
    given = [str(model), str(tmp_path / "out"), "--to", "diffusers"]
    result = CliRunner().invoke(convert, [*given, "--sampling", "spacing=quadratic"])
    assert result.exit_code == 1
    assert "sampling: spacing = 'quadratic': diffusers would draw other images" in result.output
    assert CliRunner().invoke(convert, [*given, "--sampling", "spacing"]).exit_code == 2
    changes = [
        "--sampling",
        "sampler=ddim",
        "--sampling",
        "clip=false",
        "--sampling",
        "landing=stride",
    ]
    result = CliRunner().invoke(convert, [*given, *changes])
    assert result.exit_code == 0, result.output
    sampling = diffusion.load(tmp_path / "out").config.sampling
    assert (sampling.sampler, sampling.clip, sampling.landing) == ("ddim", False, "stride")


@pytest.mark.parametrize(
    ("name", "variable", "reason"),
    [
        ("sample", "CXX", "InvalidCxxCompiler: "),
        ("train", "CXX", "InvalidCxxCompiler: "),
        ("sample", "TORCHINDUCTOR_CACHE_DIR", "FileExistsError: "),
        ("train", "TORCHINDUCTOR_CACHE_DIR", "FileExistsError: "),
    ],
)
def test_where_nothing_can_be_compiled_one_sentence_says_so(
    model: Path, config_file: Path, tmp_path: Path, name: str, variable: str, reason: str
) -> None:
    unusable = str(tmp_path / "unusable")  # no compiler, or a file where a folder is wanted
    if variable != "CXX":
        Path(unusable).touch()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment = {**os.environ, **cache, variable: unusable}
    commands = {
        "sample": ["--model", str(model), "--out", str(tmp_path / "a.png"), "--compile"],
        "train": [str(config_file), "--out", str(tmp_path / "run"), "compile=true"],
    }
    command = [sys.executable, "-m", "ddpm", name, *commands[name], "--quiet"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    said = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1, ended.stderr
    assert said.startswith(f"ddpm {name}: torch.compile failed: {reason}")
    assert unusable in said and "Traceback" not in ended.stderr
