"""Pictures say in themselves that a machine made them: the IPTC digital source type, as XMP.

The mark is put into finished files, whoever encoded them: a chunk of PNG (ISO/IEC 15948) and of
WebP (its container specification), an application extension of GIF (XMP specification, part 3).
Pixels stay as they are. Other formats have no place for it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED = f"{_TYPES}trainedAlgorithmicMedia"  # by a model that was trained on samples
PROCESSED = f"{_TYPES}algorithmicallyEnhanced"  # somebody's own picture, changed by an algorithm
_XMP_FLAG, _ALPHA_FLAG = 0x04, 0x10  # of WebP's VP8X
_GIF_HEAD = b"\x21\xff\x0bXMP DataXMP"
_GIF_LOOP = b"\x21\xff\x0bNETSCAPE2.0"
# Readers that know nothing of XMP skip it: whichever byte they take for a length leads to the end.
_GIF_TAIL = bytes([0x01, *range(0xFF, -1, -1), 0x00])


def packet(source_type: str) -> bytes:
    """The XMP packet."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'xmp:CreatorTool="ddpm-serve" Iptc4xmpExt:DigitalSourceType="{source_type}"/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()


def marked(content: bytes, suffix: str, source_type: str) -> bytes:
    """The file with the mark in it; of a format that has no place for one as it is."""
    put = _PLACES.get(suffix)
    return content if put is None else put(content, packet(source_type))


def _png(content: bytes, xmp: bytes) -> bytes:
    data = b"iTXt" + b"XML:com.adobe.xmp" + bytes(5) + xmp  # not compressed, of no language
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    head = 8 + 25  # the signature, and IHDR, which comes first
    return content[:head] + chunk + content[head:]


def _gif(content: bytes, xmp: bytes) -> bytes:
    colours = 3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0
    head = 13 + colours  # the header, the screen, and its table of colours
    if content[head : head + len(_GIF_LOOP)] == _GIF_LOOP:  # some look for it here alone
        head += len(_GIF_LOOP) + 5
    return content[:head] + _GIF_HEAD + xmp + _GIF_TAIL + content[head:]


def _webp(content: bytes, xmp: bytes) -> bytes:
    chunks = list(_riff_chunks(content))
    name, first = chunks[0]
    if name != b"VP8X":
        chunks.insert(0, (b"VP8X", _extended(first)))
        first = chunks[0][1]
    chunks[0] = (b"VP8X", bytes([first[0] | _XMP_FLAG]) + first[1:])
    chunks.append((b"XMP ", xmp))
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _riff_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at + 8 <= len(content):
        (size,) = struct.unpack_from("<I", content, at + 4)
        yield content[at : at + 4], content[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _extended(lossless: bytes) -> bytes:
    """The VP8X header for a file that was one VP8L chunk: flags, and width and height less one."""
    (bits,) = struct.unpack_from("<I", lossless, 1)  # after its signature byte
    flags: int = _ALPHA_FLAG if bits >> 28 & 1 else 0
    width: int = bits & 0x3FFF
    height: int = bits >> 14 & 0x3FFF
    return flags.to_bytes(4, "little") + width.to_bytes(3, "little") + height.to_bytes(3, "little")


_PLACES: dict[str, Callable[[bytes, bytes], bytes]] = {"png": _png, "gif": _gif, "webp": _webp}
