"""The offline command `ddpm evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from training.options import COMPILE, COUNT, PATH, POSITIVE, THREADS, find_model, numbers_of

# What is heeded only beside another option.
BESIDE = {
    "features": ("quality", "frechet_images", "sampler", "steps"),
    "quality": (
        "quality_images", "quality_samplers", "quality_spacings", "quality_steps",
        "quality_against",
    ),
    "monte_carlo": ("samples", "decoder_draws"),
}  # fmt: skip


@click.command()
@click.argument("model")
@click.argument("data")
@click.option("--out", type=PATH, help="Folder; default runs/evaluate- and the model's name.")
@click.option("--splits", help="Such as train,test; the last is plotted. Default: see below.")
@click.option(
    "--images", default=256, show_default=True, type=COUNT, help="For the sum over all t."
)
@click.option("--monte-carlo", default=0, show_default=True, type=COUNT, help="For sampled t.")
@click.option("--samples", default=20, show_default=True, type=POSITIVE, help="Of t, an image.")
@click.option("--decoder-draws", type=POSITIVE, help="Of L_0 among these; default a sixth, ≥ 2.")
@click.option(
    "--variance", help="σ²: large, small or learned; default learned if the network has it."
)
@click.option("--sigma", hidden=True)
@click.option("--labelled", is_flag=True, help="Bits/dim given the label, p(x_0|y).")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**53 - 1),
    help="Of the choice of images and the noise.",
)
@click.option("--fit", default="auto", type=click.Choice(["auto", "error", "pad", "resize"]))
@click.option("--image-column", default="image", show_default=True)
@click.option("--label-column", default="label", show_default=True)
@click.option("--features", help="For the Fréchet distance: a TorchScript file, or inception.")
@click.option("--frechet-images", default=10_000, show_default=True, type=click.IntRange(min=2))
@click.option("--quality", is_flag=True, help="Not one Fréchet distance, but a table of samplers.")
@click.option("--quality-images", default=2000, show_default=True, type=click.IntRange(min=2))
@click.option(
    "--quality-samplers",
    default="",
    help="Default: ddpm, ddim, to 50 steps dpmpp_2m, dpmpp_3m and unipc, and tuned tables if there "
    "are any; of a consistency model its own.",
)
@click.option(
    "--quality-spacings",
    default="",
    help="Default: uniform and trailing, with quadratic for the first two of these samplers, with "
    "lambda and karras for the others.",
)
@click.option("--quality-steps", default="5,10,15,20,50,100,250", show_default=True)
@click.option(
    "--quality-against",
    type=PATH,
    help="results.json of an earlier table, whose first line is the one to equal; default: T steps "
    "of ddpm, drawn anew.",
)
@click.option("--sampler", help="Of the samples; default what the model's config says.")
@click.option("--steps", type=POSITIVE, help="Of the sampler; default the model's, or 100.")
@click.option("--pictures", default=6, show_default=True, type=COUNT, help="In progressive.png.")
@click.option("--device", help="cpu, cuda, …; default: cuda where there is one.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="fp32")
@click.option("--compile", "compiled", is_flag=True, help=COMPILE)
@click.option("--batch-size", default=64, show_default=True, type=POSITIVE)
@THREADS
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(threads: int | None, **options: Any) -> None:
    """Measure MODEL (a name in models/, or a folder) on DATA (as data.source of a training).

    Writes results.json, terms.png (L_t over t), rate_distortion.png and progressive.png. The
    numbers of every network call are kept in the folder: run the same command again to go on
    after an interruption. Without --splits, all of a folder of images is measured, and train and
    test of parquet files and hub datasets; with it, each is a folder in the folder of images.
    """
    from diffusion import cores
    from diffusion.files import CheckpointError
    from diffusion.sampling import NotFiniteError
    from diffusion.speed import CompileError
    from training.evaluate import EvaluateOptions
    from training.evaluate import evaluate as run

    cores.use(threads or cores.count())
    model = find_model(options.pop("model"))
    out = options.pop("out") or Path("runs") / f"evaluate-{model.name}"
    named = options.pop("splits")
    splits = _names(named or "")
    sigma = options.pop("sigma")
    if sigma is not None:
        click.echo("warning: --sigma is now called --variance", err=True)
        options["variance"] = options["variance"] or sigma
    if named is not None and not splits:
        sys.exit("ddpm evaluate: --splits: must name at least one split")
    for name in ("samplers", "spacings"):
        options[f"quality_{name}"] = _names(options[f"quality_{name}"])
    try:
        _check_together(options)
        options["quality_steps"] = numbers_of("--quality-steps", options["quality_steps"])
        run(EvaluateOptions(model=model, out=out, splits=splits, **options), click.echo)
    except KeyboardInterrupt:
        sys.exit(f"ddpm evaluate: interrupted; {out} holds what was done, run it again to go on")
    except (CheckpointError, CompileError, NotFiniteError, OSError, ValueError) as error:
        sys.exit(f"ddpm evaluate: {error}")
    click.echo(f"\n{out}/results.json")


def _check_together(options: dict[str, Any]) -> None:
    """Raise ValueError at options that would have no effect, or leave nothing to measure."""
    source = click.get_current_context().get_parameter_source
    for needed, names in BESIDE.items():
        for name in names:
            if source(name) is ParameterSource.COMMANDLINE and not options[needed]:
                raise ValueError(f"{_flag(name)}: needs {_flag(needed)}")
    for name in ("sampler", "steps"):
        if options["quality"] and options[name] is not None:
            raise ValueError(f"{_flag(name)}: --quality has --quality-samplers and --quality-steps")
    measures = ("images", "monte_carlo", "pictures", "features")
    if not any(options[name] for name in measures):
        raise ValueError("nothing to measure: --images, --monte-carlo and --pictures are 0")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _names(listed: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())
