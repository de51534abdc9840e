"""What is offered and said of samplers is what the service takes and does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.browser.conftest import Served, Visit
from tests.browser.steps import draw, says, unfold

PICTURE = Path(__file__).parent.parent / "pictures" / "plain.png"


def preset(sampler: str, steps: int) -> dict[str, Any]:
    return {"sampler": sampler, "steps": steps, "spacing": "trailing", "evaluations": steps}


def test_a_tuned_sampler_is_for_whole_chains(visit: Visit, served: Served) -> None:
    """It has its own timesteps, and elsewhere another goes in its place, which is told."""
    models = served.client.get("/models").json()
    [model] = [model for model in models["data"] if model["name"] == "wide"]
    own = model["sampling"]["sampler"]
    model["presets"]["fast"] = preset("tuned", 1)
    page = visit("about:blank")
    page.route("**/models", lambda route: route.fulfill(json=models))
    page.goto(served.url)
    page.wait_for_selector("#go")
    page.select_option("#model", "wide")
    unfold(page)
    page.select_option("#sampler", "ddim")
    page.select_option("#spacing", "quadratic")
    page.select_option("#sampler", "tuned")
    page.wait_for_selector("#spacing:disabled")
    assert page.input_value("#spacing") == ""
    page.fill("#steps", "1")
    with page.expect_request("**/generate") as sent:
        page.click("#go")
    asked = json.loads(sent.value.post_data)
    assert asked["sampler"] == "tuned" and "spacing" not in asked
    says(page, "9 images in")
    page.reload()  # so that the job lends what it was made with, which has no spacing
    page.wait_for_selector("input[name=preset][value=fast]:checked")
    page.click("nav >> text=Noise")
    draw(page)
    page.locator(".lead", has_text="Back goes ddpm: tuned draws no noise").wait_for()
    page.check("input[value=mix]")
    page.set_input_files(".source >> nth=1 >> input[type=file]", PICTURE)
    page.locator(".lead", has_text=f"Back goes {own}: tuned is for whole chains").wait_for()
    with page.expect_response("**/interpolate") as told:
        page.click("#denoise")
    assert told.value.json()["request"]["sampler"] == own
    says(page, "9 images in")


def test_what_is_said_of_a_preset_is_true_of_its_model(visit: Visit, served: Served) -> None:
    """Only all steps of ddpm are the paper's chain."""
    models = served.client.get("/models").json()
    first = models["data"][0]
    page = visit("about:blank")
    page.route("**/models", lambda route: route.fulfill(json=models))

    def hint(name: str) -> str:
        page.check(f"input[name=preset][value={name}]")
        page.wait_for_selector(f"input[name=preset][value={name}]:checked")
        return str(page.inner_text(".chips .hint"))

    few = ("fast", "balanced", "faithful")
    first["presets"] = {name: preset("ddim", n) for n, name in enumerate(few, 1)}
    page.goto(served.url)
    assert hint("faithful") == "ddim in 3 steps: the best that this model gives"
    assert hint("fast").startswith("ddim in 1 step:")
    first["presets"]["faithful"] = preset("ddpm", first["T"])
    page.reload()
    assert "the paper's chain, exactly" in hint("faithful")
