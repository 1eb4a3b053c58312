"""Adopted guests on their way through a handoff: QEMU and libvirt are values, process, memory and image are real."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.desks import Desk, Facts, Live, M, Mount, desk_of, grant, guest, region
from support.fake_qemu import FakeQemu
from support.streams import PAGE, Page, Stream
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.custody import payloads
from memconsole.backend.handoff import adopted_facts, carried, carried_back, fast
from memconsole.backend.handoff.carried import Taking
from memconsole.backend.managers import libvirt, libvirt_setup, plans, saveimage, virsh
from memconsole.backend.managers.libvirt_setup import Part
from memconsole.backend.managers.migration import filtered
from memconsole.backend.managers.sealed import Standing
from memconsole.backend.peers import handle
from memconsole.backend.steps import Step, run
from memconsole.backend.verbs import prepare
from memconsole.errors import GuestError, MemconsoleError
from memconsole.extents import Extent, Flag
from memconsole.model import GuestKind, GuestState, Managed, ManagedRam

UUID = "5d5b5d26-0c46-4d3f-9a58-6b8c3d9c0a11"
XML = b"<domain type='qemu'><name>web</name><memoryBacking><source type='memfd'/></memoryBacking></domain>"
STREAM = Stream((("pc.ram", 4 * M), ("pc.bios", PAGE)), ((Page("pc.ram", 0, b"\1" * PAGE), Page("pc.bios", 0)),))
MANAGED = Managed("libvirt", "web", UUID, state="running", persistent=True, ram=ManagedRam("memfd", shared=True))
FRAMES = (Extent(0, 0x1000, 1024, Flag.PRESENT | Flag.HUGE),)


class Qemu(FakeQemu):
    """One that would empty its RAM when it ends."""

    empties = True
    block = "pc.ram"

    def human_monitor_command(self, command_line: str, **_: object) -> object:
        assert command_line == "info ramblock"
        row = (
            f"{self.block:>30}    4 KiB  0x0000000000000000 0x0000000000400000 0x0000000000400000 0x00007f0000000000 rw"
        )
        return f"              Block Name    PSize  Offset  Used  Total  HVA  RO\n{row}\n"

    def qom_get(self, **_: object) -> object:
        return self.empties

    def qom_set(self, value: bool, **_: object) -> object:
        self.empties = value
        return {}


class Host:
    """libvirt as a value: which domains run, what it was told to start, and the process that its QEMU is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, saves: Path) -> None:
        self.qemu = Qemu(STREAM.raw())
        self.runs = {UUID}
        self.saved: set[str] = set()
        self.started: list[str] = []
        self.says = "paused"
        self.silent = self.destroyed = False
        self.xml = XML
        saves.mkdir()
        monkeypatch.setattr(carried_back, "SAVES", saves)
        monkeypatch.setattr(virsh, "monitor", lambda _uuid: self.ask)
        monkeypatch.setattr(virsh, "description", lambda _uuid: self.xml)
        monkeypatch.setattr(virsh, "was_destroyed", lambda _uuid: self.destroyed)
        monkeypatch.setattr(virsh, "state", lambda _uuid: self.says)
        monkeypatch.setattr(virsh, "running", lambda: frozenset(self.runs))
        monkeypatch.setattr(virsh, "is_saved", lambda uuid: uuid in self.saved)
        monkeypatch.setattr(virsh, "is_off", lambda _uuid, _within: True)
        monkeypatch.setattr(virsh, "start", lambda uuid, _within: self.start(f"start {uuid}"))
        monkeypatch.setattr(virsh, "restore", lambda image, _within: self.start(f"restore {Path(image).suffix}"))
        monkeypatch.setattr(libvirt_setup, "status", lambda _root: tuple(self.parts))
        self.parts: list[Part] = []
        self.process = subprocess.Popen(["sleep", "infinity"])

    def ask(self, command: str, arguments: Mapping[str, object], fd: int | None = None) -> Any:
        if self.silent:
            raise GuestError("libvirt does not hand it on", "no answer", "see libvirtd")
        return self.qemu(command, arguments, fd)

    def start(self, how: str) -> None:
        self.started.append(how)
        self.runs.add(UUID)

    def stopped(self) -> bool:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(monkeypatch, tmp_path / "saves")
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
def desk(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """An adopted guest ``web`` that runs."""
    pid = host.process.pid
    ticks = handle.stat(pid)[1]
    mine = replace(
        guest("web", GuestKind.FOREIGN, pid=pid), start_ticks=ticks, adopted=True, managed=MANAGED, memory=4 * M
    )
    facts = Facts(
        regions=(region("web.pc.ram"),),
        guests=(mine,),
        grants=(grant(region="web.pc.ram", guest="web", gpa=0),),
        live=(Live("web", GuestKind.FOREIGN, pid, ticks),),
        frames=FRAMES,
    )
    with desk_of(tmp_path, facts) as made:
        made.mount = Mount()
        made.tree.write("/proc/sys/kernel/random/boot_id", "this\n")
        monkeypatch.setattr(
            carried_back, "_found", lambda _desk, mine, _said: replace(mine, pid=pid, start_ticks=ticks)
        )
        yield made


def taken(desk: Desk) -> tuple[Taking, list[Step]]:
    """A guest whose state was taken, and the steps that did it."""
    taking = Taking(desk, desk.state.guests["web"], lambda: None)
    steps = list(taking.steps())
    desk.carry(run("take", steps))
    return taking, steps


def digest(desk: Desk) -> str:
    """What its image is to be locked to."""
    with desk.segment_frames("web.pc.ram", 0) as table:
        return carried.frames_digest([("web.pc.ram", (table.digest(),))])


def ended(desk: Desk, host: Host, *, jumped: bool = False) -> None:
    """Its state was taken, its image is whole, and its process has ended: by a rehearsal, or a jump."""
    taking, _ = taken(desk)
    taking.seal(digest(desk))
    taking.end()
    host.runs.clear()
    if jumped:
        desk.tree.write("/proc/sys/kernel/random/boot_id", "another\n")


def test_the_state_is_taken_into_a_locked_image_and_the_process_is_stopped(desk: Desk, host: Host) -> None:
    taking, _ = taken(desk)
    until(host.stopped, "its process is stopped")
    assert not host.qemu.empties
    assert taking.said.before.running
    assert taking.said.emptied == ("pc.ram",)
    taking.seal(digest(desk))
    fd, payload = desk.custody.get("carried:web")
    found = saveimage.examine(fd)
    os.close(fd)
    assert found.image.lock is not None
    assert found.image.lock.digest == payloads.read("carried:web", payload, carried.Carried).digest == digest(desk)
    assert found.stream is not None
    assert found.stream.was_locked
    assert carried.is_waiting(desk, "web") is False


def test_what_was_done_is_undone_step_by_step(desk: Desk, host: Host) -> None:
    _, steps = taken(desk)
    for step in reversed(steps):
        assert step.undo is not None
        step.undo()
    until(lambda: not host.stopped(), "its process goes on")
    assert (host.qemu.status, host.qemu.empties, host.qemu.bandwidth) == ("running", True, 134217728)
    assert carried.noted(desk) == []


def test_one_that_somebody_let_go_on_is_not_carried(desk: Desk, host: Host) -> None:
    host.says = "running"
    with pytest.raises(GuestError, match="does not stand still"):
        taken(desk)
    until(lambda: not host.stopped(), "its process goes on")
    assert carried.noted(desk) == []
    assert host.qemu.empties


def test_whoever_comes_after_one_that_died_takes_it_back_once_libvirt_answers(desk: Desk, host: Host) -> None:
    taken(desk)
    applied: list[do.GuestResume] = []
    upkeep = carried_back.Upkeep(desk, applied.append)
    host.silent = True
    with pytest.raises(MemconsoleError):
        upkeep.see_to()
    assert carried.noted(desk) == ["web"]
    upkeep.see_to()  # it has failed a moment ago
    host.silent = False
    carried_back.Upkeep(desk, applied.append).see_to()
    until(lambda: not host.stopped(), "its process goes on")
    assert (host.qemu.status, host.qemu.empties) == ("running", True)
    assert (carried.noted(desk), applied) == ([], [])


def test_a_process_that_ended_by_itself_is_not_brought_back(desk: Desk, host: Host) -> None:
    taken(desk)
    host.process.kill()
    host.process.wait()
    desk.remove_guest("web")
    applied: list[do.GuestResume] = []
    carried_back.Upkeep(desk, applied.append).see_to()
    assert (carried.noted(desk), applied) == ([], [])


def resumed(desk: Desk) -> None:
    work = prepare(desk, do.GuestResume("web"))
    assert work.refusals == []
    desk.carry(run("guest-resume", work.steps))
    desk.change(work.change)
    assert work.after is not None
    work.after()


def test_one_that_a_rehearsal_ended_is_restored_and_everything_of_it_forgotten(desk: Desk, host: Host) -> None:
    ended(desk, host)
    applied: list[do.GuestResume] = []
    carried_back.Upkeep(desk, applied.append).see_to()
    assert applied == [do.GuestResume("web")]
    resumed(desk)
    assert host.started == ["restore .image"]
    assert desk.state.guests["web"].state is GuestState.RUNNING
    assert carried.noted(desk) == []
    assert plans.planned(desk.runtime_dir) == ()
    assert desk.mount is not None
    assert desk.mount.synced


def test_what_a_jump_brought_lies_where_libvirt_looks_before_it_is_asked(desk: Desk, host: Host) -> None:
    ended(desk, host, jumped=True)
    carried_back.offer_all(desk, {"web"})  # spoiled: it waits for a person
    assert plans.planned(desk.runtime_dir) == ()
    carried_back.offer_all(desk)
    assert plans.is_verified(UUID, desk.runtime_dir)
    assert plans.read(UUID, desk.runtime_dir) == {"pc.ram": Path("/run/mount/guests/web/ram/web.pc.ram")}
    save = carried_back.SAVES / "web.save"
    with save.open("rb", buffering=0) as file:
        found = saveimage.examine(file.fileno())
    assert found.stream is not None
    assert not found.stream.was_locked
    host.saved.add(UUID)
    resumed(desk)
    assert host.started == [f"start {UUID}"]
    assert not save.exists()


def test_an_image_is_restored_once_and_on_its_ram_alone(desk: Desk, host: Host) -> None:
    ended(desk, host, jumped=True)
    desk.facts = Facts(frames=(Extent(0, 0x2000, 1024, Flag.PRESENT | Flag.HUGE),))
    with pytest.raises(GuestError, match="its RAM is not what it was"):
        resumed(desk)
    desk.facts = Facts(frames=FRAMES)
    carried_back.offer_all(desk)
    for suffix in (".verified", ".restoring"):  # the hook has used the right, and the guest has ended since
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{plans.directory(desk.runtime_dir) / UUID}{suffix}")  # noqa: PTH108
    with pytest.raises(GuestError) as caught:
        resumed(desk)
    assert caught.value.code == "Spent"
    assert host.started == []
    work = prepare(desk, do.GuestLetGo("web"))
    desk.carry(run("guest-let-go", work.steps))
    assert carried.noted(desk) == []


def test_without_a_mount_it_waits(desk: Desk, host: Host) -> None:
    ended(desk, host)
    desk.mount = None
    with pytest.raises(GuestError, match="no mount shows its RAM"):
        resumed(desk)
    assert carried.noted(desk) == ["web"]


def test_without_the_hook_no_image_is_unlocked(desk: Desk, host: Host) -> None:
    ended(desk, host, jumped=True)
    host.parts = [Part("hook", "libvirt's hook", "/etc/libvirt", Standing.MISSING, "it is not there", "set it up")]
    carried_back.offer_all(desk)
    assert list(carried_back.SAVES.iterdir()) == []
    with pytest.raises(GuestError, match="other RAM"):
        resumed(desk)
    host.parts = []
    resumed(desk)
    assert host.started == ["restore .image"]


def test_one_whose_xml_changed_while_its_state_was_taken_goes_on(desk: Desk, host: Host) -> None:
    """A disk that was attached would be in its state and not in the image's XML: it could never be restored."""
    taking = Taking(desk, desk.state.guests["web"], lambda: None)
    look, *rest = taking.steps()
    desk.carry(run("take", [look]))
    host.xml = XML.replace(b"</domain>", b"<devices><disk/></devices></domain>")
    with pytest.raises(GuestError, match="changed meanwhile"):
        desk.carry(run("take", rest))
    assert host.qemu.status == "running"
    assert not host.stopped()


def test_what_its_balloon_has_changed_is_no_change(desk: Desk, host: Host) -> None:
    host.xml = XML.replace(b"<name>", b"<currentMemory unit='KiB'>4096</currentMemory><name>")
    taking = Taking(desk, desk.state.guests["web"], lambda: None)
    look, *rest = taking.steps()
    desk.carry(run("take", [look]))
    host.xml = XML
    desk.carry(run("take", rest))
    assert host.stopped()


def test_one_that_ends_while_its_state_is_taken_is_said_to_have(desk: Desk, host: Host) -> None:
    taking = Taking(desk, desk.state.guests["web"], lambda: None)
    look, change, stream = taking.steps()
    desk.carry(run("take", [look, change]))
    host.process.kill()
    host.process.wait()
    host.silent = True
    with pytest.raises(GuestError, match="has ended meanwhile") as caught:
        desk.carry(run("take", [Step("set", "", lambda: None, change.undo), stream]))
    assert "not undone" not in caught.value.why.replace("and not undone: libvirt", "")


def test_one_that_somebody_destroys_before_it_is_ended_stays_so(desk: Desk, host: Host) -> None:
    taking, _ = taken(desk)
    taking.seal(digest(desk))
    host.destroyed = True
    fd = taking._fd
    taking.end()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert taking.is_destroyed
    assert "carried:web" not in desk.custody.names()


def test_one_whose_process_ended_is_told_how_it_is_adopted_again(
    desk: Desk, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = desk.state.guests["web"]
    desk.remove_guest("web")
    monkeypatch.setattr(libvirt, "domains", lambda _root: {7: MANAGED})
    ((said,),) = adopted_facts.kept(desk, [mine]).values()
    assert "libvirt has started it again on other RAM" in said
    words = "memconsole guest let-go web; memconsole release web.pc.ram; memconsole guest adopt web"
    assert said.endswith(words)
    monkeypatch.setattr(libvirt, "domains", lambda _root: {})
    ((said,),) = adopted_facts.kept(desk, [mine]).values()
    assert said.endswith("memconsole guest let-go web")
    assert host.started == []


def test_what_keeps_an_adopted_guest_is_said_in_words(desk: Desk, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = desk.state.guests["web"]
    now = MANAGED
    monkeypatch.setattr(libvirt, "domains", lambda _root: {})
    monkeypatch.setattr(libvirt, "of_process", lambda *_: now)
    monkeypatch.setattr(desk, "ram_files", lambda _guest: ())

    def kept() -> str:
        return "; ".join(adopted_facts.kept(desk, [mine])["web"])

    assert kept() == ""
    now = replace(MANAGED, state="pmsuspended", helped=("TPM (swtpm)",))
    assert "TPM (swtpm)" in kept()
    assert "pmsuspended: QEMU cannot let a guest that sleeps go on" in kept()
    assert "virsh dompmwakeup web wakes it" in kept()
    now = MANAGED
    host.silent = True
    assert kept() == "libvirt does not answer: no answer"
    desk.mount = None
    assert "memconsole serve --mount" in kept()
    mine = replace(mine, managed=None)
    assert kept() == "no manager starts it again: libvirt does not run it"


def test_in_the_fast_lane_its_state_is_there_unlocked_beside_the_image_and_goes_with_it(
    desk: Desk, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = fast.Origin(("qemu",), (), 1, 1, (), b"<domstatus/>", b"")
    monkeypatch.setattr(fast, "origin", lambda _root, _guest: origin)
    taking = Taking(desk, desk.state.guests["web"], lambda: None, is_fast=True)
    desk.carry(run("take", list(taking.steps())))
    assert fast.held("web") not in desk.custody.names()  # before the image is whole nobody can start it
    taking.seal("11" * 32)
    fd, _ = desk.custody.get(fast.held("web"))
    os.lseek(fd, 0, os.SEEK_SET)
    found = filtered(fd, -1, taking.said.elsewhere)
    os.close(fd)
    assert not found.was_locked
    carried.take_back(desk, "web")
    assert [name for name in desk.custody.names() if name.partition(":")[0] in {"fast", "carried"}] == []


def test_one_that_memconsole_resume_had_go_on_is_never_restored(desk: Desk, host: Host) -> None:
    ended(desk, host, jumped=True)
    carried_back.spend_all(desk, ["web", "another"])
    assert carried.noted(desk) == []
    carried_back.offer_all(desk)
    assert list(carried_back.SAVES.iterdir()) == []
    assert plans.planned(desk.runtime_dir) == ()
