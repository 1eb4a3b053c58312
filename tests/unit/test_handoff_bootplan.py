"""Boot plans and records of a resume: what cannot stand in one is refused, what is broken is named."""

from __future__ import annotations

import struct
import zlib

import pytest
from msgspec.structs import replace

from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import BootPlan, ClockReading, GuestFile, Hold, MonitorLines, Start, Verify
from memconsole.errors import BadFile, UsageError

START = Start("web", ("canary", ""), "/run/web", "/run/web/log", (("state:web", 3),), 1, 2)
FULL = BootPlan(
    (Hold("memconsole:web", 7, "region:web:0", b"{}"),),
    (Verify("region:web:0", 4096, "00" * 16),),
    (START, replace(START, groups=(3,), variables=("A=b",), directories=("/d",), unless=("/run/d.pid",))),
    (MonitorLines("web", "/run/qmp", (("a", "b"), ("c", "d")), 5),),
    ClockReading(1, 2, 3),
    (GuestFile("web", "/run/web.pid", b"@PID@"), GuestFile("web", "/key", b"k", early=True)),
)


def test_a_plan_reads_back() -> None:
    assert bootplan.decode(bootplan.encode(FULL)) == FULL
    assert bootplan.decode(bootplan.encode(FULL) + bytes(4096)) == FULL


@pytest.mark.parametrize(
    "plan",
    [
        BootPlan((Hold("", 1, "region:web:0"),)),
        BootPlan((Hold("s" * 64, 1, "region:web:0"),)),
        BootPlan((Hold("memconsole:web", 1, "a\0b"),)),
        BootPlan((Hold("memconsole:web", 1, "n" * 201),)),
        BootPlan((Hold("memconsole:web", -1, "region:web:0"),)),
        BootPlan((Hold("memconsole:web", 1, "region:web:0", bytes(4097)),)),
        BootPlan((), (Verify("region:web:0", 4096, "00"),)),
        BootPlan((), (Verify("region:web:0", 1 << 64, "00" * 16),)),
        BootPlan((), (), (replace(START, words=()),)),
        BootPlan((), (), (replace(START, fds=(("state:web", 2),)),)),
        BootPlan((), (), (replace(START, fds=(("state:web", 3),) * 1001),)),
        BootPlan((), (), (replace(START, words=("w" * 65000,) * 20),)),
        BootPlan((), (), (replace(START, uid=-1),)),
        BootPlan((), (), (), (MonitorLines("web", "", ()),)),
        BootPlan((), (), (replace(START, groups=(-1,)),)),
        BootPlan((), files=(GuestFile("web", "", b""),)),
        BootPlan((), files=(GuestFile("web", "/run/web", bytes(1 << 20)),)),
    ],
)
def test_what_cannot_stand_in_a_plan_is_refused(plan: BootPlan) -> None:
    with pytest.raises(UsageError):
        bootplan.encode(plan)


def sealed(raw: bytearray) -> bytes:
    """With the checksum of what it holds now: only what it says of itself is wrong."""
    struct.pack_into("<I", raw, 12, 0)
    struct.pack_into("<I", raw, 12, zlib.crc32(raw))
    return bytes(raw)


def changed(at: int, form: str, value: int) -> bytes:
    raw = bytearray(bootplan.encode(FULL))
    struct.pack_into(form, raw, at, value)
    return sealed(raw)


FIRST = 48
"""Where the first record begins: its magic, its checksum, its size, its kind."""


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "does not begin as a boot plan"),
        (b"x" * 100, "does not begin as a boot plan"),
        (bootplan.encode(FULL)[:-1], "truncated"),
        (bootplan.encode(FULL)[:-8] + b"otherwis", "checksum"),
        (changed(8, "<I", 9), "version 9"),
        (changed(20, "<I", 99), "fewer records"),
        (changed(FIRST, "<I", 0), "not whole"),
        (changed(FIRST + 4, "<I", 0), "not whole"),
        (changed(FIRST + 8, "<I", 1 << 30), "not whole"),
    ],
)
def test_a_broken_plan_is_named_and_says_that_nothing_is_lost(raw: bytes, said: str) -> None:
    with pytest.raises(BadFile) as error:
        bootplan.decode(raw)
    assert said in error.value.why
    assert error.value.remedy


def test_a_record_of_a_kind_that_is_not_known_is_passed_over_and_a_short_one_is_named() -> None:
    raw = bytearray(bootplan.encode(BootPlan(FULL.holds)))
    size, _ = struct.unpack_from("<IH", raw, FIRST + 8)

    def with_crc(kind: int, token_bytes: int) -> bytes:
        struct.pack_into("<IH", raw, FIRST + 8, FIRST_HEAD + token_bytes, kind)
        struct.pack_into("<I", raw, FIRST + 4, zlib.crc32(raw[FIRST + 8 : FIRST + FIRST_HEAD + token_bytes]))
        return sealed(raw)

    assert bootplan.decode(with_crc(99, size - FIRST_HEAD)) == BootPlan(())
    with pytest.raises(BadFile) as error:
        bootplan.decode(with_crc(1, 12))
    assert "shorter than it says" in error.value.why


FIRST_HEAD = 16


@pytest.mark.parametrize(
    ("start", "stop", "kernels", "ns"),
    [
        (ClockReading(100, 0, 5), ClockReading(300, 0, 99), [(ClockReading(1, 1, 1), ClockReading(11, 101, 1))], 2000),
        (ClockReading(0, 0, 5), ClockReading(300, 0, 99), [(ClockReading(1, 1, 1), ClockReading(11, 101, 1))], 94),
        (ClockReading(400, 0, 5), ClockReading(300, 0, 99), [(ClockReading(1, 1, 1), ClockReading(11, 101, 1))], 94),
        (ClockReading(100, 0, 99), ClockReading(300, 0, 5), [], 0),
    ],
)
def test_time_passes_by_the_processors_counter_where_it_is_known(
    start: ClockReading, stop: ClockReading, kernels: list[tuple[ClockReading, ClockReading]], ns: int
) -> None:
    assert bootplan.between(start, stop, kernels) == ns


def test_a_moment_is_now() -> None:
    first, second = bootplan.moment(), bootplan.moment()
    assert first.boottime_ns < second.boottime_ns
    assert bootplan.between(first, second, [(first, second)]) > 0
