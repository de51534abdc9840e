"""Generate: pictures from noise, live; their chain; the link of a job."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Served, Visit
from tests.browser.steps import ask, drawn, job_of, says, slide

PICTURE = Path(__file__).parent.parent / "pictures" / "plain.png"


def test_a_click_draws_pictures_and_keeps_their_chain(page: Any, visit: Visit) -> None:
    assert page.input_value("#model") == "tiny"
    ask(page, images=4, steps=20, seed=7)
    says(page, "4 images in")
    images = drawn(page)
    assert len(set(images)) == 4
    sizes = page.eval_on_selector_all("#grid img", "all => all.map(i => i.naturalWidth)")
    assert sizes == [8] * 4
    # Back to the beginning of the chain, in either kind.
    slide(page, 0)
    first = drawn(page)
    assert len(first) == 4 and set(first).isdisjoint(images)
    page.click(".chips.kind label:has-text('t')")
    assert set(drawn(page)).isdisjoint(first)
    assert page.inner_text(".of-t dd") == "1000"
    # The film of it ends where it began.
    page.click("#play")
    page.locator("#play", has_text="Play").wait_for()
    assert drawn(page) == images
    # The link shows the same to somebody else.
    other = visit(page.url)
    says(other, "4 images in")
    other.wait_for_selector("#grid img >> nth=3")
    assert drawn(other) == images


def test_a_job_that_failed_to_load_is_asked_for_again(visit: Visit, served: Served) -> None:
    """By who comes to it again; and where it says of no number, all that has come is shown."""
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    body = {"model": "wide", "images": [picture] * 3, "steps": 2}
    job = served.client.post("/encode", json=body, headers={"Prefer": "wait=60"}).json()
    page = visit("about:blank")
    problem = {"status": 500, "code": "internal", "detail": "Something broke."}
    page.route(
        f"**/jobs/{job['id']}", lambda route: route.fulfill(status=500, json=problem), times=1
    )
    page.goto(f"{served.url}#job={job['id']}")
    says(page, "Something broke.")
    page.click("nav >> text=Queue")
    page.wait_for_selector("main.queue")
    page.go_back()
    says(page, "3 images in")
    page.wait_for_selector("#grid img >> nth=2")


def test_a_reload_in_mid_run_comes_back_to_it(page: Any) -> None:
    ask(page, images=4, steps=500)
    job = job_of(page)
    says(page, "at t = ")
    page.reload()
    says(page, "4 images in")
    assert job_of(page) == job and len(set(drawn(page))) == 4
    page.click("text=Everything else")  # the link lends its settings too
    assert page.input_value("#steps") == "500"


def test_the_form_says_and_asks_for_the_sampler_and_spacing_that_are_chosen(
    page: Any, served: Served
) -> None:
    page.click("text=Everything else")
    sampling = served.client.get("/models/tiny").json()["sampling"]
    assert page.input_value("#sampler") == sampling["sampler"]
    assert page.input_value("#spacing") == sampling["spacing"]
    page.select_option("#sampler", label="dpmpp_3m")
    page.select_option("#spacing", label="karras")
    page.wait_for_selector("input[name=preset]:checked", state="detached")
    ask(page, images=1, steps=12)
    says(page, "1 image in")
    request = served.client.get(f"/jobs/{job_of(page)}").json()["request"]
    asked = {name: request[name] for name in ("sampler", "spacing", "steps")}
    assert asked == {"sampler": "dpmpp_3m", "spacing": "karras", "steps": 12}


def test_nothing_moves_while_pictures_come(page: Any) -> None:
    # Before anything is filled in: what is one's own takes no more place than a preset. The fold
    # alone, which a click opens, may move what is below it.
    page.click("text=Everything else")
    page.wait_for_selector("#count:visible")
    page.wait_for_timeout(600)
    page.evaluate(
        "window.moved = []; new PerformanceObserver(all => all.getEntries().forEach(entry =>"
        " window.moved.push([entry.value, ...entry.sources.map(s => s.node?.outerHTML)])))"
        ".observe({type: 'layout-shift'})"
    )
    ask(page, images=9, steps=60)
    says(page, "9 images in")
    page.wait_for_timeout(300)
    assert page.evaluate("window.moved") == []


@pytest.mark.slow
def test_cancel_stops_a_long_job_and_keeps_what_there_was(page: Any, served: Served) -> None:
    ask(page, images=36, steps=1000)
    says(page, "at t = ")
    page.click("#cancel")
    says(page, "Canceled")
    assert served.jobs()[0]["status"] == "canceled"
    page.wait_for_selector("#cancel:disabled")
    page.wait_for_selector("#go:enabled")
    assert drawn(page)


@pytest.mark.slow
def test_what_is_refused_is_said(page: Any) -> None:
    page.wait_for_selector("form")
    page.evaluate("document.querySelector('form').noValidate = true")
    ask(page, images=1, steps=1001)
    page.locator("[role=alert]", has_text="steps").wait_for()
    page.wait_for_selector("#go:enabled")
