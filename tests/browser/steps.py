"""What a visitor does and sees."""

from __future__ import annotations

import time
from typing import Any

PATIENCE_S = 150.0


def until(page: Any, condition: str) -> None:
    """Look from outside until it holds: the page's policy lets nothing inside it evaluate text."""
    deadline = time.monotonic() + PATIENCE_S
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def unfold(page: Any) -> None:
    """Open the rest of the form."""
    page.click("text=Everything else")
    page.wait_for_selector("#steps:visible")


def fill(page: Any, *, images: int, steps: int, seed: int | None = None) -> None:
    """Fill the form in."""
    if not page.locator("#count").is_visible():
        unfold(page)
    page.fill("#count", str(images))
    page.fill("#steps", str(steps))
    page.fill("#seed", "" if seed is None else str(seed))


def ask(page: Any, *, images: int, steps: int, seed: int | None = None) -> None:
    """Fill the form in and press Generate."""
    fill(page, images=images, steps=steps, seed=seed)
    page.click("#go")


def says(page: Any, text: str) -> None:
    """Wait until the line below the bar says it."""
    deadline = time.monotonic() + PATIENCE_S
    while text not in (told := page.locator("#status").all_inner_texts() or [""])[0]:
        assert time.monotonic() < deadline, f"{told[0]!r}, not {text!r}"
        page.wait_for_timeout(50)


def drawn(page: Any, where: str = "#grid") -> list[str]:
    """The pictures in a place, each as the data: address of a PNG of its pixels: those that came
    with an event and those that were fetched are alike in nothing else."""
    found: list[str] = page.eval_on_selector_all(
        f"{where} img",
        """all => Promise.all(all.map(async image => {
            const whole = Object.assign(new Image(), {src: image.src});
            await whole.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [whole.naturalWidth, whole.naturalHeight];
            canvas.getContext("2d").drawImage(whole, 0, 0);
            return canvas.toDataURL();
        }))""",
    )
    return found


def slide(page: Any, to: int, slider: str = ".time") -> None:
    """Move the slider over t; `to` counts from the noise, 0, up to the image, T."""
    page.eval_on_selector(
        slider,
        "(slider, to) => { slider.value = to;"
        " slider.dispatchEvent(new Event('input', {bubbles: true})); }",
        to,
    )


def job_of(page: Any, *, after: str = "") -> str:
    """The id of the job that the address names (another one than `after`), once it is shown."""
    page.wait_for_url(lambda url: "#job=" in url and not (after and url.endswith(after)))
    job = str(page.url).rpartition("#job=")[2]
    page.wait_for_selector(f".progress[data-job='{job}']")
    return job


def listen(page: Any) -> None:
    """Write down in window.heard what a screen reader reads out by itself."""
    page.evaluate(
        "window.heard = []; new MutationObserver(all => all.forEach(({target}) => {"
        " const region = (target.closest ? target : target.parentElement)"
        "?.closest('[role=status], [role=alert], [aria-live]');"
        " if (region) heard.push(region.textContent); }))"
        ".observe(document, {subtree: true, childList: true, characterData: true})"
    )


def refuse(route: Any) -> None:
    """Answer in the place of the service, as it does where a quota is used up."""
    problem = {"status": 429, "code": "quota_exceeded", "detail": "Too much waits."}
    route.fulfill(status=429, json=problem, content_type="application/problem+json")


def draw(page: Any, pad: str = ".pad canvas") -> None:
    """A seven, with the mouse."""
    box = page.locator(pad).first.bounding_box()

    def at(x: float, y: float) -> tuple[float, float]:
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    page.mouse.move(*at(0.3, 0.25))
    page.mouse.down()
    for point in ((0.7, 0.25), (0.6, 0.5), (0.45, 0.8)):
        page.mouse.move(*at(*point), steps=4)
    page.mouse.up()
