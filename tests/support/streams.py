"""Migration streams as QEMU writes them, made of values: what a filter makes of one is another of them."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

SHARED = "x-ignore-shared"
PAGE = 4096
DESCRIPTION = b'{"configuration": {"vmsd_name": "configuration"}, "page_size": 4096, "devices": []}'
NOWHERE = (1 << 64) - 1
"""The GPA that a locked stream has for each block."""
SWITCHOVER = struct.pack(">BHH", 8, 11, 0)


@dataclass(frozen=True)
class Page:
    """A record: a page of a block at an offset; without content it is one of zeros."""

    block: str
    offset: int
    content: bytes = b""


@dataclass(frozen=True)
class Stream:
    """A stream: RAM blocks by name and size, a section of pages after the other, and what stands behind them."""

    blocks: tuple[tuple[str, int], ...]
    sections: tuple[tuple[Page, ...], ...]
    devices: bytes = b"\4device"
    machine: str = "pc-q35-10.0"
    capabilities: tuple[str, ...] = ()
    gpa: int = 0
    uuid: bytes = b""
    page_bits: int = 0
    footers: bool = True
    between: bytes = SWITCHOVER
    again: bool = True
    """Whether each section says its first page's block, also where it is that of the last page before."""

    def raw(self) -> bytes:
        """The stream's bytes."""
        made = bytearray(b"QEVM" + struct.pack(">I", 3))
        if self.machine:
            made += b"\7" + struct.pack(">I", len(self.machine)) + self.machine.encode() + self._configuration()
        before = ""
        for number, pages in enumerate(((), *self.sections)):
            last = number == len(self.sections)
            if last:
                made += self.between
            made += self._section(number, last=last) + _pages(pages, "" if self.again else before)
            before = pages[-1].block if pages else before
            made += b"\x7e" + struct.pack(">I", 2) if self.footers else b""
        made += self.devices + b"\0\6" + struct.pack(">I", len(DESCRIPTION)) + DESCRIPTION
        return bytes(made)

    def _configuration(self) -> bytes:
        made = b""
        if self.page_bits:
            made += b"\5" + _named("configuration/target-page-bits") + struct.pack(">II", 1, self.page_bits)
        if self.uuid:
            made += b"\5" + _named("configuration/uuid") + struct.pack(">I", 1) + self.uuid
        if self.capabilities:
            made += b"\5" + _named("configuration/capabilities") + struct.pack(">II", 1, len(self.capabilities))
            made += b"".join(map(_named, self.capabilities))
        return made

    def _section(self, number: int, *, last: bool) -> bytes:
        if number:
            return struct.pack(">BI", 3 if last else 2, 2)
        made = struct.pack(">BI", 1, 2) + _named("ram") + struct.pack(">II", 0, 4)
        made += struct.pack(">Q", sum(size for _, size in self.blocks) | 4)
        for name, size in self.blocks:
            made += _named(name) + struct.pack(">Q", size)
            made += struct.pack(">Q", self.gpa) if SHARED in self.capabilities else b""
        return made


def _pages(pages: tuple[Page, ...], before: str) -> bytes:
    made = bytearray()
    for page in pages:
        same = page.block == before
        made += struct.pack(">Q", page.offset | (8 if page.content else 2) | (0x20 if same else 0))
        made += (b"" if same else _named(page.block)) + (page.content or b"\0")
        before = page.block
    return bytes(made + struct.pack(">Q", 0x10))


def _named(name: str) -> bytes:
    return bytes([len(name.encode())]) + name.encode()


def without(stream: Stream, names: frozenset[str], *, lock: bool) -> Stream:
    """What a filter makes of a stream: no page of these blocks, locked or not."""
    sections = tuple(tuple(page for page in pages if page.block not in names) for pages in stream.sections)
    return replace(stream, sections=sections, capabilities=(SHARED,) if lock else (), gpa=NOWHERE, again=True)


def some(rng: random.Random) -> Stream:
    """A stream of a guest with a few blocks, whose pages come in several rounds, each block's first page at least."""
    sizes = [("pc.ram", PAGE * rng.randrange(4, 12)), ("ram-node1", PAGE * 4), ("/rom@etc/acpi/tables", PAGE * 2)]
    blocks = tuple(sizes[: rng.randrange(1, 4)])
    sections = []
    for number in range(rng.randrange(1, 4)):
        pages = [Page(name, 0, rng.randbytes(PAGE)) for name, _ in blocks] if not number else []
        for _ in range(rng.randrange(8)):
            name, size = rng.choice(blocks)
            content = rng.randbytes(PAGE) if rng.random() < 0.5 else b""
            pages.append(Page(name, rng.randrange(size // PAGE) * PAGE, content))
        sections.append(tuple(pages))
    return Stream(
        blocks,
        tuple(sections),
        devices=b"\4" + rng.randbytes(rng.randrange(300)),
        capabilities=rng.choice([(), (SHARED,)]),
        uuid=rng.choice([b"", rng.randbytes(16)]),
        footers=rng.random() < 0.8,
        again=rng.random() < 0.5,
        between=rng.choice([b"", SWITCHOVER]),
    )
