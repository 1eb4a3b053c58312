"""``guest adopt`` and ``let-go``: whom they refuse, what custody has then, and what is left when one is cut short."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.desks import Desk, Facts, Live, M, desks, guest, region

from memconsole import actions as do
from memconsole.backend import steps
from memconsole.backend.custody import payloads
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.managers import libvirt_setup
from memconsole.backend.managers.guest_memory import Block, BlockPart
from memconsole.backend.managers.libvirt_setup import Part
from memconsole.backend.managers.sealed import Standing
from memconsole.backend.stores.adopted import RamFile
from memconsole.backend.verbs import adopt, prepare
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError, KernelRefused, MemconsoleError
from memconsole.model import Guest, GuestKind, GuestState, Managed, ManagedRam, MemoryModule, Outcome, Region
from memconsole.undoing import inverse

HVA = 0x7F0000000000
SHARED = "memory-backend-memfd,id=mem,share=on"
DOMAIN = Managed("libvirt", "web shop", "0c5e64d4-9af8-4b2c-9a7a-2ad77a6f6a6e", ram=ManagedRam("memfd", shared=True))


def vm(name: str, pid: int, managed: Managed | None = DOMAIN, backend: str = SHARED) -> Guest:
    """A QEMU that runs here without memconsole."""
    made = guest(name, GuestKind.FOREIGN, pid=pid)
    return replace(made, managed=managed, command=("qemu", "-object", backend), memory=4 * M)


def block(name: str = "pc.ram", at: int = 0, **changes: Any) -> Block:
    """A block of 4 MiB that is mapped at its place in the order of blocks."""
    made = Block(name, 4 * M, True, HVA + (at << 30), (BlockPart(at << 32, 0, 4 * M),))
    return made._replace(**changes)


SPLIT = block(parts=(BlockPart(0, 0, 3 * M), BlockPart(1 << 32, 3 * M, M)))


@pytest.fixture(autouse=True)
def _virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has a virsh; nothing here runs it."""
    binary = tmp_path / "bin" / "virsh"
    binary.parent.mkdir()
    binary.write_text("#!/bin/false\n")
    binary.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(binary.parent))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A domain ``web shop`` of two blocks, one whose RAM is split, a private one, a QEMU by hand, a guest of ours."""
    named = replace(DOMAIN, name="files", uuid="2")
    with desks(
        tmp_path,
        guests=(guest("db"),),
        live=(Live("db"),),
        strangers=(
            vm("web shop", 11),
            vm("files", 12, named),
            vm("plain", 13, replace(named, name="plain", uuid="3", ram=ManagedRam()), "memory-backend-ram,id=mem"),
            vm("qemu-14", 14, None),
        ),
        ram=((11, (block("ram-node0"), block("ram-node1", 1))), (12, (SPLIT,)), (13, ()), (14, (block("mem0"),))),
    ) as made:
        yield made


def run(desk: Desk, action: do.Action) -> PreparedAction:
    work = prepare(desk, action)
    assert work.refusals == []
    desk.carry(steps.run(action.spec.id, work.steps))
    desk.change(work.change)
    return work


def codes(desk: Desk, action: do.Action) -> list[str]:
    found = prepare(desk, action).refusals
    assert all(each.remedy for each in found)
    return [each.code for each in found]


def test_each_block_becomes_a_region_with_a_grant_that_says_where_it_is(desk: Desk) -> None:
    work = run(desk, do.GuestAdopt("web shop"))
    state = desk.state
    adopted = state.guests["web-shop"]
    assert (adopted.kind, adopted.adopted, adopted.pid, adopted.memory) == (GuestKind.FOREIGN, True, 11, 8 * M)
    assert [(each.name, each.store, each.size) for each in state.regions.values()] == [
        ("web-shop.ram-node0", "adopted", 4 * M),
        ("web-shop.ram-node1", "adopted", 4 * M),
    ]
    assert [(each.region, each.gpa, each.length) for each in state.grants.values()] == [
        ("web-shop.ram-node0", 0, 4 * M),
        ("web-shop.ram-node1", 1 << 32, 4 * M),
    ]
    for index, name in enumerate(state.regions):
        (fd,) = desk.fds(name)
        assert os.fstat(fd).st_ino == desk.ram[11][index][1].inode
        assert f"region:{name}:0" in desk.custody.names()
    assert desk.asked == ["web shop"]
    assert inverse(do.GuestAdopt("web shop"), outcome_of(work), None) == do.GuestLetGo("web-shop")


def outcome_of(work: PreparedAction) -> Outcome:
    return Outcome("guest-adopt", work.subject, work.text)


def test_nothing_is_asked_before_it_is_done(desk: Desk) -> None:
    work = prepare(desk, do.GuestAdopt("web shop"))
    assert [step.id for step in work.steps] == ["ask-web-shop", "hold-web-shop", "join-web-shop"]
    assert desk.asked == []
    assert desk.custody.names() == []


def test_a_block_in_two_ranges_of_addresses_has_a_grant_for_each(desk: Desk) -> None:
    run(desk, do.GuestAdopt("files"))
    assert [(each.gpa, each.offset, each.length) for each in desk.state.grants.values()] == [
        (0, 0, 3 * M),
        (1 << 32, 3 * M, M),
    ]


def test_all_of_libvirts_are_one_plan_and_who_cannot_be_is_told(desk: Desk) -> None:
    work = run(desk, do.GuestAdopt(all=True))
    assert sorted(desk.state.guests) == ["db", "files", "web-shop"]
    assert "plain" in work.note
    assert "its RAM is private" in work.note
    desk.facts = dataclasses.replace(desk.facts, strangers=desk.facts.strangers[2:])  # as a survey shows them now
    assert codes(desk, do.GuestAdopt(all=True)) == ["PrivateRam"]


def test_a_qemu_by_its_socket_is_called_as_the_operator_says(desk: Desk) -> None:
    run(desk, do.GuestAdopt("shop", qmp="/run/qmp-14"))
    assert list(desk.state.regions) == ["shop.mem0"]
    assert desk.state.guests["shop"].pid == 14


@pytest.mark.parametrize(
    ("action", "refused"),
    [
        (do.GuestAdopt(), "WhichGuest"),
        (do.GuestAdopt("web shop", all=True), "WhichGuest"),
        (do.GuestAdopt(all=True, qmp="/run/qmp-14"), "WhichGuest"),
        (do.GuestAdopt("none"), "NoSuchGuest"),
        (do.GuestAdopt("none", qmp="/run/gone"), "NotFound"),
        (do.GuestAdopt("none", qmp="/run/qmp-999"), "NoSuchGuest"),
        (do.GuestAdopt("db"), "Ours"),
        (do.GuestAdopt("plain"), "PrivateRam"),
        (do.GuestAdopt("qemu-14"), "NoMonitor"),
        (do.GuestAdopt("files", qmp="/run/qmp-12"), "Managed"),
        (do.GuestLetGo("none"), "NoSuchGuest"),
        (do.GuestLetGo("db"), "NoSuchGuest"),
    ],
)
def test_whom_it_does_not_adopt_is_refused_by_name(desk: Desk, action: do.Action, refused: str) -> None:
    found = prepare(desk, action).refusals
    assert [each.code for each in found] == [refused]


def test_ram_of_huge_pages_or_on_a_disk_is_refused_with_what_to_change(desk: Desk) -> None:
    (made, file, fd) = desk.ram[12][0]
    for kind, code, word in (("hugetlb", "HugePages", "<hugepages/>"), ("ext4", "NotInMemory", "memory_backing_dir")):
        desk.ram[12][0] = (made, file._replace(kind=kind, path="/var/lib/x"), fd)
        (refusal,) = prepare(desk, do.GuestAdopt("files")).refusals
        assert refusal.code == code
        assert word in refusal.remedy


def moved(desk: Desk, monkeypatch: pytest.MonkeyPatch, lacking: str = "", **changes: Any) -> PreparedAction:
    """The plan of a copy of the domain whose RAM is private, on a host with libvirt's hook."""
    part = Part("hook", "libvirt's hook", "/x", Standing.MISSING if lacking else Standing.THERE, lacking, "setup")
    monkeypatch.setattr(libvirt_setup, "status", lambda _root: (part,))
    monkeypatch.setattr(type(desk.custody), "survives", True)
    plain = next(each for each in desk.facts.strangers if each.name == "plain")
    managed = replace(plain.managed or DOMAIN, **{"state": "running", **changes})
    desk.facts = dataclasses.replace(desk.facts, strangers=(replace(plain, managed=managed),))
    return prepare(desk, do.GuestAdopt("plain", copy=True))


def test_private_ram_is_moved_where_that_is_asked_for_and_its_plan_says_how_long(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--copy" in prepare(desk, do.GuestAdopt("plain")).refusals[0].remedy
    work = moved(desk, monkeypatch)
    assert work.refusals == []
    names = [step.id.removesuffix("-plain") for step in work.steps]
    assert names == ["ask", "make", "hold", "look", "set", "copy", "end", "start", "join"]
    assert "stands still, about 2.3 s" in work.steps[-2].text
    assert "next cold start is on RAM of its own again" in work.note


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"lacking": "it is not there"}, "HookMissing", "it is not there"),
        ({"state": "pmsuspended"}, "NotRunning", "pmsuspended"),
        ({"host_devices": ("0000:01:00.0",)}, "Hindered", "0000:01:00.0"),
        ({"helped": ("virtiofs share",)}, "Hindered", "virtiofs share"),
        ({"block_jobs": ("backup of vda",)}, "Hindered", "backup of vda"),
        ({"modules": (MemoryModule("virtio-mem", M),)}, "Hindered", "virtio-mem"),
    ],
)
def test_what_libvirt_could_not_start_again_is_not_moved(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: str, word: str
) -> None:
    (refusal,) = moved(desk, monkeypatch, **changes).refusals
    assert refusal.code == code
    assert word in refusal.why


def test_a_memconsole_that_ends_with_its_terminal_moves_nothing(desk: Desk) -> None:
    assert codes(desk, do.GuestAdopt("plain", copy=True)) == ["NoService"]


def test_a_domain_that_libvirt_migrates_or_that_cannot_be_asked_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = vm("busy", 21, replace(DOMAIN, job="migration out"))
    with desks(tmp_path, strangers=(busy, vm("web shop", 22)), ram=((21, (block(),)), (22, (block(),)))) as desk:
        assert codes(desk, do.GuestAdopt("busy")) == ["JobUnderWay"]
        monkeypatch.setenv("PATH", "/nowhere")
        assert codes(desk, do.GuestAdopt("web shop")) == ["NoVirsh"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"shared": False}, "PrivateRam"), ({"hva": HVA + 4096}, "PrivateRam"), ({"size": 8 * M}, "PartOfFile")],
)
def test_what_qemu_says_and_its_process_does_not_show_leaves_nothing(
    desk: Desk, changes: dict[str, Any], code: str
) -> None:
    made, file, fd = desk.ram[11][1]
    desk.ram[11][1] = (made._replace(**changes), file, fd)
    work = prepare(desk, do.GuestAdopt("web shop"))
    with pytest.raises(GuestError) as told:
        desk.carry(steps.run("guest-adopt", work.steps))
    assert told.value.code == code
    assert desk.custody.names() == []
    assert desk.live_guest("web-shop") is None


def test_an_nvdimm_on_a_disk_stays_where_it_is(desk: Desk) -> None:
    made, file, fd = desk.ram[11][1]
    desk.ram[11][1] = (made._replace(nv=True), file._replace(kind="ext4"), fd)
    run(desk, do.GuestAdopt("web shop"))
    assert list(desk.state.regions) == ["web-shop.ram-node0"]


def test_a_failure_half_way_takes_out_of_custody_what_was_put_there(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = prepare(desk, do.GuestAdopt("web shop"))
    opened = desk.open_ram
    second = desk.ram[11][1][1]

    def fails(guest: Guest, file: RamFile) -> int:
        if file == second:
            raise KernelRefused("open", 13, what="no")
        return opened(guest, file)

    monkeypatch.setattr(desk, "open_ram", fails)
    with pytest.raises(MemconsoleError):
        desk.carry(steps.run("guest-adopt", work.steps))
    assert desk.custody.names() == []
    assert not desk.holds_region("web-shop.ram-node0")


def test_ram_that_was_plugged_in_since_is_adopted_by_doing_it_again(desk: Desk) -> None:
    later = desk.ram[11].pop()
    run(desk, do.GuestAdopt("web shop"))
    assert codes(desk, do.GuestAdopt("web shop")) == ["AlreadyAdopted"]
    desk.ram[11].append(later)
    work = run(desk, do.GuestAdopt("web-shop"))
    assert [step.id for step in work.steps] == ["ask-web-shop", "hold-web-shop"]
    assert sorted(desk.state.regions) == ["web-shop.ram-node0", "web-shop.ram-node1"]


def test_letting_go_leaves_the_guest_its_ram_and_custody_nothing(desk: Desk) -> None:
    run(desk, do.GuestAdopt("web shop"))
    run(desk, do.GuestLetGo("web shop"))
    assert desk.custody.names() == []
    assert (desk.state.regions, desk.state.grants, sorted(desk.state.guests)) == ({}, {}, ["db"])


def test_the_ram_of_one_that_ended_stays_until_it_is_released(desk: Desk) -> None:
    run(desk, do.GuestAdopt("web shop"))
    desk.lives("web-shop").says = GuestState.GONE
    assert codes(desk, do.GuestAdopt("web shop")) == ["GuestGone"]
    work = run(desk, do.GuestLetGo("web-shop"))
    assert "stays in custody" in work.text
    assert sorted(desk.state.regions) == ["web-shop.ram-node0", "web-shop.ram-node1"]
    assert codes(desk, do.GuestAdopt("web shop")) == ["NameTaken"]
    run(desk, do.Release("web-shop.ram-node0"))
    assert desk.custody.names() == ["region:web-shop.ram-node1:0"]
    assert os.fstat(desk.ram[11][0][2]).st_size == 4 * M  # nobody's file was emptied


def test_what_memconsole_cannot_do_with_it_is_said(desk: Desk) -> None:
    run(desk, do.GuestAdopt("web shop"))
    desk.change(StateChange(regions=(region("spare"),)))
    for action in (do.GuestStop("web-shop"), do.GuestPause("web-shop"), do.GuestResume("web-shop")):
        assert codes(desk, action)[0] == "Adopted"
    assert "Adopted" in codes(desk, do.Map("web-shop.ram-node0", "db"))
    assert "FixedRam" in codes(desk, do.Map("spare", "web-shop"))
    (granted,) = prepare(desk, do.Release("web-shop.ram-node0")).refusals
    assert granted.remedy == "memconsole guest let-go web-shop"


def test_a_grant_of_it_ends_only_when_nobody_has_the_ram(desk: Desk) -> None:
    run(desk, do.GuestAdopt("web shop"))
    desk.facts = replace_facts(desk, ((11,),))
    assert codes(desk, do.Revoke("g1")) == ["Adopted"]
    desk.facts = replace_facts(desk, ((),))
    run(desk, do.Revoke("g1"))
    assert "g1" not in desk.state.grants
    assert desk.holds_region("web-shop.ram-node0")


def replace_facts(desk: Desk, reaching: tuple[tuple[int, ...], ...]) -> Facts:
    desk.looks = 0
    return dataclasses.replace(desk.facts, reaching=reaching)


def test_one_that_was_cut_short_leaves_only_what_is_not_its_own(desk: Desk) -> None:
    work = prepare(desk, do.GuestAdopt("web shop"))
    for step in work.steps[:2]:
        step.do()
    kept = Region("web-shop.mine", "memfd", 4 * M, 4096, work.change.regions[0].state)
    payloads.put(desk.custody, "region:web-shop.mine:0", desk.ram[14][0][2], kept)
    adopt.drop_unfinished(desk, work.aims.guests)
    assert desk.custody.names() == ["region:web-shop.mine:0"]


def test_one_that_libvirt_started_again_is_not_adopted_beside_what_it_was(desk: Desk) -> None:
    """After an operator's save and restore: another process, other RAM, and the name of its own in the ledger."""
    run(desk, do.GuestAdopt("web shop"))
    desk.remove_guest("web-shop")
    desk.facts = dataclasses.replace(desk.facts, strangers=(vm("qemu-99", 99, DOMAIN),))
    for action in (do.GuestAdopt("web shop"), do.GuestAdopt("qemu-99"), do.GuestAdopt(all=True)):
        (refusal,) = prepare(desk, action).refusals
        assert refusal.code == "GuestGone"
        assert "memconsole guest let-go web-shop; memconsole release web-shop.ram-node0;" in refusal.remedy
        assert refusal.remedy.endswith("memconsole guest adopt 'web shop'")
