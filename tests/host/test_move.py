"""A region goes from one store to the other and back, with its guest, and whoever dies meanwhile leaves it whole.

The arena is an ext4 of a loop device, which is not dax: what only dax has is seen in tests/vm/test_arena.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import arenas
from support.controls import M, goes_on, guest, region
from support.faultpoints import fault_points
from support.guests import AgentProcess
from support.waiting import until
from support.worlds import World, worlds

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.revoke import POINTS
from memconsole.backend.stores import arena
from memconsole.extents import digest_fd
from memconsole.model import GrantState, GuestState

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
SIZE = 4 * M
TESTS = Path(__file__).parent.parent
MOVED = [point for point in POINTS if ".move." in point]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with arenas.images(tmp_path_factory.mktemp("arena"), "host") as path:
        yield path


@pytest.fixture
def world(image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world with an arena, in the processes that die there too."""
    usable = (arenas.at(image),)
    monkeypatch.setattr(arena, "mounted", lambda *_: usable)
    prelude = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom pathlib import Path\nfrom support import arenas\n"
    with worlds(f"{prelude}arenas.take_as_dax(Path({str(image)!r}))\n") as made:
        yield made
    arenas.empty(image)


def fill(control: Control, name: str = "web") -> str:
    """Contents that are nowhere twice, with a hole; their digest."""
    (fd,) = control._desk.fds(name)
    for at in range(0, SIZE // 2, 4096):
        os.pwrite(fd, b"page" + at.to_bytes(8, "little"), at)
    return digest_fd(fd)


def where(control: Control, image: Path, kept: str, *, holds: str = "web") -> str:
    """The store that has the region, whole, and has it alone."""
    store = region(control.snapshot(), holds).store
    assert digest_fd(control._desk.fds(holds)[0]) == kept
    assert arenas.files(image) == ([holds] if store == "dax" else [])
    held = [name for name in control._desk.custody.names() if not name.startswith("quarantine:")]
    assert held == ["ledger", f"region:{holds}:0"]
    assert control._state.unfinished == {}
    return store


def test_a_region_goes_to_an_arena_and_back(world: World, image: Path) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", SIZE))
        kept = fill(control)
        plan = control.plan(do.Move("web", "dax"))
        assert [effect.id for effect in plan.effects] == ["move"]
        assert "4M more are needed" in plan.effects[0].text
        done = control.apply(do.Move("web", "dax"))
        assert kept in done.text
        assert where(control, image, kept) == "dax"
        record = arena.read_record(image / "web", arena.RegionRecord)
        assert record is not None
        assert record.region.name == "web"
        control.apply(do.Move("web", "memfd"))
        assert where(control, image, kept) == "memfd"
    with world.control() as control:
        assert where(control, image, kept) == "memfd"
        control.apply(do.Move("web", "dax"))
        control.apply(do.Release("web"))
        assert arenas.files(image) == []


@pytest.mark.parametrize(("source", "target"), [("memfd", "dax"), ("dax", "memfd")])
def test_whoever_dies_leaves_it_whole_in_exactly_one_store(world: World, image: Path, source: str, target: str) -> None:
    move = do.Move("web", target)
    with world.control() as control:
        control.apply(do.Reserve("web", SIZE, store=source))
        kept = fill(control)
        points = fault_points(control.plan(move))
    stays = [points[0], *MOVED[: MOVED.index("revoke.move.committed")]]
    for point in (points[0], *MOVED, points[1]) if target == "dax" else MOVED[2:]:
        world.dies(move, point)
        with world.control() as control:
            assert where(control, image, kept) == (source if point in stays else target), point
            if point not in stays:
                control.apply(do.Move("web", source))
                assert where(control, image, kept) == source


def test_a_process_with_an_agent_has_it_again_and_runs_on(world: World, image: Path) -> None:
    with AgentProcess(world.runtime / "agents") as process, world.control() as control:
        control.apply(do.Reserve("web", SIZE))
        control.apply(do.GuestAttach("db", process.pid))
        control.apply(do.Map("web", "db"))
        assert process.do("wait g1") == "g1"
        process.do("write g1 hello")
        plan = control.plan(do.Move("web", "dax"))
        assert [effect.id for effect in plan.effects] == ["ask-g1", "move", "offer"]
        control.apply(do.Move("web", "dax"))
        (grant,) = control.snapshot().grants
        assert (grant.id, grant.state) == ("g1", GrantState.MAPPED)
        assert process.do("read g1 5") == "hello"
        process.do("write g1 there")
        assert os.pread(control._desk.fds("web")[0], 5, 0) == b"there"
        assert arenas.files(image) == ["web"]


def test_a_process_whose_control_process_died_has_it_again(world: World, image: Path) -> None:
    with AgentProcess(world.runtime / "agents") as process:
        with world.control() as control:
            control.apply(do.Reserve("web", SIZE))
            control.apply(do.GuestAttach("db", process.pid))
            control.apply(do.Map("web", "db"))
            assert process.do("wait g1") == "g1"
            process.do("write g1 hello")
            points = fault_points(control.plan(do.Move("web", "dax")))
        store = "dax"
        for point in ("move.ask-g1.after", "revoke.move.named", "revoke.move.committed", "move.offer.before"):
            assert point in points or point in MOVED
            world.dies(do.Move("web", store), point, "db")
            with world.control() as control:
                until(lambda: guest(control.snapshot(), "db").agent, "the agent came back")
                assert process.do("wait g1") == "g1"
                assert process.do("read g1 5") == "hello", point
                store = {"dax": "memfd", "memfd": "dax"}[region(control.snapshot(), "web").store]


def test_a_canary_counts_on_in_the_other_store(world: World, image: Path) -> None:
    with world.control() as control:
        control.apply(do.GuestStart("watch", memory=SIZE))
        goes_on(control, "watch")
        control.apply(do.Move("watch", "dax"))
        goes_on(control, "watch")
        assert arenas.files(image) == ["watch"]
        control.apply(do.Move("watch", "memfd"))
        goes_on(control, "watch")


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="there is no QEMU")
def test_a_qemu_is_saved_for_it_and_started_again(world: World, image: Path) -> None:
    world.runtime.mkdir(exist_ok=True)
    (world.runtime / "keeper").symlink_to(world.keeper)  # where memconsole-resume asks for it
    with world.control() as control:
        control.apply(do.GuestStart("vm", vmm="qemu", memory=16 * M))
        pid = guest(control.snapshot(), "vm").pid
        plan = control.plan(do.Move("vm", "dax", within=60))
        assert [effect.id for effect in plan.effects] == ["suspend", "move"]
        assert "started again" in plan.note
        control.apply(do.Move("vm", "dax", within=60))
        found = guest(control.snapshot(), "vm")
        assert (found.state, found.pid != pid) == (GuestState.RUNNING, True)
        assert arenas.files(image) == ["vm"]
    world.dies(do.Move("vm", "memfd", within=60), "move.suspend.after")
    with world.control() as control:
        assert guest(control.snapshot(), "vm").state is GuestState.RUNNING
        assert region(control.snapshot(), "vm").store == "dax"


def test_who_uses_it_and_has_no_agent_refuses_it_by_name(world: World, tmp_path: Path) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", SIZE))
        control.apply(do.GuestStart("watch", memory=SIZE))
        with open(control._desk.fds("web")[0], "rb", closefd=False) as held:
            import subprocess

            with subprocess.Popen(["sleep", "600"], pass_fds=[held.fileno()]) as other:
                try:
                    (refusal,) = control.plan(do.Move("web", "dax")).refusals
                    assert refusal.code == "StillMapped"
                    assert str(other.pid) in refusal.why
                finally:
                    other.kill()
        assert control.plan(do.Move("web", "dax")).refusals == ()
