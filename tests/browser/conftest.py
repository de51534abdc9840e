"""The page as `ddpm up` serves it, in a real browser: chromium, driven by playwright."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import diffusion
from diffusion import ScheduleConfig
from diffusion.checkpoint import WEIGHTS_NAME
from diffusion.files import digest_of
from diffusion.tuned import Tuned, write_tuned
from tests.app.test_up import up
from tests.diffusion.networks import TINY, build_model

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 150_000  # machines are busy

playwright.expect.set_options(timeout=PATIENCE_MS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if CHROMIUM is None and "tests/browser/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason="needs chromium on the PATH"))


@dataclass(frozen=True)
class Served:
    """A running `ddpm up` with two tiny models, which differ in size, colours, classes, T and
    samplers."""

    process: subprocess.Popen[str]
    client: httpx.Client

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/") + "/"

    def kill(self, part: str) -> None:
        """Kill the children that run `ddpm {part}`; what started them starts them again."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if part in child.cmdline():
                child.kill()

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get("/jobs").json()["data"]
        return found


def tune(folder: Path) -> None:
    """A tuned table of one row."""
    table = Tuned((99.0,), ((1.0, -0.3, 0.5, 0.0),))
    write_tuned([table], folder, weights=digest_of([folder / WEIGHTS_NAME]))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("page")
    model = build_model(schedule=ScheduleConfig(T=1000), class_names=("ones", "twos", "threes"))
    diffusion.save(model, place / "models" / "tiny")
    other = replace(TINY, image_size=16, in_channels=3, num_classes=0, null_class=False)
    diffusion.save(build_model(other), place / "models" / "wide")
    tune(place / "models" / "wide")
    with up(place) as (process, client):
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while len(client.get("/models").json()["data"]) < 2:  # one after the other
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Served(process, client)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        launched = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Open a page as a new visitor. Errors of its scripts, or against its policy, fail the test."""
    faults: list[str] = []
    contexts = []

    def hear(message: Any) -> None:
        # That a request failed is no fault of the page, which says so itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    def opened(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", hear)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(visit: Visit, served: Served) -> Any:
    return visit(served.url)
