"""Queue: who works, and the jobs of this browser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.browser.conftest import Served
from tests.browser.steps import ask, job_of, says


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


@pytest.mark.slow
def test_a_paused_queue_is_told(page: Any, served: Served) -> None:
    [queue] = served.client.get("/queue").json()["queues"]
    served.client.post(f"/queue/{queue['name']}/pause")
    try:
        page.click("nav >> text=Queue")
        page.locator(".lead", has_text="Paused").wait_for()
    finally:
        served.client.post(f"/queue/{queue['name']}/resume")
