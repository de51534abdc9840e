"""The parts of `ddpm evaluate` that ask a feature network what it thinks of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from training.bits import Chosen
from training.features import (
    Draw,
    FeatureError,
    Features,
    Looked,
    distance,
    identity,
    real,
    sampled,
)  # fmt: skip
from training.quality import Quality, Real, Way, aim_of, table, ways

if TYPE_CHECKING:
    from training.evaluate import Run


def frechet(run: Run, split: str, echo: Callable[[str], None]) -> dict[str, Any]:
    """Distance of samples to a split, beside that of as many images of the first split."""
    options, features, name = run.options, run.features, run.options.features
    assert features is not None and name is not None  # `check` opened them
    conditional = run.model.config.network.num_classes > 0
    chosen_of = {
        which: run.chosen(which, options.frechet_images, labelled=conditional)
        for which in dict.fromkeys((run.splits[0], split))
    }
    _check_enough(*chosen_of.items())
    found = {which: _look(run, features, chosen).features for which, chosen in chosen_of.items()}
    first = chosen_of[run.splits[0]]
    labels = first.batch(np.arange(len(first)))[1]
    way = run.model.config.sampling.options(
        run.model.schedule.T, sampler=options.sampler, steps=options.steps
    )
    samples = sampled(
        features,
        Draw(run.model, run.model.table(**way), len(first), options.seed, labels),
        width=found[split].shape[1],
        path=options.out / "partial" / "frechet.npz",
        key=run.key
        | {"features": identity(name), "sampler": options.sampler, "steps": way["steps"]}
        | {"seed": options.seed, "images": len(first)},
        batch_size=options.batch_size,
        progress=not options.quiet,
    ).features
    result: dict[str, Any] = {"features": name, "images": len(samples), "steps": way["steps"]}
    for which, values in found.items():
        result[f"samples_to_{which}"] = distance(samples, values)
        echo(f"Fréchet distance of samples to {which}: {result[f'samples_to_{which}']:.4f}")
    if len(found) == 2:
        a, b = found.values()
        result["real_to_real"] = distance(a, b)
    return result


def _check_enough(*sets: tuple[str, Chosen]) -> None:
    """Raise FeatureError for a set too small for a covariance, before anything is drawn."""
    for which, chosen in sets:
        if len(chosen) < 2:
            raise FeatureError(f"{which}: {len(chosen)} images: at least 2 are needed")


def _look(run: Run, features: Features, chosen: Chosen) -> Looked:
    device, batch_size = run.model.device, run.options.batch_size
    return real(features, chosen, device=device, batch_size=batch_size)


def quality(run: Run, echo: Callable[[str], None]) -> dict[str, Any]:
    """The table of samplers, spacings and steps: see `training.quality`."""
    options, features, name = run.options, run.features, run.options.features
    assert features is not None and name is not None  # the command asks for them
    conditional = run.model.config.network.num_classes > 0
    first, last = run.splits[0], run.splits[-1]
    others = run.chosen(first, options.quality_images, labelled=conditional)
    chosen = run.chosen(last, options.frechet_images)
    if first == last:  # halve it, so that no image is held against itself
        all_of_it = run.chosen(first, options.quality_images + options.frechet_images)
        n = min(options.quality_images, len(all_of_it) // 2)
        others = replace(others, indices=all_of_it.indices[:n])
        chosen = replace(chosen, indices=all_of_it.indices[n:])
    _check_enough((first, others), (last, chosen))
    reference = _look(run, features, chosen)
    judge = Quality(
        run.model,
        features,
        Real(reference.features, _look(run, features, others).features),
        labels=others.batch(np.arange(len(others)))[1],
        classifies=reference.labels is not None,
        seed=options.seed,
        folder=options.out / "partial",
        key=run.key | {"features": identity(name)},
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    aim = None
    if options.quality_against is not None:
        aim = aim_of(
            options.quality_against,
            {
                "data": options.data,
                "seed": options.seed,
                "features": options.features,
                "frechet_images": options.frechet_images,
            },
            splits=run.splits,
            images=len(others),
        )
    return table(judge, _cells(run)[aim is not None :], echo, aim=aim)


def _cells(run: Run) -> list[Way]:
    """What is asked for; of a consistency model, by default, its own sampler alone."""
    options, model, samplers = run.options, run.model, run.options.quality_samplers
    if not samplers and model.config.sampling.sampler == "consistency":
        samplers = ("consistency",)
    return ways(
        model.schedule.T,
        samplers,
        options.quality_spacings,
        options.quality_steps,
        tuned=tuple(model.tuned),
    )
