"""`ddpm evaluate`: its numbers are the library's; it resumes; tables, pictures and errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffusion
from diffusion.likelihood import likelihood
from diffusion.schedule import ScheduleConfig
from diffusion.speed import prepare
from tests.diffusion.networks import TINY, build_model
from training.bits import choose, mean_and_error, measure
from training.config import DataConfig
from training.data import Images, load_images
from training.evaluate_command import evaluate
from training.partial import PartialArrays, PartialError
from training.precision import dtype_cost
from training.rate_distortion import paper_steps, rate_distortion

T = 20


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model = build_model(schedule=ScheduleConfig(T=T, beta_end=0.4), crop=(6, 6))
    model.network.conv_out.weight.mul_(0.1)
    diffusion.save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train and test, 6×6, three classes: smooth blobs."""
    generator = np.random.default_rng(1)
    y, x = np.mgrid[:6, :6]
    for split, count in (("train", 9), ("test", 6)):
        for i in range(count):
            cy, cx = generator.uniform(1, 5, 2)
            blob = 255 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 3)
            folder = tmp_path / "data" / split / f"c{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(blob.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "data"


def invoke(model: Path, data: Path, out: Path, *options: str) -> str:
    arguments = [str(model), str(data), "--out", str(out), "--quiet", "--dtype", "fp32"]
    arguments += [*([] if "--splits" in options else ["--splits", "train,test"]), *options]
    result = CliRunner().invoke(evaluate, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def by_library(model: Path, data: Path, split: str, **options: Any) -> np.ndarray:
    """Bits/dim of all images of a split, by one library call."""
    images = load_images(
        DataConfig(source=str(data), split=split, fit="pad"),
        channels=1,
        side=8,
        num_classes=0,
        progress=False,
    )
    x_start = images.batch(torch.arange(len(images)))[0] / 127.5 - 1
    return likelihood(diffusion.load(model), x_start, seed=3, **options).bits_per_dim.numpy()


def test_numbers_are_those_of_the_library(model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke(
        model_folder,
        data,
        out,
        "--images",
        "6",
        "--monte-carlo",
        "9",
        "--samples",
        "5",
        "--seed",
        "3",
        "--variance",
        "large",
        "--pictures",
        "2",
    )
    results = json.loads((out / "results.json").read_text())
    assert results["dims"] == 64 and results["dims_unpadded"] == 36
    for split, count in (("train", 9), ("test", 6)):
        found = results["splits"][split]
        for variance in ("large", "small"):
            exact = by_library(model_folder, data, split, variance=variance)
            # 6 of train's 9 are chosen; those are found again by their order.
            images = choose(cast("Images", _Sized(count)), 6, seed=3).indices
            mean, error = mean_and_error(exact[images])
            full = found["full"][variance]
            assert full["bits_per_dim"] == pytest.approx(mean, abs=1e-4)
            assert full["standard_error"] == pytest.approx(error, abs=1e-4)
            assert full["bits_per_unpadded_dim"] == pytest.approx(mean * 64 / 36, abs=2e-4)
            parts = full["L_0"] + full["L_1_to_T-1"] + found["full"]["L_T"]
            assert parts == pytest.approx(full["bits_per_dim"])
            drawn = by_library(model_folder, data, split, variance=variance, samples=5)
            assert found["monte_carlo"][variance]["bits_per_dim"] == pytest.approx(
                drawn.mean(), abs=1e-4
            )
        terms = found["full"]["terms"]
        assert terms["t"] == list(range(1, T + 1))
        total = sum(terms["bits_per_dim"]) + found["full"]["L_T"]
        assert total == pytest.approx(found["full"]["large"]["bits_per_dim"])
    for name in ("terms.png", "rate_distortion.png", "progressive.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100


class _Sized:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def test_the_rate_distortion_table_has_the_papers_columns(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    printed = invoke(
        model_folder, data, out, "--images", "4", "--splits", "test", "--pictures", "0"
    )
    results = json.loads((out / "results.json").read_text())
    rows = results["rate_distortion"]
    assert [row["reverse_steps"] for row in rows] == [20, 18, 16, 14, 12, 10, 8, 6, 4, 2]
    assert [row["t"] for row in rows] == [21 - row["reverse_steps"] for row in rows]
    rates = [row["rate_bits_per_dim"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    # The last line: everything but L_0 is sent, and x̂_0(x_1) is nearly the image.
    full = results["splits"]["test"]["full"]
    assert rates[0] == pytest.approx(full["small"]["bits_per_dim"] - full["small"]["L_0"])
    assert "| 20 | " in printed and not (out / "progressive.png").exists()


def test_rate_and_distortion_from_terms_by_hand(tmp_path: Path, model_folder: Path) -> None:
    """Rate at t = L_T + … + L_t; the RMSE there is of the network call at t."""
    images = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    source = _Tensors(images.to(torch.uint8))
    full = measure(
        diffusion.load(model_folder),
        choose(source, 3, seed=0),
        variances=("small",),
        seed=0,
        samples=None,
        path=tmp_path / "p.npz",
        key={},
        progress=False,
    )
    curve = rate_distortion(full, "small")
    terms, prior = full.term_bits("small").mean(0), full.prior_bits().mean()
    for t in (1, 7, 19, 20):
        i = T - t
        assert curve.t[i] == t and curve.steps[i] == T + 1 - t
        assert curve.rate[i] == pytest.approx(prior + terms[t:].sum())
        rmse = 127.5 * math.sqrt(full.squared_error[:, t - 1].mean())
        assert curve.rmse[i] == pytest.approx(rmse)
    assert paper_steps(1000) == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


class _Tensors:
    class_names = ()
    size = (8, 8)

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pixels[indices], torch.full_like(indices, -1)


def test_an_interrupted_evaluation_goes_on(model_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--images", "4", "--splits", "test", "--pictures", "0", "--batch-size", "16")
    invoke(model_folder, data, out, *options)
    whole = (out / "results.json").read_text()
    path = out / "partial" / "test-full.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name in ("small", "large", "squared_error"):
        arrays[name][2:] = np.nan
    arrays["small"][0, 0] += 64 * math.log(2)  # marks what must not be computed again
    np.savez(path, **arrays)
    invoke(model_folder, data, out, *options)
    before, after = (
        json.loads(text)["splits"]["test"]["full"]["small"]["bits_per_dim"]
        for text in (whole, (out / "results.json").read_text())
    )
    assert after == pytest.approx(before + 1 / 4, abs=1e-6)


def test_partial_results_of_another_run_are_refused(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--images", "2", "--splits", "test", "--pictures", "0")
    invoke(model_folder, data, out, *options)
    result = CliRunner().invoke(
        evaluate, [str(model_folder), str(data), "--out", str(out), "--seed", "9", *options]
    )
    assert result.exit_code == 1 and "another evaluation" in result.output
    again = [str(model_folder), str(data), "--out", str(out), "--dtype", "fp32", *options]
    assert CliRunner().invoke(evaluate, again).exit_code == 0
    for changed in ("--fit", "a picture"):  # the same data set by name, and other images
        if changed == "--fit":
            result = CliRunner().invoke(evaluate, [*again, "--fit", "resize"])
        else:
            Image.new("L", (6, 6)).save(data / "test" / "c0" / "0.png")
            for path in (data / "test").glob("*/*.png"):
                Image.new("L", (6, 6), 9).save(path)
            result = CliRunner().invoke(evaluate, again)
        assert result.exit_code == 1 and "another evaluation" in result.output, changed
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    with pytest.raises(PartialError, match="cannot be read"):
        PartialArrays(tmp_path / "broken.npz", {"a": (2,)}, {})


@pytest.mark.filterwarnings("ignore:.torch.jit")  # how the file is made
def test_frechet_distance_with_a_torchscript_network(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    class Means(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * torch.stack(
                [x.mean(dim=(1, 2, 3)), x[:, :, 2:6, 2:6].mean(dim=(1, 2, 3))], 1
            )

    torch.jit.script(Means()).save(str(tmp_path / "features.pt"))
    out = tmp_path / "out"
    options = (
        "--images",
        "0",
        "--pictures",
        "0",
        "--frechet-images",
        "6",
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--features",
        str(tmp_path / "features.pt"),
    )
    printed = invoke(model_folder, data, out, *options)
    found = json.loads((out / "results.json").read_text())["frechet"]
    assert found["samples_to_train"] > found["real_to_real"] >= 0
    assert "Fréchet distance of samples to test" in printed
    again = out / "again.json"
    (out / "results.json").rename(again)
    invoke(model_folder, data, out, *options)  # from the kept features
    assert json.loads((out / "results.json").read_text()) == json.loads(again.read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variance", "learned"), "variance = 'learned'"),
        (("--splits", ","), "at least one split"),
        (("--splits", "nowhere"), "nowhere"),
        (("--splits", "test", "--features", "none.pt"), "features = 'none.pt'"),
        (("--splits", "test", "--features", "inception"), "features = 'inception'"),
        (("--quality",), "--quality: needs --features"),
        (("--sampler", "foo"), "--sampler: needs --features"),
        (("--steps", "5"), "--steps: needs --features"),
        (("--quality-images", "5"), "--quality-images: needs --quality"),
        (("--samples", "5"), "--samples: needs --monte-carlo"),
        (("--quality", "--features", "x.pt", "--quality-steps", "5,ten"), "--quality-steps 'ten'"),
        (("--quality", "--features", "x.pt", "--sampler", "ddim"), "--sampler: --quality has"),
        (("--images", "0"), "nothing to measure"),
    ],
)
def test_bad_options_are_named(
    model_folder: Path, data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    arguments = [str(model_folder), str(data), "--out", str(tmp_path / "o"), "--pictures", "0"]
    result = CliRunner().invoke(evaluate, [*arguments, "--quiet", *options])
    assert result.exit_code == 1 and message in result.output


def test_a_single_image_has_no_error_and_its_results_are_json(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    def refused(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    printed = invoke(model_folder, data, tmp_path / "o", "--images", "1", "--pictures", "1")
    assert " ± ? bits/dim on 1 images" in printed
    results = json.loads((tmp_path / "o" / "results.json").read_text(), parse_constant=refused)
    assert results["splits"]["test"]["full"]["small"]["standard_error"] is None


def test_a_seed_is_none_below_zero(model_folder: Path, data: Path) -> None:
    result = CliRunner().invoke(evaluate, [str(model_folder), str(data), "--seed", "-1"])
    assert result.exit_code == 2 and "'--seed': -1" in result.output


def test_every_split_is_checked_before_any_is_computed(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    for split, message in (("absent", "data.split = 'absent'"), ("test", "cannot be used")):
        (data / "test" / "c1" / "1.png").write_bytes(b"no picture")
        out = tmp_path / split
        arguments = [str(model_folder), str(data), "--out", str(out), "--splits", f"train,{split}"]
        result = CliRunner().invoke(evaluate, [*arguments, "--quiet", "--images", "2"])
        assert result.exit_code == 1 and message in result.output
        assert not (out / "partial").exists()


def test_labels_that_would_mean_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    model = build_model(schedule=ScheduleConfig(T=T, beta_end=0.4), class_names=("c1", "c0", "c2"))
    diffusion.save(model, tmp_path / "named")
    arguments = [str(tmp_path / "named"), str(data), "--splits", "test", "--fit", "pad"]
    arguments += ["--out", str(tmp_path / "o"), "--quiet"]
    result = CliRunner().invoke(evaluate, [*arguments, "--labelled"])
    assert result.exit_code == 1
    assert "its classes are c0, c1, c2, the model's c1, c0, c2" in result.output


def test_without_splits_a_folder_is_measured_whole(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    arguments = [str(model_folder), str(data), "--out", str(tmp_path / "o"), "--pictures", "0"]
    result = CliRunner().invoke(evaluate, [*arguments, "--quiet", "--images", "99"])
    assert result.exit_code == 0, result.output
    splits = json.loads((tmp_path / "o" / "results.json").read_text())["splits"]
    assert [*splits] == ["all"] and splits["all"]["full"]["images"] == 15


def test_a_network_that_needs_labels_gets_them(data: Path, tmp_path: Path) -> None:
    import dataclasses

    network = dataclasses.replace(TINY, null_class=False)
    model = build_model(network, schedule=ScheduleConfig(T=T, beta_end=0.4), crop=(6, 6))
    model.network.conv_out.weight.mul_(0.1)
    diffusion.save(model, tmp_path / "needy")
    invoke(tmp_path / "needy", data, tmp_path / "out", "--images", "3", "--pictures", "1")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_compiled_code_gives_the_same_numbers(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    found = []
    for name, options in (("eager", ()), ("compiled", ("--compile",))):
        invoke(model_folder, data, tmp_path / name, "--splits", "test", *options)
        results = json.loads((tmp_path / name / "results.json").read_text())
        found.append(results["splits"]["test"]["full"]["small"]["bits_per_dim"])
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_a_number_format_that_would_be_seen_is_refused(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs is printed and kept; `auto` does without one that costs too much."""
    options = ("--images", "4", "--splits", "test", "--pictures", "0", "--quiet")
    monkeypatch.setattr("training.evaluate.fast_dtype", lambda model: torch.bfloat16)
    for name, dtype, allowed, used in (
        ("a", "bf16", 1e9, "bfloat16"),
        ("b", "auto", 1e-9, "float32"),
        ("c", "bf16", 1e-9, None),
    ):
        monkeypatch.setattr("training.precision.ALLOWED", allowed)
        out = tmp_path / name
        arguments = [str(model_folder), str(data), "--out", str(out), "--dtype", dtype, *options]
        ran = CliRunner().invoke(evaluate, arguments)
        assert re.search(
            r"bfloat16 moves bits/dim by [+-]0\.\d+ ± 0\.\d+ \(4 images\); ", ran.output
        )
        if used is None:
            assert ran.exit_code == 1 and "--dtype bf16: bfloat16 moves" in ran.output
            assert "use --dtype fp32" in ran.output and not out.exists()
        else:
            results = json.loads((out / "results.json").read_text())
            assert results["dtype"] == used and results["dtype_cost"]["dtype"] == "bfloat16"


def test_what_a_number_format_costs_is_the_difference_of_two_evaluations(
    model_folder: Path, data: Path
) -> None:
    model = diffusion.load(model_folder)
    images = load_images(
        DataConfig(source=str(data), split="train", fit="pad"),
        channels=1, side=8, num_classes=0, progress=False,
    )  # fmt: skip
    chosen = choose(images, 9, seed=3)
    found = dtype_cost(model, torch.bfloat16, chosen, seed=3, variance="small")
    x_start = chosen.batch(np.arange(9))[0]
    keys = torch.from_numpy(chosen.indices)
    by_hand = [
        likelihood(each, x_start, samples=20, seed=3, indices=keys).bits_per_dim
        for each in (model, prepare(model, dtype=torch.bfloat16))
    ]
    wanted = float((by_hand[1] - by_hand[0]).mean())
    assert found.images == 9 and found.bits_per_dim == pytest.approx(wanted, rel=1e-3)
    spread = float(by_hand[0].std()) / 9**0.5
    assert found.allowed == pytest.approx(spread / 10, rel=1e-3)
    assert found.too_much is (abs(wanted) > spread / 10)
    none = dtype_cost(model, torch.float32, chosen, seed=3, variance="small")
    assert none.bits_per_dim == 0 and not none.too_much
