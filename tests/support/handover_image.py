"""Writers of what a kernel hands over: physical memory in which the structures of KHO and LUO stand as in a kernel.

Held against the kernel's own in tests/vm; here they are what parsers are shown, whole and torn.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from memconsole.errors import BadFile

PAGE = 4096
STRINGS = b"preserved-memory-map\0compatible\0preserved-data\0blob-size\0"


class Cells:
    """Physical memory of pages, each put where it is wanted; everywhere else there is none."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self._next = 0x100000
        self.reads = 0

    def read(self, address: int, length: int) -> bytes:
        parts = []
        while length:
            page, within = address & -PAGE, address % PAGE
            if page not in self.pages:
                raise BadFile(f"there is no memory at {address:#x}")
            self.reads += 1
            parts.append(bytes(self.pages[page][within : within + length]))
            address += len(parts[-1])
            length -= len(parts[-1])
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Data at an address; pages come to be as they are needed."""
        while data:
            page, within = address & -PAGE, address % PAGE
            part = data[: PAGE - within]
            self.pages.setdefault(page, bytearray(PAGE))[within : within + len(part)] = part
            address += len(part)
            data = data[len(part) :]

    def put(self, data: bytes = b"", pages: int = 1) -> int:
        """Data in pages of its own, aligned to their number; their address."""
        size = pages * PAGE
        self._next += -self._next % size
        address = self._next
        self._next += size
        self.write(address, data.ljust(size, bytes(1)))
        return address

    def core(self, path: Path) -> None:
        """The same memory as an ELF core, a segment a page."""
        headers, body = bytearray(), bytearray()
        start = 64 + 56 * len(self.pages)
        for address, page in sorted(self.pages.items()):
            headers += struct.pack("<IIQQQQQQ", 1, 4, start + len(body), address, address, PAGE, PAGE, 0)
            body += page
        ident = b"\x7fELF\x02\x01\x01".ljust(16, bytes(1))
        header = ident + struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(self.pages), 0, 0, 0)
        path.write_bytes(header + headers + body)


def fdt(
    properties: Mapping[str, bytes], children: Mapping[str, Mapping[str, bytes]], strings: bytes = STRINGS
) -> bytes:
    """A tree of a root and its children (version 17)."""
    names = bytearray(strings)

    def offset(name: str) -> int:
        raw = name.encode() + b"\0"
        if raw not in names:
            names.extend(raw)
        return names.index(raw)

    def pad(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    def node(name: str, values: Mapping[str, bytes], inner: bytes) -> bytes:
        out = struct.pack(">I", 1) + pad(name.encode() + b"\0")
        for key, value in values.items():
            out += struct.pack(">III", 3, len(value), offset(key)) + pad(value)
        return out + inner + struct.pack(">I", 2)

    inner = b"".join(node(name, values, b"") for name, values in children.items())
    block = node("", properties, inner) + struct.pack(">I", 9)
    at = 40 + 16
    head = (at + len(block) + len(names), at, at + len(block), 40, 17, 16, 0, len(names), len(block))
    return struct.pack(">10I", 0xD00DFEED, *head) + bytes(16) + block + bytes(names)


def u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def root(memory: Cells, tree: int, blobs: Mapping[str, bytes], compatible: str = "kho-v4") -> bytes:
    """KHO's root tree over blobs, which are put into memory."""
    children = {
        name: {"preserved-data": u64(memory.put(blob)), "blob-size": u64(len(blob))} for name, blob in blobs.items()
    }
    return fdt({"preserved-memory-map": u64(tree), "compatible": compatible.encode() + b"\0"}, children)


def radix(memory: Cells, blocks: Iterable[tuple[int, int]]) -> int:
    """The tree of preserved blocks, each a first pfn and an order; the address of its root."""
    nodes: dict[tuple[int, int], int] = {}

    def node(level: int, prefix: int) -> int:
        if (level, prefix) not in nodes:
            nodes[level, prefix] = memory.put()
            if level < 5:
                parent = node(level + 1, prefix >> 9)
                memory.write(parent + (prefix & 511) * 8, u64(nodes[level, prefix]))
        return nodes[level, prefix]

    top = node(5, 0)
    for pfn, order in blocks:
        key = 1 << (52 - order) | pfn >> order
        leaf, bit = node(0, key >> 15), key & 32767
        memory.pages[leaf][bit // 8] |= 1 << bit % 8
    return top


def chain(memory: Cells, entries: Sequence[bytes]) -> int:
    """Entries in a chain of blocks; the address of the first, 0 when there are none."""
    if not entries:
        return 0
    each = (PAGE - 16) // len(entries[0])
    following = 0
    for first in reversed(range(0, len(entries), each)):
        part = entries[first : first + each]
        following = memory.put(struct.pack("<QQ", following, len(part)) + b"".join(part))
    return following


def vmalloc(memory: Cells, data: bytes, order: int = 0) -> bytes:
    """Data in a vmalloc array; its descriptor."""
    step = PAGE << order
    areas = [memory.put(data[at : at + step], 1 << order) for at in range(0, len(data), step)]
    following = 0
    for first in reversed(range(0, len(areas), 511)):
        following = memory.put(u64(following) + b"".join(map(u64, areas[first : first + 511])))
    return struct.pack("<QIHH", following, len(areas) << order, 1, order)


def memfd(memory: Cells, size: int, folios: Sequence[tuple[int, int, int]], *, order: int = 0, seals: int = 0) -> int:
    """A memfd of folios (index, pfn, flags); the address of its state."""
    array = b"".join(struct.pack("<QQ", pfn | flags << 52, index) for index, pfn, flags in folios)
    head = struct.pack("<QQIIQ", 0, size, seals, 0, len(folios))
    return memory.put(head + vmalloc(memory, array, order))


def luo(
    memory: Cells,
    sessions: Mapping[str, Sequence[tuple[str, int, int]]],
    flbs: Sequence[tuple[str, int, int]] = (),
    compatible: bytes = b"luo-v5",
    number: int = 3,
) -> bytes:
    """LUO's state: sessions of files (compatible, token, data), and objects (name, data, count)."""
    entries = []
    for name, files in sessions.items():
        listed = chain(memory, [struct.pack("<48sQQ", kind.encode(), data, token) for kind, token, data in files])
        entries.append(struct.pack("<64sQQ", name.encode(), listed, len(files)))
    objects = b"".join(struct.pack("<48sQQ", name.encode(), data, count) for name, data, count in flbs)
    flbs_pa = memory.put(struct.pack("<QQ", 1, len(flbs)) + objects)
    return struct.pack("<8sQQQ", compatible, number, chain(memory, entries), flbs_pa)


def metadata(release: str, count: int, version: int = 1) -> bytes:
    return struct.pack("=I65sI", version, release.encode(), count)
