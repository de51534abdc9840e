"""The last release, from its commit, in an environment of its own with the same packages."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.house import ROOT, git
from tests.stack import Version

# version → the commit that it was released from; the last one is what deploys come from.
RELEASES = {"0.1.0": "c907cbc39cb8fd6ef316d7948696123860918df6"}
LAST = list(RELEASES)[-1]


_SAVE = """
import sys, diffusion
from tests.diffusion.networks import build_model
diffusion.save(build_model(schedule=diffusion.ScheduleConfig(T=1000)), sys.argv[1])
"""


def save_model(version: Version, folder: Path) -> None:
    """A tiny model as a version writes it; a newer one reads what an older one wrote."""
    command = [version.python, "-c", _SAVE, str(folder)]
    subprocess.run(command, check=True, cwd=version.tree)


def build(folder: Path, release: str = LAST) -> Version:
    """The code of a release under `folder`; skips the test where the history does not reach it."""
    commit = RELEASES[release]
    try:
        git("cat-file", "-e", f"{commit}^{{commit}}")
    except subprocess.CalledProcessError:
        pytest.skip(f"the git history here does not have {commit}, release {release}")
    git("archive", f"--output={folder / 'code.tar'}", commit)
    tree = folder / "code"
    with tarfile.open(folder / "code.tar") as archive:
        archive.extractall(tree, filter="data")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    [packages] = (folder / "env").glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("-packages") and Path(path) != ROOT]
    # Its own code before everything, and no finder of an installed project of ours.
    (packages / "release.pth").write_text("\n".join([str(tree), *ours]))
    return Version(str(folder / "env" / "bin" / "python"), tree)
