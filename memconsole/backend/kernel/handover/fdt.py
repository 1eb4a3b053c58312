"""Flattened device trees (the devicetree specification, chapter 5).

    blob       header padding reservations struct strings, at the offsets the header names; framing is big-endian
    header     u32 magic = d00dfeed, totalsize, off_struct, off_strings, off_rsvmap, version, last_compatible,
               boot_cpu, size_strings, size_struct
    struct     node END(9)
    node       BEGIN_NODE(1) name NUL pad4 (prop | NOP(4))* (node | NOP)* END_NODE(2)
    prop       PROP(3) u32 length u32 name_offset value pad4

KHO shows its outgoing tree through debugfs with the size it had when the file was made: it ends in the middle of the
strings. ``strings`` names what the whole table is known to be, and completes one that is cut where the two agree.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from memconsole.decoding import text
from memconsole.errors import BadFile

MAGIC = b"\xd0\x0d\xfe\xed"
_HEADER = struct.Struct(">10I")
_BEGIN, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
_DEPTH = 64


@dataclass
class FdtNode:
    """A node: its properties' values as they stand, and its children, both in order."""

    name: str = ""
    properties: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, FdtNode] = field(default_factory=dict)

    def texts(self, name: str) -> tuple[str, ...]:
        """A property that is a list of strings, without their NULs; empty when there is none."""
        return tuple(text(part) for part in self.properties.get(name, b"").split(bytes(1)) if part)

    def number(self, name: str) -> int:
        """A property that is a native u64, as KHO writes them.

        Raises:
            BadFile: there is none, or it is not 8 bytes.
        """
        value = self.properties.get(name, b"")
        if len(value) != 8:
            raise BadFile(
                "the tree is not as the kernel writes it", f"{self.name or '/'}:{name} has {len(value)} bytes"
            )
        return int.from_bytes(value, "little")


def parse(blob: bytes, strings: bytes = b"") -> FdtNode:
    """The root node of a tree.

    Raises:
        BadFile: not a tree, truncated, or with a structure that cannot be.
    """
    if len(blob) < _HEADER.size or not blob.startswith(MAGIC):
        raise _bad("it does not begin with a header")
    _, total, at, names_at, _, version, compatible, _, names_size, size = _HEADER.unpack_from(blob)
    if version < 17 or compatible > 17:
        raise _bad(f"its version is {version}")
    if at + size > min(total, len(blob)) or names_at + names_size > total:
        raise _bad(f"it is truncated: {len(blob)} bytes of {total}")
    names = blob[names_at : names_at + names_size]
    if len(names) < names_size:
        if len(strings) != names_size or not strings.startswith(names):
            raise _bad(f"it is truncated: {len(blob)} bytes of {total}")
        names = strings
    return _Parser(blob[at : at + size], names).root()


class _Parser:
    def __init__(self, block: bytes, names: bytes) -> None:
        self._block = block
        self._names = names
        self._at = 0

    def root(self) -> FdtNode:
        """The one node of a struct block."""
        top = FdtNode()
        open_nodes = [top]
        while True:
            token = self._word()
            if token == _BEGIN:
                node = FdtNode(self._string())
                if len(open_nodes) > _DEPTH or node.name in open_nodes[-1].children:
                    raise _bad(f"a node {node.name!r} too deep, or twice")
                open_nodes[-1].children[node.name] = node
                open_nodes.append(node)
            elif token == _PROP and len(open_nodes) > 1:
                length, name = self._word(), self._name(self._word())
                open_nodes[-1].properties[name] = self._take(length)
            elif token == _END_NODE and len(open_nodes) > 1:
                open_nodes.pop()
            elif token == _END and len(open_nodes) == 1 and len(top.children) == 1:
                return next(iter(top.children.values()))
            elif token != _NOP:
                raise _bad(f"token {token:#x} at {self._at - 4:#x} of its structure")

    def _take(self, length: int) -> bytes:
        """The next bytes; what follows is aligned to 4."""
        if self._at + length > len(self._block):
            raise _bad("its structure ends too early")
        value = self._block[self._at : self._at + length]
        self._at += length + -length % 4
        return value

    def _word(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def _string(self) -> str:
        end = self._block.find(bytes(1), self._at)
        if end < 0:
            raise _bad("a name has no end")
        return text(self._take(end + 1 - self._at)[:-1])

    def _name(self, offset: int) -> str:
        end = self._names.find(bytes(1), offset)
        if end < 0:
            raise _bad(f"a property's name at {offset:#x} of its strings")
        return text(self._names[offset:end])


def _bad(why: str) -> BadFile:
    return BadFile("this is not a flattened device tree", why)
