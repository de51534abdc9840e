"""The wheel: what is in it, and that it serves where it is not the working folder's code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

import ddpm
from jobs.version import VERSION
from tests.house import ROOT, git

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def tracked() -> list[str]:
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    parts = (*(f"{package}/" for package in ddpm.PACKAGES), "ddpm.py", "pyproject", "LICENSE")
    for name in tracked():
        if name.startswith((*parts, "README")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = [*PIP, "wheel", *options, str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_every_package(wheel: Path) -> None:
    assert wheel.name.startswith(f"ddpm_serve-{VERSION}-")
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    packages = tuple(f"{package}/" for package in ddpm.PACKAGES)
    assert inside == {name for name in tracked() if name.startswith(packages)} | {"ddpm.py"}
    assert {f"{package}/py.typed" for package in ddpm.PACKAGES} <= inside


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the wheel's packages. Those of other projects come from this environment."""
    target = wheel.parent / "installed"
    command = [*PIP, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return target


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with our models and packages of its owner's, some named like ours."""
    for name in ("app", "worker", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not your package')\n")
    (tmp_path / "jobs.py").write_text("raise SystemExit('not your module')\n")
    (tmp_path / "models").symlink_to(ROOT / "models")
    return tmp_path


def environment(installed: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    return {**inherited, "PYTHONPATH": str(installed), "PYTHONUNBUFFERED": "1"}


def test_the_wheel_serves_beside_packages_of_the_same_names(installed: Path, place: Path) -> None:
    command = [sys.executable, str(installed / "bin" / "ddpm"), "up", "--port", "0"]
    with subprocess.Popen(
        command, cwd=place, env=environment(installed), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"serves .* on http://localhost:(\d+)", line)
            assert found, line
            url = f"http://127.0.0.1:{found[1]}"
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                assert client.get("/healthz").json()["version"] == VERSION
                assert client.get("/").headers["content-type"].startswith("text/html")
                headers = {"Prefer": "wait=60"}
                job = client.post("/generate", json={"steps": 2}, headers=headers).json()
                assert job["status"] == "succeeded"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def test_its_commands_run_there_too(installed: Path, place: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=place,
            env=environment(installed),
            capture_output=True,
            text=True,
            timeout=120,
        )

    where = run("-P", "-c", "import app, jobs; print(app.__file__)").stdout
    assert where.startswith(str(installed))  # and not the checkout
    # The process that compiles is ours: it misses its arguments.
    code = "import subprocess, sys; from jobs.processes import *; sys.exit(subprocess.call("
    compiling = run("-P", "-c", f"{code}command_of('worker.network.compile_one')))")
    assert "not enough values to unpack" in compiling.stderr
    # A configuration that comes with the package.
    script = str(installed / "bin" / "ddpm")
    training = run(script, "train", "mnist", "data.source=nowhere", "--out", "runs/m")
    assert training.returncode == 1 and "nowhere" in training.stderr, training.stderr
