"""Tars in memory: written by tarfile, and small tools to take them apart and to damage them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

BLOCK = 512
RECORD = 20 * BLOCK
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

Entry = tuple[str | tarfile.TarInfo, bytes]


def special(name: str, kind: bytes, target: str = "", **pax: str) -> tarfile.TarInfo:
    """Return a header of this kind: a folder, a link, a device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, target, pax
    return info


def tar_of(entries: Iterable[Entry], format: str = "pax", **pax_global: str) -> bytes:
    """Return a tar of these entries, in order, without the clock; of a kind that holds data, its size is set."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format], pax_headers=pax_global) as tar:
        for entry, data in entries:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def spans(tar: bytes) -> dict[str, bytes]:
    """Return by name each member's bytes as tarfile places them: extension headers, header, data, padding."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as reader:
        infos = reader.getmembers()
        return {i.name: tar[i.offset : i.offset_data + i.size + -i.size % BLOCK] for i in infos}


def header_places(tar: bytes) -> list[int]:
    """Return where every header block stands, those of extension headers too."""
    places, at = [], 0
    while any(tar[at : at + BLOCK]):
        places.append(at)
        size = int(tar[at + 124 : at + 136].strip(b" \0") or b"0", 8)
        at += BLOCK + size + -size % BLOCK
    return places


def patched(tar: bytes, at: int, new: bytes) -> bytes:
    """Return the tar with `new` written over the bytes at `at`."""
    return tar[:at] + new + tar[at + len(new) :]


def mended(tar: bytes, at: int) -> bytes:
    """Return the tar with a right checksum in the header at `at`."""
    block = bytearray(tar[at : at + BLOCK])
    block[148:156] = b" " * 8
    return patched(tar, at + 148, b"%06o\0 " % sum(block))


def ended(body: bytes) -> bytes:
    """Return members with the end-of-archive that tar writes."""
    return body + bytes(2 * BLOCK + -(len(body) + 2 * BLOCK) % RECORD)
