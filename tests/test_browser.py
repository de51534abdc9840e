"""The page in a real browser, as a user would: chromium, driven by playwright, if they are here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

import diffusion
from diffusion import ScheduleConfig
from tests.app.test_up import up
from tests.diffusion.networks import build_model

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, served. An error in its script fails the tests."""
    place = tmp_path_factory.mktemp("page")
    diffusion.save(build_model(schedule=ScheduleConfig(T=1000)), place / "models" / "tiny")
    with up(place) as (_, client), playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(base_url=str(client.base_url))
        page.set_default_timeout(30_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto("/")
        yield page
        assert faults == []
        browser.close()


def generate(page: Any, images: int, steps: int) -> None:
    page.fill("#count", str(images))
    page.fill("#steps", str(steps))
    page.click("#go")


def wait_until(page: Any, condition: str) -> None:
    """Look from outside until it holds: the page's policy lets nothing inside it evaluate text."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def drawn(page: Any) -> list[str]:
    """The sources of the pictures on the stage."""
    found: list[str] = page.eval_on_selector_all("#grid img", "all => all.map(i => i.src)")
    return found


def test_a_click_draws_pictures_and_keeps_their_chain(page: Any) -> None:
    assert page.input_value("#model") == "tiny"
    page.fill("#seed", "7")
    generate(page, images=4, steps=20)
    wait_until(page, "document.getElementById('status').textContent.startsWith('done')")
    images = drawn(page)
    assert len(set(images)) == 4 and all(src.startswith("data:image/png") for src in images)
    sizes = page.eval_on_selector_all("#grid img", "all => all.map(i => i.naturalWidth)")
    assert all(size > 0 for size in sizes)
    # Back to the beginning of the chain, in either kind, and to its end again.
    page.evaluate("document.getElementById('time').value = 0")
    page.dispatch_event("#time", "input")
    first = drawn(page)
    assert set(first).isdisjoint(images)
    page.select_option("#kind", "x_t")
    assert set(drawn(page)).isdisjoint(first)
    page.click("#play")
    wait_until(page, "document.getElementById('play').textContent === 'Play'")
    assert drawn(page) == images


@pytest.mark.slow
def test_the_film_is_of_the_kind_that_is_shown(page: Any) -> None:
    for kind in ("x_t", "x_start"):
        page.select_option("#kind", kind)
        with (
            page.expect_request(lambda request: "snapshots.gif" in request.url) as asked,
            page.context.expect_page() as opened,
        ):
            page.click("#links a:has-text('film')")
        assert f"kind={kind}" in asked.value.url
        opened.value.close()


@pytest.mark.slow
def test_an_earlier_job_lends_its_settings(page: Any) -> None:
    page.fill("#seed", "")
    page.click("#recent button")
    assert page.input_value("#seed") == "7" and page.input_value("#steps") == "20"


@pytest.mark.slow
def test_cancel_stops_a_long_job(page: Any) -> None:
    generate(page, images=36, steps=1000)
    wait_until(page, "document.getElementById('status').textContent.startsWith('t = ')")
    page.click("#cancel")
    wait_until(page, "document.getElementById('status').textContent.startsWith('canceled')")
    page.wait_for_selector("#cancel:disabled")
    page.wait_for_selector("#go:enabled")


@pytest.mark.slow
def test_what_is_refused_is_said(page: Any) -> None:
    page.evaluate("document.getElementById('form').noValidate = true")
    generate(page, images=0, steps=10)
    page.wait_for_selector("#status .bad")
    assert "num_images" in page.inner_text("#status")


@pytest.mark.slow
def test_the_documentation_needs_no_other_host(page: Any) -> None:
    documentation = page.context.browser.new_page()
    asked: list[str] = []
    documentation.on("request", lambda request: asked.append(request.url))
    documentation.goto(page.url + "docs")
    documentation.wait_for_selector("text=/generate")
    own = documentation.url.removesuffix("/docs")
    assert len(asked) > 3 and all(url.startswith((own, "data:")) for url in asked), asked
    documentation.close()
