"""The README's examples, run as they stand against `ddpm up` on another port."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs.settings import MIB, Settings
from tests.house import ROOT, check_ddpm
from tests.live import Service, live

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str, mark: str) -> list[str]:
    found = [text for kind, text in BLOCKS if kind == language and mark in text]
    assert found, f"the README has no {language} example with {mark}"
    return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").symlink_to(ROOT / "models")
    with live(folder) as service:
        yield service


def test_the_first_picture_is_a_digit_on_the_disk(service: Service) -> None:
    (example,) = blocks("bash", "seven.png localhost")
    service.run(["bash", "-ec"], example)
    with Image.open(service.folder / "seven.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (32, 32))
        assert np.asarray(picture).std() > 20  # strokes, not a blank


def test_a_job_streams_to_its_end_and_leaves_a_film(service: Service) -> None:
    (example,) = blocks("bash", "/events")
    printed = service.run(["bash", "-ec"], example)
    for event in ("status", "progress", "snapshot", "image", "done"):
        assert f"event: {event}\n" in printed
    with Image.open(service.folder / "chain.gif") as film:
        assert film.format == "GIF"
        assert getattr(film, "n_frames", 1) >= 5


def test_a_picture_is_noised_at_every_t_asked_for(service: Service) -> None:
    (example,) = blocks("bash", "localhost:8000/noise")
    Image.new("L", (28, 28), 200).save(service.folder / "seven.png")
    printed = service.run(["bash", "-ec"], example)
    assert sorted(int(t) for t in re.findall(r'"t":(\d+),"index":0,"kind":"x_t"', printed)) == [
        1, 100, 500, 1000,
    ]  # fmt: skip


def test_python_over_http(service: Service) -> None:
    (example,) = blocks("python", "grid.png")
    printed = service.run([sys.executable, "-c"], example)
    status, digest = printed.split()
    assert status == "succeeded"
    assert len(digest) == 64
    with Image.open(service.folder / "five.png") as picture:
        assert picture.size == (32, 32)
    with Image.open(service.folder / "grid.png") as picture:
        assert min(picture.size) >= 96
    assert httpx.get(f"http://{service.address}/docs").status_code == 200


CLIENT = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "client" / "README.md").read_text("utf-8"), re.M | re.S
)


@pytest.mark.parametrize("i", range(len(CLIENT)))
def test_the_clients_own_examples(service: Service, i: int) -> None:
    printed = service.run([sys.executable, "-c"], CLIENT[i])
    assert len(CLIENT) == 5
    said = ["succeeded 4", "", "x_t at 1", "", "/num_images invalid_request"][i]
    assert said in printed


def test_a_chain_starts_in_the_middle(service: Service) -> None:
    (example,) = blocks("bash", "localhost:8000/reconstruct")
    Image.new("L", (32, 32), 200).save(service.folder / "seven.png")
    service.run(["bash", "-ec"], example)
    with Image.open(service.folder / "nine.png") as picture:
        assert picture.size == (3 * 34 - 2, 3 * 34 - 2)


def test_a_chain_branches(service: Service) -> None:
    (example,) = blocks("python", "client.reconstruct")
    status, *urls = service.run([sys.executable, "-c"], example).split()
    assert status == "succeeded" and len(urls) == 4


def test_two_pictures_are_mixed(service: Service) -> None:
    (example,) = blocks("bash", "localhost:8000/interpolate")
    Image.new("L", (32, 32), 200).save(service.folder / "seven.png")
    service.run(["bash", "-ec"], example)
    with Image.open(service.folder / "between.png") as picture:
        assert picture.size == (5 * 34 - 2, 32)


def test_the_bound_of_a_picture(service: Service) -> None:
    (example,) = blocks("bash", "localhost:8000/likelihood")
    Image.new("L", (32, 32), 200).save(service.folder / "seven.png")
    result = json.loads(service.run(["bash", "-ec"], example))["result"]
    assert result["dims"] == 1024 and result["images"][0]["bits_per_dim"] > 0


def test_rq_shows_the_embedded_redis(service: Service) -> None:
    (example,) = blocks("bash", "rq info")
    printed = service.run(["bash", "-ec"], example.replace(".venv/bin/", ""))
    assert re.search(r"redis\.sock.*: (idle|busy) ddpm\.", printed), printed


def test_the_library_in_five_lines(service: Service) -> None:
    (example,) = blocks("python", "import diffusion")
    printed = service.run(
        [sys.executable, "-c"], f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{example}"
    )
    assert printed.startswith("<Model 1×32×32, 10 classes, T = 1000 (linear), predicts epsilon, ")
    assert printed.endswith(" torch.Size([4, 1, 32, 32])\n")
    with Image.open(service.folder / "four.png") as picture:
        assert picture.size == (66, 66)


def test_every_ddpm_command_of_the_readme_is_one() -> None:
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith(".venv/bin/ddpm")]
    assert {command[0] for command in commands} >= {"sample", "train"}
    for command in commands:
        check_ddpm(command)


def settings_table() -> str:
    """The README's table of settings, from the class that reads them."""
    lines = ["| variable | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        variable = "REDIS_URL" if name == "redis_url" else f"DDPM_{name.upper()}"
        value = field.default
        if isinstance(value, int) and value >= MIB and value % MIB == 0:
            shown = f"`{value}` ({value // MIB} MiB)" if "bytes" in name else f"`{value}`"
        else:
            shown = "" if value is None or value == () else f"`{value}`"
        lines.append(f"| `{variable}` | {shown} | {field.description} |")
    return "\n".join(lines) + "\n"


def test_the_settings_are_all_listed() -> None:
    assert settings_table() in README


@pytest.mark.slow
def test_sampling_without_a_server(service: Service) -> None:
    (example,) = blocks("bash", "ddpm sample --model mnist")
    assert shutil.which("ddpm", path=str(Path(sys.executable).parent))
    service.run(["bash", "-ec"], example.replace(".venv/bin/", ""))
    with (
        Image.open(service.folder / "grid.png") as grid,
        Image.open(service.folder / "chain.gif") as film,
    ):
        assert grid.size == (8 * 34 - 2, 8 * 34 - 2)
        assert getattr(film, "n_frames", 1) >= 10
