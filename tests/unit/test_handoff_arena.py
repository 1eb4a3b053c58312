"""A handoff of guests on an arena, played on a desk: alone without live update, and beside guests on memfds with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from support import handoffs
from support.desks import M, grant, region
from support.handoffs import Desk, Played, Vmm, refused, two_guests, vm

from memconsole.actions import HandoffRehearse, HandoffRun
from memconsole.backend import steps
from memconsole.backend.handoff import bootplan, facts, landing, manifest, roads, sequence
from memconsole.backend.ledger.state import Intent, StateChange
from memconsole.backend.stores import memfd
from memconsole.backend.stores.arena import Arena
from memconsole.backend.stores.base import Carrier
from memconsole.backend.stores.dax import DaxStore
from memconsole.backend.work import PreparedAction
from memconsole.errors import MemconsoleError
from memconsole.model import GuestKind, Region, Survival

RUN = HandoffRun()
WORD = "memmap=64M!4G"


class Lab(DaxStore):
    """One arena: what was left in it by token, and whether it is held still; ``fails``: what it cannot do."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, lasting=True)
        probe = os.memfd_create("where")
        self._device = os.fstat(probe).st_dev
        os.close(probe)
        self.lies: dict[int, bytes] = {}
        self.still = False
        self.fails = ""

    def arenas(self) -> tuple[Arena, ...]:
        return (Arena("lab", Path("/nowhere"), self._device, "/dev/pmem0", 4 << 30, 64 * M),)

    def carriers(self) -> tuple[Carrier, ...]:
        return (Carrier("arena:lab", "lab", 32 * M, 2 * M, 4 << 30),)

    def leave(self, place: str, files: Mapping[int, int]) -> None:
        assert place == "arena:lab"
        self.lies = {token: manifest.content(fd) for token, fd in files.items()}
        if self.fails == "leave":
            raise refused("leave")

    def take_back(self) -> None:
        assert not self.still
        self.lies = {}

    def hold_still(self, *, on: bool) -> None:
        self.still = on
        if on and self.fails == "still":
            raise refused("still")


def on_arena(name: str) -> Region:
    return replace_store(region(name))


def replace_store(made: Region) -> Region:
    return Region(made.name, "dax", made.size, made.page_size, made.state)


def made_of(tmp_path: Path, *others: Region) -> Iterator[tuple[Desk, Lab]]:
    """The canary is on the arena, and so is the QEMU unless its region is of the ``others``."""
    names = {each.name for each in others}
    regions = tuple(on_arena(name) for name in ("web", "vm") if name not in names) + others
    live = (Vmm("web", pid=4001), Vmm("vm", GuestKind.QEMU, 4002, ram="g2"))
    guests = (vm("web"), vm("vm", GuestKind.QEMU, 4002))
    grants = (grant("g1", "web", "web", gpa=0), grant("g2", "vm", "vm", gpa=0))
    with two_guests(tmp_path, regions=regions, guests=guests, grants=grants, live=live) as desk:
        lab = Lab(tmp_path)
        desk.__dict__["stores"] = {memfd.NAME: memfd, "dax": lab}
        yield desk, lab


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[Desk, Lab]]:
    yield from made_of(tmp_path)


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[tuple[Desk, Lab]]:
    yield from made_of(tmp_path, region("vm"))


def planned(desk: Desk, played: Played, *, luo: bool) -> PreparedAction:
    found = handoffs.seen(desk, played, RUN)
    if not luo:
        line = f"quiet {WORD}"
        more = roads.facts_of(desk, Survival(), line)
        found = replace(found, survival=Survival(), line=line, here=line, **more)  # type: ignore[arg-type]
    work = sequence.made_of(desk, RUN, found, played)
    assert work.refusals == []
    return work


def run(desk: Desk, work: PreparedAction) -> None:
    desk.carry(steps.run("handoff-run", work.steps))


def inode(desk: Desk, name: str) -> int:
    return os.fstat(desk.fds(name)[0]).st_ino


def test_without_live_update_all_of_it_is_left_in_the_arena_which_is_held_still(alone: tuple[Desk, Lab]) -> None:
    desk, lab = alone
    played = Played(desk)
    work = planned(desk, played, luo=False)
    assert [step.id for step in work.steps] == [
        *("check", "load", "place", "pause-web", "pause-vm", "save-web", "save-vm", "manifest", "still", "jump"),
    ]
    run(desk, work)
    assert played.preserved == {}
    assert (sorted(lab.lies), lab.still) == ([1, 2, 3, 4], True)
    assert [lab.lies[token].rstrip(b"\0") for token in (2, 3, 4)] == [b"ledger", b"state of web", b"state of vm"]
    found = bootplan.decode(lab.lies[1])
    assert [(each.session, each.token, each.name) for each in found.holds] == [
        ("arena:lab", inode(desk, "web"), "region:web:0"),
        ("arena:lab", inode(desk, "vm"), "region:vm:0"),
        ("arena:lab", 2, "ledger"),
        ("arena:lab", 3, "state:web"),
        ("arena:lab", 4, "state:vm"),
    ]
    assert [each.name for each in found.verifies] == ["region:web:0", "region:vm:0"]
    assert [each.guest for each in found.starts] == ["web", "vm"]


def test_with_live_update_each_guest_takes_its_road_in_one_sequence(beside: tuple[Desk, Lab]) -> None:
    desk, lab = beside
    played = Played(desk)
    work = planned(desk, played, luo=True)
    assert [step.id for step in work.steps] == [
        *("check", "load", "preserve-vm", "place", "pause-web", "pause-vm", "save-web", "save-vm"),
        *("manifest", "still", "jump"),
    ]
    run(desk, work)
    assert set(played.preserved) == {"memconsole:vm", "memconsole:manifest"}
    assert (lab.lies, lab.still) == ({}, True)
    found = bootplan.decode(desk.content(bootplan.MANIFEST))
    assert [(each.session, each.name) for each in found.holds] == [
        ("memconsole:vm", "region:vm:0"),
        ("arena:lab", "region:web:0"),
        ("memconsole:manifest", "ledger"),
        ("memconsole:manifest", "state:web"),
        ("memconsole:manifest", "state:vm"),
    ]


@pytest.mark.parametrize("failing", ["save-vm", "manifest", "still", "jump", "leave", "hold"])
def test_what_fails_leaves_the_arena_as_it_was_and_every_guest_running(alone: tuple[Desk, Lab], failing: str) -> None:
    desk, lab = alone
    before = desk.custody.names()
    work = planned(desk, Played(desk), luo=False)

    def fails() -> None:
        raise refused(failing)

    lab.fails = {"hold": "still"}.get(failing, failing)
    work.steps = [replace(step, do=fails) if step.id == failing else step for step in work.steps]
    with pytest.raises(MemconsoleError, match="cannot be done"):
        run(desk, work)
    assert (lab.lies, lab.still, desk.custody.names()) == ({}, False, before)
    assert [desk.lives(name).did[-1] for name in ("web", "vm")] == ["resume", "resume"]


def test_a_rehearsal_leaves_nothing_in_the_arena(alone: tuple[Desk, Lab]) -> None:
    desk, lab = alone
    played, action = Played(desk), HandoffRehearse()
    work = sequence.made_of(desk, action, facts.gather_facts(desk, action, played, jump=False), played)
    assert work.refusals == []
    desk.carry(steps.run("handoff-rehearse", work.steps))
    assert (lab.lies, lab.still, played.did) == ({}, False, ["revive manifest"])


def test_what_a_control_process_that_died_left_is_taken_back_before_a_guest_goes_on(alone: tuple[Desk, Lab]) -> None:
    desk, lab = alone
    played = Played(desk)
    work = planned(desk, played, luo=False)
    work.steps = [step for step in work.steps if step.id not in {"still", "jump"}]
    run(desk, work)
    assert lab.lies
    landing.undo_handoff(desk, Intent(0, RUN, "host", "", StateChange()), played)
    assert lab.lies == {}
    assert [desk.lives(name).did[-1] for name in ("web", "vm")] == ["resume", "resume"]


def test_a_vm_on_a_store_that_nobody_finds_is_named(alone: tuple[Desk, Lab]) -> None:
    desk, lab = alone
    assert roads.stranded(desk) == ()
    lab._device = -1
    assert roads.stranded(desk) == (("web", "web"), ("vm", "vm"))
