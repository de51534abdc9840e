"""Who cannot see, cannot point, or has a small screen: axe, the keyboard, a phone."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Served, Visit
from tests.browser.steps import ask, draw, drawn, says

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")
PICTURE = Path(__file__).parent.parent / "pictures" / "plain.png"
PHONE = {"width": 390, "height": 844}


def check(page: Any, where: str) -> None:
    """No violation of any rule of axe, best practices included."""
    found = axe.Axe().run(page).response["violations"]
    told = [(rule["id"], [node["target"] for node in rule["nodes"]]) for rule in found]
    assert told == [], where


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_no_place_violates_a_rule(visit: Visit, served: Served, scheme: str) -> None:
    page = visit(served.url, color_scheme=scheme)
    page.wait_for_selector("#go")
    check(page, "before the first run")
    ask(page, images=4, steps=10)
    says(page, "4 images in")
    check(page, "after a run")
    page.click("text=Download")
    check(page, "a menu")
    page.click("#code")
    check(page, "a dialog")
    page.keyboard.press("Escape")
    page.click("nav >> text=Noise")
    draw(page)
    page.wait_for_selector(".strip img >> nth=1")
    check(page, "noise")
    page.click("nav >> text=Look inside")
    page.wait_for_selector("#measure:enabled")
    check(page, "look inside")
    page.click("nav >> text=Queue")
    page.locator(".jobs .state", has_text="succeeded").wait_for()
    check(page, "queue")
    page.route(
        re.compile("/(queue|models)$"),
        lambda route: route.fulfill(status=401, json={"code": "unauthorized"}),
    )
    page.wait_for_selector("#key")
    check(page, "a key")


def mixture(served: Served) -> str:
    """The id of a job whose nine pictures are one row."""
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    body = {"model": "wide", "images": [picture] * 2, "t": 50, "steps": 2}
    lambdas = {"lambdas": [i / 8 for i in range(9)]}
    job = served.client.post(
        "/interpolate", json={**body, **lambdas}, headers={"Prefer": "wait=60"}
    )
    return str(job.json()["id"])


def test_a_phone_has_the_button_and_the_result_in_sight(visit: Visit, served: Served) -> None:
    page = visit(served.url, viewport=PHONE, has_touch=True, is_mobile=True)
    page.wait_for_selector("#go")
    box = page.locator("#go").bounding_box()
    assert box["y"] + box["height"] <= PHONE["height"] and box["width"] > 200
    page.tap("#go")
    says(page, "9 images in")
    page.wait_for_selector("#grid img >> nth=8")
    for place in ("#grid button >> nth=0", "#grid button >> nth=8", "#go"):
        box = page.locator(place).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= PHONE["height"], place
    for place in ("generate", "noise", "look", "queue"):
        page.goto(f"{served.url}#{place}")
        page.wait_for_selector(f"main.{place}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == PHONE["width"], place
    page.goto(f"{served.url}#job={mixture(served)}")
    page.wait_for_selector(".grid.wide img >> nth=8")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    check(page, "on a phone")


@pytest.mark.slow
def test_all_of_a_generation_goes_by_keyboard(page: Any) -> None:
    page.wait_for_selector("#go")
    page.focus("input[name=label]:checked")
    page.keyboard.press("ArrowRight")
    assert page.locator("input[name=label][value='0']").is_checked()
    page.focus("#go")
    page.keyboard.press("Enter")
    says(page, "9 images in")
    page.focus("#grid button >> nth=4")
    page.keyboard.press("Enter")
    page.focus(".time")
    last = drawn(page)
    page.keyboard.press("PageDown")
    assert drawn(page) != last
    assert page.get_attribute(".time", "aria-valuetext").startswith("t = ")
    page.focus(".menu summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert "512 px" in page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
