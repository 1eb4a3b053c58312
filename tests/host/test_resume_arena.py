"""memconsole-resume and an arena, on an ext4 of a loop device in a range's place: what a handoff left is taken up once.

The program is built with a tree of its own for /sys and /dev, under ASan and UBSan. Placement is what FIEMAP says.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import keepers
from support.resume_program import FLAGS, SOURCES
from support.waiting import LONG_S

from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import BootPlan, Hold, Resume, Start, Verify
from memconsole.backend.peers.handle import Handle
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import arena_cargo, dax, ext4
from memconsole.backend.stores.arena import Arena
from memconsole.errors import KernelRefused, NotFound
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.units import PAGE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
M = 1 << 20
SIZE, START = 4 * M, 1 << 30
BEFORE = "00000000-0000-0000-0000-00000000b007"
"""The boot id of the kernel that left something."""
STAYS = "import time; time.sleep(600)"


def said_by(place: Path) -> str:
    """What the mark of a manifest says; empty where there is none."""
    with contextlib.suppress(OSError):
        return os.getxattr(place / ".handoff.1", arena_cargo.MARK).decode()
    return ""


class Range:
    """A range with an arena on it, mounted, and a memconsole-resume that takes it for one of this host."""

    def __init__(self, keeper: keepers.Running, place: Path, loop: str, program: Path) -> None:
        self.place = place
        self._program = program
        self._runtime = keeper.path.parent
        self._loop = loop
        self.custody = KeeperCustody(keeper.path)
        self._started: list[Handle] = []

    def close(self) -> None:
        for handle in self._started:
            handle.kill()
            handle.close()
        self.custody.close()

    def region(self, name: str = "web") -> tuple[Hold, Verify]:
        """A region, as a plan has it."""
        made = Arena("host", self.place, self.place.stat().st_dev, self._loop, START, 96 * M)
        fd = dax.create_file(made, name, SIZE)
        rows = [
            Extent(run.logical // PAGE, (START + run.physical) // PAGE, run.length // PAGE, Flag.PRESENT)
            for run in ext4.runs(fd, SIZE)
        ]
        with ExtentTable.from_rows(rows, first=0, pages=SIZE // PAGE) as table:
            digest = table.digest()
        token = os.fstat(fd).st_ino
        os.close(fd)
        name = f"region:{name}:0"
        return Hold("arena:host", token, name, b"payload"), Verify(name, SIZE, digest)

    def leave(self, plan: BootPlan | bytes) -> None:
        """What the kernel before left: a plan, and a file for each of its holds that is no region, with its name."""
        contents = {1: plan if isinstance(plan, bytes) else bootplan.encode(plan)}
        if isinstance(plan, BootPlan):
            contents |= {each.token: each.name.encode() for each in plan.holds if not each.name.startswith("region:")}
        fds = {}
        for token, content in contents.items():
            fds[token] = os.memfd_create("left")
            os.write(fds[token], content)
        arena_cargo.leave(self.place, fds)
        for fd in fds.values():
            os.close(fd)
        os.setxattr(self.place / ".handoff.1", arena_cargo.MARK, f"{arenas.machine_id()} {BEFORE}".encode())

    def run(self, fault: str = "") -> tuple[int, str]:
        env = os.environ | ({FAULT_VARIABLE: fault} if fault else {})
        with tempfile.TemporaryFile("w+") as err:
            words = [str(self._program), "--runtime", str(self._runtime)]
            done = subprocess.run(words, stdout=err, stderr=err, env=env, timeout=LONG_S, check=False)
            err.seek(0)
            said = err.read()
        with contextlib.suppress(NotFound):
            for guest in self.record().guests:
                if guest.pid and guest.pid not in {each.pid for each in self._started}:
                    self._started.append(Handle(guest.pid, guest.start_ticks))
        return done.returncode, said

    def record(self) -> Resume:
        fd, _ = self.custody.get(bootplan.RESUME)
        try:
            return bootplan.read_resume(os.pread(fd, M, 0))
        finally:
            os.close(fd)

    def content(self, name: str) -> bytes:
        fd, _ = self.custody.get(name)
        try:
            return os.pread(fd, M, 0)
        finally:
            os.close(fd)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.place.iterdir() if path.name.startswith("."))


class Built(NamedTuple):
    """memconsole-resume and a keeper, and the tree in which the former looks for ranges."""

    program: Path
    keeper: Path
    tree: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    place = tmp_path_factory.mktemp("resume")
    program, tree = place / "memconsole-resume", place / "tree"
    own = [f'-DARENA_SYS="{tree}/sys"', f'-DARENA_DEV="{tree}/dev"', "-DDRIVER_NS=0", f'-DLUO_DEVICE="{tree}/none"']
    flags = [*FLAGS, "-fno-sanitize-recover=all", *own]
    subprocess.run([compiler, *flags, "-o", program, *SOURCES], check=True)
    return Built(program, keepers.build_sanitized(place), tree)


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[str]:
    """An arena's file system on a loop device, mounted; the device."""
    with image.open("wb") as new:
        new.truncate(96 * M)
    place.mkdir()
    ext4.make(str(image), "mc:host", 96 * M)
    found = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"there is no loop device: {found.stderr.strip()}")
    loop = found.stdout.strip()
    try:
        subprocess.run(["mount", loop, place], check=True)
        try:
            yield loop
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


@pytest.fixture
def range_(built: Built, tmp_path: Path) -> Iterator[Range]:
    place = tmp_path / "mnt"
    with mounted(tmp_path / "image", place) as loop:
        number = Path(loop).stat().st_rdev
        shown = built.tree / f"sys/dev/block/{os.major(number)}:{os.minor(number)}/device"
        for each in (built.tree / "sys/class/block/pmem0", built.tree / "dev", shown):
            each.mkdir(parents=True)
        (shown / "resource").write_text(f"{START:#x}\n")
        (built.tree / "dev/pmem0").symlink_to(loop)
        try:
            with (
                keepers.running(built.keeper) as keeper,
                contextlib.closing(Range(keeper, place, loop, built.program)) as made,
            ):
                yield made
        finally:
            shutil.rmtree(built.tree)


def a_guest(range_: Range, tmp_path: Path) -> BootPlan:
    """A guest on a region, its state and the ledger, as they are left."""
    hold, verify = range_.region()
    fds = (("region:web:0", 3), ("state:web", 4))
    start = Start("web", (sys.executable, "-c", STAYS), str(tmp_path), str(tmp_path / "log"), fds)
    holds = (hold, Hold("arena:host", 2, "ledger"), Hold("arena:host", 3, "state:web"))
    return BootPlan(holds, (verify,), (start,))


def test_what_was_left_is_taken_up_its_guests_run_and_nothing_of_it_stays(range_: Range, tmp_path: Path) -> None:
    plan = a_guest(range_, tmp_path)
    range_.leave(plan)
    assert range_.left() == [".handoff.1", ".handoff.2", ".handoff.3"]
    code, said = range_.run()
    assert (code, said) == (0, "")
    found = range_.record()
    assert (found.mode, [each.state for each in found.guests], found.findings) == ("arena", ["started"], ())
    fd, payload = range_.custody.get("region:web:0")
    assert (os.fstat(fd).st_ino, payload) == (plan.holds[0].token, b"payload")
    os.close(fd)
    assert (range_.content("ledger"), range_.content("state:web")) == (b"ledger", b"state:web")
    assert range_.left() == []
    assert range_.run()[0] == 6


def test_it_may_die_at_every_point_and_starts_no_guest_twice(range_: Range, tmp_path: Path) -> None:
    plan = a_guest(range_, tmp_path)
    range_.leave(plan)
    passed = tmp_path / "points"
    code, died = -9, 0
    while code < 0:
        code, said = range_.run(f"@{passed}")
        died += code < 0
    assert code in {0, 6}, said
    assert died > 12
    assert [each.state for each in range_.record().guests] == ["started"]
    assert (range_.content("ledger"), range_.left()) == (b"ledger", [])


def test_pages_that_are_elsewhere_hold_the_guest(range_: Range, tmp_path: Path) -> None:
    plan = a_guest(range_, tmp_path)
    moved = Verify("region:web:0", SIZE, "00" * 16)
    range_.leave(plan._replace(verifies=(moved,)))
    code, said = range_.run()
    found = range_.record()
    assert code == 4
    assert "pages-moved" in said
    assert [each.state for each in found.guests] == ["held"]
    assert "state:web" in range_.custody.names()


def test_another_file_of_the_name_and_a_region_that_is_gone_are_said(range_: Range, tmp_path: Path) -> None:
    plan = a_guest(range_, tmp_path)
    other = plan.holds[0].token + 1
    holds = (
        Hold("arena:host", other, "region:web:0"),
        Hold("arena:host", 9, "region:../x:0"),
        Hold("arena:gone", 1, "region:g:0"),
    )
    range_.leave(plan._replace(holds=(*holds, *plan.holds[1:])))
    code, said = range_.run()
    lost = {each.subject: each.text for each in range_.record().findings if each.id == "lost"}
    assert code == 4
    assert "Stale file handle" in lost["region:web:0"]
    assert "Invalid argument" in lost["region:../x:0"]
    assert "boot with the memmap= of the kernel before" in lost["region:g:0"]
    assert "region:web:0 is not in custody" in said


@pytest.mark.parametrize(
    ("mark", "why"),
    [
        ("somebody-else {before}", "another host (machine id somebody-else) has left a handoff there"),
        ("{machine} {now}", ""),
        ("{machine} {before} 00000000-0000-0000-0000-0000000000ff", "guests ran on"),
        ("", ""),
    ],
)
def test_what_is_of_another_host_or_not_to_be_used_any_more_is_left_alone(
    range_: Range, tmp_path: Path, mark: str, why: str
) -> None:
    range_.leave(a_guest(range_, tmp_path))
    now = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    manifest = range_.place / ".handoff.1"
    os.removexattr(manifest, arena_cargo.MARK)
    if mark:
        said = mark.format(machine=arenas.machine_id(), before=BEFORE, now=now)
        os.setxattr(manifest, arena_cargo.MARK, said.encode())
    code, said = range_.run()
    assert code == 6
    assert why in said
    assert len(range_.left()) == 3
    assert range_.custody.names() == []


def test_an_arena_of_another_control_process_is_left_alone(range_: Range, tmp_path: Path) -> None:
    range_.leave(a_guest(range_, tmp_path))
    fd = os.open(range_.place, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    code, said = range_.run()
    os.close(fd)
    assert (code, "another control process uses it" in said) == (6, True)
    assert range_.run()[0] == 0


def test_guests_that_were_started_are_written_down_before_they_are(range_: Range, tmp_path: Path) -> None:
    range_.leave(a_guest(range_, tmp_path))
    code, _ = range_.run("resume.start.web.before")
    now = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert code == -9
    assert said_by(range_.place) == f"{arenas.machine_id()} {BEFORE} {now}"


def test_a_plan_of_another_version_starts_nothing_and_stays_to_be_looked_at(range_: Range, tmp_path: Path) -> None:
    plan = a_guest(range_, tmp_path)
    raw = bytearray(bootplan.encode(plan))
    raw[8] = 99
    range_.leave(bytes(raw))
    code, said = range_.run()
    assert code == 4
    assert "of a version this memconsole does not know" in said
    assert "region:web:0" in range_.custody.names()
    assert (range_.left(), said_by(range_.place)) == ([".handoff.1"], "")
    assert range_.run()[0] == 6


def test_what_is_taken_back_means_nothing(range_: Range, tmp_path: Path) -> None:
    range_.leave(a_guest(range_, tmp_path))
    arena_cargo.take_back(range_.place)
    arena_cargo.take_back(range_.place)
    assert range_.left() == []
    assert range_.run()[0] == 6


def test_what_finds_no_room_leaves_nothing(range_: Range) -> None:
    fd = os.memfd_create("large")
    os.ftruncate(fd, 128 * M)
    os.pwrite(fd, b"x", 0)
    with pytest.raises(KernelRefused, match="cannot take the guests' state"):
        arena_cargo.leave(range_.place, {1: fd})
    os.close(fd)
    assert range_.left() == []


def test_an_arena_that_is_held_still_takes_nothing_until_it_goes_on(range_: Range) -> None:
    arena_cargo.hold_still(range_.place)
    arena_cargo.hold_still(range_.place)
    arena_cargo.let_go_on(range_.place)
    arena_cargo.let_go_on(range_.place)
    (range_.place / "again").write_text("written")
