"""The safetensors files in which diffusers keeps a network's weights: one, shards, or a variant.

    diffusion_pytorch_model.safetensors                 one file
    diffusion_pytorch_model.safetensors.index.json      names shards, …-00001-of-00002.safetensors
    diffusion_pytorch_model.fp16.safetensors            a variant, of other precision mostly

As in diffusers an index counts before a single file beside it, which may be from an older save. A
variant is read where there is nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from diffusion.files import CheckpointError, read_json, read_weights

STEM = "diffusion_pytorch_model"
WEIGHTS_NAME = f"{STEM}.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_VARIANT = re.compile(
    rf"{STEM}(?:\.safetensors\.index\.(?P<index>[^.]+)\.json|\.(?P<file>[^.]+)\.safetensors)"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(\.[^.]+)?\.safetensors$")


def find_weights(folder: Path) -> list[Path]:
    """The files to read, an index first if there is one; CheckpointError says what is there
    instead of them."""
    if (folder / INDEX_NAME).is_file():
        return _with_shards(folder / INDEX_NAME)
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    variants = _variants(folder)
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder}: no {WEIGHTS_NAME}, and several variants of it: {', '.join(variants)}; "
            "leave one of them"
        )
    for path in variants.values():
        return _with_shards(path) if path.suffix == ".json" else [path]
    raise _nothing(folder)


def read_stored(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of the files that `find_weights` found."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        if path.suffix != ".json":
            tensors |= read_weights(path)
    return tensors


def _variants(folder: Path) -> dict[str, Path]:
    """Variant → its index, or its one file."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"{STEM}.*")):
        match = _VARIANT.fullmatch(path.name)
        if match and not _SHARD.search(path.name):
            name = match["index"] or match["file"]
            if name not in found or match["index"]:
                found[name] = path
    return found


def _with_shards(index: Path) -> list[Path]:
    """An index and the shards it names, in order."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map: must map tensors to the files that hold them")
    shards = []
    for name in sorted({str(name) for name in names.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map: {name!r:.200}: must be a .safetensors here"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: no such file, but {index.name} names it")
        shards.append(index.parent / name)
    return [index, *shards]


def _nothing(folder: Path) -> CheckpointError:
    for found in sorted(folder.glob("*")):
        if found.suffix in _PICKLES:
            return CheckpointError(
                f"{found}: a pickle, which can run code when it is read, is never opened; "
                f"have diffusers write {WEIGHTS_NAME} (save_pretrained does by default)"
            )
        if _SHARD.search(found.name):
            return CheckpointError(f"{found}: a part of weights, but there is no {INDEX_NAME}")
        if found.suffix == ".safetensors":
            return CheckpointError(f"{found}: must be named {WEIGHTS_NAME}")
    return CheckpointError(f"{folder / WEIGHTS_NAME}: no such file")
