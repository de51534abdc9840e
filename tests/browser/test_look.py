"""Look inside: bits, terms, rate and distortion; the forward chain as a film."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from tests.browser.conftest import Served, Visit
from tests.browser.steps import draw, drawn, job_of, refuse, says, slide

PICTURE = Path(__file__).parent.parent / "pictures" / "plain.png"


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


def test_rates_are_told_of_all_terms_alone(visit: Visit, served: Served) -> None:
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    body = {"model": "wide", "images": [picture], "mode": "full", "terms": [10, 50, 90]}
    wait = {"Prefer": "wait=60"}
    job = served.client.post("/likelihood", json=body, headers=wait).json()
    page = visit(f"{served.url}#job={job['id']}")
    page.locator(".bits .hint", has_text="3 terms of 100 were asked for").wait_for()
    assert page.locator(".bits .plot, .shares").count() == 0
    # Numbers, as they are rounded.
    told = page.evaluate(
        "all => import('./static/page/words.js').then(({compact}) => all.map(compact))",
        [0.00996, 99_960, 0.000123, 0.01, -20_000],
    )
    assert told == ["1.0·10⁻²", "1.0·10⁵", "1.2·10⁻⁴", "0.0100", "-2.0·10⁴"]


def rate(page: Any, terms: dict[str, Any]) -> float:
    """What the page's own arithmetic makes of the terms."""
    found: float = page.evaluate(
        "terms => import('./static/page/look.js').then(({ratesOf}) => ratesOf(terms).at(-1).rate)",
        terms,
    )
    return found
