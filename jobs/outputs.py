"""The names of a job's outputs: what there is to fetch, and where it lies in the store."""

from __future__ import annotations


def image_name(index: int) -> str:
    """A finished image."""
    return f"i:{index}"


def snapshot_name(t: int, kind: str, index: int) -> str:
    """A kept state of image `index`: kind x_t, x_start or eps at the paper's t."""
    return f"s:{t}:{kind}:{index}"


def parse_name(name: str) -> tuple[int, str, int] | int:
    """(t, kind, index) of a snapshot, or the index of an image."""
    what, *rest = name.split(":")
    if what == "i":
        return int(rest[0])
    t, kind, index = rest
    return int(t), kind, int(index)
