"""The one `ddpm up` of a folder: it holds a lock there, and leaves the address of its Redis."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

_LOCK = "lock"
_URL = "redis.url"


class InUse(RuntimeError):
    """Another `ddpm up` has the folder."""


class NotRunning(RuntimeError):
    """No `ddpm up` has the folder."""


def hold(folder: Path) -> IO[bytes]:
    """Hold the folder for this process. Raises InUse if another has it."""
    held = (folder / _LOCK).open("wb")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        raise InUse(f"another `ddpm up` uses {folder} already") from error
    return held


def write(folder: Path, url: str) -> None:
    """Leave the URL of the Redis that is used, readable for this user alone: it may hold a
    password."""
    path = folder / _URL
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(url)


def forget(folder: Path) -> None:
    """Take the URL away again."""
    (folder / _URL).unlink(missing_ok=True)


def redis_url(folder: Path) -> str:
    """The URL of the Redis of the `ddpm up` that runs. Raises NotRunning."""
    try:
        with (folder / _LOCK).open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)  # only where nobody has it
    except BlockingIOError:
        url = folder / _URL
        if url.is_file():
            return url.read_text()
        raise NotRunning(f"the `ddpm up` of {folder} is not ready yet") from None
    except OSError:
        pass
    raise NotRunning(f"no `ddpm up` runs with its data in {folder}")
