"""Learning the tables of few evaluations, for one checkpoint: the mathematics of `ddpm tune`.

A student of K rows has K real times and coefficients of its own; what it makes of x_T is to be what
a fine solver, the teacher, makes of the same x_T. All is learned by back-propagation through the K
evaluations, the network staying as it is: the times as Tong et al. 2024 (LD3), the coefficients as
Frankel et al. 2025 (S4S). A table of few rows cannot follow the flow exactly; so x_T may move
within a small ball around its own, which asks for the teacher's image from *some* x_T nearby (LD3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import cores
from diffusion.model import Model
from diffusion.samplers import build_table
from diffusion.sampling import chain
from diffusion.schedule import Schedule
from diffusion.table import COLUMNS, SamplerTable
from diffusion.tuned import LEARNED, Tuned, from_dict

FIXED = [
    (sampler, spacing)
    for sampler in ("dpmpp_2m", "dpmpp_3m", "unipc")
    for spacing in ("uniform", "quadratic", "trailing", "lambda", "karras")
]


class Student(nn.Module):
    """A table of K rows as parameters, begun at a fixed one.

    times: gaps of λ between the rows, as logits of their shares of the whole. The rest are changes
    of the fixed table's weights: x ← keep·e^k·x + gain·Σ_j (w_j + ω_j) x̂_0,j, with keep and gain
    the exact ones of the times, so that a change of times alone stays on the flow of one image.
    """

    weights: Tensor
    first_keep: Tensor

    def __init__(self, schedule: Schedule, table: SamplerTable) -> None:
        super().__init__()
        self.levels = torch.tensor(schedule.half_log_snr)
        self.clip = float(table.coefficients[0, COLUMNS.index("clip")])
        ts = [*table.time.tolist(), -1.0]
        lambdas = np.array([schedule.lambda_at(t) for t in ts[:-1]])
        # The row after the last is the image: its λ is none of the network's.
        low, high = lambdas[0], schedule.half_log_snr[0]
        self.ends = (float(low), float(high))
        shares = np.append(np.diff(lambdas), high - lambdas[-1] + 1e-3)
        self.shares = nn.Parameter(torch.tensor(np.log(shares)))
        a, b, d, f = (table.coefficients[:, COLUMNS.index(name)] for name in LEARNED)
        keep, gain = self._flow(self.lambdas().detach())
        weights = np.stack([a, d, f], axis=1) / gain.numpy()[:, None]
        self.register_buffer("weights", torch.tensor(weights))
        self.register_buffer("first_keep", torch.tensor(b - keep.numpy()))
        self.change = nn.Parameter(torch.zeros(len(table), 3, dtype=torch.float64))
        self.keep = nn.Parameter(torch.zeros(len(table), dtype=torch.float64))

    def lambdas(self) -> Tensor:
        """λ of the rows, ascending from that of x_T; float64 [K]."""
        low, high = self.ends
        shares = torch.softmax(self.shares, 0) * (high - low)
        return low + torch.cumsum(torch.cat([shares.new_zeros(1), shares[:-1]]), 0)

    def times(self) -> Tensor:
        """The times of these λ, between the indices; float64 [K]."""
        lambdas, levels = self.lambdas(), self.levels
        index = torch.searchsorted(-levels, -lambdas.detach()).clamp(1, len(levels) - 1)
        below, above = levels[index - 1], levels[index]
        found = (index - 1) + (lambdas - below) / (above - below)
        return torch.cat([found.new_full((1,), len(levels) - 1), found[1:].clamp(0)])

    def rows(self) -> Tensor:
        """a, b, d and f of each row, float64 [K, 4]; the last lands on x̂_0 alone."""
        keep, gain = self._flow(self.lambdas())
        first = torch.ones_like(keep)
        first[-1] = 0.0
        b = (keep + self.first_keep) * torch.exp(self.keep) * first
        a, d, f = (gain[:, None] * (self.weights + self.change)).unbind(1)
        reach = torch.arange(len(a))  # there is nothing before the first row
        return torch.stack([a, b, d * (reach > 0), f * (reach > 1)], 1)

    def forward(self, model: Model, x: Tensor, labels: Tensor | None) -> Tensor:
        """The image of x_T [N, C, H, W], clipped. On a GPU all that the way back needs is kept; on
        a CPU, as a rule with less memory for an image, it is made again."""
        times, rows = self.times().to(x.device), self.rows().to(x.device, x.dtype)
        bound, again = self.clip, x.device.type == "cpu"
        prev = older = torch.zeros_like(x)
        for time, row in zip(times, rows, strict=True):

            def evaluate(x: Tensor, time: Tensor) -> Tensor:
                found = model.estimate(x, time.expand(len(x)), labels).x_start
                return found.clamp(-bound, bound) if math.isfinite(bound) else found

            x_start = (
                checkpoint(evaluate, x, time, use_reentrant=False, preserve_rng_state=False)
                if again
                else evaluate(x, time)
            )
            a, b, d, f = row
            x = a * x_start + b * x + d * prev + f * older
            prev, older = x_start, prev
        return x.clamp(-1, 1)

    def tuned(self, **figures: object) -> Tuned:
        """What was learned, as numbers."""
        with torch.no_grad():
            times, rows = self.times().tolist(), self.rows().tolist()
        return Tuned(
            tuple(times), tuple(map(tuple, rows)), clip=math.isfinite(self.clip), figures=figures
        )

    def _flow(self, lambdas: Tensor) -> tuple[Tensor, Tensor]:
        """√((1−ᾱ_s)/(1−ᾱ_t)) and √ᾱ_s (1 − e^{−h}) of each row; 0 and 1 to the image."""
        noise = torch.sigmoid(-2 * lambdas).sqrt()
        signal = torch.sigmoid(2 * lambdas).sqrt()
        keep, gain = noise[1:] / noise[:-1], signal[1:] * -torch.expm1(lambdas[:-1] - lambdas[1:])
        return torch.cat([keep, keep.new_zeros(1)]), torch.cat([gain, gain.new_ones(1)])


@dataclass(frozen=True, eq=False)
class Pairs:
    """x_T and what the teacher makes of it, float32 [N, C, H, W]; labels [N] or None."""

    x_T: Tensor
    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.x_T)

    def part(self, where: Tensor | slice) -> Pairs:
        """Some of them."""
        labels = None if self.labels is None else self.labels[where]
        return Pairs(self.x_T[where], self.images[where], labels)


@torch.no_grad()
def run(model: Model, table: SamplerTable, x: Tensor, labels: Tensor | None) -> Tensor:
    """What a deterministic table makes of x_T, clipped to [−1, 1]."""
    for step in chain(model, table, x, class_label=labels):
        x = step.x_next
    return x.clamp(-1, 1)


def best_fixed(model: Model, steps: int, held: Pairs) -> tuple[SamplerTable, str, float]:
    """The fixed table of so many rows nearest to the teacher, its name, and its RMSE."""
    clip, found = model.config.sampling.clip, []
    for sampler, spacing in FIXED:
        table = build_table(
            model.schedule, sampler=sampler, steps=steps, spacing=spacing, clip=clip
        )
        image = run(model, table, held.x_T, held.labels)
        found.append((rmse(image, held.images), f"{sampler}, {spacing}", table))
    error, name, table = min(found, key=lambda one: one[0])
    return table, name, error


def rmse(a: Tensor, b: Tensor) -> float:
    """Root of the mean square difference, of images in [−1, 1]."""
    return float((a - b).square().mean().sqrt())


@dataclass(frozen=True)
class Options:
    """iterations: Adam steps. batch: pairs a step. rate: of Adam. radius: of the ball around each
    x_T, of its norm."""

    iterations: int = 300
    batch: int = 16
    rate: float = 0.01
    radius: float = 0.05


class Tuner:
    """Learns one student; `state` and `restore` carry it over an interruption."""

    def __init__(
        self, model: Model, table: SamplerTable, pairs: Pairs, held: Pairs, options: Options
    ) -> None:
        self.model, self.pairs, self.held, self.options = model, pairs, held, options
        self.student = Student(model.schedule, table)
        self.moved = torch.zeros_like(pairs.x_T)  # of each x_T, within its ball
        self.optimizer = torch.optim.Adam(self.student.parameters(), options.rate)
        self.iteration = 0
        self.best_error, self.best = math.inf, self.student.tuned()

    def step(self) -> float:
        """One step of Adam; the mean square error before it."""
        options = self.options
        share = self.iteration / options.iterations
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate * (0.5 + 0.5 * math.cos(math.pi * share))
        generator = torch.Generator().manual_seed(self.iteration)
        where = torch.randperm(len(self.pairs), generator=generator)[: options.batch]
        part = self.pairs.part(where)
        moved = self.moved[where]
        loss, by_moved = self._backward(part, moved)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self._move(where, moved, by_moved)
        self.iteration += 1
        return loss

    def _backward(self, part: Pairs, moved: Tensor) -> tuple[float, Tensor]:
        """Set the student's gradients; the mean square error, and its gradient by `moved`.

        On a CPU the rows are dealt to the cores, each of which goes back through its own.
        """
        elements = part.images.numel()
        found = cores.dealt(
            len(part),
            lambda rows: self._slopes(part.part(rows), moved[rows], elements),
            device=moved.device,
            large=self.model.is_large,
        )
        losses, by_moved, slopes = zip(*found, strict=True)
        for parameter, *each in zip(self.student.parameters(), *slopes, strict=True):
            parameter.grad = torch.stack(each).sum(0)
        return sum(losses), torch.cat(by_moved)

    def _slopes(
        self, part: Pairs, moved: Tensor, elements: int
    ) -> tuple[float, Tensor, tuple[Tensor, ...]]:
        """Σ (image − teacher's)²/elements over some pairs; its gradients: by `moved`, the rest."""
        moved = moved.detach().requires_grad_()
        image = self.student(self.model, part.x_T + moved, part.labels)
        loss = (image - part.images).square().sum() / elements
        by_moved, *rest = torch.autograd.grad(loss, [moved, *self.student.parameters()])
        return float(loss.detach()), by_moved, tuple(rest)

    def _move(self, where: Tensor, moved: Tensor, by_moved: Tensor) -> None:
        """x_T a step down the loss, of a quarter of the radius, and back into the ball."""
        radius = self.options.radius * math.sqrt(moved[0].numel())
        slope = by_moved / by_moved.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        there = moved - 0.25 * radius * slope
        length = there.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        self.moved[where] = there * (radius / length).clamp(max=1.0)

    def judge(self) -> float:
        """RMSE to the teacher on the held-out x_T themselves; the best student is kept."""
        tuned = self.student.tuned()
        table = tuned.table(self.model.schedule.T)
        error = rmse(run(self.model, table, self.held.x_T, self.held.labels), self.held.images)
        if error < self.best_error:
            self.best_error, self.best = error, tuned
        return error

    def state(self) -> dict[str, object]:
        """All that `restore` needs."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "moved": self.moved.cpu(),
            "iteration": self.iteration,
            "best": self.best.to_dict(),
            "best_error": self.best_error,
        }

    def restore(self, state: dict[str, object]) -> None:
        """Go on from `state`."""
        self.student.load_state_dict(state["student"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.moved.copy_(state["moved"])  # type: ignore[arg-type]
        self.iteration = state["iteration"]  # type: ignore[assignment]
        self.best, self.best_error = from_dict(state["best"]), state["best_error"]  # type: ignore[arg-type, assignment]
