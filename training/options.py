"""What the offline commands have in common: kinds of options, how models are named, warnings."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=0)
POSITIVE = click.IntRange(min=1)
COMPILE = "By torch.compile: takes a minute, and then up to half of the time. Needs a C++ compiler."
THREADS = click.option(
    "--threads", type=POSITIVE, help="CPU threads; default: the cores there are."
)


def models_folder() -> Path:
    """Where models have names: models/, or DDPM_MODELS."""
    return Path(os.environ.get("DDPM_MODELS", "models"))


def find_model(name: str | Path) -> Path:
    """A folder, or the name of one in models/ (DDPM_MODELS)."""
    return Path(name) if Path(name).is_dir() else models_folder() / name


@contextmanager
def warnings_in_words(kind: type[Warning]) -> Iterator[None]:
    """What is warned of on stderr, once each, without a line of our code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", kind)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
        yield


def numbers_of(option: str, listed: str) -> tuple[int, ...]:
    """Whole numbers, each once. Raises ValueError naming what is none."""
    words = [word for part in listed.split(",") if (word := part.strip())]
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise ValueError(f"{option} {word!r}: must be whole numbers with commas")
    return tuple(dict.fromkeys(int(word) for word in words))


class Finite(click.FloatRange):
    """A range without NaN and infinity, which click's lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; refuses what is none."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number
