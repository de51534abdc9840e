"""Queue: who works, and the jobs of this browser."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.browser.conftest import Served, Visit
from tests.browser.steps import ask, drawn, job_of, says


def test_the_queue_tells_who_works_and_links_to_jobs(page: Any, served: Served) -> None:
    ask(page, images=1, steps=5)
    says(page, "1 image in")
    job = job_of(page)
    page.click("nav >> text=Queue")
    page.locator(".figures .figure", has_text="worker").first.wait_for()
    page.locator(".plain", has_text="tiny").first.wait_for()
    page.locator(".plain", has_text="0 of 64 slots taken").first.wait_for()
    page.locator(".figures .figure", has_text="/ 64").first.wait_for()
    row = page.locator(f".jobs a[href='#job={job}']")
    row.locator(".state", has_text="succeeded").wait_for()
    row.click()
    says(page, "1 image in")
    assert job_of(page) == job


def test_work_is_told_as_far_as_it_is_known(visit: Visit, served: Served) -> None:
    """Queues are worked off side by side."""
    told = served.client.get("/queue").json()
    [queue] = told["queues"]
    page = visit("about:blank")
    page.route("**/queue", lambda route: route.fulfill(json=told))
    for first, second, words in ((40, 50, "50 seconds"), (40, None, "–")):
        times = {"a": first, "b": second}
        told["queues"] = [
            {**queue, "name": name, "image_steps": 9_000, "eta_s": eta_s}
            for name, eta_s in times.items()
        ]
        page.goto(served.url + "#queue")
        page.reload()
        page.locator(".figure:has-text('of work left') b", has_text=words).wait_for()


def test_a_job_is_asked_for_again_once_it_has_answered(visit: Visit, served: Served) -> None:
    """And while somebody looks."""
    page = visit("about:blank")
    held: list[Any] = []
    page.route("**/jobs/slow", lambda route: held.append(route))
    page.clock.install()
    page.goto(served.url)
    known = [{"id": "slow", "kind": "generate", "created": "2026-01-01T00:00:00Z", "title": "one"}]
    page.evaluate("jobs => localStorage.setItem('ddpm-jobs', jobs)", json.dumps(known))
    page.click("nav >> text=Queue")

    def pass_by() -> int:
        for _ in range(5):
            page.clock.run_for(4_100)
            page.wait_for_timeout(20)
        return len(held)

    assert pass_by() == 1
    running = {"id": "slow", "status": "running", "progress": {"step": 1, "total": 4}}
    held[0].fulfill(json=running)
    page.locator(".jobs .state", has_text="25 %").wait_for()
    assert pass_by() == 2
    page.evaluate("void Object.defineProperty(document, 'hidden', {value: true})")
    held[1].fulfill(json={**running, "progress": {"step": 2, "total": 4}})
    page.locator(".jobs .state", has_text="50 %").wait_for()
    assert pass_by() == 2


def test_pictures_are_fetched_once_and_not_kept_for_ever(visit: Visit, served: Served) -> None:
    body = {"model": "tiny", "num_images": 1, "steps": 3}
    wait = {"Prefer": "wait=60"}
    job = served.client.post("/generate", json=body, headers=wait).json()
    page = visit("about:blank")
    page.add_init_script(
        "window.held = new Set(); const {createObjectURL, revokeObjectURL} = URL;"
        "URL.createObjectURL = b => { const u = createObjectURL(b); held.add(u); return u; };"
        "URL.revokeObjectURL = u => { held.delete(u); revokeObjectURL(u); }"
    )
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(served.url)))
    page.route("**/events?*", lambda route: None)  # which would bring them too
    page.goto(served.url)
    known = [{**job, "created": job["created_at"], "title": "one", "done": True}]
    page.evaluate("jobs => localStorage.setItem('ddpm-jobs', jobs)", json.dumps(known))
    for _ in range(2):
        page.click("nav >> text=Queue")
        page.click(f".jobs a[href='#job={job['id']}']:has(img)")
        page.wait_for_selector("#grid img")
        page.wait_for_selector(".strip img")
        page.click("nav >> text=Noise")
        page.wait_for_selector(".recent img")
    of_job = [path for path in asked if path.endswith(".png") and job["id"] in path]
    assert len(of_job) == len(set(of_job))
    assert {path.rpartition("/")[2] for path in of_job} >= {"0.png", "grid.png"}
    page.evaluate(
        "() => import('./static/page/sources.js').then(({fetched}) => Promise.all("
        "Array.from({length: 320}, (_, i) => fetched({url: `static/page/icon.svg?${i}`}))))"
    )
    assert page.evaluate("held.size") <= 300
    page.click("nav >> text=Generate")  # what is shown is there, whatever was forgotten
    page.wait_for_selector("#grid img")
    assert len(drawn(page)) == 1


@pytest.mark.slow
def test_a_paused_queue_is_told(page: Any, served: Served) -> None:
    [queue] = served.client.get("/queue").json()["queues"]
    served.client.post(f"/queue/{queue['name']}/pause")
    try:
        page.click("nav >> text=Queue")
        page.locator(".lead", has_text="Paused").wait_for()
    finally:
        served.client.post(f"/queue/{queue['name']}/resume")
