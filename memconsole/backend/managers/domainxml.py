"""The XML of a domain in a save image, changed where its RAM comes from and nowhere else.

libvirt compares an image's XML with nothing but itself, so what a restored guest's RAM is made of is decided there:

    <memoryBacking>             <source type='memfd'/> or none becomes <source type='file'/>, <access mode='shared'/>
    <metadata>                  gets the lock: <mc:handoff xmlns:mc="urn:memconsole:handoff" region= digest=/>

Places are found by a parser and changed as bytes: what else a person or a manager wrote stays as it is, to the letter.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from memconsole import decoding
from memconsole.errors import Refused

LARGEST = 8 << 20
NAMESPACE = "urn:memconsole:handoff"
_WHAT = "the XML of the domain"
_REMEDY = "see it with virsh dumpxml NAME"
_MC = f"{NAMESPACE} handoff"
_BACKING = ("domain", "memoryBacking")
_METADATA = ("domain", "metadata")
_SHARED = "<access mode='shared'/>"
_FILE = "<source type='file'/>"
_PASSING = re.compile(rb"<currentMemory[^>]*>[^<]*</currentMemory>")


class Lock(NamedTuple):
    """What an image is locked to: a region, and the digest of where its RAM is."""

    region: str
    digest: str


def lasting(xml: bytes) -> bytes:
    """A domain's XML without what changes by itself while it runs (its balloon)."""
    return _PASSING.sub(b"", xml)


class _Element(NamedTuple):
    """An element: its attributes, where its start tag begins and ends, and where its end tag begins.

    An element without contents that is written as one tag ends in it: ``within`` is None.
    """

    attributes: dict[str, str]
    start: int
    opened: int
    within: int | None

    def end(self, raw: bytes) -> int:
        """Behind its end."""
        return self.opened if self.within is None else _tag_end(raw, self.within)


class _Places:
    """The elements by their path, the first of each; namespaces are said as ``URI NAME``."""

    def __init__(self, raw: bytes) -> None:
        self.found: dict[tuple[str, ...], _Element] = {}
        self.cells: list[dict[str, str]] = []
        self._raw = raw
        self._path: list[str] = []
        self._begun: list[tuple[dict[str, str], int]] = []
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.XmlDeclHandler = _only_utf_8
        self._parser = parser
        parser.Parse(raw, True)
        domain = self.found.get(("domain",))
        if domain is None or domain.within is None:
            raise ValueError("it is no <domain>, or an empty one")
        self.end = domain.within

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        if len(self._path) > decoding.DEPTH:
            raise ValueError(f"elements are nested deeper than {decoding.DEPTH} levels")
        self._begun.append((attributes, self._parser.CurrentByteIndex))
        if self._path == ["domain", "cpu", "numa", "cell"]:
            self.cells.append(attributes)

    def _end(self, _name: str) -> None:
        path = tuple(self._path)
        self._path.pop()
        attributes, start = self._begun.pop()
        opened = _tag_end(self._raw, start)
        within = None if self._raw[opened - 2 : opened] == b"/>" else self._parser.CurrentByteIndex
        if path in {_BACKING, _METADATA} and path in self.found:
            raise ValueError(f"<{path[-1]}> is there twice")
        self.found.setdefault(path, _Element(attributes, start, opened, within))


def _only_utf_8(_version: str, encoding: str | None, _standalone: int) -> None:
    if encoding is not None and encoding.lower() != "utf-8":
        raise ValueError(f"it is in {encoding}, not UTF-8")


def _tag_end(raw: bytes, start: int) -> int:
    """Behind the ``>`` of a start tag, which may stand in an attribute's value as well."""
    quote = 0
    for at in range(start, len(raw)):
        byte = raw[at]
        if quote:
            quote = 0 if byte == quote else quote
        elif byte in b"\"'":
            quote = byte
        elif byte == ord(">"):
            return at + 1
    raise ValueError("a tag has no end")


def _places(xml: bytes) -> _Places:
    decoding.xml(xml, what=_WHAT, remedy=_REMEDY, limit=LARGEST)
    with decoding.named(_WHAT, _REMEDY):
        return _Places(xml)


def on_files(xml: bytes, *, moved: bool = False) -> bytes:
    """The same domain with its RAM in shared files, where libvirt and its hook put them.

    ``moved``: into other files than it is in now, so that it need not stay of huge pages.

    Raises:
        Undecodable: it is no domain. Refused: its RAM is of huge pages, or a cell of it is not shared.
    """
    places = _places(xml)
    what = "the RAM of the domain cannot come from files"
    pages = places.found.get((*_BACKING, "hugepages"))
    if pages is not None and not moved:
        raise Refused(what, "it is of huge pages", "adopt it with --copy", code="HugePages")
    if any(cell.get("memAccess", "shared") != "shared" for cell in places.cells):
        raise Refused(
            what, "a NUMA cell of it is private", "make memAccess shared in its definition", code="PrivateCell"
        )
    backing = places.found.get(_BACKING)
    if backing is None:
        return _spliced(xml, [(places.end, places.end, f"<memoryBacking>{_FILE}{_SHARED}</memoryBacking>")])
    if backing.within is None:
        return _spliced(xml, [(backing.start, backing.opened, f"<memoryBacking>{_FILE}{_SHARED}</memoryBacking>")])
    changes = [(pages.start, pages.end(xml), "")] if pages is not None else []
    for name, tag in (("source", _FILE), ("access", _SHARED)):
        before = places.found.get((*_BACKING, name))
        changes.append((backing.within, backing.within, tag) if before is None else _instead(before, name, tag))
    return _spliced(xml, changes)


def _instead(element: _Element, name: str, tag: str) -> tuple[int, int, str]:
    if element.within is not None:
        raise decoding.Undecodable(_WHAT, f"its <{name}> has contents", _REMEDY, fault="malformed")
    return element.start, element.opened, tag


def _spliced(xml: bytes, changes: list[tuple[int, int, str]]) -> bytes:
    for start, end, text in sorted(changes, reverse=True):
        xml = xml[:start] + text.encode() + xml[end:]
    return xml


def lock(xml: bytes) -> Lock | None:
    """What the image is locked to, as its metadata says; None: to nothing.

    Raises:
        Undecodable: it is no domain, or its lock says nothing.
    """
    found = _places(xml).found.get((*_METADATA, _MC))
    if found is None:
        return None
    with decoding.named(_WHAT, _REMEDY):
        return Lock(found.attributes["region"], found.attributes["digest"])


def locked(xml: bytes, to: Lock) -> bytes:
    """The same domain with a lock in its metadata, in the place of one that it had.

    Raises:
        Undecodable: it is no domain.
    """
    places = _places(xml)
    tag = f'<mc:handoff xmlns:mc="{NAMESPACE}" region={quoteattr(to.region)} digest={quoteattr(to.digest)}/>'
    before, metadata = places.found.get((*_METADATA, _MC)), places.found.get(_METADATA)
    if before is not None:
        return _spliced(xml, [_instead(before, "mc:handoff", tag)])
    if metadata is None:
        return _spliced(xml, [(places.end, places.end, f"<metadata>{tag}</metadata>")])
    if metadata.within is None:
        return _spliced(xml, [(metadata.start, metadata.opened, f"<metadata>{tag}</metadata>")])
    return _spliced(xml, [(metadata.within, metadata.within, tag)])
