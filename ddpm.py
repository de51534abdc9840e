"""The console script `ddpm`: a group whose subcommands are imported only when they are used.

So `ddpm api` and `ddpm --help` never load torch, and a part that is not installed is missed only
by the command that needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import click

from jobs.version import VERSION

DISTRIBUTION = "ddpm-serve"
PACKAGES = ("app", "diffusion", "jobs", "training", "worker")


class Entry(NamedTuple):
    """Where a subcommand lives, and what the group knows of it without importing it."""

    target: str  # "package.module:attribute"
    extra: str  # what to install for it
    help: str


COMMANDS: dict[str, Entry] = {
    "up": Entry("app.commands:up", "serve", "Serve: start Redis, a worker and the HTTP API."),
    "env": Entry("app.commands:env", "api", "Print REDIS_URL of the `ddpm up` that runs here."),
    "doctor": Entry("app.commands:doctor", "api", "Say what is installed, runs, and is wrong."),
    "api": Entry("app.commands:api", "api", "Run the HTTP API alone, against REDIS_URL."),
    "key": Entry("app.commands:key", "api", "Make an API key; only its hash is kept."),
    "worker": Entry("worker.commands:worker", "worker", "Run one worker alone, on REDIS_URL."),
    "bench": Entry("worker.bench.command:bench", "serve", "Measure this machine, part by part."),
    "train": Entry(
        "training.commands:train", "train", "Train a network on pictures, or as a TOML file says."
    ),
    "sample": Entry("training.commands:sample", "train", "Draw images, a grid or a film."),
    "restore": Entry(
        "training.restore_commands:restore", "train", "Fill in, sharpen, colour, denoise."
    ),
    "encode": Entry("training.restore_commands:encode", "train", "From pictures to their x_T."),
    "evaluate": Entry(
        "training.evaluate_command:evaluate", "train", "Measure bits/dim and image quality."
    ),
    "tune": Entry(
        "training.tune_command:tune", "train", "Learn tables of few evaluations for a model."
    ),
    "convert": Entry("training.commands:convert", "train", "Convert from and to diffusers."),
    "serve-model": Entry(
        "training.commands:serve_model", "train", "Put a run's checkpoint under a name in models/."
    ),
    "pull": Entry("training.commands:pull", "hub", "Fetch a model from the Hugging Face hub."),
}


@contextmanager
def missing_package_named(name: str, entry: Entry) -> Iterator[None]:
    """Turns a package that is not installed into one sentence that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package, _, inner = (error.name or "").partition(".")
        if not package or (package in PACKAGES and inner):  # our mistake, not the installation's
            raise
        raise click.ClickException(
            f"`ddpm {name}` needs {package}, which is not installed: "
            f"pip install '{DISTRIBUTION}[{entry.extra}]'"
        ) from error


def load_command(name: str, entry: Entry) -> click.Command:
    """The click command that `entry` names.

    Raises click.ClickException, with what to install, if a package it needs is missing.
    """
    module_name, _, attribute = entry.target.partition(":")
    with missing_package_named(name, entry):
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
    return command


class LazyGroup(click.Group):
    """A click group over a table of entries."""

    def __init__(self, *args: Any, entries: Mapping[str, Entry], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        return load_command(cmd_name, entry) if entry else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.entries:
            ctx.fail(f"no command {args[0]!r}; the commands are {', '.join(self.entries)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError:  # commands import what is slow to load when they run
            name = ctx.invoked_subcommand
            if name is None:
                raise
            with missing_package_named(name, self.entries[name]):
                raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would import every command for its short help.
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])


@click.group(cls=LazyGroup, entries=COMMANDS)
@click.version_option(VERSION, prog_name="ddpm")
def main() -> None:
    """Train, sample and serve denoising diffusion probabilistic models."""


if __name__ == "__main__":
    main()
