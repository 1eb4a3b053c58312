"""libvirt's save images: read strictly, written whole or not at all, locked and unlocked; and the XML in them."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import streams
from support.streams import PAGE, Page, Stream

from memconsole.backend.diagnose.inspect import describe
from memconsole.backend.managers import domainxml, saveimage
from memconsole.backend.managers.domainxml import Lock
from memconsole.backend.managers.migration import Elsewhere
from memconsole.backend.managers.saveimage import Image
from memconsole.cli import main
from memconsole.decoding import Undecodable
from memconsole.errors import BadFile, ExitCode, KernelRefused, MemconsoleError, Refused

RAM = 8 * PAGE
DOMAIN = (Path(__file__).parent.parent / "support" / "domstatus.xml").read_bytes()
DOMAIN = DOMAIN[DOMAIN.index(b"<domain type") : DOMAIN.index(b"</domstatus>")].strip()
STREAM = Stream((("pc.ram", RAM), ("pc.bios", PAGE)), ((Page("pc.ram", 0, b"\1" * PAGE), Page("pc.bios", 0)),))
ELSEWHERE = (Elsewhere("pc.ram", RAM),)
DIGEST = "0123456789abcdef" * 2
LOCK = Lock("web", DIGEST)
COOKIE = b"<qemusavecookie/>"


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    """Files that are closed in the end; ``file`` makes one of bytes."""
    made: list[int] = []
    yield made
    for fd in made:
        os.close(fd)


def file(files: list[int], content: bytes = b"") -> int:
    files.append(os.memfd_create("image", os.MFD_CLOEXEC))
    os.write(files[-1], content)
    return files[-1]


def as_libvirt(
    xml: bytes = DOMAIN, cookie: bytes = COOKIE, *, magic: bytes = saveimage.MAGIC, form: int = 0, padding: int = 700
) -> bytes:
    """An image as libvirt 9 writes it."""
    body = xml + b"\0" + (cookie + b"\0" if cookie else b"") + bytes(padding)
    numbers = (2, len(body), 1, form, len(xml) + 1 if cookie else 0, *[0] * 14)
    return magic + struct.pack("<19I", *numbers) + body + STREAM.raw()


def contents(fd: int) -> bytes:
    return os.pread(fd, 1 << 20, 0)


def locked_image(files: list[int], raw: bytes = b"") -> int:
    target = file(files)
    saveimage.lock(file(files, raw or as_libvirt()), target, ELSEWHERE, LOCK)
    return target


@pytest.mark.parametrize("cookie", [COOKIE, b""])
def test_an_image_is_read_as_libvirt_writes_it_and_written_as_it_was_read(files: list[int], cookie: bytes) -> None:
    fd = file(files, as_libvirt(cookie=cookie))
    image = saveimage.read(fd)
    assert image == Image(True, DOMAIN, cookie, 700)
    assert image.lock is None
    assert os.read(fd, 1 << 20) == STREAM.raw()
    again = file(files)
    saveimage.begin(again, image)
    with pytest.raises(BadFile, match="not whole"):
        saveimage.read(again)
    os.lseek(again, 0, os.SEEK_END)
    os.write(again, STREAM.raw())
    saveimage.finish(again)
    assert contents(again) == as_libvirt(cookie=cookie)


def test_a_locked_image_has_neither_its_ram_nor_a_stream_that_starts(files: list[int]) -> None:
    fd = locked_image(files)
    image = saveimage.read(fd)
    assert image.lock == LOCK
    assert image.cookie == COOKIE
    assert b"<source type='file'/>" in image.xml
    assert b"memfd" not in image.xml
    assert os.read(fd, 1 << 20) == streams.without(STREAM, frozenset({"pc.ram"}), lock=True).raw()


def test_it_is_unlocked_for_the_digest_that_it_was_locked_to(files: list[int], tmp_path: Path) -> None:
    source, target = locked_image(files), tmp_path / "web.save"
    target.write_bytes(b"the one before")
    found = saveimage.unlock(source, target, ELSEWHERE, digest=DIGEST)
    assert found.was_locked
    assert target.stat().st_mode & 0o777 == 0o600
    with target.open("rb", buffering=0) as opened:
        assert saveimage.read(opened.fileno()).lock == LOCK
        assert opened.read() == streams.without(STREAM, frozenset({"pc.ram"}), lock=False).raw()


@pytest.mark.parametrize(
    ("elsewhere", "digest", "why"),
    [
        (ELSEWHERE, DIGEST[::-1], "not those that are here"),
        ((), DIGEST, "said nowhere to be elsewhere: pc.ram"),
        ((Elsewhere("pc.ram", RAM * 2),), DIGEST, "another size"),
        ((*ELSEWHERE, Elsewhere("ram-node1", RAM)), DIGEST, "no block of RAM of this name"),
    ],
)
def test_it_is_not_unlocked_for_other_ram_and_what_was_there_stays(
    files: list[int], tmp_path: Path, elsewhere: tuple[Elsewhere, ...], digest: str, why: str
) -> None:
    source, target = locked_image(files), tmp_path / "web.save"
    target.write_bytes(b"the one before")
    with pytest.raises((Refused, BadFile)) as caught:
        saveimage.unlock(source, target, elsewhere, digest=digest)
    assert why in caught.value.why
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the one before"]


def test_what_is_not_locked_is_not_unlocked(files: list[int], tmp_path: Path) -> None:
    for raw in (as_libvirt(), as_libvirt(domainxml.locked(DOMAIN, LOCK))):
        with pytest.raises(Refused) as caught:
            saveimage.unlock(file(files, raw), tmp_path / "web.save", (), digest=DIGEST)
        assert caught.value.code == "NotLocked"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [1, 2, 3, 4, 5, 6])
def test_another_format_is_refused_by_its_name(files: list[int], form: int) -> None:
    with pytest.raises(Refused, match="cannot be used") as caught:
        saveimage.read(file(files, as_libvirt(form=form)))
    assert "save_image_format" in caught.value.remedy


def test_a_spoiled_or_cut_image_is_an_error_by_name(files: list[int]) -> None:
    raw = as_libvirt()
    rng = random.Random(3)
    start = len(raw) - len(STREAM.raw())
    for at in [*range(100), *(rng.randrange(start) for _ in range(200))]:
        cut = file(files, raw[:at])
        with pytest.raises(MemconsoleError):
            saveimage.read(cut)
        other = bytearray(raw)
        other[at] ^= 1 << rng.randrange(8)
        with contextlib.suppress(MemconsoleError):
            saveimage.read(file(files, bytes(other)))
        while files:
            os.close(files.pop())


def test_an_image_that_cannot_be_written_is_an_error_of_the_kernel() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(KernelRefused):
        saveimage.begin(full, Image(True, DOMAIN))
    os.close(full)


def parsed(xml: bytes) -> ElementTree.Element:
    return ElementTree.fromstring(xml)


def test_the_ram_of_a_domain_is_made_of_files_and_nothing_else_changes() -> None:
    made = domainxml.on_files(DOMAIN)
    assert made == DOMAIN.replace(b"<source type='memfd'/>", b"<source type='file'/>")
    assert domainxml.on_files(made) == made


def test_ram_of_huge_pages_that_is_moved_becomes_ordinary_files() -> None:
    pages = b"<hugepages><page size='2' unit='M'/></hugepages>"
    for backing in (pages, b"<hugepages/>"):
        xml = b"<domain><memoryBacking>" + backing + b"<nosharepages/></memoryBacking></domain>"
        with pytest.raises(Refused, match="huge pages"):
            domainxml.on_files(xml)
        made = domainxml.on_files(xml, moved=True)
        assert [each.tag for each in parsed(made).iterfind("memoryBacking/*")] == ["nosharepages", "access", "source"]


@pytest.mark.parametrize(
    "backing",
    [
        b"",
        b"<memoryBacking/>",
        b"<memoryBacking></memoryBacking>",
        b"<memoryBacking><discard/></memoryBacking>",
        b"<memoryBacking><source type='anonymous'/><access mode='private'/><discard/></memoryBacking>",
        b"<memoryBacking><source note='a > b' type=\"memfd\" /><access mode='shared'></access></memoryBacking>",
        b"<metadata><x:m xmlns:x='u'><memoryBacking><source type='memfd'/></memoryBacking></x:m></metadata>",
        b"<!-- <memoryBacking><hugepages/></memoryBacking> --><title><![CDATA[<memoryBacking>]]></title>",
    ],
)
def test_whatever_was_said_of_it_before(backing: bytes) -> None:
    xml = b"<domain type='kvm'><name>gr\xc3\xbcn</name>" + backing + b"<devices/></domain>"
    if b"</access>" in backing:
        with pytest.raises(Undecodable, match="cannot be read"):
            domainxml.on_files(xml)
        return
    made = parsed(domainxml.on_files(xml))
    assert made.find("memoryBacking/source").get("type") == "file"  # type: ignore[union-attr]
    assert made.find("memoryBacking/access").get("mode") == "shared"  # type: ignore[union-attr]
    assert len(made.findall("memoryBacking/*")) == (3 if b"discard" in backing else 2)
    assert made.findtext("name") == "grün"
    assert [each.tag for each in made if each.tag != "memoryBacking"] == [
        each.tag for each in parsed(xml) if each.tag != "memoryBacking"
    ]


def test_a_lock_is_put_where_metadata_is_and_replaces_one_that_was_there() -> None:
    first = domainxml.locked(DOMAIN, Lock("a'b\"<c>", "0" * 32))
    assert domainxml.lock(first) == Lock("a'b\"<c>", "0" * 32)
    again = domainxml.locked(first, LOCK)
    assert domainxml.lock(again) == LOCK
    assert parsed(again).findtext("metadata/{*}instance/{*}name") == "web-1"
    for metadata in (b"", b"<metadata/>", b"<metadata></metadata>"):
        assert domainxml.lock(domainxml.locked(b"<domain>" + metadata + b"</domain>", LOCK)) == LOCK


@pytest.mark.parametrize(
    ("xml", "code"),
    [
        (b"<domain><memoryBacking><hugepages/></memoryBacking></domain>", "HugePages"),
        (b"<domain><cpu><numa><cell id='0' memAccess='private'/></numa></cpu></domain>", "PrivateCell"),
    ],
)
def test_ram_that_cannot_come_from_files_is_refused(xml: bytes, code: str) -> None:
    with pytest.raises(Refused) as caught:
        domainxml.on_files(xml)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "xml",
    [
        b"",
        b"<domain/>",
        b"<network></network>",
        b"<domain><memoryBacking/><memoryBacking/></domain>",
        b"<!DOCTYPE domain><domain></domain>",
        b"<?xml version='1.0' encoding='latin-1'?><domain></domain>",
        b"<domain>" + b"<a>" * 100 + b"</a>" * 100 + b"</domain>",
        b"<domain><metadata><h:handoff xmlns:h='urn:memconsole:handoff'/></metadata></domain>",
    ],
)
def test_what_is_no_domain_is_an_error_by_name(xml: bytes) -> None:
    with pytest.raises(Undecodable):
        domainxml.lock(xml)


def test_inspect_says_what_an_image_is_and_that_nothing_starts_from_it(
    files: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "web.save"
    path.write_bytes(contents(locked_image(files)))
    found = describe(path)
    assert (found.kind, found.version, found.findings) == ("save-image", 2, ())
    assert (found.facts["region"], found.facts["locked"], found.facts["running"]) == ("web", True, True)
    assert found.facts["blocks"][0] == {"name": "pc.ram", "size": RAM, "pages": 0}
    assert main(["inspect", str(path)]) == ExitCode.DONE
    assert "locked: True" in capsys.readouterr().out
    path.write_bytes(contents(locked_image(files))[:-1])
    assert main(["inspect", str(path)]) == ExitCode.FINDINGS
    assert "no description closes it" in capsys.readouterr().out
