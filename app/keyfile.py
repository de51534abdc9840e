"""The file of API keys: a name and the SHA-256 of a key on each line, read again as it changes.

    # who        what
    alice        sha256:5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8
    night-batch  sha256:6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b

Several lines may have one name (a new key beside the old one); a line taken out revokes its key
within a second. `ddpm key NAME` makes a key and its line.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)
_LOOK_S = 1.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LINE = re.compile(rf"({NAME.pattern})\s+sha256:([0-9a-f]{{64}})")


class KeyFileError(ValueError):
    """The file is not there, or has a line that is none. The message names file and line."""


class KeyFile:
    """Raises KeyFileError where the file cannot be used at the start. Later what was last read
    holds until the file can be read again: a mistake locks nobody out, and lets nobody in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = read(path)
        self._version = self._seen()
        self._looked = time.monotonic()

    def keys(self) -> Mapping[bytes, str]:
        """digest → name, at most a second old."""
        if time.monotonic() - self._looked >= _LOOK_S:
            self._looked = time.monotonic()
            version = self._seen()
            if version != self._version:
                self._version = version
                self._read_again()
        return self._keys

    def _read_again(self) -> None:
        try:
            self._keys = read(self._path)
            log.info("API keys: %d in %s", len(self._keys), self._path)
        except KeyFileError as error:
            log.error("API keys: %s; those read before still hold", error)

    def _seen(self) -> tuple[int, ...]:
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def read(path: Path) -> dict[bytes, str]:
    """digest → name. Raises KeyFileError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"DDPM_API_KEYS_FILE = {path}: {error}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:  # the line itself is not repeated: it may hold a key
            wanted = "NAME sha256:(64 hexadecimal digits)"
            raise KeyFileError(f"DDPM_API_KEYS_FILE = {path}, line {number}: must be {wanted}")
        found[bytes.fromhex(match[2])] = match[1]
    return found


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and its line for the file."""
    key = f"ddpm_{secrets.token_urlsafe(32)}"
    return key, f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"
