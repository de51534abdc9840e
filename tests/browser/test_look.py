"""Look inside: bits, terms, rate and distortion; the forward chain as a film."""

from __future__ import annotations

import math
from typing import Any

from tests.browser.conftest import Served, Visit
from tests.browser.steps import draw, drawn, job_of, refuse, says, slide


def test_a_picture_is_measured_and_its_noising_filmed(visit: Visit, served: Served) -> None:
    page = visit(served.url + "#look")
    draw(page)
    page.click("#film")
    says(page, "1 image in")
    slide(page, 500)
    page.wait_for_selector(".filmstrip img >> nth=9")
    assert page.inner_text(".of-t dd") == "500"
    noise = job_of(page)
    page.click("#measure")
    measured = job_of(page, after=noise)
    page.wait_for_selector(".bits .plot >> nth=1")
    result = served.client.get(f"/jobs/{measured}").json()["result"]
    assert page.inner_text(".bits .figure b >> nth=0") == f"{result['bits_per_dim']:.3f}"
    page.wait_for_selector(".shares img >> nth=5")
    assert len(set(drawn(page, ".shares"))) == 6
    # The last point of the plot is the whole rate, L_1 … L_{T−1}.
    ratios = rate(page, result["images"][0]["terms"])
    assert math.isclose(ratios, result["L_t"], rel_tol=1e-3)
    # What is refused of the shares is said.
    page.route("**/reconstruct", refuse)
    page.reload()
    page.locator(".bits [role=alert]", has_text="Too much waits.").wait_for()
    # In Queue a film is no thin line.
    page.click("nav >> text=Queue")
    box = page.locator(f".jobs a[href='#job={noise}'] img").bounding_box()
    assert box["height"] > 20 and box["width"] > 5 * box["height"]


def rate(page: Any, terms: dict[str, Any]) -> float:
    """What the page's own arithmetic makes of the terms."""
    found: float = page.evaluate(
        "terms => import('./static/page/look.js').then(({ratesOf}) => ratesOf(terms).at(-1).rate)",
        terms,
    )
    return found
