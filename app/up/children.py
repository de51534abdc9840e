"""Child processes of the supervisor: each with a log file, and none left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_TAIL = 5


class Child:
    """One process. name: what messages call it."""

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        self.started = time.monotonic()
        with log.open("wb") as output:
            # Its own session: Ctrl-C goes to the supervisor alone, which stops things in order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def epitaph(self) -> str:
        """How it ended, in one sentence, and the last lines of its log."""
        code = self._process.poll()
        how = f"exit status {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return f"{self.name} stopped ({how}); {self.last_words()}"

    def last_words(self) -> str:
        """Where its log is, and the last lines of it."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-_TAIL:]
        return "\n  ".join([f"see {self.log}", *lines])

    def stop(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL after so many seconds."""
        self.terminate()
        self.wait(seconds)

    def terminate(self) -> None:
        """SIGTERM."""
        if self.running:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL."""
        if self.running:
            self._process.kill()

    def wait(self, seconds: float) -> None:
        """Wait for its end, then kill it."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _die_with_parent() -> None:
    """A supervisor that is killed takes its children with it (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
