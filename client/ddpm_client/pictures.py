"""Pictures on their way in and out. PIL and numpy are optional: only what uses them needs them."""

from __future__ import annotations

import base64
import importlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ddpm_client.errors import MissingPackage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Picture: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
    Array: TypeAlias = str | os.PathLike[str] | bytes | NDArray[np.floating[Any]]
    Float32: TypeAlias = NDArray[np.float32]
else:  # both packages may be missing where this runs
    Picture: TypeAlias = Any
    Array: TypeAlias = Any
    Float32: TypeAlias = Any


def needed(module: str, extra: str) -> Any:
    """An optional package. Raises MissingPackage."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise MissingPackage(
            f"this needs {package}, which is not installed: pip install 'ddpm-client[{extra}]'"
        ) from error


def encoded(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as JSON: pictures and files as base64, other arrays as lists of numbers, and no
    field that is None.

    A file is given by its path, as a Path (or in `images`, `x_t` and `y` also as a str).
    """
    return {name: _field(name, value) for name, value in request.items() if value is not None}


def _field(name: str, value: Any) -> Any:
    if name == "images":
        many = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return [_base64(one) for one in (value if many else [value])]
    if name in ("x_t", "y"):
        return _base64(value)
    if name == "operator" and isinstance(value, Mapping):
        return {key: _option(key, one) for key, one in value.items() if one is not None}
    return _plain(value)


def _option(name: str, value: Any) -> Any:
    return _base64(value) if name == "mask" and hasattr(value, "dtype") else _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | os.PathLike) or _is_picture(value):
        return _base64(value)
    if hasattr(value, "tolist"):  # a number of numpy, or an array of them
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value


def _is_picture(value: Any) -> bool:
    return hasattr(value, "save") and hasattr(value, "getbands")


def _base64(value: Any) -> str:
    return base64.b64encode(_bytes(value)).decode()


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        return Path(value).read_bytes()
    buffer = io.BytesIO()
    if _is_picture(value):
        value.save(buffer, "PNG")
    elif str(getattr(value, "dtype", "")) == "uint8":
        needed("PIL.Image", "pil").fromarray(value).save(buffer, "PNG")
    elif hasattr(value, "dtype"):
        needed("numpy", "numpy").save(buffer, value, allow_pickle=False)
    else:
        raise TypeError(f"{type(value).__name__}: must be bytes, a path, a picture or an array")
    return buffer.getvalue()


def to_pil(file: bytes) -> Image.Image:
    """A picture file as a PIL image."""
    opened: Image.Image = needed("PIL.Image", "pil").open(io.BytesIO(file))
    opened.load()
    return opened


def to_array(file: bytes) -> Float32:
    """An .npy file as float32 [C,H,W]."""
    array: Float32 = needed("numpy", "numpy").load(io.BytesIO(file), allow_pickle=False)
    return array


def in_archive(content: bytes) -> list[Image.Image]:
    """The pictures of a zip, in the order of their names."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return [to_pil(archive.read(name)) for name in names]
