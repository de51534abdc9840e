"""The form: it keeps what is chosen from place to place, and asks for just that."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Served, Visit
from tests.browser.steps import ask, draw, drawn, fill, job_of, says, slide, unfold, until

PICTURE = Path(__file__).parent.parent / "pictures" / "plain.png"
KINDS = ("generate", "noise", "likelihood")
WAIT = {"Prefer": "wait=60"}


def request_of(served: Served, job: str) -> dict[str, Any]:
    request: dict[str, Any] = served.client.get(f"/jobs/{job}").json()["request"]
    return request


def test_a_number_is_written_as_one_writes(page: Any) -> None:
    """What is half written is not completed, and what cannot be is refused where it can be seen."""
    unfold(page)
    page.check("input[name=label][value='1']")
    for field, text in (("#count", "4"), ("#steps", "12"), ("#guidance", "2.50")):
        page.click(field)
        page.keyboard.press("Control+A")
        page.keyboard.press("Backspace")
        assert page.input_value(field) == ""
        page.keyboard.type(text)
        assert page.input_value(field) == text
    # What is far too large is no reason to draw so many places for pictures.
    page.fill("#count", "2000000")
    page.wait_for_selector(".blank .picture >> nth=35")
    assert page.locator(".blank .picture").count() == 36
    page.fill("#count", "4")
    # What is left empty is as it was; what is wrong and folded away comes out to be seen.
    page.fill("#steps", "")
    page.focus("#seed")
    until(page, "document.getElementById('steps').value === '12'")
    page.fill("#steps", "0")
    page.click("text=Everything else")
    page.wait_for_selector("#steps", state="hidden")
    page.click("#go")
    page.wait_for_selector("#steps:visible")
    assert "#job" not in page.url
    page.fill("#steps", "12")
    with page.expect_request("**/generate") as sent:
        page.click("#go")
    asked = json.loads(sent.value.post_data)
    assert (asked["steps"], asked["num_images"], asked["guidance"]) == (12, 4, 2.5)


def test_the_desk_stays_from_place_to_place(page: Any, served: Served) -> None:
    page.check("input[name=label][value='2']")
    ask(page, images=2, steps=9, seed=5)
    says(page, "2 images in")
    first = job_of(page)
    page.click("text=Noise this")
    page.locator(".pad canvas[aria-label*='image 1 of a job']").wait_for()
    assert page.locator("input[name=label]:checked").get_attribute("value") == "2"
    page.click("text=Clear")
    unfold(page)
    assert page.input_value("#steps") == "9"
    # The seed that is written is that of the noise; "Other noise" takes it back.
    draw(page)
    page.fill("#seed", "77")
    slide(page, 400)
    page.click("#denoise")
    denoised = job_of(page, after=first)
    assert request_of(served, denoised)["seed"] == 77
    page.click("#reseed")
    assert page.input_value("#seed") == ""
    # The same picture is taken again, though the address has named it before.
    page.click("nav >> text=Generate")
    assert page.input_value("#count") == "2"
    page.click("text=Noise this")
    page.locator(".pad canvas[aria-label*='image 1 of a job']").wait_for()
    # Another model has other sizes, classes and samplers, and the page none of the first's.
    page.check("input[value=restore]")
    page.click("text=Lower half")
    page.select_option("#model", "wide")
    page.locator(".pad canvas[aria-label*='nothing yet']").wait_for()
    assert page.locator("input[name=label]").count() == 0
    page.locator("text=Draw or take a picture first").wait_for()
    page.select_option("#model", "tiny")
    page.locator("text=50 % of it is unknown").wait_for()
    # What was brushed is there after a look elsewhere.
    page.check("input[value=denoise]")
    page.check("input[value=restore]")
    until(page, BRUSHED)


BRUSHED = """(() => {
  const canvas = document.getElementById("brush");
  const all = canvas?.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return all?.filter((a, i) => i % 4 === 3 && a > 0).length === all?.length / 8;
})()"""


@pytest.mark.parametrize(
    "kind",
    ["reconstruct", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)],
)
def test_a_link_lends_the_model_and_settings_to_each_place(
    visit: Visit, served: Served, kind: str
) -> None:
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    bodies: dict[str, dict[str, Any]] = {
        "generate": {"num_images": 64, "steps": 7},  # more than the form would ask for
        "reconstruct": {"images": [picture], "t": 50, "steps": 5, "num_images": 4},
        "noise": {"images": [picture], "t": [1, 100]},
        "likelihood": {"images": [picture], "mode": "full"},
    }
    job = served.client.post(
        f"/{kind}", json={"model": "wide", **bodies[kind]}, headers=WAIT
    ).json()
    page = visit(f"{served.url}#job={job['id']}")
    says(page, " in ")
    until(page, "document.getElementById('model')?.value === 'wide'")
    # At every place: a job that is not of Generate is not shown there.
    for place in ("Noise", "Look inside", "Generate"):
        page.click(f"nav >> text={place}")
        page.locator("nav [aria-current]", has_text=place).wait_for()
        assert page.input_value("#model") == "wide"
    assert page.locator(".progress").count() == (1 if kind == "generate" else 0)
    unfold(page)
    own = {"generate": "7", "reconstruct": "10"}  # 10 of 100 are 5 from t = 50 on
    assert page.input_value("#steps") == own.get(kind, "100") and page.input_value("#sampler")
    assert page.input_value("#count") == ("36" if kind == "generate" else "9")


@pytest.mark.slow
def test_what_a_job_shows_is_of_its_own_picture_and_model(visit: Visit, served: Served) -> None:
    """Whatever lies on the desk by now."""
    page = visit(served.url + "#look")
    page.select_option("#model", "wide")
    draw(page)
    page.click("#measure")
    says(page, "100 terms in")
    page.wait_for_selector(".shares img >> nth=5")
    shares = drawn(page, ".shares")
    page.click("text=Clear")
    page.select_option("#model", "tiny")
    page.wait_for_timeout(300)
    assert drawn(page, ".shares") == shares
    with page.expect_request("**/reconstruct") as sent:
        page.reload()
    page.wait_for_selector(".shares img >> nth=5")
    assert page.input_value("#model") == "wide"
    assert json.loads(sent.value.post_data)["model"] == "wide"


@pytest.mark.slow
def test_a_branch_by_one_step_would_be_one_picture(page: Any, served: Served) -> None:
    """The last step draws no noise, so there are two at least."""
    page.check("input[name=label][value='1']")
    unfold(page)
    page.select_option("#sampler", "ddpm")
    ask(page, images=1, steps=5)
    says(page, "1 image in")
    trunk = job_of(page)
    slide(page, 800)
    page.click("#branch")
    branch = request_of(served, job_of(page, after=trunk))
    assert branch["sampler"] == "ddpm" and branch["steps"] == 2
    says(page, "4 images in")
    assert len(set(drawn(page))) == 4


def test_back_with_a_dialog_open_is_no_end_of_the_page(page: Any, served: Served) -> None:
    fill(page, images=1, steps=3)
    page.click("#go")
    first = job_of(page)
    says(page, "1 image in")
    page.click("#go")
    job_of(page, after=first)
    says(page, "1 image in")
    page.reload()  # so that the first is not known here
    says(page, "1 image in")
    page.click("#code")
    page.wait_for_selector("dialog")
    page.go_back()
    assert job_of(page) == first
    says(page, "1 image in")


@pytest.mark.slow
def test_where_the_page_may_not_copy_the_code_is_selected(page: Any) -> None:
    ask(page, images=1, steps=3)
    says(page, "1 image in")
    page.click("#code")
    page.evaluate("void (navigator.clipboard.writeText = () => Promise.reject(new Error()))")
    page.click("dialog >> text=Copy")
    page.locator("dialog [role=status]", has_text="Selected").wait_for()
    assert page.evaluate("getSelection().toString()").startswith("job=")


def test_a_manifest_asks_for_no_other_address(page: Any) -> None:
    page.wait_for_selector("#go")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(f"{request.method} {request.url}"))
    evil = {"model": "tiny", "kind": "queue/ddpm/pause"}
    page.set_input_files(
        "input[accept*=json]",
        {"name": "m.json", "mimeType": "application/json", "buffer": json.dumps(evil).encode()},
    )
    page.locator("[role=alert]", has_text="kind").wait_for()
    assert not [url for url in asked if url.startswith("POST")]


@pytest.mark.slow
def test_a_measurement_is_canceled(visit: Visit, served: Served) -> None:
    page = visit(served.url + "#look")
    draw(page)
    page.click("#measure")
    page.click("#cancel")
    says(page, "Canceled")
    page.wait_for_selector("#measure:enabled")
    assert page.locator("#cancel").count() == 0


def test_two_clicks_are_one_job(visit: Visit, served: Served) -> None:
    page = visit(served.url + "#look")
    draw(page)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(f"{request.method} {request.url}"))
    page.wait_for_selector("#film:enabled")
    page.dblclick("#film", force=True)
    job_of(page)
    assert len([url for url in asked if url == f"POST {served.url}noise"]) == 1


def test_what_could_not_be_read_is_forgotten_with_the_next_picture(
    visit: Visit, served: Served
) -> None:
    page = visit(served.url + "#noise")
    page.wait_for_selector(".pad canvas")
    page.set_input_files(".source input[type=file]", Path(__file__))
    page.locator("[role=alert]", has_text="test_desk.py").wait_for()
    page.set_input_files(".source input[type=file]", PICTURE)
    page.locator(".pad canvas[aria-label*='plain.png']").wait_for()
    page.wait_for_selector("[role=alert]", state="detached")


def test_what_was_wanted_last_lies_there(visit: Visit, served: Served) -> None:
    """Even where what was wanted before it comes later."""
    body = {"model": "tiny", "num_images": 2, "steps": 3}
    job = served.client.post("/generate", json=body, headers=WAIT).json()
    page = visit(served.url + "#noise")
    pad = page.locator(".pad canvas")
    pad.wait_for()
    known = [{**job, "created": job["created_at"], "title": "two", "done": True}]
    page.evaluate("jobs => localStorage.setItem('ddpm-jobs', jobs)", json.dumps(known))
    held: list[Any] = []
    page.route("**/images/0.png", lambda route: held.append(route))

    def let_come() -> None:
        assert held
        with page.expect_response("**/images/0.png"):
            while held:
                held.pop().continue_()
        page.wait_for_timeout(300)

    link = f"#noise&picture={job['id']}"
    page.evaluate(f"location.hash = '{link}/0'")
    while not held:
        page.wait_for_timeout(20)
    page.evaluate(f"location.hash = '{link}/1'")
    page.locator(".pad canvas[aria-label*='image 2 of a job']").wait_for()
    let_come()
    assert "image 2 of a job" in pad.get_attribute("aria-label")
    # One of those made earlier, and then a drawing.
    page.reload()
    page.click(".recent button")
    draw(page)
    page.locator(".pad canvas[aria-label*='your drawing']").wait_for()
    let_come()
    assert "your drawing" in pad.get_attribute("aria-label")


def test_a_browser_that_keeps_nothing_will_do(visit: Visit, served: Served) -> None:
    page = visit("about:blank")
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('forbidden'); }})"
    )
    page.goto(served.url)
    ask(page, images=1, steps=3)
    says(page, "1 image in")
    page.click("nav >> text=Queue")
    page.locator(".jobs .state", has_text="succeeded").wait_for()


@pytest.mark.slow
@pytest.mark.parametrize("link", ["#job=../queue", "#job=..", "#noise&picture=../queue/0"])
def test_a_link_leads_to_jobs_alone(visit: Visit, served: Served, link: str) -> None:
    page = visit("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(served.url)))
    page.goto(served.url + link)
    page.locator("text=/no such job|no job/").first.wait_for()
    told = [url for url in asked if url.startswith("jobs/")]
    assert told and not [url for url in asked if url == "queue/images/0.png"]


@pytest.mark.slow
def test_how_many_wait_is_told_while_they_do(page: Any, served: Served) -> None:
    [queue] = served.client.get("/queue").json()["queues"]
    served.client.post(f"/queue/{queue['name']}/pause")
    try:
        body = {"model": "tiny", "num_images": 1, "steps": 2}
        before = [served.client.post("/generate", json=body).json()["id"] for _ in range(2)]
        ask(page, images=1, steps=3)
        says(page, "2 jobs before this one")
        served.client.post(f"/jobs/{before[0]}/cancel")
        says(page, "1 job before this one")
    finally:
        served.client.post(f"/queue/{queue['name']}/resume")
    says(page, "1 image in")
