"""docs/against.md: what the code is held against, and how far it is from it at most.

Each line of the table is measured here, by the function of its name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch

import diffusion
from diffusion.bound import gaussian_kl
from diffusion.decoder import decoder_nats
from diffusion.diffusers.scheduler import read_scheduler
from diffusion.likelihood import likelihood, likelihood_x_t
from diffusion.noise import normal_table, philox
from diffusion.parameterization import coefficients_at
from diffusion.samplers import build_table
from diffusion.schedule import linear_schedule
from diffusion.table import update
from tests.diffusion.gaussian import GaussianDenoiser
from tests.diffusion.networks import build_model
from tests.diffusion.test_diffusers_chains import draw, model_of, our_chain, their_chain
from tests.diffusion.test_diffusers_networks import build, inputs, save_pipeline
from tests.diffusion.test_noise import KNOWN
from training.frechet import frechet_distance

PAGE = Path(__file__).parents[2] / "docs" / "against.md"


@cache
def hugging_face() -> Any:
    """diffusers, imported once: it takes seconds."""
    import diffusers

    return diffusers


def scheduler_chain(kind: str, **said: Any) -> float:
    theirs = getattr(hugging_face(), kind)(**said)
    process = read_scheduler({"_class_name": kind, **theirs.config}, "scheduler_config.json")
    config = diffusion.ModelConfig(
        diffusion.UNetConfig(8, 1, channels=(8,), attention=(False,), groups=4),
        process.schedule,
        process.prediction,
        sampling=process.sampling,
    )
    model = model_of(config)
    differences = [
        (our_chain(model, steps) - their_chain(theirs, steps, model)).abs().max()
        for steps in (7, 61, 250)
    ]
    return float(max(differences))


def ancestral_chain(folder: Path) -> float:
    return scheduler_chain(
        "DDPMScheduler", timestep_spacing="linspace", variance_type="fixed_small"
    )


def ddim_chain(folder: Path) -> float:
    return scheduler_chain("DDIMScheduler", timestep_spacing="trailing", set_alpha_to_one=True)


def solver_chain(
    kind: str, sampler: str, spacings: dict[str, dict[str, Any]], **said: Any
) -> float:
    """Whole chains, the same network asked at the same real times: theirs rounds those it tells.

    Its σ are in float32.
    """
    schedule, found = linear_schedule(), []
    denoiser = GaussianDenoiser(schedule, variance=0.25)

    def bent(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A smooth ε̂ that is no line."""
        return denoiser.eps(x, t) * (1 + 0.05 * torch.cos(2 * x))

    def read(x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        r_x, r_out, *_ = coefficients_at(schedule, "epsilon", t)[..., None, None, None]
        return r_x * x + r_out * eps

    for (spacing, theirs), steps in itertools.product(spacings.items(), (7, 20, 50)):
        scheduler = getattr(hugging_face(), kind)(**said, **theirs)
        scheduler.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        table = build_table(schedule, sampler=sampler, spacing=spacing, steps=steps, clip=False)
        x = wanted = draw(-1)
        prev = older = torch.zeros_like(x)
        for row, time in enumerate(table.time.tolist()):
            t = torch.full((len(x),), time, dtype=torch.float64)
            x_start = read(x, bent(x, t), t)
            rows = torch.from_numpy(table.coefficients)[row].expand(len(x), -1)
            x = update(rows, x, x_start=x_start, eps=x, x_start_prev=prev, z=x, x_start_older=older)
            prev, older = x_start, prev
            their_t = scheduler.timesteps[row]
            wanted = scheduler.step(bent(wanted, t), their_t, wanted).prev_sample
        found.append(float((x - wanted).abs().max()))
    return max(found)


def dpmpp_3m_chain(folder: Path) -> float:
    return solver_chain(
        "DPMSolverMultistepScheduler",
        "dpmpp_3m",
        {
            "trailing": {"timestep_spacing": "trailing"},
            "karras": {"use_karras_sigmas": True},
            "lambda": {"use_lu_lambdas": True},
        },
        solver_order=3,
    )


def unipc_chain(folder: Path) -> float:
    spacings: dict[str, dict[str, Any]] = {
        "trailing": {"timestep_spacing": "trailing"},
        "karras": {"use_karras_sigmas": True},
    }
    return solver_chain("UniPCMultistepScheduler", "unipc", spacings, final_sigmas_type="zero")


@torch.inference_mode()
def network(folder: Path) -> float:
    theirs = build(hugging_face(), "labels")
    save_pipeline(hugging_face(), theirs, folder)
    x, t, labels = inputs(theirs)
    wanted = theirs(x, t, labels).sample
    found = diffusion.load(folder).output(x, t, labels)
    return float((found - wanted).abs().max() / wanted.abs().max())


def gradient(folder: Path) -> float:
    """Along one direction of all weights, against a central difference, in float64."""
    model = build_model()
    net = model.network.double().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(2, 3, 1, 8, 8, generator=generator, dtype=torch.float64)
    t, label = torch.tensor([0, 50, 99]), torch.tensor([0, 1, 2])
    along = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().abs()
        for p in net.parameters()
    ]

    def loss() -> torch.Tensor:
        return (model.output(x, t, label) - wanted).square().mean()

    loss().backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(net.parameters(), along, strict=True))  # type: ignore[operator]
    h, values = 1e-6, []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, d in zip(net.parameters(), along, strict=True):
                p += step * d
            values.append(float(loss()))
    return abs((values[0] - values[1]) / (2 * h) / slope - 1)


def transition(folder: Path) -> float:
    """KL of Gaussians, over twelve orders of magnitude of their variances."""
    generator = torch.Generator().manual_seed(0)
    difference, log_q, log_p = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    log_q, log_p = 4 * log_q - 6, 4 * log_p - 6
    q = torch.distributions.Normal(difference, (log_q / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(difference), (log_p / 2).exp())
    wanted = torch.distributions.kl_divergence(q, p)
    return float(((gaussian_kl(difference, log_q, log_p) - wanted) / wanted).abs().max())


def decoder(folder: Path) -> float:
    """−ln of the mass of each grey level that has more than 10⁻¹² of it."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, deviation = 0.31, 0.02
    log_variance = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
    found = decoder_nats(levels, torch.tensor(mean, dtype=torch.float64), log_variance).numpy()
    normal = scipy.stats.norm(mean, deviation)
    low, high = normal.cdf(levels - 1 / 255), normal.cdf(levels + 1 / 255)
    upper = normal.sf(levels - 1 / 255) - normal.sf(levels + 1 / 255)
    mass = np.where(levels.numpy() > mean, upper, high - low)
    some = (mass > 1e-12) & (np.abs(levels.numpy()) < 1)
    return float(np.abs(found[some] + np.log(mass[some])).max())


def bits(folder: Path) -> float:
    """The terms L_1 … of a network, from the definitions in float64 by torch's distributions."""
    model = build_model()
    model.network.double().conv_out.weight.mul_(0.1)
    levels = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    x_start = levels.double() / 127.5 - 1
    found = likelihood(model, x_start, seed=1, variance="large")
    schedule, largest = model.schedule, 0.0
    zero = torch.zeros(2, dtype=torch.long)
    for k in (1, 2, 40, 99):
        t = torch.full((2,), k)
        x_t = likelihood_x_t(schedule, x_start, t, seeds=zero + 1, indices=torch.arange(2))
        beta, bar = schedule.betas[k], schedule.alphas_cumprod[k]
        before = schedule.alphas_cumprod[k - 1]
        eps = model.output(x_t, t)[:, :1]
        x_hat = ((x_t - (1 - bar) ** 0.5 * eps) / bar**0.5).clamp(-1, 1)
        own, other = before**0.5 * beta / (1 - bar), (1 - beta) ** 0.5 * (1 - before) / (1 - bar)
        variance = beta * (1 - before) / (1 - bar)
        q = torch.distributions.Normal(own * x_start + other * x_t, variance**0.5)
        p = torch.distributions.Normal(own * x_hat + other * x_t, beta**0.5)
        wanted = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
        largest = max(largest, float(((found.nats[:, k] - wanted) / wanted).abs().max()))
    return largest


def schedule_tables(folder: Path) -> float:
    """ᾱ and 1 − ᾱ of the paper's schedule, in rational arithmetic."""
    schedule, bar, largest = linear_schedule(), Fraction(1), 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        bar *= 1 - Fraction(beta)
        pairs = ((schedule.alpha_bar(t), bar), (schedule.one_minus_alpha_bar(t), 1 - bar))
        bar = Fraction(int(bar * 2**200), 2**200)  # so that it does not grow without end
        largest = max(largest, *(abs(float(Fraction(got) / want - 1)) for got, want in pairs))
    return largest


def normals(folder: Path) -> float:
    wanted = scipy.special.ndtri((np.arange(65536) + 0.5) / 65536)
    return float(np.abs(normal_table().double().numpy() - wanted).max())


def counters(folder: Path) -> float:
    found = [philox(tuple(map(torch.tensor, c)), tuple(map(torch.tensor, k))) for c, k, _ in KNOWN]
    wanted = [answer for _, _, answer in KNOWN]
    return float(np.abs(np.array([[int(w) for w in words] for words in found]) - wanted).max())


def frechet(folder: Path) -> float:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(500, 40)), 0.5 + 1.3 * generator.normal(size=(400, 40))
    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    square = np.square(a.mean(0) - b.mean(0)).sum()
    wanted = square + np.trace(sigma_a + sigma_b - 2 * root)
    return abs(frechet_distance(a, b) / wanted - 1)


MEASURED: dict[str, Callable[[Path], float]] = {
    f.__name__: f
    for f in (
        ancestral_chain, ddim_chain, dpmpp_3m_chain, unipc_chain, network, gradient, transition,
        decoder, bits, schedule_tables, normals, counters, frechet,
    )
}  # fmt: skip


def told() -> dict[str, float]:
    """Name → largest difference, as the page has them."""
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    lines = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) == 6]
    return {cells[3].strip("`"): float(cells[2]) for cells in lines if cells[3].startswith("`")}


def test_every_line_has_a_measurement() -> None:
    assert told().keys() == MEASURED.keys()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize("name", MEASURED)
def test_the_difference_is_no_more_than_the_page_says(name: str, tmp_path: Path) -> None:
    assert MEASURED[name](tmp_path) <= told()[name]
