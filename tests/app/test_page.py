from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from app.pages import STATIC

PAGE = (STATIC / "index.html").read_text()


def test_the_page_is_served_without_a_key_and_from_here_alone(client: httpx.Client) -> None:
    reply = client.get("/")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
    assert reply.text == PAGE
    assert client.get("/static/index.html").status_code == 200
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", PAGE)


def test_the_documentation_comes_from_here_alone(client: httpx.Client) -> None:
    page = client.get("/docs").text
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert len(addresses) == 3  # a style sheet, a script, an icon
    for address in addresses:
        assert address.startswith("/static/docs/")
        assert client.get(address).status_code == 200
    assert not re.search(r"""["'](?:https?:)?//""", page)


def test_every_element_the_script_names_exists() -> None:
    named = set(re.findall(r'\$\("([\w-]+)"\)', PAGE))
    assert len(named) > 15
    assert named <= set(re.findall(r'id="([\w-]+)"', PAGE))


def test_every_route_the_script_calls_exists(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    patterns = [re.sub(r"\{\w+\}", "[^/]+", path) for path in paths]
    called = re.findall(r"""["`](/[^"`?]*)""", PAGE)
    assert len(called) > 6
    for path in called:
        concrete = re.sub(r"\$\{[^}]*\}", "x", path)
        if concrete not in ("/docs", "/"):
            assert any(re.fullmatch(pattern, concrete) for pattern in patterns), path


def test_the_script_parses(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here")
    script = re.search(r'<script type="module">(.*?)</script>', PAGE, re.S)
    assert script is not None
    (tmp_path / "page.mjs").write_text(script[1])
    subprocess.run([node, "--check", str(tmp_path / "page.mjs")], check=True)
