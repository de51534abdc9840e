"""A `ddpm up` of its own, for the examples of the documentation."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.house import ROOT


@dataclass(frozen=True)
class Service:
    """Where it runs, and where it listens."""

    folder: Path
    address: str

    def run(self, command: list[str], example: str) -> str:
        """Run an example in the folder of the service; what it prints."""
        text = example.replace("localhost:8000", self.address)
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "client"),
        }
        ran = subprocess.run(
            [*command, text],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout


@contextmanager
def live(folder: Path) -> Iterator[Service]:
    """The service, with its data and models in a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "REDIS_URL"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm", "up", "--port", "0"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://(localhost:\d+)", line)
        assert address, line
        yield Service(folder, address[1])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
