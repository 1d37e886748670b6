"""Where packets lie in Ogg files (RFC 3533): the pages of each link of a chain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

CAPTURE = b'OggS'
HEADER, MOST_SEGMENTS = 27, 255
CONTINUED, FIRST = 1, 2  # flags of a page
SEARCHED = 2**16  # bytes at a time, for the next page after damage


@dataclass(frozen=True)
class OggPages:
    """Pages of a stream: where each lies, and the number of the first packet that begins on it or later.

    sizes: bytes of all packets in order, headers included, until it is known how many `headers` there are
    """

    offsets: np.ndarray
    packets: np.ndarray
    sizes: np.ndarray
    headers: int = 0

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.packets.nbytes + self.sizes.nbytes

    def beginning_with(self, sizes: list[int]) -> OggPages | None:
        """With the headers counted, given the sizes of the packets after them; None if these are others."""
        for headers in (3, 2, len(self.sizes) - len(sizes)):
            if headers >= 0 and self.sizes[headers : headers + len(sizes)].tolist() == list(sizes):
                return replace(self, headers=headers, sizes=self.sizes[:0])
        return None


def split_links(file: BinaryIO, size: int) -> list[tuple[int, int, OggPages | None]]:
    """Begin and end of each link of a chain of streams, and its pages; None where streams are mixed or damaged."""
    links: list[list[Any]] = []
    position, begun = 0, False
    while position + HEADER <= size:
        file.seek(position)
        header = file.read(HEADER + MOST_SEGMENTS)
        if header[:4] != CAPTURE:
            position = _next_page(file, position, size)
            if links:
                links[-1][1] = True
            continue
        lacing = header[HEADER : HEADER + header[26]]
        is_first = bool(header[5] & FIRST)
        if not links or (is_first and begun):
            links.append([position, False, set(), [], [], [], 0])
        link, begun = links[-1], not is_first
        _, _, serials, offsets, packets, sizes, pending = link
        serials.add(header[14:18])
        offsets.append(position - link[0])
        packets.append(len(sizes) + (1 if header[5] & CONTINUED else 0))
        pending = pending if header[5] & CONTINUED else 0
        for lace in lacing:
            pending += lace
            if lace < 255:
                sizes.append(pending)
                pending = 0
        link[-1] = pending
        position += HEADER + len(lacing) + sum(lacing)
    found = []
    for number, (begin, damaged, serials, offsets, packets, sizes, _) in enumerate(links):
        stop = links[number + 1][0] if number + 1 < len(links) else size
        mixed = damaged or len(serials) > 1
        pages = OggPages(np.array(offsets), np.array(packets, np.uint32), np.array(sizes, np.uint32))
        found.append((begin, stop, None if mixed else pages))
    return found


def _next_page(file: BinaryIO, position: int, size: int) -> int:
    while position < size:
        file.seek(position + 1)
        at = file.read(SEARCHED).find(CAPTURE)
        if at >= 0:
            return position + 1 + at
        position += SEARCHED - len(CAPTURE)
    return size


def read_packets(part: Any, pages: OggPages, sizes: np.ndarray, first: int, last: int) -> list[bytes]:
    """Packets `first` to `last`, counted after the headers. Raises ValueError if the file is not what it was."""
    wanted, stop = first + pages.headers, last + pages.headers
    page = int(np.searchsorted(pages.packets, wanted, 'right')) - 1
    # several pages may continue one packet: those that begin before it
    number, pending, found = int(pages.packets[page]), b'', []
    part.seek(int(pages.offsets[page]))
    fresh = True
    while number < stop:
        header = part.read(HEADER)
        if len(header) < HEADER or header[:4] != CAPTURE:
            break
        lacing = part.read(header[26])
        body, at = part.read(sum(lacing)), 0
        # the end of a packet that began before the page where reading began
        skipping = fresh and bool(header[5] & CONTINUED)
        fresh, run = False, 0
        for lace in lacing:
            run += lace
            if lace == 255:
                continue
            if not skipping:
                if number >= wanted:
                    found.append(pending + body[at : at + run])
                number += 1
            skipping, pending = False, b''
            at, run = at + run, 0
        fresh = skipping
        pending += b'' if skipping else body[at:]
    found = found[: last - first]
    if [len(it) for it in found] != sizes[first:last].tolist():
        raise ValueError(f'packets {first} to {last} are not where they were')
    return found
