"""The console script: every subcommand exists, and what is missing or wrong is named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import ddpm
from app.main import create_app
from app.routes.system import Health
from jobs.settings import Settings
from jobs.version import VERSION
from tests.house import ROOT, project
from worker.provenance import versions


@pytest.mark.parametrize("name", sorted(ddpm.COMMANDS))
def test_every_subcommand_exists_and_explains_itself(name: str) -> None:
    result = CliRunner().invoke(ddpm.main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"{name} [OPTIONS]" in result.output
    assert ddpm.COMMANDS[name].extra in project()["optional-dependencies"]


def test_help_lists_every_subcommand() -> None:
    result = CliRunner().invoke(ddpm.main, ["--help"])
    listed = re.findall(r"^  ([\w-]+)  +\S", result.output.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(ddpm.COMMANDS)


def test_there_is_one_version() -> None:
    """Of the installed package, too: what pyproject.toml takes it from is this constant."""
    (attribute,) = re.findall(
        r'^version = \{ attr = "(.*)" \}$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M
    )
    assert attribute == "jobs.version.VERSION"
    said = CliRunner().invoke(ddpm.main, ["--version"]).output
    assert said == f"ddpm, version {VERSION}\n"
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = [name for name in re.findall(r"^## (\S+)", changes, re.M) if name != "Unreleased"]
    assert headings[0] == VERSION
    assert create_app(Settings()).version == VERSION
    assert Health().version == VERSION
    assert versions()["ddpm-serve"] == VERSION


def test_an_unknown_subcommand_is_refused_with_the_known_ones() -> None:
    result = CliRunner().invoke(ddpm.main, ["serve"])
    assert result.exit_code == 2
    assert "no command 'serve'" in result.output
    assert all(name in result.output for name in ddpm.COMMANDS)


ABSENT = "import package_nobody_has.part\n"
COMMAND = "import click\n@click.command()\ndef worker() -> None:\n"


@pytest.mark.parametrize(
    "source", [ABSENT, f"{COMMAND}    {ABSENT}"], ids=["when loaded", "when run"]
)
def test_a_missing_package_is_named_with_what_to_install(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe_commands.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "probe_commands", raising=False)
    entry = ddpm.Entry("probe_commands:worker", "worker", "")
    result = CliRunner().invoke(ddpm.LazyGroup(entries={"worker": entry}), ["worker"])
    assert result.exit_code == 1
    assert result.output == (
        "Error: `ddpm worker` needs package_nobody_has, which is not installed: "
        "pip install 'ddpm-serve[worker]'\n"
    )


def test_a_mistake_of_our_own_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"jobs\.nowhere"):
        ddpm.load_command("up", ddpm.Entry("jobs.nowhere:up", "serve", ""))
