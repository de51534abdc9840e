"""The files of a checkpoint folder: JSON and weights, read and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_JSON_BYTES = 16 * 2**20


class CheckpointError(ValueError):
    """A folder that is no usable checkpoint; the message says which file and why."""


class NoRoomError(CheckpointError):
    """A checkpoint that needs more memory than there is at the moment."""


def size_of(path: Path) -> int:
    """Bytes of a file; CheckpointError if it is none, as a pipe, which would never end. OSError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: must be a file")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError otherwise."""
    try:
        size = size_of(path)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; must be at most {MAX_JSON_BYTES}")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; is this a checkpoint folder?") from error
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read: nested too deeply") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, no JSON, a number too long
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return raw


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; CheckpointError otherwise."""
    try:
        size_of(path)
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: broken weights file: {error}") from error


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """A JSON file, whole or not at all. A number that is NaN or infinite, for which JSON has no
    word, becomes null."""
    temporary = path.with_name(f".{path.name}.tmp")
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    text = json.dumps(finite, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(tensors, temporary, metadata={"format": "pt"})
    # save_file gives them to their owner alone; a service under another user must read them too.
    temporary.chmod(0o644)
    temporary.replace(path)


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over the contents of these files, in this order."""
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                sha.update(chunk)
    return sha.hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
