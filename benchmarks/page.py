"""The page in Chromium: its bytes, what moves while it streams, a slow line, and its memory.

    .venv/bin/python benchmarks/page.py [--url http://localhost:8000] [--generations 200]

Needs a service with the MNIST model that has nothing else to do, and `chromium` on the PATH. Bytes
and layout shift do not depend on how busy the machine is; the times do.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from playwright.sync_api import sync_playwright

LIMIT_S = 600
SLOW_3G = {"downloadThroughput": 50_000, "uploadThroughput": 50_000, "latency": 400}
OBSERVE = """window.moved = 0; new PerformanceObserver(all => all.getEntries().forEach(
    entry => { window.moved += entry.value; })).observe({type: 'layout-shift', buffered: true});"""
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def until(page: Any, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        page.wait_for_timeout(50)


def done(page: Any) -> bool:
    return "seed" in str(page.inner_text("#status"))


def generate(page: Any, *, steps: int, images: int = 9) -> None:
    if not page.locator("#count").is_visible():
        page.click("text=Everything else")
    page.fill("#count", str(images))
    page.fill("#steps", str(steps))
    before = page.url
    page.click("#go")
    until(page, lambda: page.url != before)
    until(page, lambda: done(page))


def kind_of(url: str) -> str:
    if "/static/" in url and url.rpartition(".")[2] in ("js", "css", "svg"):
        return "scripts and styles"
    if url.rpartition(".")[2] in ("webp", "png"):
        return "pictures"
    return "the page itself" if url.rstrip("/").count("/") == 2 else "answers of the API"


def first_visit(browser: Any, url: str) -> None:
    page = browser.new_page(viewport=DESKTOP)
    page.add_init_script(OBSERVE)
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}

    asked: list[Any] = []
    page.on("requestfinished", lambda request: asked.append(request))
    page.goto(url)
    page.wait_for_selector("#grid img")
    page.wait_for_timeout(2000)
    for request in asked:
        kind = kind_of(request.url.partition("?")[0])
        sizes[kind] = sizes.get(kind, 0) + request.sizes()["responseBodySize"]
        counts[kind] = counts.get(kind, 0) + 1
    print("| first visit | requests | bytes |\n|---|---|---|")
    for kind, size in sorted(sizes.items()):
        print(f"| {kind} | {counts[kind]} | {size:,} |")
    light = sum(size for kind, size in sizes.items() if kind != "pictures")
    print(f"| **all but pictures** | | **{light:,}** |")
    page.close()


def painted(page: Any) -> float:
    """First contentful paint, ms after the visitor asked for the page."""
    found: float = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    )
    return found


def first_paint(browser: Any, url: str, visits: int = 9) -> None:
    """Nothing in the browser's cache, each time."""
    print("\n| first paint, ms | median | least | most |\n|---|---|---|---|")
    for name, line in (("this machine", None), ("400 kbit/s, 400 ms", SLOW_3G)):
        found = []
        for _ in range(visits if line is None else 3):
            context = browser.new_context(viewport=DESKTOP)
            page = context.new_page()
            if line is not None:
                session = context.new_cdp_session(page)
                session.send("Network.enable")
                session.send("Network.emulateNetworkConditions", {"offline": False, **line})
            page.goto(url, timeout=LIMIT_S * 1000)
            page.wait_for_selector("#go", timeout=LIMIT_S * 1000)
            found.append(painted(page))
            context.close()
        print(f"| {name} | {median(found):.0f} | {min(found):.0f} | {max(found):.0f} |", flush=True)


def layout_shift(browser: Any, url: str) -> None:
    print("| layout shift | of the first visit | while 9 × 100 steps stream |\n|---|---|---|")
    for name, viewport in (("1280 × 800", DESKTOP), ("390 × 844", PHONE)):
        page = browser.new_page(viewport=viewport)
        page.add_init_script(OBSERVE)
        page.goto(url)
        page.wait_for_selector("#grid img")
        page.wait_for_timeout(1000)
        first = page.evaluate("window.moved")
        page.evaluate("window.moved = 0")
        page.click("#go")
        until(page, lambda page=page: page.locator("#status").count() > 0 and done(page))
        page.wait_for_timeout(500)
        print(f"| {name} | {first:.4f} | {page.evaluate('window.moved'):.4f} |")
        page.close()


def slow_line(browser: Any, url: str) -> None:
    """400 kbit/s and 400 ms: how many different pictures came before the last."""
    page = browser.new_page(viewport=PHONE)
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", {"offline": False, **SLOW_3G})
    page.goto(url, timeout=LIMIT_S * 1000)
    page.wait_for_selector("#go", timeout=LIMIT_S * 1000)
    page.click("#go")
    seen: set[str] = set()
    until(page, lambda: page.locator("#status").count() > 0)
    while not done(page):
        seen.update(page.eval_on_selector_all("#grid img", "a => a.slice(0, 1).map(i => i.src)"))
        page.wait_for_timeout(50)
    print(f"\n400 kbit/s, 400 ms: {len(seen)} states of the first image before the last\n")
    page.close()


def memory(browser: Any, url: str, generations: int) -> None:
    page = browser.new_page(viewport=DESKTOP)
    page.goto(url)
    page.wait_for_selector("#go")
    session = page.context.new_cdp_session(page)
    print("| generations | heap, MiB | DOM nodes |\n|---|---|---|")
    for made in range(1, generations + 1):
        generate(page, steps=5)
        if made in (10, 20, generations // 2, generations):
            session.send("HeapProfiler.collectGarbage")
            heap = session.send("Runtime.getHeapUsage")["usedSize"] / 2**20
            nodes = session.send("Memory.getDOMCounters")["nodes"]
            print(f"| {made} | {heap:.1f} | {nodes:,} |", flush=True)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000/")
    parser.add_argument("--generations", type=int, default=200)
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        first_visit(browser, args.url)
        first_paint(browser, args.url)
        layout_shift(browser, args.url)
        slow_line(browser, args.url)
        if args.generations:
            memory(browser, args.url, args.generations)
        browser.close()


if __name__ == "__main__":
    main()
