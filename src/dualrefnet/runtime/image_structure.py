"""The parts of an encoded image, counted before a decoder sees them.

A decoder may take minutes or gigabytes for a small file that repeats a scan of all pixels, or an empty header.
"""

from __future__ import annotations

import re

# Cameras write up to a dozen scans, and a few dozen segments.
MAX_SCANS = 100
MAX_SEGMENTS = 1000
# Beyond one in so many bytes, which is less than any encoder puts into a chunk of pixels.
CHUNK = 1024
# Not those that belong to the data of a scan.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
_START_OF_SCAN, _END = 0xDA, 0xD9


def excess(data: bytes) -> str | None:
    """Return what a JPEG or PNG holds too many of; None if that is nothing."""
    if data.startswith(b"\xff\xd8"):
        return _excess_of_jpeg(data)
    if data.startswith(b"\x89PNG"):
        return _excess_of_png(data)
    return None


def _excess_of_jpeg(data: bytes) -> str | None:
    place, segments, scans = 2, 0, 0
    while found := _MARKER.search(data, place):
        marker, place = found[1][0], found.end()
        if marker == _END:
            break
        segments += 1
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS:
            return f"more than {MAX_SCANS} scans"
        if segments > MAX_SEGMENTS:
            return f"more than {MAX_SEGMENTS} segments"
        place += int.from_bytes(data[place : place + 2], "big")
    return None


def _excess_of_png(data: bytes) -> str | None:
    place, chunks, most = 8, 0, MAX_SEGMENTS + len(data) // CHUNK
    while place < len(data):
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        chunks += 1
        if chunks > most:
            return f"more than {most} chunks"
    return None
