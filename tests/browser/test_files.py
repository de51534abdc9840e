"""Branches, files out and in, code to take along, and a page that is not at the root."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from app.main import create_app
from jobs.settings import Settings
from jobs.store.writer import JobStore
from tests.app.conftest import CARD, serving
from tests.browser.conftest import Served, Visit
from tests.browser.steps import ask, draw, drawn, job_of, says, slide

PREFIX = "/some/where"


def test_a_branch_goes_on_from_a_state_and_hangs_in_the_tree(page: Any, served: Served) -> None:
    ask(page, images=4, steps=20, seed=3)
    says(page, "4 images in")
    trunk = job_of(page)
    page.click("#grid button >> nth=2")
    slide(page, 500)
    t = int(page.inner_text(".of-t dd"))
    page.check("input[name=label][value='1']")
    page.check("input[value=fast]")  # which draws no noise, but branches do
    page.click("#branch")
    branch = job_of(page, after=trunk)
    says(page, "4 images in")
    request = served.client.get(f"/jobs/{branch}").json()["request"]
    fast = served.client.get(f"/models/{request['model']}").json()["presets"]["fast"]
    assert request["source"] == {"job": trunk, "t": t, "index": 2}
    assert fast["steps"] < 100 and request["sampler"] == "ddpm"
    assert request["class_label"] == 1 and request["steps"] == int(100 * t / 1000 + 0.5)
    assert len(set(drawn(page))) == 4
    tree = page.locator(".branches li")
    assert tree.count() == 2
    assert f"t = {t}" in page.inner_text(".branches [aria-current]")
    page.click(f".branches a[href='#job={trunk}']")
    says(page, "seed 3")


def saved(page: Any, words: str) -> Path:
    """What an entry of the menu gives."""
    page.click("text=Download")
    with page.expect_download() as waiting:
        page.click(f".menu button:has-text('{words}')")
    return Path(waiting.value.path())


@pytest.mark.slow
def test_files_of_a_job_are_what_they_say(page: Any, served: Served) -> None:
    ask(page, images=3, steps=10)
    says(page, "3 images in")
    with Image.open(saved(page, "512 px")) as image:
        assert image.size == (512, 512)
    with Image.open(saved(page, "film")) as film:
        assert getattr(film, "n_frames", 1) > 5
    arrays = np.load(io.BytesIO(saved(page, "npz").read_bytes()))
    first = served.client.get(f"/jobs/{job_of(page)}/images/0.npy").content
    assert np.array_equal(arrays["0000"], np.load(io.BytesIO(first)))


@pytest.mark.slow
@pytest.mark.parametrize("words", ["Manifest", "512 px"])
def test_a_manifest_makes_the_same_images_again(page: Any, words: str) -> None:
    ask(page, images=2, steps=10)
    says(page, "2 images in")
    job, images = job_of(page), drawn(page)
    path = saved(page, words)
    page.set_input_files("input[accept*=json]", path)
    job_of(page, after=job)
    says(page, "2 images in")
    assert drawn(page) == images


@pytest.mark.slow
def test_a_file_without_a_manifest_is_told(page: Any, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps([1, 2]))
    page.set_input_files("input[accept*=json]", tmp_path / "other.json")
    page.locator("[role=alert]", has_text="other.json: holds no manifest").wait_for()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("reconstruct", "was made from a picture, and a manifest holds none: bring it at Noise"),
        pytest.param("interpolate", "two pictures", marks=pytest.mark.slow),
        pytest.param("likelihood", "bring it at Look inside", marks=pytest.mark.slow),
    ],
)
def test_a_manifest_of_a_picture_says_what_is_missing(page: Any, kind: str, words: str) -> None:
    made = {"kind": kind, "model": "tiny", "source": "image", "t": 50}
    page.set_input_files(
        "input[accept*=json]",
        {"name": "m.json", "mimeType": "application/json", "buffer": json.dumps(made).encode()},
    )
    page.locator("[role=alert]", has_text=words).wait_for()


# What node is told before the code, the pictures that a person would have chosen, and after it.
FILES_OF_NODE = """
const {readFileSync, writeFileSync} = await import("node:fs");
const files = [new File([readFileSync("picture.png")], "picture.png")];
"""
WRITTEN_BY_NODE = """
writeFileSync("images.png", Buffer.from(await images.arrayBuffer()));
"""
# The same in a page, from bytes in base64, and to bytes in base64.
FILES_OF_A_PAGE = """
const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
const files = [new File([bytes(picture)], "picture.png")];
"""
WRITTEN_BY_A_PAGE = """
return btoa(String.fromCharCode(...new Uint8Array(await images.arrayBuffer())));
"""


def run_code(page: Any, tmp_path: Path, language: str) -> None:
    """Take the code that is shown, and run it."""
    page.click("#code")
    page.click(f"dialog button:has-text('{language.split()[0]}')")
    code = page.inner_text("dialog pre")
    page.keyboard.press("Escape")
    if language == "JavaScript in a page":
        mine = tmp_path / "picture.png"
        given = base64.b64encode(mine.read_bytes() if mine.exists() else b"").decode()
        body = f"async (picture) => {{{FILES_OF_A_PAGE}{code}{WRITTEN_BY_A_PAGE}}}"
        (tmp_path / "images.png").write_bytes(base64.b64decode(page.evaluate(body, given)))
        return
    # A picture of one's own is read where the code asks for it.
    before = FILES_OF_NODE if "of files" in code else FILES_OF_NODE.replace("const files", "//")
    command = {
        "curl": ["bash", "-c", code],
        "Python": [sys.executable, "-c", code],
        "JavaScript": ["node", "--input-type=module", "-e", before + code + WRITTEN_BY_NODE],
    }[language]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, env={"PATH": "/usr/bin:/bin"})


@pytest.mark.slow
@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript", "JavaScript in a page"])
def test_the_code_gives_the_same(page: Any, tmp_path: Path, language: str) -> None:
    needed = {"curl": "curl", "JavaScript": "node"}.get(language)
    if needed is not None and shutil.which(needed, path="/usr/bin:/bin") is None:
        pytest.skip(f"there is no {needed} here")
    ask(page, images=4, steps=10)
    says(page, "4 images in")
    run_code(page, tmp_path, language)
    grid = saved(page, "one PNG")
    with Image.open(tmp_path / "images.png") as ours, Image.open(grid) as theirs:
        small = theirs.resize(ours.size, Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(ours), np.asarray(small))
    # And of a picture of one's own.
    page.click("nav >> text=Noise")
    draw(page)
    (tmp_path / "images.png").unlink()
    shutil.copy(Path(__file__).parent.parent / "pictures" / "plain.png", tmp_path / "picture.png")
    page.click("#denoise")
    says(page, "9 images in")
    with Image.open(tmp_path / "picture.png") as picture:
        picture.convert("L").resize((8, 8)).save(tmp_path / "picture.png")
    run_code(page, tmp_path, language)
    assert (tmp_path / "images.png").stat().st_size > 100


@pytest.mark.slow
def test_the_shell_waits_for_a_long_job(page: Any, served: Served, tmp_path: Path) -> None:
    """Longer than the service would keep one request waiting, a minute."""
    if shutil.which("curl", path="/usr/bin:/bin") is None:
        pytest.skip("there is no curl here")
    ask(page, images=1, steps=3)
    says(page, "1 image in")
    [queue] = served.client.get("/queue").json()["queues"]
    served.client.post(f"/queue/{queue['name']}/pause")
    resume = Timer(64, served.client.post, [f"/queue/{queue['name']}/resume"])
    resume.start()
    run_code(page, tmp_path, "curl")
    resume.join()
    with Image.open(tmp_path / "images.png") as image:
        assert image.size == (8, 8)


class Proxied:
    """The application as a proxy shows it that cuts a prefix off."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            scope = {**scope, "path": path.removeprefix(PREFIX) if PREFIX in path else "/nothing"}
        await self._app(scope, receive, send)


def test_the_page_works_behind_a_sub_path(visit: Visit, redis_url: str) -> None:
    settings = Settings(redis_url=redis_url, janitor_s=0.5)
    store = JobStore.connect(settings)
    store.publish_card(CARD)
    app = create_app(settings)
    app.add_middleware(Proxied)
    with serving(settings, app=app) as client:
        page = visit(f"{client.base_url}{PREFIX}/")
        page.click("#go")
        says(page, "no worker is running")
        job = client.get(f"{PREFIX}/jobs").json()["data"][0]["id"]
        assert job_of(page) == job
        with pytest.raises(httpx.HTTPStatusError):
            client.get("/jobs").raise_for_status()
    store.redis.close()
