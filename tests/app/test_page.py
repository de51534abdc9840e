from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from app.pages import STATIC

PAGE = (STATIC / "index.html").read_text()
FOLDER = STATIC / "page"
MODULES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.js"))}


def test_the_page_is_served_without_a_key_and_from_here_alone(client: httpx.Client) -> None:
    reply = client.get("/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    assert reply.text == PAGE
    assert client.get("/static/index.html").status_code == 200
    policy = reply.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "style-src 'self';" in policy
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    for path in files:
        served = client.get(f"/static/{path.relative_to(STATIC)}")
        assert served.content == path.read_bytes()
        assert served.headers["cache-control"] == "no-cache"
    again = client.get("/static/page/main.js", headers={"If-None-Match": served_etag(client)})
    assert again.status_code == 304 and again.headers["cache-control"] == "no-cache"


def served_etag(client: httpx.Client) -> str:
    return str(client.get("/static/page/main.js").headers["etag"])


def test_all_of_the_page_is_named_relative_to_it() -> None:
    for address in re.findall(r"""(?:src|href)=["']([^"']*)""", PAGE):
        assert not re.match(r"(?:\w+:)?/", address), address
        assert address == "docs" or (STATIC.parent / address).is_file(), address
    style = (FOLDER / "style.css").read_text()
    assert "@import" not in style and "url(" not in style
    for name, text in MODULES.items():
        assert not re.search(r"""["'`](?:https?:)?//""", text), name
        for imported in re.findall(r"""^(?:import|export) .*from ["'](.*)["'];$""", text, re.M):
            assert (FOLDER / posixpath.normpath(imported)).is_file(), f"{name}: {imported}"


def test_the_page_is_light() -> None:
    files = [STATIC / "index.html", *FOLDER.glob("*.*"), *FOLDER.glob("vendor/*.js")]
    assert sum(path.stat().st_size for path in files) < 200_000
    assert (FOLDER / "vendor" / "LICENSES.txt").is_file()


def test_the_documentation_comes_from_here_alone(client: httpx.Client) -> None:
    page = client.get("/docs").text
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert len(addresses) == 3  # a style sheet, a script, an icon
    for address in addresses:
        assert address.startswith("/static/docs/")
        assert client.get(address).status_code == 200
    assert not re.search(r"""["'](?:https?:)?//""", page)


def test_every_route_the_scripts_call_exists(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    patterns = [re.sub(r"\{\w+\}", "[^/]+", path) for path in paths]
    called = re.findall(
        r"""(?<![.\w])(?:get|call|fetch|start|from|ask)\(["`]([\w$][^"`?]*)""",
        "\n".join(MODULES.values()),
    )
    assert len(set(called)) > 8
    for path in called:
        if path.startswith(("${root}", "${url}", "${folder}")):  # code that people copy; files
            continue
        concrete = re.sub(r"\$\{[^}]*\}", "x", path)
        roots = (f"/{concrete}", f"/jobs/x/{concrete}")  # `from` names a file of a job
        found = [one for one in roots for pattern in patterns if re.fullmatch(pattern, one)]
        assert found, path


@pytest.mark.parametrize("name", MODULES)
def test_the_scripts_parse(name: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here")
    (tmp_path / "page.mjs").write_text(MODULES[name])
    subprocess.run([node, "--check", str(tmp_path / "page.mjs")], check=True)
