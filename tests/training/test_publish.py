"""`ddpm serve-model` and `ddpm pull`: a checkpoint gets a name, a description and a picture."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import diffusion
from diffusion.about import MOST_DESCRIPTION, MOST_THUMBNAIL, About, read_about, write_about
from diffusion.samplers import SamplingDefaults
from jobs.settings import MODEL_OF_NO_NAME
from tests.diffusion.networks import build_model
from training.commands import convert, serve_model
from training.pictures import grid
from training.publish import draw
from worker.models import ModelFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, as training leaves one."""
    folder = tmp_path / "runs" / "pets"
    diffusion.save(build_model(class_names=("cat", "dog", "owl")), folder)
    (folder / "train.json").write_text('{"steps": 500, "data": {"source": "pictures/pets"}}')
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDPM_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(serve_model, [*map(str, arguments)])


def test_a_run_is_served_under_a_name(run: Path, models: Path) -> None:
    result = call(run, "--name", "zoo")
    assert result.exit_code == 0, result.output
    assert '{"model": "zoo"}' in result.stdout
    assert {path.name for path in (models / "zoo").iterdir()} == {
        "card.json", "config.json", "model.safetensors", "thumbnail.png",
    }  # fmt: skip
    assert [path.name for path in models.iterdir()] == ["zoo"]
    # The digest is that of the run: neither description nor picture changes it.
    assert diffusion.load(models / "zoo").digest == diffusion.load(run).digest
    [served] = ModelFolder(models, queue="ddpm").rescan().loaded
    assert served.card.description == "8×8 grey, 3 classes, trained 500 steps on pets"
    with Image.open(models / "zoo" / "thumbnail.png") as picture:
        assert picture.format == "PNG" and 100 < max(picture.size) <= 128
    assert len(served.card.thumbnail) < 1.4 * MOST_THUMBNAIL


def test_a_worker_sees_a_new_description_of_the_same_model(run: Path, models: Path) -> None:
    call(run)
    folder = ModelFolder(models, queue="ddpm")
    [first] = folder.rescan().loaded
    again = call(run, "--description", "Three animals.", "--replace")
    assert again.exit_code == 0, again.output
    [second] = folder.rescan().loaded
    assert (second.name, second.card.description) == ("pets", "Three animals.")
    assert second.card.digest == first.card.digest


def test_what_is_there_is_not_overwritten(run: Path, models: Path) -> None:
    assert call(run).exit_code == 0
    before = (models / "pets" / "config.json").stat().st_mtime_ns
    result = call(run)
    assert result.exit_code == 1 and "pets: is there already; --replace" in result.output
    assert (models / "pets" / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", [".hidden", "a/b", "a b", "x" * 101])
def test_a_name_that_is_none(run: Path, models: Path, name: str) -> None:
    result = call(run, "--name", name)
    assert result.exit_code == 1 and "must be 1 to 100 of the letters" in result.output
    assert not models.exists()


def test_a_folder_that_is_no_run(tmp_path: Path, models: Path) -> None:
    result = call(tmp_path / "nothing")
    assert result.exit_code == 1 and "is this a checkpoint folder?" in result.output
    assert not models.exists()


def test_a_folder_of_diffusers(run: Path, models: Path, tmp_path: Path) -> None:
    convert_to = ["--to", "diffusers", "--sampling", "sampler=ddpm"]
    one = build_model(network=diffusion.UNetConfig(8, 1, (8, 16), (False, False), 1, 4))
    diffusion.save(one, tmp_path / "runs" / "plain")
    made = CliRunner().invoke(
        convert, [str(tmp_path / "runs" / "plain"), str(tmp_path / "theirs"), *convert_to]
    )
    assert made.exit_code == 0, made.output
    result = call(tmp_path / "theirs", "--name", "plain")
    assert result.exit_code == 0, result.output
    assert diffusion.load(models / "plain").shape == (1, 8, 8)


def test_commands_take_the_name(run: Path, models: Path, tmp_path: Path) -> None:
    call(run)
    result = CliRunner().invoke(convert, ["pets", str(tmp_path / "copy")])
    assert result.exit_code == 0, result.output
    assert diffusion.load(tmp_path / "copy").config.class_names == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    ("card", "thumbnail", "says"),
    [
        ("{", b"", "card.json: cannot be read"),
        ('{"description": 3}', b"", "description: must be a text"),
        (json.dumps({"description": "x" * (MOST_DESCRIPTION + 1)}), b"", "at most 2000"),
        ("{}", b"GIF89a", "thumbnail: must be a PNG"),
        ("{}", b"\x89PNG" * MOST_THUMBNAIL, "at most 32768"),
    ],
)
def test_a_broken_card_keeps_no_model_from_serving(
    run: Path, caplog: pytest.LogCaptureFixture, card: str, thumbnail: bytes, says: str
) -> None:
    (run / "card.json").write_text(card)
    if thumbnail:
        (run / "thumbnail.png").write_bytes(thumbnail)
    [served] = ModelFolder(run.parent, queue="ddpm").rescan().loaded
    assert served.card.description == "" and says in caplog.text


def test_about_is_written_as_it_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    about = About("Ein Satz über ε.", buffer.getvalue())
    write_about(about, tmp_path)
    assert read_about(tmp_path) == about
    assert read_about(tmp_path / "nowhere") == About()


def test_the_models_that_come_with_us_say_what_they_are() -> None:
    """The one of requests that name none is loaded before the other, which is small too."""
    folder = ModelFolder(ROOT / "models", queue="ddpm")
    [first] = folder.rescan(only_first=True).loaded
    [other] = folder.rescan().loaded
    assert (first.name, other.name) == (MODEL_OF_NO_NAME, "mnist-fast")
    for served in (first, other):
        assert "digits" in served.card.description and served.card.thumbnail
        assert sum(path.stat().st_size for path in served.folder.iterdir()) < 7_100_000
    assert first.card.samplers["tuned"].steps == (4, 5, 6)
    own = first.card.sampling
    assert (own.sampler, own.spacing, first.card.steps) == ("unipc", "trailing", 8)
    draws = {name for name, its in first.card.samplers.items() if its.draws}
    assert draws == {"ddpm", "langevin"}
    assert other.card.sampling.sampler == "consistency" and other.card.samplers["consistency"].draws
    assert [preset.steps for preset in other.card.presets.values()] == [1, 2, 3]


def test_the_picture_of_a_consistency_model_is_made_by_its_own_sampler() -> None:
    own = SamplingDefaults("consistency", spacing="trailing", steps=2)
    model = build_model(class_names=("cat", "dog", "owl"), sampling=own)
    images = diffusion.sample(model, 8, class_label=[i % 3 for i in range(8)])
    expected = grid(images, columns=4)
    with Image.open(io.BytesIO(draw(model))) as picture:
        smaller = picture.resize(expected.size, Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(smaller), np.asarray(expected))


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one repository takes."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        files = sorted(path for path in self.folder.iterdir())
        if found := re.fullmatch(r"/me/tiny/resolve/\w+/(.+)", self.path):
            content = (self.folder / found[1]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": "a" * 40})
        elif self.path.startswith("/api/models/me/tiny/revision/main"):
            names = [{"rfilename": path.name} for path in files]
            body = {"id": "me/tiny", "sha": "a" * 40, "siblings": names}
            self._answer(json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/api/models/me/tiny/tree"):
            body_list = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in files
            ]
            self._answer(json.dumps(body_list).encode(), {"Content-Type": "application/json"})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(run: Path) -> Iterator[str]:
    (run / "code.py").write_text("raise SystemExit\n")
    Hub.folder, Hub.asked = run, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def pull(endpoint: str, tmp_path: Path, hub_id: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "DDPM_MODELS": str(tmp_path / "models"),
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "ddpm", "pull", hub_id],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_a_model_of_the_hub_is_pulled(hub: str, run: Path, tmp_path: Path) -> None:
    done = pull(hub, tmp_path, "me/tiny")
    assert done.returncode == 0, done.stderr
    assert diffusion.load(tmp_path / "models" / "tiny").digest == diffusion.load(run).digest
    assert read_about(tmp_path / "models" / "tiny").thumbnail
    assert not any("code.py" in path for path in Hub.asked)


@pytest.mark.parametrize(
    ("hub_id", "endpoint", "says"),
    [
        ("me/tiny", "http://127.0.0.1:9", "me/tiny: the hub cannot be reached"),
        ("me/other", None, "me/other: cannot be fetched"),
        ("no/id/at/all", None, "must be an id of the hub, as owner/name"),
    ],
)
def test_what_cannot_be_pulled(
    hub: str, tmp_path: Path, hub_id: str, endpoint: str | None, says: str
) -> None:
    done = pull(endpoint or hub, tmp_path, hub_id)
    assert done.returncode == 1
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "models").exists()
