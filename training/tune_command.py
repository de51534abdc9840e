"""The offline command `ddpm tune`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from training.options import PATH, POSITIVE, THREADS, Finite, find_model, numbers_of


@click.command()
@click.argument("model")
@click.option("--evaluations", default="4,6,8,10", show_default=True, help="Of the tables.")
@click.option("--pairs", default=512, show_default=True, type=POSITIVE, help="x_T to learn from.")
@click.option("--held", default=256, show_default=True, type=POSITIVE, help="x_T to choose by.")
@click.option("--teacher-steps", default=50, show_default=True, type=POSITIVE)
@click.option("--iterations", default=300, show_default=True, type=POSITIVE)
@click.option("--batch-size", default=16, show_default=True, type=POSITIVE)
@click.option(
    "--rate", default=0.01, show_default=True, type=Finite(0, min_open=True), help="Of Adam."
)
@click.option(
    "--radius", default=0.05, show_default=True, type=Finite(0), help="Of the ball x_T may move in."
)
@click.option("--out", type=PATH, help="Default runs/tune- and the name.")
@click.option("--device", help="cpu, cuda, …; default: cuda where there is one.")
@THREADS
@click.option("--quiet", is_flag=True, help="No progress bar.")
def tune(
    model: str,
    evaluations: str,
    pairs: int,
    held: int,
    teacher_steps: int,
    iterations: int,
    batch_size: int,
    rate: float,
    radius: float,
    out: Path | None,
    device: str | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Learn tables of few evaluations for MODEL (a name in models/, or a folder).

    They are written to its tuned.json, each as soon as it is learned, and are the sampler `tuned`
    of the library, the commands and the service, with `steps` one of these numbers. Run the same
    command again to go on after an interruption.
    """
    from diffusion import cores
    from diffusion.files import CheckpointError
    from training.tune import Options
    from training.tune_run import TuneOptions
    from training.tune_run import tune as run

    cores.use(threads or cores.count())
    folder = find_model(model)
    out = out or Path("runs") / f"tune-{folder.name}"
    learning = Options(iterations, batch_size, rate, radius)
    try:
        rows = numbers_of("--evaluations", evaluations)
        options = TuneOptions(
            folder, out, rows, pairs, held, teacher_steps, quiet, device, learning
        )
        made = run(options, click.echo)
    except KeyboardInterrupt:
        sys.exit(f"ddpm tune: interrupted; {out} holds what was done, run it again to go on")
    except (CheckpointError, OSError, ValueError) as error:
        sys.exit(f"ddpm tune: {error}")
    click.echo(f'{made}: requests may say {{"sampler": "tuned"}}')
