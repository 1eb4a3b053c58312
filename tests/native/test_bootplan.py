"""The boot plan in both its readers: what Python writes, C reads; of what is spoiled it keeps what it can."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import BootPlan, ClockReading, GuestFile, Hold, MonitorLines, Start, Verify
from memconsole.errors import BadFile, UsageError

DRIVER = Path(__file__).with_name("bootplan_driver.c")
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fsanitize=address,undefined"]
HEADER = 48

PLAN = BootPlan(
    (
        Hold("memconsole:web", 1, "region:web:0", b"\0payload\xff"),
        Hold("memconsole:web", 2**64 - 1, "region:web:1"),
        Hold("memconsole:manifest", 2, "ledger", b"x" * 4096),
    ),
    (Verify("region:web:0", 64 << 20, "00112233445566778899aabbccddeeff"),),
    (
        Start("web", ("/usr/bin/canary", "", "--größe"), "/run/x", "/run/x/log", (("region:web:0", 3), ("s", 1023))),
        Start("db", ("qemu",), "/", "/dev/null", (), 107, 64055),
        Start("lv", ("qemu",), "/", "/log", (("s", 3),), 1, 2, (3, 4), ("A=b",), ("/d", "/e"), ("/run/a.pid",)),
    ),
    (MonitorLines("db", "/run/x/qmp", (('{"execute":"cont"}', "return"), ("a", "b")), 1234),),
    ClockReading(1, 2, 3),
    (
        GuestFile("lv", "/run/lv.xml", b"<pid>@PID@</pid>\0", 0o600, 1, 2),
        GuestFile("lv", "/lib/key", b"", 0o640, early=True),
    ),
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("bootplan") / "driver"
    subprocess.run([compiler, *FLAGS, "-fno-sanitize-recover=all", "-o", path, DRIVER], check=True)
    return path


def read(driver: Path, plans: Iterable[bytes]) -> list[list[str]]:
    """What C finds in each of these, a line a thing."""
    stdin = b"".join(struct.pack("<I", len(plan)) + plan for plan in plans)
    done = subprocess.run([driver], input=stdin, capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().split("\n")
    found: list[list[str]] = [[]]
    for line in lines[:-1]:
        if line == "end":
            found.append([])
        else:
            found[-1].append(line)
    return found[:-1]


def _hex(value: str | bytes) -> str:
    return (value.encode() if isinstance(value, str) else value).hex() or "-"


def described(plan: BootPlan) -> list[str]:
    """A plan as the driver says it."""
    lines = [f"plan {plan.written.ticks} {plan.written.boottime_ns} {plan.written.realtime_ns}"]
    lines += [_hold(hold) for hold in plan.holds]
    lines += [f"verify {verify.size} {verify.digest} {_hex(verify.name)}" for verify in plan.verifies]
    for start in plan.starts:
        fds = "".join(f" {number} {_hex(name)}" for name, number in start.fds)
        words = " ".join(map(_hex, start.words))
        places = f"{_hex(start.guest)} {_hex(start.directory)} {_hex(start.log)}"
        groups = "".join(f" {gid}" for gid in start.groups)
        lists = (start.variables, start.directories, start.unless)
        more = "".join("".join(f" {_hex(each)}" for each in texts) + " ;" for texts in lists)
        lines.append(f"start {start.uid} {start.gid} {places}{fds} {words} ;{groups}{more}")
    for say in plan.says:
        lines.append(
            f"say {say.within_ms} {_hex(say.guest)} {_hex(say.socket)} "
            + " ".join(_hex(text) for line in say.lines for text in line)
        )
    for file in plan.files:
        numbers = f"{file.uid} {file.gid} {file.mode} {int(file.early)}"
        lines.append(f"file {numbers} {_hex(file.guest)} {_hex(file.path)} {_hex(file.content)}")
    return lines


def _hold(hold: Hold) -> str:
    return f"hold {hold.token} {_hex(hold.session)} {_hex(hold.name)} {_hex(hold.payload)}"


def resealed(plan: bytes) -> bytes:
    """A plan whose header's checksum is right again."""
    raw = bytearray(plan)
    length = struct.unpack_from("<I", raw, 16)[0]
    struct.pack_into("<I", raw, 12, 0)
    struct.pack_into("<I", raw, 12, zlib.crc32(raw[:length]))
    return bytes(raw)


def test_c_reads_what_python_writes_and_so_does_python(driver: Path) -> None:
    raw = bootplan.encode(PLAN)
    second_part = raw.ljust(bootplan.end(raw), b"\0") + b'{"regions":[]}'
    empty = bootplan.encode(BootPlan(()))
    assert read(driver, [raw, second_part, empty]) == [described(PLAN), described(PLAN), ["plan 0 0 0"]]
    assert bootplan.decode(raw) == bootplan.decode(second_part) == PLAN
    assert bootplan.decode(empty) == BootPlan(())
    assert bootplan.end(raw) % 4096 == 0


def test_of_a_spoiled_plan_every_whole_hold_counts_and_nothing_else(driver: Path) -> None:
    raw = bootplan.encode(PLAN)
    cases = [bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]) for at in range(len(raw))]
    for at, lines in enumerate(read(driver, cases)):
        assert lines[0] == "plan 0 0 0"
        assert lines[1].startswith("fault ")
        assert all(line.startswith("hold ") for line in lines[2:])
        whole = [_hold(hold) for hold in PLAN.holds]
        assert set(lines[2:]) <= set(whole), at
        # a bit that is wrong spoils one record at most
        assert len(lines) - 2 >= len(whole) - 1, at
        with pytest.raises(BadFile):
            bootplan.decode(cases[at])


def test_a_truncated_plan_keeps_the_holds_it_still_has(driver: Path) -> None:
    raw = bootplan.encode(PLAN)
    kept = [len(lines) - 2 for lines in read(driver, (raw[:length] for length in range(len(raw))))]
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (0, 3)
    for length in (0, 7, HEADER - 1, HEADER, len(raw) - 1):
        with pytest.raises(BadFile):
            bootplan.decode(raw[:length])


def test_a_plan_of_another_version_is_held_and_nothing_of_it_is_started(driver: Path) -> None:
    raw = bytearray(bootplan.encode(PLAN))
    struct.pack_into("<I", raw, 8, 2)
    other = resealed(bytes(raw))
    ((_, fault, *holds),) = read(driver, [other])
    assert fault == "fault it is of a version this memconsole does not know"
    assert holds == [_hold(hold) for hold in PLAN.holds]
    with pytest.raises(BadFile, match="version 2"):
        bootplan.decode(other)


def _record(kind: int, body: bytes) -> bytes:
    rest = struct.pack("<IHH", 16 + len(body), kind, 0) + body
    return b"MCRC" + struct.pack("<I", zlib.crc32(rest)) + rest + bytes(-len(body) % 8)


def test_what_a_newer_version_adds_is_passed_over_and_the_rest_done(driver: Path) -> None:
    raw = bytearray(bootplan.encode(PLAN) + _record(99, b"") + _record(100, b"later"))
    struct.pack_into("<II", raw, 16, len(raw), 12)
    other = resealed(bytes(raw))
    hold = bootplan.encode(BootPlan(PLAN.holds[:1]))
    length = struct.unpack_from("<I", hold, HEADER + 8)[0]
    longer = hold[:HEADER] + _record(1, hold[HEADER + 16 : HEADER + length] + b"later")
    longer = resealed(longer[:16] + struct.pack("<I", len(longer)) + longer[20:])
    assert read(driver, [other, longer]) == [described(PLAN), ["plan 0 0 0", _hold(PLAN.holds[0])]]
    assert bootplan.decode(other) == PLAN
    assert bootplan.decode(longer) == BootPlan(PLAN.holds[:1])


def test_a_record_that_is_not_whole_makes_the_plan_one_that_is_only_held(driver: Path) -> None:
    broken = bytearray(_record(99, b"later"))
    broken[17] ^= 1
    raw = bytearray(bootplan.encode(PLAN) + broken)
    struct.pack_into("<II", raw, 16, len(raw), 11)
    other = resealed(bytes(raw))
    ((_, fault, *holds),) = read(driver, [other])
    assert fault == "fault it has a record that is not whole"
    assert holds == [_hold(hold) for hold in PLAN.holds]
    with pytest.raises(BadFile, match="a record that is not whole"):
        bootplan.decode(other)


def test_random_bodies_behind_good_checksums_do_no_harm(driver: Path) -> None:
    rng = random.Random(5)
    cases = []
    for _ in range(3000):
        kind = rng.choice([1, 2, 3, 4, 5])
        good = bootplan.encode(
            rng.choice(
                [
                    BootPlan(PLAN.holds),
                    BootPlan((), PLAN.verifies),
                    BootPlan((), (), PLAN.starts),
                    BootPlan((), files=PLAN.files),
                    PLAN,
                ]
            )
        )
        body = bytearray(good[HEADER + 16 :][: rng.randrange(200)])
        for _ in range(rng.choice([0, 1, 3, 20])):
            if body:
                body[rng.randrange(len(body))] = rng.choice([0, 1, 255, rng.randrange(256)])
        rest = struct.pack("<IHH", 16 + len(body), kind, 0) + bytes(body)
        record = b"MCRC" + struct.pack("<I", zlib.crc32(rest)) + rest
        header = b"MCBOOTPL" + struct.pack(
            "<IIIIQQQ", 1, 0, HEADER + len(record), rng.choice([1, 1, 2, 2**31]), 0, 0, 0
        )
        cases.append(resealed(header + record))
    verdicts = [lines[1] if len(lines) > 1 else "whole" for lines in read(driver, cases)]
    assert any(verdict.startswith("fault ") for verdict in verdicts)
    assert any(not verdict.startswith("fault ") for verdict in verdicts)
    for case, verdict in zip(cases, verdicts, strict=True):
        if not verdict.startswith("fault "):
            assert bootplan.decode(case)  # what C takes, Python takes


def test_random_bytes_are_no_plan(driver: Path) -> None:
    rng = random.Random(6)
    raw = bootplan.encode(PLAN)
    cases = [rng.randbytes(rng.randrange(4096)) for _ in range(500)]
    cases += [raw[: rng.randrange(200)] + rng.randbytes(500) + raw[rng.randrange(200) :] for _ in range(500)]
    assert all(lines[1].startswith("fault ") for lines in read(driver, cases))


@pytest.mark.parametrize(
    "plan",
    [
        BootPlan((Hold("", 1, "a"),)),
        BootPlan((Hold("s" * 64, 1, "a"),)),
        BootPlan((Hold("s", 1, "a\0b"),)),
        BootPlan((Hold("s", 1, "a" * 201),)),
        BootPlan((Hold("s", 2**64, "a"),)),
        BootPlan((Hold("s", 1, "a", b"x" * 4097),)),
        BootPlan((), (Verify("a", 1, "00"),)),
        BootPlan((), (), (Start("g", (), "/", "/log"),)),
        BootPlan((), (), (Start("g", ("x",), "/", "/log", (("a", 2),)),)),
        BootPlan((), (), (Start("g", ("x",), "/", "/log", (("a", 1024),)),)),
        BootPlan((), (), (Start("g", ("x" * 65535,) * 20, "/", "/log"),)),
        BootPlan((), (), (), (MonitorLines("g", "/qmp", (("", "x"),)),)),
    ],
)
def test_what_cannot_stand_in_a_plan_is_refused_when_it_is_written(plan: BootPlan) -> None:
    with pytest.raises(UsageError):
        bootplan.encode(plan)


def test_time_goes_on_over_a_kexec_by_the_processors_counter() -> None:
    first, second = ClockReading(1000, 10_000, 5_000_000_000), ClockReading(3000, 12_000, 5_000_002_000)
    after, later = ClockReading(9000, 500, 6_000_000_000), ClockReading(9600, 1100, 6_000_000_600)
    assert bootplan.between(second, after, [(first, second), (after, later)]) == 6000
    assert bootplan.between(second, after, []) == 6_000_000_000 - 5_000_002_000
    assert bootplan.between(msgspec.structs.replace(second, ticks=0), after, [(first, second)]) == 999_998_000
    assert bootplan.between(after, second, []) == 0


def test_a_moment_is_three_clocks_that_go_forward() -> None:
    one, two = bootplan.moment(), bootplan.moment()
    assert two.boottime_ns > one.boottime_ns
    assert two.realtime_ns > one.realtime_ns
    assert two.ticks >= one.ticks


def test_a_broken_record_of_a_resume_is_named() -> None:
    with pytest.raises(BadFile, match="record of the resume"):
        bootplan.read_resume(b'{"version":1')
