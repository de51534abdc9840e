"""What stands around the pixels of a PNG or JPEG file: read here, so that Pillow never sees it.

Text, profiles and EXIF data are where decoders break: a compressed 2 MB profile, a rational with
the denominator 0, a directory of 65,000 entries that each claim the whole file. None of it bears
on the pixels but the orientation, which `orientation` reads by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from jobs.errors import PictureTooLarge

MAX_PARTS = 65_536  # chunks or segments: each costs a turn of a loop
MAX_SCANS = 40  # of a JPEG: each goes over all pixels again; encoders make up to 12 or so

PNG_SIGNATURE, JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# A marker, where one is looked for: not a stuffed 0, fill, TEM or a restart inside a scan.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_EXIF = b"Exif\x00\x00"
_ORIENTATION_TAG, _SHORT = 0x0112, 3


@dataclass(frozen=True)
class Container:
    """A file without what does not bear on its pixels, and the EXIF data that it carried."""

    raw: bytes
    exif: bytes = b""

    @property
    def png_depth(self) -> int:
        """Bits a sample of a PNG; 8 for everything else."""
        return self.raw[24] if self.raw.startswith(PNG_SIGNATURE) and len(self.raw) > 24 else 8


def strip(raw: bytes) -> Container:
    """The file as Pillow may see it. Raises PictureTooLarge for too many parts or scans."""
    if raw.startswith(PNG_SIGNATURE):
        return _strip_png(raw)
    return _strip_jpeg(raw) if raw.startswith(JPEG_START) else Container(raw)


def _strip_png(raw: bytes) -> Container:
    kept, exif, at = [PNG_SIGNATURE], b"", len(PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        kind, end = raw[at + 4 : at + 8], at + 12 + int.from_bytes(raw[at : at + 4])
        if kind in _PNG_CHUNKS:
            kept.append(raw[at:end])
        elif kind == b"eXIf":
            exif = raw[at + 8 : end - 4]
        if kind == b"IEND" or end >= len(raw):
            return Container(b"".join(kept), exif)
        at = end
    raise PictureTooLarge(f"a PNG of more than {MAX_PARTS} chunks")


def _strip_jpeg(raw: bytes) -> Container:
    """Without EXIF, profiles and comments; JFIF and Adobe segments tell of the colours and stay."""
    kept, exif, at, scans, body = [raw[:2]], b"", 2, 0, None
    for _ in range(MAX_PARTS):
        marker = _MARKER.search(raw, at)
        kind = marker[1][0] if marker else _EOI
        if marker is None or kind == _EOI:
            body = len(raw) if body is None else body
            return Container(b"".join([*kept, raw[body:]]), exif)
        start, end = marker.start(), marker.end()
        at = end if kind == _SOI else end + max(2, int.from_bytes(raw[end : end + 2]))
        if kind == _SOS:
            scans += 1
            body = start if body is None else body
            if scans > MAX_SCANS:
                raise PictureTooLarge(f"a JPEG of more than {MAX_SCANS} scans")
        elif body is None:
            content = raw[end + 2 : at]
            if kind == _APP1 and content.startswith(_EXIF) and not exif:
                exif = content[len(_EXIF) :]
            if kind in (_APP0, _APP14) or not (_APP0 <= kind <= _APP15 or kind == _COM):
                kept.append(raw[start:at])
    raise PictureTooLarge(f"a JPEG of more than {MAX_PARTS} segments")


def orientation(exif: bytes) -> int:
    """1..8 as EXIF numbers them, from a TIFF block's first directory; 1 if it does not say."""
    exif = exif.removeprefix(_EXIF)  # WebP files are written with it and without it
    order: Literal["little", "big"]
    if exif.startswith(b"II*\x00"):
        order = "little"
    elif exif.startswith(b"MM\x00*"):
        order = "big"
    else:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    directory = number(4, 4)
    for i in range(min(number(directory, 2), len(exif) // 12)):
        entry = directory + 2 + 12 * i
        if number(entry, 2) == _ORIENTATION_TAG:
            fits = number(entry + 2, 2) == _SHORT and number(entry + 4, 4) == 1
            value = number(entry + 8, 2)
            return value if fits and 1 <= value <= 8 else 1
    return 1
