"""The offline commands: `ddpm train`, `sample`, `convert`, `serve-model` and `pull`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from training.options import (
    COMPILE,
    PATH,
    POSITIVE,
    THREADS,
    find_model,
    models_folder,
    warnings_in_words,
)

if TYPE_CHECKING:
    from training.config import TrainConfig


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=PATH, metavar="FOLDER|CONFIG")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--out", type=PATH, help="Run folder; default runs/ and the name of FOLDER or CONFIG."
)
@click.option("--resume", is_flag=True, help="Go on with a run, from its last checkpoint.")
@click.option("--init", type=PATH, help="Start from the weights of this folder or named model.")
@THREADS
@click.option("--quiet", is_flag=True, help="No progress bar.")
def train(
    config: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    init: Path | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Train a model on a folder of pictures, or as a TOML file says.

    FOLDER holds pictures, in a folder a class if there are classes: size, channels and classes
    are inferred and shown. CONFIG may be a name of ours, such as mnist. Any key can be overridden:
    `ddpm train mnist steps=2000 optimizer.learning_rate=1e-3`. `ddpm train --resume RUN` goes on
    with the run in a folder. Several processes, which share the cores: `torchrun --nproc-per-node 2
    -m ddpm train` and the same words.
    """
    from diffusion import cores
    from diffusion.device import DeviceError
    from diffusion.files import CheckpointError
    from diffusion.samplers import FewStepsWarning
    from diffusion.speed import CompileError
    from training.config import ConfigError
    from training.sources import DataError
    from training.state import StateError
    from training.trainer import Trainer

    folder = out or default_folder(config, resume)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun would give each one core
    cores.use(threads or (cores.count() if processes == 1 else max(1, cores.usable() // processes)))
    try:
        if resume and init is not None:
            raise StateError("--init starts a run and --resume goes on with one: give one of them")
        with warnings_in_words(FutureWarning):
            settings = _settings(config, overrides, folder, resume)
        for level in settings.network.deaf_levels:
            click.echo(
                f"warning: network.groups = {settings.network.groups} makes each of the "
                f"{settings.network.channels[level]} channels of level {level} a group of its own: "
                "the timestep and the label will have no effect there",
                err=True,
            )
        init = init and find_model(init)
        trainer = Trainer(settings, folder, init=init, progress=not quiet)
        for note in trainer.images.notes if trainer.is_main else ():
            click.echo(f"{settings.data.source}: {note}", err=True)
        if resume:
            step = trainer.resume()
            click.echo(f"resuming {folder} at step {step} of {settings.steps}", err=True)
        with warnings_in_words(FewStepsWarning):
            trainer.run()
    except (
        CheckpointError, CompileError, ConfigError, DataError, DeviceError, OSError, StateError
    ) as error:  # fmt: skip
        sys.exit(f"ddpm train: {error}")
    if trainer.is_main:
        click.echo(f"{folder}: step {trainer.step} of {settings.steps}")


def default_folder(config: Path, resume: bool) -> Path:
    """Where a run is kept if nothing is said: the run itself, or runs/ and a name."""
    if config.is_dir():
        return config if resume else Path("runs") / config.resolve().name
    return Path("runs") / config.stem


def _settings(config: Path, overrides: tuple[str, ...], folder: Path, resume: bool) -> TrainConfig:
    """What to train. Raises StateError, ConfigError, DataError."""
    from training.config import load_config
    from training.infer import infer_config
    from training.resuming import check_resumable, stored_config
    from training.state import CONFIG_FILE, StateError, find_state

    if resume:
        settings = (stored_config if config.is_dir() else load_config)(config, overrides)
        check_resumable(folder, settings)
        return settings
    for run in (folder, config):
        if find_state(run):
            raise StateError(
                f"{run}: holds a run already; --resume goes on with it, --out starts another"
            )
    if not config.is_dir():
        return load_config(config, overrides)
    settings, found = infer_config(config, overrides)
    network = settings.network
    click.echo(
        f"{config}: {found.describe()}\n"
        f"training at {network.image_size}×{network.image_size}, {network.in_channels} channel(s), "
        f"{network.num_classes} classes, data.fit = {settings.data.fit}, {settings.steps} steps; "
        f"all of it is in {folder / CONFIG_FILE}, and any key can be given, such as steps=5000",
        err=True,
    )
    return settings


@click.command()
@click.option("--model", default="mnist", show_default=True, help="A name in models/, or a folder.")
@click.option("--num-images", "-n", default=1, show_default=True, type=POSITIVE)
@click.option("--class-label", help="A label or class name; several with commas, used in turn.")
@click.option("--guidance", default=1.0, show_default=True, help="ε_u + g(ε_c − ε_u); 1 is off.")
@click.option("--preset", help="fast, balanced or faithful: sampler, steps and spacing in a word.")
@click.option("--sampler", help="By name (a wrong one lists all); default: the model's.")
@click.option("--steps", type=int, help="Evaluations an image; default: the model's, or 100.")
@click.option("--spacing", help="By name (a wrong one lists all); default: the model's.")
@click.option("--eta", type=float, help="Noise of ddim: 0 none, the default; 1 ancestral.")
@click.option("--variance", help="σ² of ddpm: large, small or learned; default: the model's.")
@click.option("--corrector-steps", type=int, help="Langevin steps after each step; default 0.")
@click.option("--seed", type=int, help="Default: drawn, and printed.")
@click.option("--out", default="grid.png", show_default=True, help="See below.")
@click.option("--snapshots", "every", type=POSITIVE, help="A row every N steps.")
@click.option("--kind", type=click.Choice(["x_t", "x_start"]), default="x_start", show_default=True)
@click.option("--device", help="cpu, cuda, …; default: cuda where there is one.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto")
@click.option("--compile", "compiled", is_flag=True, help=COMPILE)
@click.option("--batch-size", default=64, show_default=True, type=POSITIVE)
@THREADS
@click.option("--quiet", is_flag=True, help="No progress bar.")
def sample(threads: int | None, **options: object) -> None:
    """Draw images from a trained model, without a server.

    --out decides what is written: FILE.png (or .webp) is the picture, a grid for several images;
    a folder (no suffix, a final /, or one that is there) gets 00000.png, 00001.png, …; FILE.gif is
    a film of the chain (as is FILE.webp with --snapshots). With --snapshots N, FILE.png shows the
    chain as columns: what x_t (or x̂_0) was every N steps.
    """
    from diffusion import cores
    from diffusion.files import CheckpointError
    from diffusion.samplers import FewStepsWarning
    from diffusion.sampling import NotFiniteError
    from diffusion.speed import CompileError
    from training.sample import SampleOptions, draw

    cores.use(threads or cores.count())
    options["model"] = find_model(str(options["model"]))
    out = str(options["out"])
    if not out:
        raise click.BadParameter("'': must be a file or a folder", param_hint="--out")
    options["out"] = Path(out)
    options["folder"] = out.endswith("/") or Path(out).is_dir() or not Path(out).suffix
    try:
        with warnings_in_words(FewStepsWarning):
            written, seed = draw(SampleOptions(**options))  # type: ignore[arg-type]
    except (CheckpointError, CompileError, NotFiniteError, OSError, ValueError) as error:
        sys.exit(f"ddpm sample: {error}")
    click.echo(f"{written} (seed {seed})")


@click.command()
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option("--to", type=click.Choice(["ours", "diffusers"]), default="ours", show_default=True)
@click.option("--sampling", multiple=True, metavar="FIELD=VALUE", help="Sample otherwise; repeat.")
def convert(source: Path, target: Path, to: str, sampling: tuple[str, ...]) -> None:
    """Convert a checkpoint folder: SOURCE (or a name in models/) in our format or diffusers',
    TARGET in the one named.

    A pipeline of diffusers draws the same images as the model does by default. Where it cannot,
    the field is named; --sampling changes it: --sampling sampler=ddpm --sampling clip=false.
    """
    from diffusion import checkpoint
    from diffusion.files import CheckpointError

    try:
        changes = dict(_field_and_value(text) for text in sampling)
        checkpoint.convert(find_model(source), target, to, sampling=changes)
    except (CheckpointError, OSError) as error:
        sys.exit(f"ddpm convert: {error}")
    click.echo(str(target))


def _field_and_value(text: str) -> tuple[str, str | bool]:
    """name=value; true and false are truth values."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r}: must be FIELD=VALUE", param_hint="--sampling")
    return name, {"true": True, "false": False}.get(value, value)


@click.command()
@click.argument("run", type=PATH)
@click.option("--name", help="What the service calls it; default: the folder's name.")
@click.option("--description", help="What GET /models says of it; default: what the run knows.")
@click.option("--replace", is_flag=True, help="Put it in the place of a model of this name.")
def serve_model(run: Path, name: str | None, description: str | None, replace: bool) -> None:
    """Put the checkpoint of a RUN under a name into models/ (DDPM_MODELS), with a thumbnail.

    Workers that run serve it at once. RUN may be any checkpoint folder, of diffusers too.
    """
    from diffusion.files import CheckpointError
    from training.publish import PublishError, publish

    name = name or run.resolve().name
    try:
        made = publish(run, models_folder(), name, description=description, replace=replace)
    except (CheckpointError, OSError, PublishError) as error:
        sys.exit(f"ddpm serve-model: {error}")
    click.echo(f'{made}: requests may say {{"model": "{name}"}}')


@click.command()
@click.argument("hub_id")
@click.option("--name", help="What the service calls it; default: the last part of HUB_ID.")
@click.option("--replace", is_flag=True, help="Put it in the place of a model of this name.")
def pull(hub_id: str, name: str | None, replace: bool) -> None:
    """Fetch a DDPM from the Hugging Face hub into models/ (DDPM_MODELS): google/ddpm-cifar10-32."""
    import huggingface_hub  # noqa: F401 - that it is missing is told before anything else

    from diffusion.files import CheckpointError
    from training.publish import PublishError
    from training.publish import pull as fetch

    name = name or hub_id.rpartition("/")[2]
    try:
        made = fetch(hub_id, models_folder(), name, replace=replace)
    except (CheckpointError, OSError, PublishError) as error:
        sys.exit(f"ddpm pull: {error}")
    click.echo(f'{made}: requests may say {{"model": "{name}"}}')
