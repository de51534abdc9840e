"""The table of samplers, spacings and steps, and the default that is chosen from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffusion
from diffusion.schedule import ScheduleConfig
from tests.diffusion.networks import TINY, build_model
from training.evaluate_command import evaluate
from training.quality import WORTH, Cell, Real, cheapest, outlook, ways

T = 20


class Judge(torch.nn.Module):
    """Two features, and a class by the mean of the picture."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = x.mean(dim=(1, 2, 3))
        features = torch.stack([mean, x[:, :, 2:6, 2:6].mean(dim=(1, 2, 3))], 1)
        return features, torch.stack([-mean, 0.0 * mean, mean], 1)


class Features(torch.nn.Module):
    """The same features alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([mean, x[:, :, 2:6, 2:6].mean(dim=(1, 2, 3))], 1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, a data set with train and test, and two networks to look at samples."""
    model = build_model(schedule=ScheduleConfig(T=T, beta_end=0.4))
    model.network.conv_out.weight.mul_(0.1)
    diffusion.save(model, tmp_path / "model")
    generator = np.random.default_rng(1)
    for split, count in (("train", 12), ("test", 9)):
        for i in range(count):
            folder = tmp_path / "data" / split / f"c{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    for name, network in (("judge", Judge()), ("features", Features())):
        torch.jit.script(network).save(str(tmp_path / f"{name}.pt"))
    return tmp_path


def invoke(place: Path, *options: str) -> str:
    arguments = [str(place / "model"), str(place / "data"), "--out", str(place / "out"), "--quiet"]
    small = ["--images", "0", "--pictures", "0", "--quality", "--quality-images", "12"]
    cells = ["--quality-samplers", "ddim,ddpm", "--quality-spacings", "uniform,trailing"]
    result = CliRunner().invoke(
        evaluate,
        [
            *arguments,
            "--splits",
            "train,test",
            *small,
            *cells,
            "--quality-steps",
            "2,5,30",
            *options,
        ],
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_the_table_has_every_cell_and_goes_on_where_it_was(place: Path) -> None:
    printed = invoke(place, "--features", str(place / "judge.pt"))
    found = json.loads((place / "out" / "results.json").read_text())["quality"]
    names = [(cell["sampler"], cell["spacing"], cell["steps"]) for cell in found["cells"]]
    assert names[0] == ("ddpm", "uniform", T) and len(names) == 1 + 2 * 2 * 2
    for cell in found["cells"]:
        assert cell["images"] == 12 and cell["ratio"] > 0 and cell["ratio_error"] > 0
        assert 0 <= cell["recognised"] <= 1
        assert f"| {cell['sampler']} | {cell['spacing']} | {cell['steps']} | " in printed
    assert found["sampling"] in [
        {"sampler": sampler, "spacing": spacing, "steps": steps}
        for sampler, spacing, steps in names
    ]
    kept = {path: path.read_bytes() for path in (place / "out" / "partial").iterdir()}
    assert len(kept) == len(names)
    gone = next(iter(kept))
    gone.unlink()  # as if interrupted before this one
    invoke(place, "--features", str(place / "judge.pt"))
    again = json.loads((place / "out" / "results.json").read_text())["quality"]
    assert again == found and gone.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_table_beside_an_earlier_one_draws_its_aim_no_more(place: Path) -> None:
    judge = ("--features", str(place / "judge.pt"))
    invoke(place, *judge, "--quality-steps", "2")
    earlier = place / "out" / "results.json"
    first = json.loads(earlier.read_text())["quality"]["cells"][0]
    against = ("--quality-against", str(earlier), "--quality-samplers", "ddim")
    invoke(place, *judge, *against, "--out", str(place / "beside"), "--quality-steps", "5")
    found = json.loads((place / "beside" / "results.json").read_text())["quality"]["cells"]
    assert found[0] == first and [cell["steps"] for cell in found[1:]] == [5, 5]
    assert not [*(place / "beside" / "partial").glob(f"*-{T}.npz")]
    other = [str(place / "model"), str(place / "data"), "--quality", *judge, *against]
    result = CliRunner().invoke(
        evaluate, [*other, "--splits", "train,test", "--images", "0", "--seed", "1"]
    )
    assert result.exit_code == 1 and "seed = 0, must be 1 as here" in result.output
    for options, message in (
        (("--quality-images", "6"), "images = 12, must be 6 as here"),
        (("--frechet-images", "5"), "frechet_images = 10000, must be 5 as here"),
        (("--splits", "test,train"), "splits = ['train', 'test'], must be ['test', 'train']"),
    ):
        given = [*other, "--splits", "train,test", "--quality-images", "12", *options]
        result = CliRunner().invoke(evaluate, [*given, "--images", "0"])
        assert result.exit_code == 1 and message in result.output, result.output


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_set_of_one_picture_is_refused_before_anything_is_drawn(place: Path) -> None:
    unlabelled = replace(TINY, num_classes=0, null_class=False)
    diffusion.save(build_model(unlabelled, schedule=ScheduleConfig(T=T)), place / "plain")
    for split, count in (("train", 3), ("test", 1)):
        (place / "loose" / split).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), i).save(place / "loose" / split / f"{i}.png")
    for options in (("--quality",), ()):
        given = [str(place / "plain"), str(place / "loose"), "--splits", "train,test", "--quiet"]
        given += ["--features", str(place / "judge.pt"), "--images", "0", *options]
        result = CliRunner().invoke(evaluate, [*given, "--out", str(place / "one")])
        assert result.exit_code == 1
        assert "test: 1 images: at least 2 are needed" in result.output
        assert not [*(place / "one").glob("partial/*")]
    few = [str(place / "plain"), str(place / "loose"), "--splits", "train", "--quiet", "--quality"]
    few += ["--features", str(place / "judge.pt"), "--images", "0", "--out", str(place / "one")]
    result = CliRunner().invoke(evaluate, few)
    assert result.exit_code == 1 and "train: 1 images: at least 2" in result.output


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_another_network_saw_is_not_taken(place: Path) -> None:
    judge = ("--features", str(place / "judge.pt"), "--quality-steps", "2")
    invoke(place, *judge)
    torch.jit.script(Features()).save(str(place / "judge.pt"))
    arguments = [
        str(place / "model"),
        str(place / "data"),
        "--out",
        str(place / "out"),
        "--quality",
    ]
    arguments += ["--splits", "train,test", "--images", "0", "--quality-images", "12", *judge]
    result = CliRunner().invoke(evaluate, arguments)
    assert result.exit_code == 1 and "another evaluation" in result.output


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_features_alone_give_ratios_alone(place: Path) -> None:
    printed = invoke(place, "--features", str(place / "features.pt"))
    found = json.loads((place / "out" / "results.json").read_text())["quality"]
    assert all(cell["recognised"] is None for cell in found["cells"])
    assert "| sampler | spacing | steps | Fréchet ratio |\n" in printed


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_table_needs_a_network(place: Path) -> None:
    arguments = [str(place / "model"), str(place / "data"), "--quality"]
    result = CliRunner().invoke(evaluate, arguments)
    assert result.exit_code == 1 and "--quality: needs --features" in result.output
    arguments += ["--features", "x.pt", "--quality-steps", "5,ten"]
    result = CliRunner().invoke(evaluate, arguments)
    assert result.exit_code == 1 and "--quality-steps 'ten'" in result.output


def test_the_ratio_of_equals_is_one_within_its_error() -> None:
    generator = np.random.default_rng(0)
    ratios = []
    for seed in range(30):
        real = Real(generator.normal(size=(4000, 3)), generator.normal(size=(300, 3)))
        ratios.append(real.ratio(generator.normal(size=(300, 3)), seed=seed))
    found, told = np.log([r for r, _ in ratios]), np.array([e / r for r, e in ratios])
    assert abs(found.mean()) < 4 * found.std() / 30**0.5
    assert 0.4 < np.sqrt((told**2).mean()) / found.std() < 2


def test_the_default_is_the_cheapest_that_is_as_good() -> None:
    def cell(sampler: str, steps: int, ratio: float, recognised: float | None = None) -> Cell:
        error = None if recognised is None else 0.004
        return Cell(sampler, "uniform", steps, 100, ratio, 0.05, recognised, error)

    reference = cell("ddpm", 1000, 0.78, 0.986)
    cells = [
        reference,
        cell("ddim", 10, 0.95, 0.986),  # too far in one
        cell("ddpm", 15, 0.75, 0.97),  # and in the other
        cell("dpmpp_2m", 20, 0.80, 0.984),
        cell("ddim", 20, 0.71, 0.985),
        cell("ddpm", 100, 0.68, 0.986),
    ]
    assert cheapest(cells) is cells[4]
    assert cheapest([reference, cells[1]]) is reference
    assert cheapest([cell("ddpm", 1000, 0.8), cell("ddim", 5, 0.82)]).steps == 5
    assert ways(50, ["ddim"], ["uniform", "trailing"], [100, 5, 5]) == [
        ("ddpm", "uniform", 50), ("ddim", "uniform", 5), ("ddim", "trailing", 5),
    ]  # fmt: skip


def test_by_default_every_sampler_is_asked_where_it_tells_something() -> None:
    cells = ways(1000, (), (), (5, 50, 250))
    assert {a for a, _, _ in cells} == {"ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc"}
    assert ("unipc", "karras", 5) in cells and ("ddim", "karras", 5) not in cells
    assert ("ddim", "uniform", 250) in cells and ("unipc", "uniform", 250) not in cells
    assert ways(1000, ("tuned", "consistency"), ("karras",), (1, 2), tuned=(6, 4))[1:] == [
        ("tuned", "uniform", 4), ("tuned", "uniform", 6),
        ("consistency", "karras", 1), ("consistency", "karras", 2),
    ]  # fmt: skip
    assert ways(1000, (), (), (5,), tuned=(4,))[-1] == ("tuned", "uniform", 4)
    named = ways(1000, ("unipc",), (), (250,))  # what is named is measured
    assert named[1:] == [("unipc", spacing, 250) for spacing in WORTH["unipc"].spacings]
    first, *_, last = outlook(ways(1000, ("ddim",), ("uniform",), (5, 10)), 20).splitlines()
    assert first == "ddpm (uniform): 1 cells, 1000 evaluations an image"
    assert last == "3 cells of 20 images: 20,300 evaluations"
