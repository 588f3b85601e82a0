"""Zeroes what a shared library has for other GPUs. Headers and offsets stay, so it loads as before, and packs small."""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

FAT_BINARY, MACHINE_CODE = 0xBA55ED50, 2
SECTIONS = (".nv_fatbin", "__nv_relfatbin")


def keep_only(library: Path, architecture: int) -> tuple[int, int]:
    """Bytes of device code that were kept and zeroed; architecture: 90 for H100 and H200."""
    kept = zeroed = 0
    with open(library, "r+b") as file, mmap.mmap(file.fileno(), 0) as image:
        for start, size in _sections(image):
            for kind, found, offset, length in _entries(image, start, size):
                if kind == MACHINE_CODE and found == architecture:
                    kept += length
                else:
                    image[offset : offset + length] = bytes(length)
                    zeroed += length
        image.flush()
    return kept, zeroed


def _sections(image: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(offset, size) of those with device code, by the section table of ELF for 64 bits."""
    (table,) = struct.unpack_from("<Q", image, 40)
    width, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + width * i) for i in range(count)]
    texts = headers[names][4]
    for name, _, _, _, offset, size in headers:
        end = image.find(b"\0", texts + name)
        if image[texts + name : end].decode().startswith(SECTIONS):
            yield offset, size


def _entries(image: mmap.mmap, start: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, offset of the code, its length) of everything in a section."""
    at, end = start, start + size
    while at + 16 <= end:
        magic, _, header, body = struct.unpack_from("<IHHQ", image, at)
        if magic != FAT_BINARY:
            at += 8  # padding
            continue
        entry, stop = at + header, at + header + body
        while entry < stop:
            kind, _, own_header, length = struct.unpack_from("<HHIQ", image, entry)
            (architecture,) = struct.unpack_from("<I", image, entry + 28)
            yield kind, architecture, entry + own_header, length
            entry += own_header + length
        at = stop
