"""Every command of the guides, run as it stands against `ddpm up` on another port."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.house import ROOT
from tests.live import Service, live

GUIDES = ("concepts", "http", "operating")
# Their commands are run by tests of their own.
ELSEWHERE = {"own-data": "tests/training/test_infer.py"}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "models").mkdir()
    (folder / "models" / "mnist").symlink_to(ROOT / "models" / "mnist")
    with live(folder) as service:
        yield service


def in_one(page: str) -> str:
    """All shell commands of a page, as one script that ends at the first failure."""
    script = "\n".join(blocks(page, "bash"))
    assert script
    return script


def test_http(service: Service) -> None:
    printed = service.run(["bash", "-ec"], in_one("http"))
    for said in ('"status":"succeeded"', "event: done", '"alpha_bar"', '"queues"', '"samplers"'):
        assert said in printed
    for name, size in {"0.png": (32, 32), "three.png": (32, 32), "mnist.png": (168, 66)}.items():
        with Image.open(service.folder / name) as picture:
            assert picture.size == size
    for name in ("0.npy", "grid.webp", "all.zip", "chain.gif"):
        assert (service.folder / name).stat().st_size > 100
    ids = re.findall(r'"id":"(\w+)"', printed)
    assert ids[-1] != ids[0] and ids.count(ids[-1]) >= 1


def test_operating(service: Service) -> None:
    script = in_one("operating").replace("--port 8000", f"--port {service.address[-5:].strip(':')}")
    printed = service.run(["bash", "-ec"], script)
    assert "is ready" in printed and "digits: requests may say" in printed
    assert '"paused":true' in printed and "# EOF" in printed
    assert "ddpm_job_wait_seconds" in printed
    assert (service.folder / "backup.tar").stat().st_size > 1000
    assert "sha256:" in (service.folder / "keys.txt").read_text()


def test_concepts(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n" + "\n".join(
        blocks("concepts", "python")
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, 1, 32, 32])")
    assert (tmp_path / "chain.gif").is_file() and (tmp_path / "noised.png").is_file()


QUALITY = ROOT / "docs" / "quality"
TABLES = {  # of docs/quality.md: a script and its results, where its table begins, a line of it
    "curve": (
        ["curve.py", *map(str, sorted(QUALITY.glob("*.json")))],
        "<!-- what curve.py found -->",
        "| unipc | 8 |",
    ),
    "convergence": (
        ["convergence.py", "--out", str(QUALITY / "convergence")],
        "<!-- what convergence.py found -->",
        "| unipc | karras |",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_quality_are_of_their_results(name: str, tmp_path: Path) -> None:
    (script, *arguments), mark, line = TABLES[name]
    page = tmp_path / "quality.md"
    said = (ROOT / "docs" / "quality.md").read_text("utf-8")
    page.write_text(said.replace(line, ""), "utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--page", str(page)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=ROOT)
    made = page.read_text("utf-8")
    assert made.partition(mark)[2] == said.partition(mark)[2] and line in made


def test_every_page_with_commands_is_run() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    with_commands = {page for page in pages if blocks(page, "(?:bash|python)")}
    assert with_commands == {*GUIDES, *ELSEWHERE}


def test_links_lead_somewhere() -> None:
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "client" / "README.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", path.read_text("utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
