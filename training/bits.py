"""Bits/dim of a data set: the bound of many images, batched and resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from diffusion.bound import BoundTable, bits_per_dim, bound_table, prior_nats
from diffusion.likelihood import evaluate_output, noised_output
from diffusion.model import Model
from diffusion.schedule import Float64
from diffusion.term_plan import Plan, full_plan, monte_carlo_plan
from training.data import Images
from training.partial import PartialArrays

_BLOCK = 256  # images at once, while nothing is computed


@dataclass(frozen=True, eq=False)
class Chosen:
    """Images of a set: their positions in it (which key their noise), and how to get them."""

    images: Images
    indices: NDArray[np.int64]
    labelled: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def digest(self) -> str:
        """SHA-256 of all that numbers of these images depend on: which they are, pixels, labels."""
        found = hashlib.sha256(self.indices.tobytes())
        for first in range(0, len(self), _BLOCK):
            pixels, labels = self.images.batch(torch.from_numpy(self.indices[first:][:_BLOCK]))
            found.update(pixels.numpy().tobytes())
            if self.labelled:
                found.update(labels.numpy().tobytes())
        return found.hexdigest()

    def batch(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """x_0 [B, C, H, W] in [−1, 1] of these of the chosen images, and labels if wanted."""
        distinct, back = np.unique(which, return_inverse=True)
        pixels, labels = self.images.batch(torch.from_numpy(self.indices[distinct]))
        x_start = (pixels.float() / 127.5 - 1)[torch.from_numpy(back)]
        return x_start, labels[torch.from_numpy(back)] if self.labelled else None


def choose(images: Images, n: int, *, seed: int, labelled: bool = False) -> Chosen:
    """n images in an order shuffled by the seed: sets are often sorted. All, if n is more."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(images))
    return Chosen(images, order[:n].astype(np.int64), labelled)


@dataclass(frozen=True, eq=False)
class Measured:
    """The bound of N images, K terms each: see `diffusion.term_plan`.

    nats: for each σ², [N, K]; squared_error: of x̂_0, mean over the dimensions, [N, K];
    prior: L_T, [N]; dims: D.
    """

    plan: Plan
    prior: Float64
    nats: dict[str, Float64]
    squared_error: Float64
    dims: int

    def bits_per_dim(self, variance: str) -> Float64:
        """(L_T + … + L_0)/(D ln 2) of each image, [N]."""
        total = self.prior + (self.nats[variance] * self.plan.weight).sum(1)
        return self._bits(total)

    def decoder_bits(self, variance: str) -> Float64:
        """L_0 in bits/dim, [N]."""
        first = self.plan.row == 0
        return self._bits((self.nats[variance] * np.where(first, self.plan.weight, 0)).sum(1))

    def term_bits(self, variance: str) -> Float64:
        """Terms L_0 … L_{T−1} of a full sum in bits/dim, [N, T]."""
        return self._bits(self.nats[variance])

    def prior_bits(self) -> Float64:
        """L_T in bits/dim, [N]."""
        return self._bits(self.prior)

    def _bits(self, nats: Float64) -> Float64:
        bits: Float64 = bits_per_dim(torch.from_numpy(nats), self.dims).numpy()
        return bits


def mean_and_error(values: Float64) -> tuple[float, float]:
    """Mean over the images and its standard error; infinite for a single image."""
    n = len(values)
    error = float(values.std(ddof=1)) / n**0.5 if n > 1 else float("inf")
    return float(values.mean()), error


def plan_for(
    table: BoundTable,
    chosen: Chosen,
    *,
    seed: int,
    samples: int | None,
    decoder_draws: int | None = None,
) -> Plan:
    """The full sum (samples = None), or `samples` evaluations an image."""
    if samples is None:
        return full_plan(table, len(chosen))
    indices = torch.from_numpy(chosen.indices)
    return monte_carlo_plan(
        table, seed=seed, indices=indices, samples=samples, decoder_draws=decoder_draws
    )


@torch.inference_mode()
def measure(
    model: Model,
    chosen: Chosen,
    *,
    variances: Sequence[str],
    seed: int,
    samples: int | None,
    path: Path,
    key: dict[str, Any],
    decoder_draws: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Measured:
    """Evaluate the planned terms of the chosen images, keeping what is done in `path`.

    variances: choices of σ², all computed from the same network calls; samples, decoder_draws: as
    in `plan_for`; key: what else the numbers depend on. Raises PartialError if `path` is of another
    run.
    """
    table = bound_table(model.schedule)
    plan = plan_for(table, chosen, seed=seed, samples=samples, decoder_draws=decoder_draws)
    own = {
        "seed": seed,
        "samples": samples,
        "decoder_draws": int((plan.row[0] == 0).sum()),
        "images": chosen.digest(),
        "sigmas": list(variances),
    }
    shapes = dict.fromkeys((*variances, "squared_error"), plan.row.shape)
    partial = PartialArrays(path, shapes, key | own)
    left, columns = partial.missing(), plan.row.shape[1]
    bar = tqdm(
        total=plan.row.size,
        initial=plan.row.size - len(left),
        desc=path.stem,
        unit="eval",
        disable=not progress,
    )
    with bar, partial.saved() as save_now_and_then:
        for first in range(0, len(left), batch_size):
            flat = left[first : first + batch_size]
            image, draw = flat // columns, flat % columns
            found = _evaluate(model, table, plan, chosen, (image, draw), seed, variances)
            for name, values in found.items():
                partial.arrays[name][image, draw] = values.cpu().numpy()
            bar.update(len(flat))
            save_now_and_then()
    arrays = dict(partial.arrays)
    squared_error = arrays.pop("squared_error")
    dims = int(np.prod(model.shape))
    return Measured(plan, _priors(model, chosen), arrays, squared_error, dims)


def _evaluate(
    model: Model,
    table: BoundTable,
    plan: Plan,
    chosen: Chosen,
    where: tuple[NDArray[np.int64], NDArray[np.int64]],
    seed: int,
    variances: Sequence[str],
) -> dict[str, Tensor]:
    """Nats of each choice of σ², and the squared error, [B], from one network call."""
    device = model.device
    x_start, labels = chosen.batch(where[0])
    x_start = x_start.to(device)
    row = torch.from_numpy(plan.row[where]).to(device)
    x_t, out = noised_output(
        model,
        table,
        row=row,
        x_start=x_start,
        seed=seed,
        indices=torch.from_numpy(chosen.indices[where[0]]).to(device),
        repeat=torch.from_numpy(plan.repeat[where]).to(device),
        class_label=None if labels is None else labels.to(device),
    )
    found: dict[str, Tensor] = {}
    for variance in variances:
        evaluation = evaluate_output(
            model, table, row=row, x_start=x_start, x_t=x_t, out=out, variance=variance
        )
        found[variance] = evaluation.nats
        found["squared_error"] = evaluation.squared_error
    return found


def _priors(model: Model, chosen: Chosen) -> Float64:
    """L_T of each image, [N]; a thousand at a time."""
    blocks = np.array_split(np.arange(len(chosen)), -(-len(chosen) // 1000))
    parts = [prior_nats(model.schedule, chosen.batch(block)[0]).numpy() for block in blocks]
    prior: Float64 = np.concatenate(parts)
    return prior
