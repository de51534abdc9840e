"""Where the repository is and what its packaging says: shared by the tests of the house."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

import ddpm

ROOT = Path(__file__).resolve().parent.parent


def project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def git(*arguments: str) -> str:
    """What git prints in this repository; skips the test outside of a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_ddpm(arguments: list[str]) -> None:
    """Holds that click accepts the command line `ddpm …`, short of running it."""
    name, *rest = arguments
    command = ddpm.main.get_command(click.Context(ddpm.main), name)
    assert command is not None, f"no subcommand {name}"
    command.make_context(name, list(rest))
