"""The library at the prompt: what a model says, pictures, and arguments that are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
from diffusion import ImagesError, Model, likelihood
from diffusion.flow import flow_likelihood
from diffusion.operators import Blur, Identity, Linear
from diffusion.table import SamplerError
from tests.diffusion.networks import build_model


@pytest.fixture(scope="module")
def model() -> Model:
    return build_model()


def test_a_model_says_what_it_is(model: Model, tmp_path: Path) -> None:
    count = sum(p.numel() for p in model.network.parameters())
    said = f"1×8×8, 3 classes, T = 100 (linear), predicts epsilon, {count:,} parameters, cpu"
    assert repr(model) == f"<Model {said}>"
    diffusion.save(model, tmp_path)
    loaded = diffusion.load(tmp_path)
    assert repr(loaded) == f"<Model {said}, digest {loaded.digest[:12]}>"


def test_an_image_and_several_become_a_picture() -> None:
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    one = diffusion.to_pil(x[0])
    assert one.mode == "L" and (np.asarray(one).ravel() == np.rint(np.arange(64) * 255 / 63)).all()
    many = diffusion.to_pil(x.expand(4, 3, 8, 8))
    assert many.mode == "RGB" and many.size == (18, 18)
    assert diffusion.to_pil(x.expand(4, 1, 8, 8), columns=4).size == (38, 8)
    assert np.asarray(diffusion.to_pil(5 * x[0]))[0, 0] == 0  # x_t is cut off, not refused
    with pytest.raises(ImagesError, match="images: holds no image"):
        diffusion.to_pil(x[:0])


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_chain_becomes_a_film(model: Model, tmp_path: Path, suffix: str) -> None:
    frames: list[torch.Tensor] = []
    images = diffusion.sample(
        model, 2, steps=4, class_label=1, on_step=lambda _, __, step: frames.append(step.x_start)
    )
    diffusion.film([*frames, images], tmp_path / f"chain{suffix}")
    with Image.open(tmp_path / f"chain{suffix}") as film:
        # The last x̂_0 is the image: Pillow shows equal frames as one that lasts longer.
        assert getattr(film, "n_frames", 1) == 4 and film.size == (18 * 7, 8 * 7)


def test_the_bound_is_at_the_top(model: Model) -> None:
    found = likelihood(model, torch.zeros(2, 1, 8, 8), samples=12)
    assert found.bits_per_dim.shape == (2,)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((1, 1, 8, 8)), "x_start: a ndarray; must be a torch tensor [N, 1, 8, 8]"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "torch.uint8; must be floating, in [−1, 1]: "),
        (torch.zeros(1, 8, 8), "its shape is [1, 8, 8]; must be [N, 1, 8, 8]"),
        (torch.zeros(1, 3, 8, 8), "its shape is [1, 3, 8, 8]"),
        (torch.full((1, 1, 8, 8), 255.0), "in 255..255; must be in [−1, 1]: x_start / 127.5 - 1"),
        (torch.full((1, 1, 8, 8), -1.5), "in -1.5..-1.5; must be in [−1, 1]"),
        (torch.full((1, 1, 8, 8), float("nan")), "must be in [−1, 1]"),
    ],
)
def test_images_that_are_none(model: Model, images: object, says: str) -> None:
    with pytest.raises(ImagesError) as refused:
        likelihood(model, images)  # type: ignore[arg-type]
    assert says in str(refused.value)


@pytest.mark.parametrize("call", [diffusion.sample, likelihood])
def test_a_folder_is_no_model(call: object) -> None:
    with pytest.raises(
        TypeError, match=r"model = 'models/mnist': must be a Model; diffusion\.load"
    ):
        call("models/mnist", torch.zeros(1, 1, 8, 8))  # type: ignore[operator]


@pytest.mark.parametrize("number", ["4", 4.0, True, 0])
def test_a_number_of_images_that_is_none(model: Model, number: object) -> None:
    with pytest.raises(SamplerError, match=r"num_images = .*: must be 1 or more"):
        diffusion.sample(model, number)  # type: ignore[arg-type]


@pytest.mark.parametrize(("frames", "path"), [([], "a.gif"), ([torch.zeros(1, 1, 2, 2)], "a.mp4")])
def test_a_film_that_cannot_be(frames: list[torch.Tensor], path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must"):
        diffusion.film(frames, tmp_path / path)


def test_submodules_are_still_there() -> None:
    code = "import diffusion; from diffusion.likelihood import check_variance; check_variance"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


NUMPY, LEVELS = np.zeros((1, 8, 8), np.float32), torch.full((1, 8, 8), 200.0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "models/mnist"}, r"model = 'models/mnist': must be a Model"),
        ({"y": NUMPY}, r"y: a ndarray; must be a torch tensor \[1, 8, 8\]"),
        ({"y": torch.zeros(1, 8, 8, dtype=torch.uint8)}, r"y: torch.uint8; must be floating"),
        ({"y": LEVELS}, r"y: in 200..200; must be in \[−1, 1\]: y / 127.5 - 1 of grey levels"),
        ({"y": LEVELS, "sigma": 1.0}, r"y: in 200..200; must be in \[−11, 11\]"),
        ({"y": LEVELS, "operator": Blur.gaussian(1.0, 8)}, r"must be in \[−1, 1\]: y / 127.5 - 1"),
        ({"operator": "mask"}, r"operator = 'mask': must be one of diffusion.operators"),
        ({"sigma": "1"}, r"sigma = '1': must be 0 or more"),
        ({"solver_steps": 1.5}, r"solver_steps = 1.5: must be 0 or more, and an int"),
        ({"travel": 1.5}, r"travel = 1.5: must be 1..100, and an int"),
        ({"steps": "9"}, r"steps = '9': must be 1..100, and an int"),
        ({"eta": "1"}, r"eta = '1': must be 0..1"),
        ({"guidance": None, "class_label": 1}, r"guidance = None: must be a finite number"),
        ({"seed": "1"}, r"seed = '1': must be an integer from 0"),
        ({"class_label": "seven"}, r"class_label = 'seven': must be an int, or as many as images"),
        ({"class_label": [1.7, 2.2]}, r"class_label = \[1.7, 2.2\]: must be an int"),
        ({"class_label": True}, r"class_label = True: must be an int"),
    ],
)
def test_what_restore_is_told_by_name(model: Model, given: dict[str, object], says: str) -> None:
    asked = {"model": model, "y": torch.zeros(1, 8, 8), "operator": Identity(), **given}
    with pytest.raises((ValueError, TypeError), match=says):
        diffusion.restore(**asked)  # type: ignore[arg-type]


def test_a_measurement_in_units_of_its_own_is_not_refused(model: Model) -> None:
    total = Linear(lambda x: 200 * x, lambda y: 200 * y)
    images = diffusion.restore(model, LEVELS / 2, total, steps=2, travel=1)
    assert (images - 0.5).abs().max() < 1e-3
    overshot = torch.full((1, 8, 8), 1.2)  # as a sharpened picture does
    assert diffusion.restore(model, overshot, Identity(), steps=2, travel=1).isfinite().all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "models/mnist"}, r"model = 'models/mnist': must be a Model"),
        ({"x": NUMPY[None]}, r": a ndarray; must be a torch tensor \[N, 1, 8, 8\]"),
        ({"x": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, r": torch.uint8; must be floating"),
        ({"x": torch.zeros(1, 8, 8)}, r": its shape is \[1, 8, 8\]; must be \[N, 1, 8, 8\]"),
        ({"x": LEVELS[None]}, r": in 200..200; must be in \[−1"),
        ({"steps": 2.5}, r"steps = 2.5: must be 1..100, and an int"),
        ({"order": "1"}, r"order = .*1.*: must be 1 or 2"),
        ({"batch_size": 0}, r"batch_size = 0: must be 1 or more"),
        ({"guidance": "2", "class_label": 1}, r"guidance = '2': must be a finite number"),
    ],
)
@pytest.mark.parametrize("call", [diffusion.encode, diffusion.decode])
def test_what_encode_and_decode_are_told_by_name(
    model: Model, call: Any, given: dict[str, object], says: str
) -> None:
    asked: dict[str, Any] = {"model": model, "x": torch.zeros(1, 1, 8, 8), **given}
    with pytest.raises((ValueError, TypeError), match=says):
        call(asked.pop("model"), asked.pop("x"), **asked)


def test_what_iterations_and_the_flow_are_told_by_name(model: Model) -> None:
    with pytest.raises(SamplerError, match=r"iterations = 1.5: must be 0..100, and an int"):
        diffusion.encode(model, torch.zeros(1, 1, 8, 8), iterations=1.5)  # type: ignore[arg-type]
    with pytest.raises(ImagesError, match=r"x_start: in 200..200; must be in \[−1, 1\]"):
        flow_likelihood(model, LEVELS[None])
    with pytest.raises(SamplerError, match="draws = 0: must be 1 or more"):
        flow_likelihood(model, torch.zeros(1, 1, 8, 8), draws=0)
