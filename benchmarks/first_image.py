"""From a clone to the first image over HTTP, and how much of it is `ddpm up` itself.

    python3 benchmarks/first_image.py

Clones this repository's HEAD, runs `make up`, and asks for a digit until one comes; then stops
it and times `ddpm up` again. pip's cache is used as it is: run it twice to have it filled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

PORT = 8733
ROOT = Path(__file__).parents[1]


def first_image(command: Sequence[str], folder: Path, limit: float = 600) -> float:
    """Seconds from the start of a command until it has served a PNG; it is stopped then."""
    log = (folder.parent / "log").open("w")
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        while time.perf_counter() - began < limit:
            if process.poll() is not None:
                raise SystemExit((folder.parent / "log").read_text())
            if ask():
                return time.perf_counter() - began
            time.sleep(0.05)
        raise SystemExit(f"no image after {limit:.0f} s")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()


def ask() -> bool:
    """Whether the service is there and answers with a picture."""
    headers = {"Content-Type": "application/json", "Prefer": "wait=30", "Accept": "image/png"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/generate",
        data=json.dumps({"class_label": 7}).encode(),
        headers=headers,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bool(answer.status == 200 and answer.read(8).startswith(b"\x89PNG"))
    except OSError:
        return False


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
        folder = Path(scratch) / "clone"
        began = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        cloned = time.perf_counter() - began
        made = first_image(["make", "up", f"PORT={PORT}"], folder)
        up = first_image([".venv/bin/ddpm", "up", "--port", str(PORT)], folder)
    print("| from | to the first image, s |\n|---|---|")
    print(f"| git clone | {cloned + made:.1f} |\n| make up | {made:.1f} |\n| ddpm up | {up:.1f} |")


if __name__ == "__main__":
    main()
