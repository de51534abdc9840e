"""`ddpm restore` and `ddpm encode`: what they write, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffusion
from diffusion import ScheduleConfig, cores
from jobs.marking import GENERATED
from tests.diffusion.networks import build_model
from training.restore_commands import encode, restore


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a picture of its size, a small one, and a mask."""
    folder = tmp_path_factory.mktemp("restore")
    model = build_model(schedule=ScheduleConfig(T=20))
    model.network.conv_out.weight.mul_(0.1)
    diffusion.save(model, folder / "tiny")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "whole.png")
    Image.fromarray(pixels[:2, :2]).save(folder / "small.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def call(place: Path, *arguments: str) -> str:
    given = ["--model", str(place / "tiny"), "--steps", "4", "--quiet", "--seed", "3", "-n", "2"]
    given += ["--dtype", "fp32"]
    ran = CliRunner().invoke(restore, [*arguments, *given])
    return f"{ran.output}{ran.exit_code}"


def test_a_strip_of_measurement_samples_mean_and_deviation(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    asked = (str(place / "whole.png"), "--box", "0,4,8,8", "--out", str(out))
    assert call(place, *asked) == f"{out} (seed 3)\n0"
    assert GENERATED.encode() in out.read_bytes()
    strip = np.asarray(Image.open(out))
    assert strip.shape == (8, 5 * 8 + 4 * 2)
    known = np.asarray(Image.open(place / "whole.png"))[:4]
    measured, first, second, mean, deviation = (strip[:, i * 10 : i * 10 + 8] for i in range(5))
    for panel in (measured, first, second, mean):
        assert np.abs(panel[:4].astype(int) - known).max() <= 1
    assert (first[4:] != second[4:]).any()
    assert deviation[:4].max() == 0 < deviation[4:].max()
    by_mask = (str(place / "whole.png"), "--mask", str(place / "mask.png"), "--out", str(out))
    call(place, *by_mask)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), strip)


def test_other_operators(place: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.png")
    small, whole = str(place / "small.png"), str(place / "whole.png")
    for arguments in (
        (small, "--operator", "average_pool", "--factor", "4"),
        (whole, "--operator", "average_pool", "--factor", "4", "--measure"),
        (whole, "--operator", "blur", "--deviation", "1", "--noise", "1"),
        (whole, "--operator", "identity", "--noise", "25", "--method", "moment"),
    ):
        assert call(place, *arguments, "--out", out).endswith("(seed 3)\n0"), arguments
        with Image.open(out) as strip:
            assert strip.size == (48, 8)


def test_of_a_blurred_picture_the_rounding_is_known(place: Path, tmp_path: Path) -> None:
    """And of the measurement that is made here there is none."""
    strips = {}
    for name, more in {
        "default": (),
        "rounding": ("--noise", "0.3"),
        "none": ("--noise", "0"),
        "measured": ("--measure",),
        "exact": ("--measure", "--noise", "0"),
    }.items():
        out = tmp_path / f"{name}.png"
        blur = (str(place / "whole.png"), "--operator", "blur", "--deviation", "1.5")
        call(place, *blur, *more, "--out", str(out))
        strips[name] = np.asarray(Image.open(out))
    np.testing.assert_array_equal(strips["default"], strips["rounding"])
    assert (strips["default"] != strips["none"]).any()
    np.testing.assert_array_equal(strips["measured"], strips["exact"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--box or --mask: is needed"),
        (("--box", "1,2,3"), "must be x0,y0,x1,y1"),
        (("--box", "0,0,9,8"), "does not lie within 8 × 8"),
        (("--box", "0,0,8,8"), "no pixel is known"),
        (("--operator", "average_pool"), "--factor: is needed"),
        (("--operator", "average_pool", "--factor", "3"), "factor = 3: does not divide"),
        (("--operator", "average_pool", "--factor", "4"), "8 × 8: must be 2 × 2"),
        (("--operator", "gray"), "weights: 3 for an image of 1 channels"),
        (("--operator", "blur"), "--deviation: is needed"),
        (("--operator", "identity", "--noise", "-1"), "--noise -1: must be 0 or more"),
        (("--box", "0,0,8,4", "--noise", "nan"), "--noise nan: must be 0 or more"),
        (("--box", "0,0,8,4", "--factor", "4"), "--factor: is for average_pool, not mask"),
        (("--operator", "gray", "--box", "0,0,8,4"), "--box: is for mask, not gray"),
        (("--box", "0,0,8,4", "--deviation", "1"), "--deviation: is for blur, not mask"),
        (("--box", "0,0,8,4", "--solver-steps", "2"), "solver_steps = 2: is for method moment"),
        (("--box", "0,0,8,4", "--device", "foo"), "device = 'foo': cannot be used here: "),
        (("--operator", "identity", "--out", "a.jpg"), "a.jpg: must end in .png or .webp"),
    ],
)
def test_what_is_refused(place: Path, arguments: tuple[str, ...], says: str) -> None:
    said = call(place, str(place / "whole.png"), *arguments)
    assert said.startswith("ddpm restore: ") and says in said and said.endswith("1")


def test_pictures_become_their_x_T(place: Path, tmp_path: Path) -> None:
    out, strip = tmp_path / "x_T.npy", tmp_path / "strip.png"
    pictures = [str(place / name) for name in ("whole.png", "small.png")]
    options = ["--model", str(place / "tiny"), "--iterations", "3", "--quiet"]
    options += ["--dtype", "fp32", "--steps", "5"]
    ran = CliRunner().invoke(
        encode, [*pictures, *options, "--out", str(out), "--strip", str(strip)]
    )
    assert ran.exit_code == 0 and "2 x_T; the way back is" in ran.output, ran.output
    assert np.load(out).shape == (2, 1, 8, 8)
    assert GENERATED.encode() in strip.read_bytes()
    with Image.open(strip) as picture:
        assert picture.size == (28, 18)


@pytest.mark.parametrize("command", [restore, encode])
def test_they_keep_to_the_cores_they_are_given(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: click.Command
) -> None:
    monkeypatch.setattr(cores, "_cores", 2)
    given = [str(place / "whole.png"), "--model", str(place / "tiny"), "--quiet", "--steps", "2"]
    if command is restore:
        given += ["--box", "0,4,8,8", "--out", str(tmp_path / "out.png")]
    else:
        given += ["--out", str(tmp_path / "out.npy")]
    ran = CliRunner().invoke(command, [*given, "--threads", "1"])
    assert ran.exit_code == 0, ran.output
    assert cores.count() == torch.get_num_threads() == 1


def test_the_picture_that_is_none_is_named(place: Path, tmp_path: Path) -> None:
    none = tmp_path / "none.png"
    none.write_bytes(b"text")
    given = ["--model", str(place / "tiny"), "--quiet", "--out", str(tmp_path / "x_T.npy")]
    ran = CliRunner().invoke(encode, [str(place / "whole.png"), str(none), *given])
    assert ran.exit_code == 1 and f"ddpm encode: {none}: not a PNG" in ran.output


def test_few_steps_are_warned_of_in_words(place: Path, tmp_path: Path) -> None:
    diffusion.save(build_model(schedule=ScheduleConfig(T=1000)), tmp_path / "long")
    given = [str(place / "whole.png"), "--model", str(tmp_path / "long"), "--steps", "2", "--quiet"]
    box = ["--box", "0,4,8,8", "--travel", "1"]
    for command, out in ((restore, ["r.png", *box]), (encode, ["x_T.npy"])):
        ran = CliRunner().invoke(command, [*given, "--out", str(tmp_path / out[0]), *out[1:]])
        assert ran.exit_code == 0, ran.output
        [line] = ran.stderr.splitlines()
        assert line.startswith("warning: ")
        assert line.endswith(" evaluations are few for ddim, which wants 10 or more here")
