"""The filter of migration streams: what it writes, what it refuses; under sanitizers with a driver of its own."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support import streams
from support.streams import PAGE, Page, Stream
from support.waiting import LONG_S

from memconsole.backend.managers.migration import Elsewhere, Filtered, filtered
from memconsole.errors import BadFile, Gone, KernelRefused, MemconsoleError, Refused

NATIVE = Path(__file__).parents[2] / "memconsole/native"
FLAGS = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"]
RAM = 16 * PAGE
RAW = Page("pc.ram", 2 * PAGE, b"\1" * PAGE)
PLAIN = Stream((("pc.ram", RAM), ("pc.bios", PAGE)), ((Page("pc.ram", 0), RAW, Page("pc.bios", 0)),))
ELSEWHERE = (Elsewhere("pc.ram", RAM),)


def memfd(content: bytes = b"", size: int = 0) -> int:
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    if size:
        os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    return fd


def run(raw: bytes, elsewhere: tuple[Elsewhere, ...] = ELSEWHERE, *, lock: bool = False) -> tuple[bytes, Filtered]:
    source, target = memfd(raw), memfd()
    try:
        facts = filtered(source, target, elsewhere, lock=lock)
        return os.pread(target, 1 << 24, 0), facts
    finally:
        os.close(source)
        os.close(target)


def refused(raw: bytes, elsewhere: tuple[Elsewhere, ...] = ELSEWHERE, *, lock: bool = False) -> MemconsoleError:
    with pytest.raises((BadFile, Refused)) as caught:
        run(raw, elsewhere, lock=lock)
    return caught.value


def test_any_stream_comes_out_without_the_pages_that_are_elsewhere() -> None:
    """Against the same values written without them, locked and not, and locked ones unlocked."""
    rng = random.Random(16)
    for _ in range(300):
        stream = streams.some(rng)
        gone = tuple(Elsewhere(*block) for block in stream.blocks if rng.random() < 0.6)
        names = frozenset(each.name for each in gone)
        plain, locked = (streams.without(stream, names, lock=lock).raw() for lock in (False, True))
        unlocked, facts = run(stream.raw(), gone)
        assert unlocked == plain
        assert run(stream.raw(), gone, lock=True)[0] == run(locked, gone, lock=True)[0] == locked
        assert run(locked, gone)[0] == unlocked
        assert {each.name: each.length for each in facts.blocks} == dict(stream.blocks)
        assert sum(each.dropped for each in facts.blocks) == sum(
            page.block in names for section in stream.sections for page in section
        )


def test_a_locked_stream_says_the_capability_and_no_place_where_a_block_could_be() -> None:
    locked, facts = run(PLAIN.raw(), lock=True)
    assert locked == streams.without(PLAIN, frozenset({"pc.ram"}), lock=True).raw()
    assert not facts.was_locked
    unlocked, facts = run(locked)
    assert unlocked == streams.without(PLAIN, frozenset({"pc.ram"}), lock=False).raw()
    assert facts.was_locked
    assert facts.machine == "pc-q35-10.0"


def test_pages_go_to_where_their_block_begins_and_zeros_wipe_what_was_there() -> None:
    pages = (Page("pc.ram", 0, b"\1" * PAGE), Page("pc.ram", PAGE, b"\2" * PAGE), Page("pc.ram", 5 * PAGE))
    stream = replace(PLAIN, sections=(pages, (Page("pc.ram", 0, b"\3" * PAGE), Page("pc.bios", 0))))
    sink = memfd(b"\7" * (RAM + 3 * PAGE))
    run(stream.raw(), (Elsewhere("pc.ram", RAM, sink, PAGE),))
    held = os.pread(sink, RAM + 3 * PAGE, 0)
    assert held[:PAGE] == held[-2 * PAGE :][:PAGE] == b"\7" * PAGE
    assert held[PAGE : 2 * PAGE] == b"\3" * PAGE
    assert held[2 * PAGE : 3 * PAGE] == b"\2" * PAGE
    assert held[6 * PAGE : 7 * PAGE] == bytes(PAGE)
    os.close(sink)


def test_pages_of_zeros_put_nothing_into_a_file_that_holds_nothing_there() -> None:
    sink = memfd(size=RAM)
    stream = replace(
        PLAIN, sections=(tuple(Page("pc.ram", at, b"") for at in range(0, RAM, PAGE)),), blocks=(("pc.ram", RAM),)
    )
    run(stream.raw(), (Elsewhere("pc.ram", RAM, sink),))
    assert os.fstat(sink).st_blocks == 0
    os.close(sink)


def test_a_file_shorter_than_its_block_takes_nothing() -> None:
    sink = memfd(size=RAM)
    assert "shorter than the block" in refused(PLAIN.raw(), (Elsewhere("pc.ram", RAM, sink, PAGE),)).why
    assert os.fstat(sink).st_size == RAM
    os.close(sink)


def test_what_is_for_who_answers_is_left_out() -> None:
    asked = struct.pack(">BHH", 8, 1, 0) + struct.pack(">BHHI", 8, 2, 4, 1)
    assert run(replace(PLAIN, between=asked + PLAIN.between).raw())[0] == run(PLAIN.raw())[0]


def live(name: bytes) -> bytes:
    return b"\1" + struct.pack(">I", 3) + bytes([len(name)]) + name + struct.pack(">II", 0, 1)


def record(flags: int) -> bytes:
    return PLAIN.raw().replace(struct.pack(">Q", 2 * PAGE | 0x28), struct.pack(">Q", 2 * PAGE | flags))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (
            replace(PLAIN, between=live(b"0000:00:04.0/vfio")).raw(),
            "a live section of it is not RAM: 0000:00:04.0/vfio",
        ),
        (replace(PLAIN, between=live(b"dirty-bitmap")).raw(), "not RAM: dirty-bitmap"),
        (replace(PLAIN, between=b"\4\0\0\0\7\6serial").raw(), "a device stands before its RAM has ended: serial"),
        (replace(PLAIN, between=struct.pack(">BHH", 8, 3, 0)).raw(), "a command in it is not known: postcopy-advise"),
        (replace(PLAIN, capabilities=("mapped-ram",)).raw(), "a capability that is not known: mapped-ram"),
        (record(0x40), "differences (xbzrle)"),
        (record(0x100), "compressed"),
        (record(0x200), "multifd"),
        (record(0x80), "RDMA"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(raw: bytes, why: str) -> None:
    error = refused(raw)
    assert isinstance(error, Refused)
    assert why in error.why


@pytest.mark.parametrize(
    ("raw", "elsewhere", "why"),
    [
        (b"", ELSEWHERE, "it is empty"),
        (b"LibvirtQemudSave", ELSEWHERE, "does not begin as a migration stream"),
        (PLAIN.raw()[:-1], ELSEWHERE, "no description closes it"),
        (PLAIN.raw() + b"\0", ELSEWHERE, "no description closes it"),
        (PLAIN.raw(), (Elsewhere("ram-node0", RAM),), "no block of RAM of this name: ram-node0"),
        (PLAIN.raw(), (Elsewhere("pc.ram", RAM + PAGE),), "another size than it is elsewhere: pc.ram"),
        (replace(PLAIN, sections=((RAW,),)).raw(), ELSEWHERE, "said nowhere to be elsewhere: pc.bios"),
        (replace(PLAIN, sections=((Page("pc.bios", PAGE),),)).raw(), ELSEWHERE, "beyond its block: pc.bios"),
        (replace(PLAIN, sections=((Page("other", 0),),)).raw(), ELSEWHERE, "no size of: other"),
        (record(0x2A), ELSEWHERE, "of no known kind"),
    ],
)
def test_a_spoiled_stream_is_named(raw: bytes, elsewhere: tuple[Elsewhere, ...], why: str) -> None:
    error = refused(raw, elsewhere)
    assert isinstance(error, BadFile)
    assert why in error.why


def test_a_machine_without_a_configuration_cannot_be_locked() -> None:
    old = replace(PLAIN, machine="")
    assert run(old.raw())[0] == streams.without(old, frozenset({"pc.ram"}), lock=False).raw()
    assert "could lock it" in refused(old.raw(), lock=True).why


def test_pages_of_another_size_are_those_that_the_stream_says() -> None:
    large = Stream((("pc.ram", 1 << 16),), ((Page("pc.ram", 0, b"\5" * (1 << 16)),),), page_bits=16)
    sink = memfd(size=1 << 16)
    run(large.raw(), (Elsewhere("pc.ram", 1 << 16, sink),))
    assert os.pread(sink, 1 << 16, 0) == b"\5" * (1 << 16)
    os.close(sink)


def test_whoever_waits_for_a_stream_that_does_not_come_can_be_told_to_stop() -> None:
    reading, writing = os.pipe()
    stopped, stopping = os.pipe()
    os.write(writing, PLAIN.raw()[:100])
    os.write(stopping, b"x")
    with pytest.raises(Gone):
        filtered(reading, -1, ELSEWHERE, stopper=stopped)
    for fd in (reading, writing, stopped, stopping):
        os.close(fd)


def test_a_target_that_takes_nothing_is_an_error_of_the_kernel() -> None:
    source, (reading, writing) = memfd(PLAIN.raw()), os.pipe()
    os.close(reading)
    with pytest.raises(KernelRefused):
        filtered(source, writing, ELSEWHERE)
    os.close(source)
    os.close(writing)


def test_spoiled_and_cut_streams_do_no_harm(tmp_path: Path) -> None:
    """The corpus: streams of every shape that QEMU writes and this reads."""
    program = tmp_path / "migration_driver"
    sources = [Path(__file__).with_name("migration_driver.c"), *NATIVE.glob("migration*.c")]
    words = ["cc", *FLAGS, "-fsanitize=address,undefined", "-I", NATIVE, "-o", program, *sources]
    subprocess.run([str(word) for word in words], check=True)
    rng = random.Random(11)
    corpus = [PLAIN, *(streams.some(rng) for _ in range(11))]
    for number, stream in enumerate(corpus):
        (tmp_path / f"{number:02}.stream").write_bytes(stream.raw())
    command = [str(program), "300", "20261130", *map(str, sorted(tmp_path.glob("*.stream")))]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LONG_S)
    assert result.returncode == 0, result.stderr
