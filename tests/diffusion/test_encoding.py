"""The probability flow up and down: closed form and order on Gaussian data, inverses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusion
from diffusion import ImagesError, decode, encode
from diffusion.encoding import decoding_table, encoding_table, slerp
from diffusion.sampling import chain
from diffusion.schedule import linear_schedule
from diffusion.table import Memory, SamplerError, SamplerTable
from tests.diffusion.gaussian import GaussianDenoiser
from tests.diffusion.networks import build_model

PAPER = linear_schedule()
VARIANCE = 0.25


def walked(denoiser: Any, table: SamplerTable, x: Tensor) -> Tensor:
    for step in chain(denoiser, table, x):
        x = step.x_next
    return x


def flow_error(T: int, order: int) -> float:
    """Relative error of x_T against the flow x_T = x_0 √(Var x_T/Var x_0), cut into T steps."""
    schedule = linear_schedule(T, 0.1 / T, 20 / T)
    denoiser = GaussianDenoiser(schedule, VARIANCE, shape=(1, 1, 1))
    table = encoding_table(schedule, range(T), order=order)
    found = float(walked(denoiser, table, torch.ones(1, 1, 1, 1, dtype=torch.float64)))
    variance = VARIANCE * schedule.alpha_bar(T - 1) + schedule.one_minus_alpha_bar(T - 1)
    return abs(found / math.sqrt(variance / VARIANCE) - 1)


@pytest.mark.parametrize(("order", "first"), [(1, 200), (2, 50)])
def test_the_order_of_convergence(order: int, first: int) -> None:
    # Beyond these T the second is at the digits of float32 tables.
    errors = [flow_error(T, order) for T in (first, 2 * first, 4 * first)]
    for coarse, fine in ((0, 1), (1, 2)):
        assert errors[coarse] / errors[fine] == pytest.approx(2**order, rel=0.25)


def test_iterations_make_the_way_up_the_inverse_of_the_way_down() -> None:
    denoiser = GaussianDenoiser(PAPER, VARIANCE, shape=(1, 2, 2))
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ts = range(9, 1000, 110)
    down = decoding_table(PAPER, ts)
    errors = []
    for iterations in (0, 1, 4, 100):
        up = encoding_table(PAPER, ts, iterations=iterations)
        back = walked(denoiser, down, walked(denoiser, up, x))
        errors.append(float((back - x).abs().max()))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4 < errors[0]


def test_rows_of_iterations_start_from_the_x_t_that_the_step_left() -> None:
    table = encoding_table(PAPER, [10, 500], iterations=2)
    assert table.t.tolist() == [10, 10, 10, 10, 500, 500]
    assert table.memory.tolist() == [Memory.X_T, Memory.KEEP, Memory.KEEP] * 2
    assert not table.coefficients[:, 4].any()  # no noise
    assert len(encoding_table(PAPER, [10, 500], order=2)) == 2


def test_a_network_is_encoded_and_decoded() -> None:
    model = build_model()
    model.network.conv_out.weight.mul_(0.3)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels, steps = torch.tensor([0, 1, 2]), []
    given: dict[str, Any] = {"steps": 20, "class_label": labels, "dtype": torch.float32}
    errors = []
    for iterations in (0, 1, 8):
        x_T = encode(model, x, iterations=iterations, **given)
        errors.append((decode(model, x_T, **given) - x).square().mean().sqrt())
    assert errors[0] > errors[1] > errors[2]
    parts = encode(
        model, x, iterations=8, batch_size=2, on_step=lambda *step: steps.append(step[:2]), **given
    )
    torch.testing.assert_close(parts, x_T, rtol=0, atol=1e-4)
    assert steps[0] == (0, 1) and steps[-1] == (2, 20 * 9)
    second = decode(model, encode(model, x, order=2, **given), order=2, **given)
    assert (second - x).square().mean().sqrt() < errors[0]


def test_the_sphere_keeps_the_norm_of_noise() -> None:
    a, b = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 0.5, 1.0):
        mixed = slerp(a, b, share)
        expected = (1 - share) * a.norm() + share * b.norm()
        assert mixed.norm() == pytest.approx(float(expected), rel=0.05)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.7), a)


def test_each_pair_has_a_path_of_its_own() -> None:
    """Beside a pair that is parallel, opposite or nothing the others stay on the sphere."""
    a, b = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(a)
    pairs = [(a, b), (a, a), (a, -a), (nothing, b), (nothing, nothing), (b, a)]
    firsts, seconds = (torch.stack(ends) for ends in zip(*pairs, strict=True))
    together = slerp(firsts, seconds, 0.3)
    assert together.dtype == torch.float32 and together.isfinite().all()
    for (first, second), found in zip(pairs, together, strict=True):
        torch.testing.assert_close(found, slerp(first, second, 0.3), rtol=0, atol=0)
    torch.testing.assert_close(together[2], 0.4 * a)  # no plane to turn in


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"timesteps": [5, 4]}, "must be strictly ascending within 0..999"),
        ({"timesteps": [0, 1000]}, "must be strictly ascending"),
        ({"order": 3}, "order = 3: must be 1 or 2"),
        ({"iterations": -1}, "iterations = -1"),
        ({"order": 2, "iterations": 1}, "mend steps of order 1"),
    ],
)
def test_what_makes_no_table(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SamplerError, match=says):
        encoding_table(PAPER, **{"timesteps": [1, 2], **given})
    with pytest.raises(ValueError, match="its shape is"):
        encode(build_model(), torch.zeros(1, 8, 8))


def test_no_images_and_no_option_of_its_own() -> None:
    model, none = build_model(), torch.zeros(0, 1, 8, 8)
    with pytest.raises(ImagesError, match="x_start: holds no image"):
        encode(model, none)
    with pytest.raises(ImagesError, match="x_T: holds no image"):
        decode(model, none)
    with pytest.raises(TypeError, match=r"decode\(\) got an unexpected .*'iterations'"):
        decode(model, torch.zeros(1, 1, 8, 8), iterations=1)  # type: ignore[call-arg]


def test_guidance_is_checked_as_by_sample() -> None:
    model, x = build_model(), torch.zeros(1, 1, 8, 8)
    for walk in (encode, decode):
        with pytest.raises(SamplerError, match=r"guidance = 3.0: needs a class_label to guide"):
            walk(model, x, steps=10, guidance=3.0)
        assert walk(model, x, steps=10, guidance=3.0, class_label=1).isfinite().all()


def test_noise_may_not_be_drawn_twice_but_rows_without_may_share_a_place() -> None:
    table = encoding_table(PAPER, [10, 500], iterations=1)
    noisy = table.coefficients.copy()
    noisy[:, 4] = 0.1
    with pytest.raises(SamplerError, match="same purpose and place"):
        replace(table, coefficients=noisy)


@pytest.mark.slow
def test_there_and_back_on_the_shipped_model() -> None:
    """Images of its own: more than 40 dB with an iteration or second order, the less without."""
    model = diffusion.load(Path(__file__).parents[2] / "models" / "mnist")
    x = diffusion.sample(model, 2, sampler="ddim", steps=50, seed=1, class_label=[3, 7])

    def psnr(**options: Any) -> float:
        noise = encode(model, x, steps=100, dtype=torch.float32, **options)
        order = options.get("order", 1)
        back = decode(model, noise, steps=100, order=order, dtype=torch.float32)
        error = (back - x).square().flatten(1).mean(1)
        return float((10 * torch.log10(4 / error)).mean())

    plain, mended, second = psnr(iterations=0), psnr(iterations=1), psnr(order=2)
    assert 30 < plain < min(mended, second) - 6
    assert mended > 40 and second > 40
