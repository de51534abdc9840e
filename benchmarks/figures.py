"""Draw docs/figures/*.png: the mathematics of the library against closed forms, without a network.

    .venv/bin/python benchmarks/figures.py [NAME ...]

Every figure takes seconds; see the function of its name for what it shows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from diffusion.bound import (
    Trajectories,
    bound_table,
    kl_terms,
    log_ratio_terms,
    transition_nats,
)
from diffusion.decoder import density_nats
from diffusion.forward import q_trajectory
from diffusion.langevin import annealed_langevin, with_correctors
from diffusion.learned_schedule import LearnedSchedule
from diffusion.multistep import dpmpp_2m
from diffusion.noise import Purpose, image_normals
from diffusion.samplers import ancestral, ddim
from diffusion.schedule import Schedule, linear_schedule
from diffusion.spacings import spaced_timesteps
from diffusion.table import SamplerTable
from diffusion.term_plan import schedule_proposal
from diffusion.theory.autoregressive import MaskingChain
from diffusion.theory.exact import (
    Mixture,
    distance_to_gaussian,
    gaussian_gap,
    gaussian_terms,
    output_variance,
    reverse_conditional,
    x_start_gain,
)
from diffusion.weights import eps_weight, min_snr_weight

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).resolve().parent.parent / "docs" / "figures"
PAPER = linear_schedule()
V = 0.25


def panels(count: int, titles: list[str]) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, 3.5), layout="constrained")
    for axis, title in zip(np.atleast_1d(axes), titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    return figure, axes


def bound_terms() -> Any:
    """Gaussian data: each term measured (dots) on its closed form; the gap closing as 1/T."""
    figure, (left, right) = panels(
        2, ["L$_{t-1}$ of N(0, ¼): closed form, measured", "bound − entropy, without row 0"]
    )
    table, n = bound_table(PAPER), 2000
    generator = torch.Generator().manual_seed(0)
    rows = np.unique(np.logspace(0, 3, 25).astype(int)) - 1
    for variance in ("large", "small"):
        left.plot(np.arange(2, 1001), gaussian_terms(PAPER, table, V, variance)[1:], label=variance)
        for row in rows[1:]:
            alpha_bar = PAPER.alpha_bar(int(row))
            x_start, eps = (torch.randn(2, n, 1, dtype=torch.float64, generator=generator)).unbind()
            x_start = x_start * math.sqrt(V)
            x_t = math.sqrt(alpha_bar) * x_start + math.sqrt(1 - alpha_bar) * eps
            nats = transition_nats(
                table,
                torch.full((n,), int(row)),
                x_start=x_start,
                x_start_hat=float(x_start_gain(PAPER, V)[row]) * x_t,
                log_variance=torch.tensor(table.log_variance(variance)[row]),
            )
            left.plot(row + 1, float(nats.mean()), "k.", markersize=4)
    left.set(xscale="log", yscale="log", xlabel="t", ylabel="nats a dimension")
    left.legend(title="σ²")
    steps = [30, 100, 300, 1000]
    for variance in ("large", "small"):
        gaps = []
        for T in steps:
            bars = 1 / (1 + np.exp(np.linspace(-6, 6, T)))
            schedule = Schedule(1 - bars / np.append(1.0, bars[:-1]))
            gaps.append(gaussian_gap(schedule, bound_table(schedule), V, variance)[1:].sum())
        right.loglog(steps, gaps, "o-", label=variance)
    right.loglog(steps, gaps[0] * steps[0] / np.array(steps), "k:", label="1/T")
    right.set(xlabel="T", ylabel="nats a dimension")
    right.legend()
    return figure


def two_forms() -> Any:
    """Equations 3 and 5 term by term: the same mean, the second with less spread."""
    schedule, n = linear_schedule(50, 1e-3, 0.25), 20_000
    generator = torch.Generator().manual_seed(1)
    x_start = math.sqrt(V) * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    keys: dict[str, Any] = {"seeds": torch.full((n,), 7), "indices": torch.arange(n)}
    xs = torch.stack([x_start, *(x for _, x in q_trajectory(schedule, x_start, **keys))])
    hats = 0.9 * torch.from_numpy(x_start_gain(schedule, V))[:, None, None] * xs[1:]
    chain = Trajectories(schedule, xs, hats, "large", density_nats)
    figure, (left, right) = panels(
        2, ["difference of their means, in standard errors", "standard deviation of each term"]
    )
    t = np.arange(2, 51)
    ratio, kl = log_ratio_terms(chain)[1:-1], kl_terms(chain)[1:-1]
    difference = ratio - kl
    left.plot(t, difference.mean(1) / difference.std(1) * math.sqrt(n), "k.")
    left.axhspan(-2, 2, alpha=0.15)
    left.set(xlabel="t", ylim=(-5, 5))
    right.semilogy(t, ratio.std(1), label="log ratio (eq. 3)")
    right.semilogy(t, kl.std(1), label="KL (eq. 5)")
    right.set(xlabel="t", ylabel="nats")
    right.legend()
    return figure


def reverse_limit() -> Any:
    """The reverse conditional of a 1-D mixture turns Gaussian as β falls (section 2)."""
    previous = Mixture(np.array([0.6, 0.4]), np.array([-0.7, 0.8]), np.array([0.08, 0.12]))
    betas = np.geomspace(0.4, 1e-3, 12)
    x_t = 0.05
    figure, axes = panels(3, ["q(x$_{t-1}$|x$_t$), β = 0.4", "β = 0.02", "KL to a Gaussian"])
    for axis, beta in ((axes[0], 0.4), (axes[1], 0.02)):
        x, density = conditional(previous, x_t, beta, 5)
        mean = np.trapezoid(x * density, x)
        variance = np.trapezoid((x - mean) ** 2 * density, x)
        normal = np.exp(-0.5 * (x - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
        axis.plot(x, density, label="true")
        axis.plot(x, normal, "--", label="Gaussian, same moments")
        axis.set(xlabel="x$_{t-1}$")
        axis.legend(fontsize=8)
    for name, fixed in (("nearest Gaussian", False), ("N(μ, β)", True)):
        kls = [
            distance_to_gaussian(*conditional(previous, x_t, b, 14)[::-1], b if fixed else None)[0]
            for b in betas
        ]
        axes[2].loglog(betas, kls, "o-", markersize=3, label=name)
    axes[2].set(xlabel="β", ylabel="nats")
    axes[2].legend()
    return figure


def conditional(
    previous: Mixture, x_t: float, beta: float, width: float
) -> tuple[np.ndarray, np.ndarray]:
    centre, half = x_t / math.sqrt(1 - beta), width * math.sqrt(beta / (1 - beta))
    x = np.linspace(centre - half, centre + half, 8001)
    return x, reverse_conditional(previous, x_t, beta, x)


def weights() -> Any:
    """What each objective makes of ‖ε − ε_θ‖² at t, and where evaluation draws its t."""
    figure, (left, right) = panels(2, ["weight of ‖ε − ε$_θ$‖²", "probability of t in evaluation"])
    t = np.arange(1, 1001)
    for name, values in (
        ("L, σ² large", eps_weight(PAPER, "large")),
        ("L, σ² small", eps_weight(PAPER, "small")),
        ("L$_{simple}$", np.ones(1000)),
        ("min-SNR-5", min_snr_weight(PAPER) / PAPER.snr),
    ):
        left.loglog(t, values, label=name)
    left.set(xlabel="t")
    left.legend(fontsize=8)
    right.loglog(t[1:], schedule_proposal(bound_table(PAPER))[1:])
    right.set(xlabel="t")
    return figure


def samplers_converge() -> Any:
    """Variance of samples of N(0, ¼), exact denoiser: every sampler tends to the data's."""
    figure, (left, right) = panels(
        2, ["|variance/v − 1| over steps", "Langevin: as c·K grows, c = 0.4, 0.2, 0.1"]
    )
    steps = [10, 20, 50, 100, 200, 500, 1000]
    tables: dict[str, Callable[[list[int]], SamplerTable]] = {
        "ancestral, small": partial(ancestral, PAPER, variance="small", clip=False),
        "ancestral, large": partial(ancestral, PAPER, variance="large", clip=False),
        "DDIM": partial(ddim, PAPER, clip=False),
        "DPM-Solver++(2M)": partial(dpmpp_2m, PAPER, clip=False),
        "ancestral, small + 2 correctors": lambda ts: with_correctors(
            ancestral(PAPER, ts, variance="small", clip=False), PAPER, steps=2
        ),
    }
    for name, build in tables.items():
        errors = [relative_error(build(spaced_timesteps(1000, k, "quadratic"))) for k in steps]
        left.loglog(steps, errors, "o-", markersize=3, label=name)
    left.set(xlabel="steps (quadratic spacing)")
    left.legend(fontsize=7)
    levels = spaced_timesteps(1000, 100, "quadratic")
    for c in (0.4, 0.2, 0.1):
        counts = [2, 5, 10, 20, 50]
        errors = [
            relative_error(annealed_langevin(PAPER, levels, corrector_steps=k, c=c, clip=False))
            for k in counts
        ]
        right.loglog(c * np.array(counts), errors, "o-", markersize=3, label=f"c = {c}")
    right.set(xlabel="c·K, the time at each of 100 levels")
    right.legend()
    return figure


def relative_error(table: SamplerTable) -> float:
    return abs(output_variance(table, PAPER, V) / V - 1)


# Ten digits of 3×5 pixels, a number a row: 7 is a full row, 5 its two ends.
GLYPHS = (75557, 26227, 71747, 71717, 55711, 74717, 74757, 71222, 75757, 75717)
POINTS = np.array([[int(bit) for row in str(g) for bit in f"{int(row):03b}"] for g in GLYPHS])


def autoregressive() -> Any:
    """Ten 3×5 digits, decoded pixel by pixel (T = D = 15 masks) and by Gaussian diffusion.

    Above: the masking chain of section 4.3, whose bound is its log-likelihood. Below: x̂_0 of the
    exact denoiser of the same ten images, coarse to fine.
    """
    chain = MaskingChain(noisy_joint(POINTS, flip=0.01))
    uniforms = np.random.Generator(np.random.Philox(key=4)).random((3, chain.D))
    masked = chain.sample(uniforms)  # [16, 3, 15]
    shown = [0, 2, 4, 6, 8, 10, 12, 13, 14, 15]
    upper = [np.where(masked[i] == chain.mask, 0.5, masked[i]) for i in shown]
    lower = progressive(2.0 * POINTS - 1, columns=len(shown))
    figure, axes = plt.subplots(6, len(shown), figsize=(6, 6.6))
    for j in range(len(shown)):
        for i in range(3):
            axes[i, j].imshow(upper[j][i].reshape(5, 3), cmap="gray", vmin=0, vmax=1)
            axes[3 + i, j].imshow(lower[j][i].reshape(5, 3), cmap="gray", vmin=-1, vmax=1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.03, top=0.95, wspace=0.1)
    figure.text(0.02, 0.965, "autoregressive decoding: one pixel a step")
    figure.text(0.02, 0.475, "Gaussian diffusion: x̂$_0$(x$_t$) as t falls")
    for axis in axes[3:].flat:
        box = axis.get_position()
        axis.set_position([box.x0, box.y0 - 0.02, box.width, box.height])
    return figure


def noisy_joint(points: np.ndarray, flip: float) -> np.ndarray:
    """The mixture of the points with each bit flipped independently, [2] * D."""
    dims = points.shape[1]
    joint = np.zeros((2,) * dims)
    for point in points:
        part = np.ones(())
        for bit in point:
            part = np.multiply.outer(part, np.where(np.arange(2) == bit, 1 - flip, flip))
        joint += part / len(points)
    return joint / joint.sum()


def progressive(points: np.ndarray, columns: int) -> list[np.ndarray]:
    """x̂_0 = Σ softmax(−‖x_t − √ᾱ_t x_i‖²/2(1−ᾱ_t)) x_i along three ancestral chains."""
    table = ancestral(PAPER, range(999, -1, -1), variance="small", clip=False)
    indices, dims = torch.arange(3), points.shape[1]
    x = image_normals(3, indices, row=0, purpose=Purpose.X_T, shape=(dims,)).double().numpy()
    kept = []
    for t, numbers in zip(table.t.tolist(), table.coefficients, strict=True):
        alpha_bar, rest = PAPER.alpha_bar(t), PAPER.one_minus_alpha_bar(t)
        square = ((x[:, None] - math.sqrt(alpha_bar) * points) ** 2).sum(-1) / (2 * rest)
        share = np.exp(square.min(1, keepdims=True) - square)
        x_start = share @ points / share.sum(1, keepdims=True)
        kept.append(x_start)
        z = image_normals(3, indices, row=t, purpose=Purpose.STEP, shape=(dims,)).numpy()
        a, b, _, c, _ = numbers[1:]
        x = a * x_start + b * x + c * z
    last = len(kept) - 1
    return [kept[i] for i in np.linspace(0, last, columns).round().astype(int)]


def learned_forward() -> Any:
    """The ten digits in T = 10 steps, exact denoiser: γ trained through the bound.

    No code of them takes less than log₂(10)/15 bits/dim.
    """
    T, repeats = 10, 20
    points = torch.from_numpy(2.0 * POINTS - 1)
    process = LearnedSchedule(linear_schedule(T, 0.01, 0.6))
    start = -process.gammas().detach()
    optimizer = torch.optim.Adam(process.parameters(), lr=0.02)
    # The same noise at every step: what is left to see is the descent.
    x_start = points.repeat(T * repeats, 1)
    t = torch.arange(T).repeat_interleave(len(points)).repeat(repeats)
    eps = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0)).double()
    bounds = []
    for _ in range(300):
        x_t = process.q_sample(x_start, t, eps)
        gamma = process.gammas()[t][:, None]
        signal, noise = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        square = (x_t[:, None] - signal[..., None] * points).square().sum(-1)
        x_start_hat = torch.softmax(-square / (2 * noise**2), dim=1) @ points
        eps_hat = (x_t - signal * x_start_hat) / noise
        terms = process.terms(x_start=x_start, x_t=x_t, t=t, eps=eps, eps_hat=eps_hat, large=1.0)
        loss = (T * terms.mean() + process.prior(points).mean()) / (15 * math.log(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.append(loss.item())
    figure, (left, right) = panels(2, ["bits/dim while γ is trained", "ln SNR$_t$"])
    left.plot(bounds)
    left.axhline(math.log2(10) / 15, color="k", linestyle=":", label="log$_2$(10)/15")
    left.set(xlabel="step of Adam", ylim=(0, None))
    left.legend()
    right.plot(np.arange(1, T + 1), start, "o-", label="linear β")
    right.plot(np.arange(1, T + 1), -process.gammas().detach(), "o-", label="learned")
    right.set(xlabel="t")
    right.legend()
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        bound_terms,
        two_forms,
        reverse_limit,
        weights,
        samplers_converge,
        autoregressive,
        learned_forward,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names or list(FIGURES)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        parser.error(f"no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names:
        figure = FIGURES[name]()
        figure.savefig(OUT / f"{name}.png", dpi=110)
        plt.close(figure)
        print(OUT / f"{name}.png")


if __name__ == "__main__":
    main()
