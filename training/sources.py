"""Where training pictures come from: a folder, parquet files or a hub id. Nothing is decoded here.

A folder is listed here and not by `datasets`, which takes folders and files called train, test or
val for splits. Ours are classes like any other, until `data.split` names one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from training.config import DataConfig

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}


class DataError(ValueError):
    """Data that cannot be trained on; the message names the picture and what is wanted."""


@dataclass(frozen=True)
class Encoded:
    """A picture as stored, its name for messages, and its label (−1: none)."""

    raw: bytes
    name: str
    label: int


class Source(Protocol):
    """Random access to encoded pictures.

    class_names: of the labels, if there are any; unusable: file → why, for what was found and
    cannot be read as a picture of the set; notes: what the user should know of.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def unusable(self) -> Mapping[str, str]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Encoded:
        """Raises DataError: no such column, label or file."""


@dataclass(frozen=True)
class FolderSource:
    """Pictures of a folder, sorted by path; with classes, one folder for each."""

    root: Path
    files: list[Path]
    labels: list[int]
    class_names: tuple[str, ...] = ()
    unusable: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Encoded:
        path = self.files[index]
        name = str(path.relative_to(self.root))
        try:
            return Encoded(path.read_bytes(), name, self.labels[index])
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class TableSource:
    """Rows of a `datasets.Dataset` whose image column is left encoded."""

    dataset: Any
    config: DataConfig
    num_classes: int
    class_names: tuple[str, ...]
    unusable: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Encoded:
        row = self.dataset[index]
        name = f"image {index}"
        cell = row[self.config.image_column]
        if not isinstance(cell, dict):
            raise DataError(f"{name}: column {self.config.image_column!r} holds no image")
        if cell.get("path"):
            name += f" ({cell['path']})"
        raw = cell.get("bytes")
        try:
            raw = Path(cell["path"]).read_bytes() if raw is None else raw
        except (OSError, TypeError) as error:
            raise DataError(f"{name}: cannot be read: {error}") from error
        return Encoded(raw, name, self._label(row, name))

    def _label(self, row: dict[str, Any], name: str) -> int:
        if not self.num_classes:
            return -1
        label = row[self.config.label_column]
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise DataError(f"{name}: label {label!r}, must be 0..{self.num_classes - 1}")
        return label


def open_source(config: DataConfig, *, num_classes: int) -> Source:
    """The set behind data.source. Raises DataError: nothing there, no labels, other classes."""
    source: Source
    if is_picture_folder(config.source):
        source = open_folder(config, labelled=num_classes > 0)
    else:
        source = _open_table(config, num_classes)
    found = len(source.class_names)
    if num_classes and found and found != num_classes:
        raise DataError(
            f"network.num_classes = {num_classes}: {config.source} has {found} classes "
            f"({_shortened(source.class_names)})"
        )
    return source


def is_picture_folder(source: str) -> bool:
    """Whether data.source is a folder, and not one of parquet files."""
    path = Path(source).expanduser()
    return path.is_dir() and not any(path.glob("*.parquet"))


def open_folder(config: DataConfig, *, labelled: bool) -> FolderSource:
    """List a folder of pictures: all of it, or the folder in it that data.split names."""
    root = _split_folder(config)
    files = list(_walk(root))
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    if not pictures:
        raise DataError(f"data.source = {config.source!r}: {root} holds no images")
    notes = _left_out(others)
    if not labelled:
        files = pictures[: config.limit]
        return FolderSource(root, files, [-1] * len(files), notes=notes)
    classes = sorted({_class_of(path, root) for path in pictures} - {""})
    if not classes:
        raise DataError(f"data.source = {config.source!r}: {root} has no folder for each class")
    if splits := [name for name in classes if name.lower() in _SPLIT_NAMES]:
        notes += (f"{', '.join(splits)}: taken for classes; data.split = NAME takes one alone",)
    loose = {str(p.relative_to(root)): "lies in no class folder" for p in pictures}
    loose = {name: why for name, why in loose.items() if os.sep not in name}
    files = [path for path in pictures if _class_of(path, root)][: config.limit]
    labels = [classes.index(_class_of(path, root)) for path in files]
    return FolderSource(root, files, labels, tuple(classes), loose, notes)


def _split_folder(config: DataConfig) -> Path:
    root = Path(config.source).expanduser()
    if config.split is None:
        return root
    if not (root / config.split).is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
        raise DataError(
            f"data.split = {config.split!r}: {root} has no such folder (it has: "
            f"{_shortened(there) or 'none'}); without data.split all of it is taken"
        )
    return root / config.split


def _walk(root: Path) -> Iterator[Path]:
    """Files at any depth, sorted; hidden ones and hidden folders are left out."""
    for entry in sorted(root.iterdir()):
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _class_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def _left_out(others: list[Path]) -> tuple[str, ...]:
    if not others:
        return ()
    suffixes = sorted({path.suffix.lower() or path.name for path in others})
    return (f"{len(others)} other files are left out: {_shortened(suffixes)}",)


def _shortened(names: tuple[str, ...] | list[str], most: int = 20) -> str:
    more = f", … {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _open_table(config: DataConfig, num_classes: int) -> TableSource:
    import datasets

    dataset = _load_table(config)
    columns = f"{config.source} has the columns {', '.join(dataset.column_names)}"
    if config.image_column not in dataset.column_names:
        raise DataError(f"data.image_column = {config.image_column!r}: {columns}")
    if num_classes and config.label_column not in dataset.column_names:
        raise DataError(
            f"data.label_column = {config.label_column!r}: {columns}, and "
            f"network.num_classes = {num_classes} needs labels"
        )
    try:
        dataset = dataset.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # Arrow and datasets raise many kinds; all mean "no pictures"
        raise DataError(
            f"data.image_column = {config.image_column!r}: holds no images: {error}"
        ) from error
    if config.limit is not None:
        dataset = dataset.select(range(min(config.limit, len(dataset))))
    if not len(dataset):
        raise DataError(f"data.source = {config.source!r}: holds no images")
    names = getattr(dataset.features.get(config.label_column), "names", None) or ()
    return TableSource(dataset, config, num_classes, tuple(names) if num_classes else ())


def _load_table(config: DataConfig) -> Any:
    """The `datasets.Dataset` of parquet files or of a hub id."""
    import datasets

    datasets.disable_progress_bars()
    split = config.split or "train"
    try:
        if parquet := _parquet_files(config, split):
            files = {split: parquet}
            return datasets.load_dataset("parquet", data_files=files, split=split)
        return datasets.load_dataset(config.source, split=split)
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        why = "cannot be read" if parquet else "no such folder, and not to be had from the hub"
        raise DataError(f"data.source = {config.source!r}: {why}: {error}") from error


def _parquet_files(config: DataConfig, split: str) -> list[str]:
    """Of a folder, a file or a glob; none for a hub id. Raises DataError for what is not there."""
    path = Path(config.source).expanduser()
    if path.is_dir():
        if found := sorted(glob(str(path / f"{split}*.parquet"))):
            return found
        there = sorted(p.name for p in path.glob("*.parquet"))
        raise DataError(
            f"data.split = {split!r}: {path} has no {split}*.parquet (it has {_shortened(there)})"
        )
    if config.source.endswith(".parquet"):
        if found := sorted(glob(str(path))):
            return found
        raise DataError(f"data.source = {config.source!r}: no such file")
    if path.exists() or config.source.startswith((".", "/", "~")):
        raise DataError(f"data.source = {config.source!r}: no such folder or .parquet file")
    return []
