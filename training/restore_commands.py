"""The offline commands `ddpm restore` and `ddpm encode`."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any

import click

from training.options import PATH, POSITIVE, THREADS, find_model, warnings_in_words

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
OPERATORS = ("mask", "average_pool", "gray", "blur", "identity")


@click.command()
@click.argument("picture", type=FILE)
@click.option("--model", default="mnist", show_default=True, help="A name in models/, or a folder.")
@click.option("--operator", type=click.Choice(OPERATORS), default="mask", show_default=True)
@click.option("--box", "boxes", multiple=True, metavar="X0,Y0,X1,Y1", help="mask: fill in; repeat.")
@click.option("--mask", type=FILE, help="mask: a picture, white where it is to be filled in.")
@click.option("--factor", type=POSITIVE, help="average_pool: side of a block.")
@click.option("--deviation", type=float, help="blur: of the Gaussian, in pixels.")
@click.option(
    "--noise",
    type=float,
    help="σ_y of the picture, in grey levels; default 0, of a blurred one its rounding, 0.3.",
)
@click.option("--measure", is_flag=True, help="PICTURE is an image; measure it first.")
@click.option("--method", type=click.Choice(["projection", "moment"]), default="projection")
@click.option("--travel", type=int, help="How often each jump is walked; default 5, moment 1.")
@click.option(
    "--solver-steps", type=click.IntRange(min=0), help="moment: products a row; default 1."
)
@click.option("--num-images", "-n", default=4, show_default=True, type=POSITIVE)
@click.option("--class-label", type=int)
@click.option("--guidance", default=1.0, show_default=True)
@click.option("--steps", type=int, help="Timesteps; default 50.")
@click.option("--seed", type=int, help="Default: drawn, and printed.")
@click.option("--out", type=PATH, default="restored.png", show_default=True)
@click.option("--device", help="cpu, cuda, …; default: cuda where there is one.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
@THREADS
@click.option("--quiet", is_flag=True, help="No progress bar.")
def restore(**options: Any) -> None:
    """Samples of what PICTURE was before it was measured: fill in, make larger, colour, sharpen,
    denoise.

    The picture written holds the measurement, the samples, their mean, and their standard deviation
    (black: all agree).
    """
    from diffusion.files import CheckpointError
    from diffusion.samplers import FewStepsWarning
    from diffusion.sampling import NotFiniteError
    from training.pictures import picture_suffix, save_picture
    from training.restore import Asked, restored_strip

    asked = Asked(**{name: options.pop(name) for name in Asked.__dataclass_fields__})
    seed = options.pop("seed")
    options["seed"] = secrets.randbelow(2**53) if seed is None else seed
    out = options.pop("out")
    try:
        picture_suffix(out)
        model = _loaded(*(options.pop(name) for name in ("model", "device", "threads")))
        with warnings_in_words(FewStepsWarning):
            strip = restored_strip(model, options.pop("picture"), asked, **options)
        save_picture(strip, out)
    except (CheckpointError, NotFiniteError, OSError, ValueError) as error:
        sys.exit(f"ddpm restore: {error}")
    click.echo(f"{out} (seed {options['seed']})")


@click.command()
@click.argument("pictures", type=FILE, nargs=-1, required=True)
@click.option("--model", default="mnist", show_default=True, help="A name in models/, or a folder.")
@click.option("--steps", type=int, help="Timesteps; default 100.")
@click.option("--order", type=click.IntRange(1, 2), default=1, show_default=True)
@click.option("--iterations", type=int, help="That mend each step of order 1; default 1.")
@click.option("--class-label", type=int)
@click.option("--out", type=PATH, default="x_T.npy", show_default=True)
@click.option("--strip", type=PATH, help="A picture: a row each of the image, x_T, the way back.")
@click.option("--device", help="cpu, cuda, …; default: cuda where there is one.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
@THREADS
@click.option("--quiet", is_flag=True, help="No progress bar.")
def encode(
    pictures: tuple[Path, ...],
    model: str,
    out: Path,
    strip: Path | None,
    device: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """The x_T of PICTURES, float32 [N, C, H, W], and how well it leads back to them."""
    import numpy as np

    from diffusion.files import CheckpointError
    from diffusion.samplers import FewStepsWarning
    from diffusion.sampling import NotFiniteError
    from training.pictures import grid, picture_suffix, save_picture
    from training.restore import encoded

    try:
        if strip is not None:
            picture_suffix(strip)
        with warnings_in_words(FewStepsWarning):
            x_T, rows, psnr = encoded(_loaded(model, device, threads), pictures, **options)
        np.save(out, x_T.numpy())
        if strip is not None:
            save_picture(grid(rows, columns=3), strip)
    except (CheckpointError, NotFiniteError, OSError, ValueError) as error:
        sys.exit(f"ddpm encode: {error}")
    click.echo(f"{out}: {len(x_T)} x_T; the way back is {psnr:.1f} dB from the pictures")


def _loaded(name: str, device: str | None, threads: int | None) -> Any:
    from diffusion import cores
    from diffusion.checkpoint import load
    from diffusion.device import pick_device

    cores.use(threads or cores.count())
    return load(find_model(name), pick_device(device))
