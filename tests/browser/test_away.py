"""What the page says and does when something of the service is away."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jobs.settings import Settings
from jobs.store.writer import JobStore
from tests.app.conftest import CARD, serving
from tests.browser.conftest import Served, Visit
from tests.browser.steps import ask, drawn, job_of, listen, says, slide, until


def test_an_api_killed_in_mid_stream_is_waited_for(page: Any, served: Served) -> None:
    ask(page, images=4, steps=600)
    job = job_of(page)
    listen(page)
    says(page, "at t = ")
    served.kill("api")
    page.locator("#away", has_text="Reconnecting…").wait_for()
    says(page, "4 images in")
    assert job_of(page) == job and len(set(drawn(page))) == 4
    page.wait_for_selector("#away", state="detached")
    # What is read out: not the seconds until it asks again, nor each t.
    heard = " | ".join(page.evaluate("heard"))
    assert "Reconnecting…" in heard and "4 images in" in heard
    assert not re.search("at t = | left|Again in|Asking", heard), heard


def test_without_a_worker_a_job_waits_and_says_so(visit: Visit, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url, janitor_s=0.5)
    store = JobStore.connect(settings)
    store.publish_card(CARD.model_copy(update={"shape": (1, 32, 32)}))
    with serving(settings) as client:
        page = visit(str(client.base_url))
        page.locator(".presence", has_text="no worker").wait_for()
        # The recording is there all the same, with all of its chain.
        page.wait_for_selector("#grid img >> nth=8")
        last = drawn(page)
        slide(page, 0)
        assert set(drawn(page)).isdisjoint(last)
        page.click("#go")
        says(page, "no worker is running. The job is kept")
        assert client.get("/jobs").json()["data"][0]["status"] == "queued"
    store.redis.close()


def test_a_key_is_asked_for_where_keys_are_set(visit: Visit, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url, janitor_s=0.5, api_keys=["open-sesame"])
    store = JobStore.connect(settings)
    store.publish_card(CARD)
    with serving(settings) as client:
        page = visit(str(client.base_url))
        # It has the focus, which goes nowhere else, and it stays.
        until(page, "document.activeElement.id === 'key'")
        for key in ("Tab", "Tab", "Tab", "Tab", "Escape", "Escape", "Escape"):
            page.keyboard.press(key)
            assert not page.evaluate("document.activeElement.matches('#app > :not(dialog) *')")
        page.locator("dialog[open] #key").wait_for()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.locator("#key-fault", has_text="not accepted").wait_for()
        # One that no request could carry is none either, here and after a reload.
        page.fill("#key", "open-sesame\u200b")
        page.keyboard.press("Enter")
        until(page, "localStorage.getItem('ddpm-key').length === 12")
        page.locator("#key-fault", has_text="not accepted").wait_for()
        page.reload()
        page.locator("#key-fault", has_text="not accepted").wait_for()
        page.fill("#key", "open-sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#go")
        page.wait_for_selector("#key", state="detached")
        page.reload()
        page.wait_for_selector("#go")
        assert not page.locator("#key").is_visible()
        page.click("#forget")
        page.wait_for_selector("#key")
    store.redis.close()


def test_what_was_refused_is_asked_again_once_something_is_not(page: Any) -> None:
    """The form goes, and nothing waits for ever for a key that nobody is asked for."""
    page.wait_for_selector("#go")
    held: list[Any] = []
    page.route("**/models", lambda route: held.append(route))
    page.route("**/queue", lambda route: route.fulfill(status=401, json={}))
    page.wait_for_selector("#key")
    page.unroute("**/queue")
    with page.expect_response("**/queue") as again:
        while not held:
            page.wait_for_timeout(20)
        held.pop().continue_()
    assert again.value.status == 200
    page.wait_for_selector("#key", state="detached")


@pytest.mark.slow
def test_a_killed_worker_is_a_pause(page: Any, served: Served) -> None:
    ask(page, images=9, steps=1000)
    says(page, "at t = ")
    told: list[int] = []
    served.kill("worker")
    while "at t = " in (said := page.inner_text("#status")):
        told.append(int(said.partition("at t = ")[2].split()[0]))
        page.wait_for_timeout(200)
    says(page, "9 images in")
    assert told == sorted(told, reverse=True) and len(set(drawn(page))) == 9
