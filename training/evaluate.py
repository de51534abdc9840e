"""`ddpm evaluate`: bits/dim by term, rate–distortion, reconstructions, Fréchet distance.

Everything goes into one folder: results.json, the pictures, and partial/ with the numbers of every
network call, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.checkpoint import load
from diffusion.device import pick_device
from diffusion.files import write_json
from diffusion.likelihood import check_variance
from diffusion.model import Model
from diffusion.speed import fast_dtype, prepare
from training.bits import Chosen, Measured, choose, mean_and_error, measure
from training.config import DataConfig
from training.data import Images
from training.features import Features, load_features
from training.judged import frechet, quality
from training.plots import plot_progressive, plot_rate_distortion, plot_terms
from training.precision import DtypeCost, dtype_cost
from training.progressive import progressive_reconstructions
from training.rate_distortion import markdown, paper_steps, rate_distortion
from training.splits import ALL, default_splits, load_split

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line asks for; see `training.evaluate_command`."""

    model: Path
    data: str
    out: Path
    splits: tuple[str, ...]
    images: int
    monte_carlo: int
    samples: int
    decoder_draws: int | None
    variance: str | None
    labelled: bool
    seed: int
    fit: str
    image_column: str
    label_column: str
    features: str | None
    frechet_images: int
    quality: bool
    quality_images: int
    quality_samplers: tuple[str, ...]
    quality_spacings: tuple[str, ...]
    quality_steps: tuple[int, ...]
    quality_against: Path | None
    sampler: str | None
    steps: int | None
    pictures: int
    device: str | None
    dtype: str
    compiled: bool
    batch_size: int
    quiet: bool


def evaluate(options: EvaluateOptions, echo: Callable[[str], None]) -> dict[str, Any]:
    """Run everything that is asked for, write it to options.out, return results.json's content.

    echo: gets a line for each result. Raises ValueError (bad options, data, partial results of
    another run) and OSError.
    """
    loaded = load(options.model, pick_device(options.device))
    variance = check_variance(loaded, options.variance)
    dtype = DTYPES.get(options.dtype) or fast_dtype(loaded)
    run = Run(options, loaded, variance)
    run.check()
    cost = run.dtype_cost(dtype)
    if cost is not None:
        echo(str(cost))
        if cost.too_much and options.dtype != "auto":
            raise ValueError(f"--dtype {options.dtype}: {cost}; use --dtype fp32")
        dtype = torch.float32 if cost.too_much else dtype
    run.use(dtype)
    results: dict[str, Any] = {
        "model": str(options.model),
        "digest": loaded.digest,
        "data": options.data,
        "T": loaded.schedule.T,
        "dims": run.dims,
        "dims_unpadded": run.dims_unpadded,
        "variance": variance,
        "seed": options.seed,
        "features": options.features,
        "frechet_images": options.frechet_images,
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_cost": None if cost is None else cost.to_dict(),
        "torch": torch.__version__,
        "splits": {},
    }
    fulls: dict[str, Measured] = {}
    for split in run.splits:
        results["splits"][split] = run.bits(split, fulls, echo)
    last = run.splits[-1]
    if fulls:
        results["rate_distortion"] = run.curves(fulls, last, echo)
    run.progressive(last)
    if options.quality:
        results["quality"] = quality(run, echo)
    elif options.features is not None:
        results["frechet"] = frechet(run, last, echo)
    write_json(results, options.out / "results.json")
    return results


class Run:
    """One evaluation of one model: the parts of `evaluate`, in their order."""

    def __init__(self, options: EvaluateOptions, model: Model, variance: str) -> None:
        self.options, self.model, self.variance = options, model, variance
        learned = model.config.network.learned_variance
        fixed = ("large", "small")
        self.variances = (
            variance,
            *(s for s in (*fixed, "learned")[: 2 + learned] if s != variance),
        )
        self.dims = int(np.prod(model.shape))
        crop = model.config.crop
        self.dims_unpadded = model.shape[0] * crop[0] * crop[1] if crop else self.dims
        # A network without a "no label" label is asked with the images' own.
        network = model.config.network
        self.labelled = options.labelled or (network.num_classes > 0 and not network.null_class)
        self.splits = options.splits or default_splits(options.data)
        self._loaded: dict[str, Images] = {}
        self.features: Features | None = None
        self.key = {"digest": model.digest, "labelled": self.labelled}

    def use(self, dtype: torch.dtype) -> None:
        """Evaluate in this format from now on."""
        self.model = prepare(self.model, dtype=dtype, compile=self.options.compiled)
        self.key["dtype"] = str(dtype)

    def dtype_cost(self, dtype: torch.dtype) -> DtypeCost | None:
        """What a format moves bits/dim by; None where there is nothing to ask."""
        planned = max(self.options.images, self.options.monte_carlo)
        if dtype == torch.float32 or not planned:
            return None
        return dtype_cost(
            self.model,
            dtype,
            self.chosen(self.splits[0], planned),
            seed=self.options.seed,
            variance=self.variance,
            batch_size=self.options.batch_size,
        )

    def check(self) -> None:
        """Open all that is asked for, before anything is computed. Raises DataError, FeatureError.

        Every picture of every split is decoded once here.
        """
        for split in self.splits:
            self._loaded[split] = self._load(split)
        if self.options.features is not None:
            self.features = load_features(self.options.features, self.model.device)

    def chosen(self, split: str, n: int, *, labelled: bool | None = None) -> Chosen:
        """n images of a split, shuffled by the seed."""
        labelled = self.labelled if labelled is None else labelled
        return choose(self._loaded[split], n, seed=self.options.seed, labelled=labelled)

    def _load(self, split: str) -> Images:
        options = self.options
        fit = options.fit if options.fit != "auto" else "pad" if self.model.config.crop else "error"
        data = {
            "source": options.data,
            "split": split if options.splits or split != ALL else None,
            "fit": fit,
            "image_column": options.image_column,
            "label_column": options.label_column,
        }
        labelled = self.labelled or options.features is not None  # samples are drawn by label
        config = DataConfig.model_validate(data)
        return load_split(config, self.model, labelled=labelled, progress=not options.quiet)

    def bits(
        self, split: str, fulls: dict[str, Measured], echo: Callable[[str], None]
    ) -> dict[str, Any]:
        """Bits/dim of a split: the full sum (kept in `fulls`) and the Monte Carlo estimate."""
        options = self.options
        found: dict[str, Any] = {}
        for name, n, samples in (
            ("full", options.images, None),
            ("monte_carlo", options.monte_carlo, options.samples),
        ):
            if not n:
                continue
            measured = measure(
                self.model,
                self.chosen(split, n),
                variances=self.variances,
                seed=options.seed,
                samples=samples,
                decoder_draws=options.decoder_draws,
                path=options.out / "partial" / f"{split}-{name}.npz",
                key=self.key | {"split": split},
                batch_size=options.batch_size,
                progress=not options.quiet,
            )
            found[name] = self.summary(measured)
            if samples is None:
                fulls[split] = measured
                found[name]["terms"] = terms_of(measured, self.variance)
            echo(f"{split}, {name.replace('_', ' ')}: {describe(found[name], self.variance)}")
        return found

    def summary(self, measured: Measured) -> dict[str, Any]:
        """Means and standard errors in bits/dim, for each choice of σ²."""
        out: dict[str, Any] = {
            "images": len(measured.prior),
            "evaluations_an_image": measured.plan.row.shape[1],
            "L_T": float(measured.prior_bits().mean()),
        }
        for variance in self.variances:
            mean, error = mean_and_error(measured.bits_per_dim(variance))
            decoder = float(measured.decoder_bits(variance).mean())
            out[variance] = {
                "bits_per_dim": mean,
                "standard_error": error,
                "bits_per_unpadded_dim": mean * self.dims / self.dims_unpadded,
                "L_0": decoder,
                "L_1_to_T-1": mean - decoder - out["L_T"],
            }
        return out

    def curves(
        self, fulls: dict[str, Measured], split: str, echo: Callable[[str], None]
    ) -> list[dict[str, float]]:
        """Plot the terms of all splits and the rate–distortion curve of one; returns its table."""
        out = self.options.out
        lines = {
            f"{name}, σ² {variance}": full.term_bits(variance).mean(0)
            for name, full in fulls.items()
            for variance in self.variances
        }
        plot_terms(lines, out / "terms.png")
        curve = rate_distortion(fulls[split], self.variance)
        plot_rate_distortion(curve, out / "rate_distortion.png")
        rows = curve.at(paper_steps(self.model.schedule.T))
        echo(f"\nrate and distortion, {split}, σ² {self.variance}:\n{markdown(rows)}")
        return rows

    def progressive(self, split: str) -> None:
        """Draw progressive.png for a few images of a split."""
        options = self.options
        if not options.pictures:
            return
        chosen = self.chosen(split, options.pictures)
        found = progressive_reconstructions(self.model, chosen, seed=options.seed)
        plot_progressive(found, options.out / "progressive.png")


def terms_of(measured: Measured, variance: str) -> dict[str, list[float]]:
    """The table of L_{t−1} over t = 1..T, with standard errors, in bits/dim."""
    bits = measured.term_bits(variance)
    columns = [mean_and_error(column) for column in bits.T]
    return {
        "t": list(range(1, bits.shape[1] + 1)),
        "bits_per_dim": [mean for mean, _ in columns],
        "standard_error": [error for _, error in columns],
    }


def describe(summary: dict[str, Any], variance: str) -> str:
    """One line of a summary."""
    found = summary[variance]
    error = found["standard_error"]
    told = f"{error:.4f}" if math.isfinite(error) else "?"  # of a single image
    return (
        f"{found['bits_per_dim']:.4f} ± {told} bits/dim on "
        f"{summary['images']} images (L_T {summary['L_T']:.5f}, L_1..L_T−1 "
        f"{found['L_1_to_T-1']:.4f}, L_0 {found['L_0']:.4f}; σ² {variance})"
    )
