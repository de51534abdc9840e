"""Child processes of the supervisor: each with a log file, and none left behind."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jobs.processes import environment

_PR_SET_PDEATHSIG = 1
_TAIL = 5
LOG_BYTES = 8 * 2**20  # of a log before it is turned
OLD_LOGS = 3


class Child:
    """One process. name: what messages call it. log: appended to."""

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        self.started = time.monotonic()
        self.turn_log()
        with log.open("ab") as output:
            output.write(f"--- {name}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())
            output.flush()
            self._words_at = output.tell()
            # Its own session: Ctrl-C goes to the supervisor alone, which stops things in order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment(), **env},
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
        """Where its log is, and the last lines that this process wrote there."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._words_at)
                lines = log.read().decode(errors="replace").strip().splitlines()[-_TAIL:]
        except OSError as error:  # somebody has cleared it away
            return f"its log cannot be read: {error}"
        return "\n  ".join([f"see {self.log}", *lines])

    def turn_log(self) -> None:
        """Move a large log to .1 (and .1 to .2, …), and go on in an empty one."""
        if rotate(self.log):
            self._words_at = 0

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


def rotate(log: Path) -> bool:
    """Turn a log that has grown beyond LOG_BYTES; the OLD_LOGS last ones are kept.

    Copied and then emptied, since a process that lives holds the file open: it appends, so it
    goes on at the new beginning. A line written between the two steps is lost; on a full disk, all
    of them are. Nothing that is wrong with a log ends what it is of.
    """
    try:
        if log.stat().st_size < LOG_BYTES:
            return False
        old = [log.with_name(f"{log.name}.{i}") for i in range(1, OLD_LOGS + 1)]
        for newer, older in reversed(list(itertools.pairwise(old))):
            if newer.exists():
                newer.replace(older)
        try:
            shutil.copyfile(log, old[0])
        except OSError:
            old[0].unlink(missing_ok=True)
        with log.open("r+b") as file:
            file.truncate()
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    """A supervisor that is killed takes its children with it (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
