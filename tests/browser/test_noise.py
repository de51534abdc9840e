"""Noise: a picture of the visitor's own, noised and denoised, mixed, and filled in."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import Served, Visit
from tests.browser.steps import PATIENCE_S, ask, draw, drawn, job_of, refuse, says, slide, until

PICTURES = Path(__file__).parent.parent / "pictures"


def pixels(src: str) -> Any:
    """uint8 [H, W] of a data: address."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).convert("L"))


def test_a_drawing_is_noised_here_as_the_service_noises_it(visit: Visit, served: Served) -> None:
    page = visit(served.url + "#noise")
    draw(page)
    slide(page, 400)  # t = 600
    page.wait_for_selector(".strip img >> nth=1")  # x_t, and x̂_0 by the network
    here = pixels(page.get_attribute(".strip img >> nth=0", "src"))
    page.click("#denoise")
    job = job_of(page)
    says(page, "9 images in")
    assert len(drawn(page)) == 9
    told = served.client.get(f"/jobs/{job}").json()
    assert told["kind"] == "reconstruct" and told["request"]["t"] == 600
    first = served.client.get(f"/jobs/{job}/snapshots/600/0.png").content
    there = np.asarray(Image.open(io.BytesIO(first)).convert("L"))
    # The same ε: of float32 in two languages, a grey level apart at most.
    assert np.abs(here.astype(int) - there).max() <= 1
    # A reload has the drawing again, from this browser.
    page.reload()
    says(page, "9 images in")
    page.locator(".pad canvas[aria-label*='the picture of this job']").wait_for()


def test_a_file_is_dropped(visit: Visit, served: Served) -> None:
    """As the system drops it: through the browser's own handling of input."""
    page = visit(served.url + "#noise")
    box = page.locator(".source .pad").bounding_box()
    browser = page.context.new_cdp_session(page)

    def drag(kind: str, *files: Path) -> None:
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(path) for path in files], "dragOperationsMask": 1}
        browser.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})

    for kind in ("dragEnter", "dragOver"):
        drag(kind, PICTURES / "plain.png")
    page.wait_for_selector(".source.over")
    drag("drop", PICTURES / "plain.png")
    page.locator(".pad canvas[aria-label*='plain.png']").wait_for()
    assert page.locator(".source.over").count() == 0
    slide(page, 1000)  # t = 0: the image itself
    there = pixels(page.get_attribute(".strip img >> nth=0", "src"))
    with Image.open(PICTURES / "plain.png") as picture:
        wanted = picture.convert("L").resize((8, 8), Image.Resampling.BOX)
    assert abs(there.mean() - np.asarray(wanted).mean()) < 8
    for kind in ("dragEnter", "dragOver", "drop"):
        drag(kind, Path(__file__))
    page.locator("[role=alert]").wait_for()


def test_what_the_network_expects_is_of_this_model_or_nothing(visit: Visit, served: Served) -> None:
    """Another model of the same size, which refuses, and the first again."""
    models = served.client.get("/models").json()
    [tiny] = [model for model in models["data"] if model["name"] == "tiny"]
    models["data"].append({**tiny, "name": "twin", "digest": "f" * 64})
    page = visit("about:blank")
    page.route("**/models", lambda route: route.fulfill(json=models))
    page.route(
        "**/models/twin/schedule",
        lambda route: route.continue_(url=route.request.url.replace("twin", "tiny")),
    )
    page.route(
        "**/noise",
        lambda route: route.continue_(post_data=route.request.post_data.replace("twin", "tiny")),
    )
    page.route(
        "**/reconstruct",
        lambda route: refuse(route) if "twin" in route.request.post_data else route.continue_(),
    )
    page.goto(served.url + "#noise")
    draw(page)
    expected = page.locator(".strip figure").nth(1).locator("img")
    expected.wait_for()
    page.select_option("#model", "twin")
    page.locator(".forward [role=alert]", has_text="at t = 350: Too much waits.").wait_for()
    assert expected.count() == 0
    page.select_option("#model", "tiny")
    expected.wait_for()
    assert expected.get_attribute("alt") == "x̂_0 at t = 350"
    page.wait_for_selector("[role=alert]", state="detached")


def test_what_waits_for_the_network_is_one_job_that_ends_with_the_wish(
    visit: Visit, served: Served
) -> None:
    """And holds no connection meanwhile: six are all that a browser has."""
    page = visit(served.url + "#noise")
    draw(page)
    expected = page.locator(".strip figure").nth(1)
    expected.locator("img").wait_for()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    [queue] = served.client.get("/queue").json()["queues"]
    served.client.post(f"/queue/{queue['name']}/pause")

    def waiting() -> int:
        return sum(job["status"] == "queued" for job in served.jobs())

    try:
        before = waiting()
        for to in range(100, 800, 100):
            with page.expect_response("**/reconstruct"):
                slide(page, to)
        while waiting() - before != 1:
            page.wait_for_timeout(50)
        # What is seen is of the t before, and told so.
        expected.locator("text=still that of t = 350").wait_for()
        assert expected.locator("img").get_attribute("alt") == "x̂_0 at t = 350"
        page.click("nav >> text=Generate")
        while waiting() > before:
            page.wait_for_timeout(50)
        assert not [url for url in asked if "wait=" in url]
    finally:
        served.client.post(f"/queue/{queue['name']}/resume")


@pytest.mark.slow
def test_two_pictures_are_mixed(visit: Visit, served: Served) -> None:
    page = visit(served.url + "#noise")
    page.check("input[value=mix]")
    draw(page)
    page.set_input_files(".source >> nth=1 >> input[type=file]", PICTURES / "plain.png")
    page.locator(".pad canvas[aria-label*='plain.png']").wait_for()
    page.click("#denoise")
    says(page, "9 images in")
    job = served.client.get(f"/jobs/{job_of(page)}").json()
    assert job["kind"] == "interpolate" and job["request"]["lambdas"] == [i / 8 for i in range(9)]
    assert len(drawn(page)) == 9


@pytest.mark.slow
def test_what_is_brushed_over_is_filled_in(visit: Visit, served: Served) -> None:
    page = visit(served.url + "#noise")
    draw(page)
    page.check("input[value=restore]")
    page.click("text=Lower half")
    page.locator("text=50 % of it is unknown").wait_for()
    drawing = pixels(page.get_attribute(".over img", "src"))
    page.click("#denoise")
    job = job_of(page)
    says(page, "9 images in")
    page.wait_for_selector(".summary img >> nth=1")
    told = served.client.get(f"/jobs/{job}").json()
    assert told["kind"] == "restore"
    for src in drawn(page):
        assert (pixels(src)[:4] == drawing[:4]).all()  # what was known is as it was


def test_mean_and_deviation_are_of_the_fillings_beside_them(visit: Visit, served: Served) -> None:
    """Whatever is about to be done with another picture."""
    picture = base64.b64encode((PICTURES / "plain.png").read_bytes()).decode()
    job = served.client.post(
        "/restore",
        json={"model": "wide", "images": [picture], "operator": {"name": "identity"},
              "num_images": 2, "steps": 2},
        headers={"Prefer": "wait=60"},
    ).json()  # fmt: skip
    page = visit(f"{served.url}#job={job['id']}")
    says(page, "2 images in")
    page.check("input[value=denoise]")
    page.wait_for_selector(".forward")
    page.wait_for_selector(".stage .summary img >> nth=1")


@pytest.mark.slow
def test_what_has_expired_is_not_offered(visit: Visit, served: Served) -> None:
    """And its link says what there still is."""
    jobs = [
        served.client.post(
            "/generate",
            json={"model": "tiny", "num_images": 1, "steps": 3, "ttl_s": ttl_s},
            headers={"Prefer": "wait=60"},
        ).json()
        for ttl_s in (1, 3600)
    ]
    said = [{**job, "created": job["created_at"], "title": job["id"], "done": True} for job in jobs]
    deadline = time.monotonic() + PATIENCE_S
    while served.client.get(f"/jobs/{jobs[0]['id']}").json()["status"] != "expired":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    page = visit(served.url)
    page.evaluate("jobs => localStorage.setItem('ddpm-jobs', jobs)", json.dumps(said))
    page.goto(f"{served.url}#job={jobs[0]['id']}")
    page.reload()
    says(page, "the settings are still here")
    page.click("nav >> text=Noise")
    page.wait_for_selector(f".recent button[aria-label*='{jobs[1]['id']}']")
    page.wait_for_selector(f".recent button[aria-label*='{jobs[0]['id']}']", state="detached")
    assert page.locator(".recent button").count() == 1


@pytest.mark.slow
def test_a_generated_picture_is_taken_along(page: Any, served: Served) -> None:
    ask(page, images=2, steps=10)
    says(page, "2 images in")
    job = job_of(page)
    page.click("#grid button >> nth=1")
    page.click("text=Noise this")
    page.locator(".pad canvas[aria-label*='image 2 of a job']").wait_for()
    slide(page, 1000)  # t = 0: the image itself
    taken = pixels(page.get_attribute(".strip img >> nth=0", "src"))
    there = served.client.get(f"/jobs/{job}/images/1.png").content
    assert (taken == np.asarray(Image.open(io.BytesIO(there)).convert("L"))).all()
    # And so to the other place.
    page.click("text=Look inside")
    until(page, "document.querySelector('.pad canvas') !== null")
    assert "image 2 of a job" in page.get_attribute(".pad canvas", "aria-label")
