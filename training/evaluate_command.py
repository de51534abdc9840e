"""The offline command `ddpm evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=0)
POSITIVE = click.IntRange(min=1)


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
@click.option("--sigma", help="large, small or learned; default learned if the network has it.")
@click.option("--labelled", is_flag=True, help="Bits/dim given the label, p(x_0|y).")
@click.option("--seed", default=0, show_default=True, help="Of the choice of images and the noise.")
@click.option("--fit", default="auto", type=click.Choice(["auto", "error", "pad", "resize"]))
@click.option("--image-column", default="image", show_default=True)
@click.option("--label-column", default="label", show_default=True)
@click.option("--features", help="For the Fréchet distance: a TorchScript file, or inception.")
@click.option("--frechet-images", default=10_000, show_default=True, type=click.IntRange(min=2))
@click.option("--sampler", help="Of the samples; default what the model's config says.")
@click.option("--steps", default=100, show_default=True, type=POSITIVE, help="Of the sampler.")
@click.option("--pictures", default=6, show_default=True, type=COUNT, help="In progressive.png.")
@click.option("--device", help="cpu, cuda, …; default: cuda where there is one.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="fp32")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile.")
@click.option("--batch-size", default=64, show_default=True, type=POSITIVE)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(**options: Any) -> None:
    """Measure MODEL (a name in models/, or a folder) on DATA (as data.source of a training).

    Writes results.json, terms.png (L_t over t), rate_distortion.png and progressive.png. The
    numbers of every network call are kept in the folder: run the same command again to go on
    after an interruption. Without --splits, all of a folder of images is measured, and train and
    test of parquet files and hub datasets; with it, each is a folder in the folder of images.
    """
    from diffusion.files import CheckpointError
    from diffusion.sampling import NotFiniteError
    from training.commands import _find_model
    from training.evaluate import EvaluateOptions
    from training.evaluate import evaluate as run

    model = _find_model(options.pop("model"))
    out = options.pop("out") or Path("runs") / f"evaluate-{model.name}"
    named = options.pop("splits")
    splits = tuple(name.strip() for name in (named or "").split(",") if name.strip())
    if named is not None and not splits:
        sys.exit("ddpm evaluate: --splits: must name at least one split")
    try:
        run(EvaluateOptions(model=model, out=out, splits=splits, **options), click.echo)
    except KeyboardInterrupt:
        sys.exit(f"ddpm evaluate: interrupted; {out} holds what was done, run it again to go on")
    except (CheckpointError, NotFiniteError, OSError, ValueError) as error:
        sys.exit(f"ddpm evaluate: {error}")
    click.echo(f"\n{out}/results.json")
