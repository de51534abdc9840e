"""The first hour: clone, picture, a line of one's own code, a model of one's own, each timed.

    python3 benchmarks/first_hour.py [--work DIR] [--until code] [--steps 400]

Clones this repository's HEAD and does what the README and docs/own-data.md say. What
is done is kept in DIR/hour.json: run it again to go on after an interruption (a training goes on
from its checkpoint, and both parts count). pip's cache is used as it is: packages that are not in
it are fetched, and that is the network's time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PORT = 8733
URL = f"http://127.0.0.1:{PORT}"
ROOT = Path(__file__).parents[1]
PICTURES, SIDE = 500, 48
LIMIT_S = 900
OWN_CODE = """
import sys, ddpm_client
with ddpm_client.Client(sys.argv[1]) as client:
    client.generate({request}).images[0].save(sys.argv[2])
"""
# Three classes of shapes, in colours, at places and of sizes that differ.
DRAW = """
import random, sys
from pathlib import Path
from PIL import Image, ImageDraw
random.seed(0)
for i in range(int(sys.argv[2])):
    kind = ("circle", "square", "triangle")[i % 3]
    side, r = int(sys.argv[3]), random.randint(10, 18)
    x, y = (random.randint(r, side - r) for _ in "xy")
    picture = Image.new("RGB", (side, side), "black")
    colour = tuple(random.randint(100, 255) for _ in "rgb")
    draw = ImageDraw.Draw(picture)
    if kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), colour)
    elif kind == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), colour)
    else:
        draw.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), colour)
    folder = Path(sys.argv[1], kind)
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{i}.png")
"""


class Hour:
    """What was done, in seconds a stage, kept in a file."""

    def __init__(self, work: Path) -> None:
        self.work, self.clone = work, work / "clone"
        self._file = work / "hour.json"
        self.seconds: dict[str, float] = {}
        self.done: list[str] = []
        if self._file.exists():
            kept = json.loads(self._file.read_text())
            self.seconds, self.done = kept["seconds"], kept["done"]

    def stage(self, name: str, call: Callable[[], None]) -> None:
        """Do it unless it is done; the time of one that is broken off counts too."""
        if name in self.done:
            return
        print(f"{name} …", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            call()
            self.done.append(name)
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            kept = {"seconds": self.seconds, "done": self.done}
            self._file.write_text(json.dumps(kept, indent=1))

    def run(self, *command: str) -> None:
        """A command in the clone. Its output goes to the log beside it."""
        with (self.work / "log").open("a") as log:
            subprocess.run(command, cwd=self.clone, stdout=log, stderr=log, check=True)

    def python(self, program: str, *arguments: str) -> None:
        self.run(".venv/bin/python", "-c", program, *arguments)

    @contextmanager
    def serving(self, *command: str) -> Iterator[None]:
        """A service that has given a picture, until it is left."""
        with (self.work / "log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=self.clone, stdout=log, stderr=log, start_new_session=True
            )
            try:
                began = time.perf_counter()
                while not gives_a_picture():
                    if process.poll() is not None or time.perf_counter() - began > LIMIT_S:
                        raise SystemExit(f"no picture; see {self.work / 'log'}")
                    time.sleep(0.05)
                yield
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


def gives_a_picture() -> bool:
    headers = {"Content-Type": "application/json", "Prefer": "wait=30", "Accept": "image/png"}
    body = json.dumps({"class_label": 7, "model": "mnist"}).encode()
    request = urllib.request.Request(f"{URL}/generate", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bool(answer.read(8).startswith(b"\x89PNG"))
    except OSError:
        return False


def clone(hour: Hour) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(hour.clone)], check=True)


def make_up(hour: Hour) -> None:
    with hour.serving("make", "up", f"PORT={PORT}"):
        pass


def own_code(hour: Hour) -> None:
    seven = OWN_CODE.replace("{request}", "class_label=7")
    hour.python(seven, URL, str(hour.work / "seven.png"))


def install(hour: Hour) -> None:
    pip = (".venv/bin/python", "-m", "pip", "install", "--quiet", "--constraint")
    hour.run(*pip, "requirements.lock", "--no-build-isolation", "--editable", ".[train]")


def train(hour: Hour, steps: int) -> None:
    run = hour.work / "run"
    begun = (run / "state").exists()
    how = ("--resume", str(run)) if begun else (str(hour.work / "shapes"), "--out", str(run))
    hour.run(".venv/bin/ddpm", "train", *how, f"steps={steps}", "--quiet")


def serve(hour: Hour) -> None:
    publish = ("serve-model", str(hour.work / "run"), "--name", "shapes", "--replace")
    hour.run(".venv/bin/ddpm", *publish)
    hour.python(_WAIT, URL)
    circle = OWN_CODE.replace("{request}", 'model="shapes", class_label="circle"')
    hour.python(circle, URL, str(hour.work / "circle.png"))


# The worker that runs finds the model by itself, a few seconds later.
_WAIT = """
import sys, time, ddpm_client
with ddpm_client.Client(sys.argv[1]) as client:
    while not any(model.name == "shapes" and model.served for model in client.models()):
        time.sleep(0.1)
"""


def report(hour: Hour) -> None:
    print("\n| what | s | since the clone, s |\n|---|---|---|")
    total = 0.0
    for name in hour.done:
        total += hour.seconds[name]
        print(f"| {name} | {hour.seconds[name]:.1f} | {total:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="kept, to go on; default: a folder for this time")
    parser.add_argument("--until", choices=["code", "model"], default="model")
    parser.add_argument("--steps", type=int, default=400, help="of the training")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended; run it again to go on"))
    work = args.work or Path(tempfile.mkdtemp(prefix="ddpm-hour-"))
    work.mkdir(parents=True, exist_ok=True)
    print(f"in {work}", file=sys.stderr)
    hour = Hour(work.resolve())
    hour.stage("git clone", lambda: clone(hour))
    hour.stage("`make up`, to the first picture", lambda: make_up(hour))
    up = (".venv/bin/ddpm", "up", "--port", str(PORT))
    code = "a line of one's own code, to its picture"
    if code not in hour.done:
        with hour.serving(*up):  # it runs already, as far as the visitor is concerned
            hour.stage(code, lambda: own_code(hour))
    if args.until == "model":
        hour.stage("what training needs, by pip", lambda: install(hour))
        draw = (str(hour.work / "shapes"), str(PICTURES), str(SIDE))
        hour.stage(f"({PICTURES} pictures are drawn)", lambda: hour.python(DRAW, *draw))
        hour.stage(f"`ddpm train`, {args.steps} steps", lambda: train(hour, args.steps))
        with hour.serving(*up):
            hour.stage("`ddpm serve-model`, to its picture", lambda: serve(hour))
    report(hour)


if __name__ == "__main__":
    main()
