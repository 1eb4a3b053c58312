"""What a handoff is checked against, as it is read of a desk and of a host's tree; and clocks, behind one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace as but
from support.bzimages import ELF, PACKERS, bzimage
from support.desks import M, grant, guest
from support.handoffs import BDF, IMAGE, Desk, Played, Vmm, refused, two_guests
from support.trees import FakeProcess, intel_dump, maps_line
from support.waiting import until

from memconsole import decoding
from memconsole.actions import HandoffRehearse, HandoffRun
from memconsole.backend.custody import manager
from memconsole.backend.custody.manager import UnitFdStore
from memconsole.backend.handoff import apart, clocks, device_facts, facts, luo, powers
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.observe.survey import GuestReply
from memconsole.errors import BadFile, Gone, GuestError, KernelRefused, NotFound
from memconsole.model import GuestClock, GuestKind, GuestResult, GuestState, HandoffReport, HandoffState, Range

RUN, REHEARSE = HandoffRun(), HandoffRehearse()
LINE = "console=ttyS0 kho=on liveupdate=on"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with two_guests(tmp_path) as made:
        yield made


def gathered(desk: Desk, action: HandoffRun | HandoffRehearse = RUN) -> facts.HandoffFacts:
    return facts.gather_facts(desk, action, Played(desk), jump=isinstance(action, HandoffRun))


# --- the host -------------------------------------------------------------------------------------------------------


def test_what_is_to_be_booted_is_what_is_named_else_what_the_host_boots(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inspect(path: str, fd: int) -> object:
        raise BadFile(f"{path} is no kernel image")

    monkeypatch.setattr(apart, "inspect", inspect)
    found = gathered(desk)
    assert (found.kernel, found.image) == ("", None)
    assert "no kernel image found in /boot" in found.image_why
    desk.tree.write("/boot/vmlinuz-7.3.5", "text")
    desk.tree.write("/boot/initrd.img-7.3.5", bytes(5000))
    found = gathered(desk)
    assert found.kernel == str(desk.root / "boot/vmlinuz-7.3.5")
    assert "no kernel image" in found.image_why
    assert found.initrd_size == 5000
    named = facts.boot_target(HandoffRun(kernel=str(desk.root / "boot/vmlinuz-7.3.5"), append=LINE), desk.root)
    assert (named.initrd, named.line) == (str(desk.root / "boot/initrd.img-7.3.5"), LINE)
    bare = facts.boot_target(HandoffRun(kernel="/k", initrd="none"), desk.root)
    assert (bare.initrd, bare.bare) == ("", True)
    found = gathered(desk, HandoffRun(kernel=str(desk.root / "none"), initrd=str(desk.root / "neither")))
    assert "No such file" in found.image_why
    assert "No such file" in found.initrd_why


def test_sysctl_loaded_image_abis_limit_and_openers_are_read_of_the_tree(desk: Desk) -> None:
    assert gathered(desk).limit is None
    desk.tree.write("/proc/sys/kernel/kexec_load_disabled", "1\n")
    desk.tree.write("/sys/kernel/kexec_loaded", "1\n")
    desk.tree.write("/proc/self/cgroup", "0::/system.slice\n")
    desk.tree.write("/sys/fs/cgroup/system.slice/memory.max", f"{64 * M}\n")
    desk.tree.write("/sys/kernel/debug/kho/out/fdt", b"\0kho-v5\0memfd-v3\0")
    desk.tree.process(FakeProcess(812, fds={4: luo.DEVICE, 5: "anon_inode:[luo_session] theirs"}))
    found = gathered(desk)
    assert (found.kexec_disabled, found.loaded, found.opener) == (True, True, 812)
    assert found.limit == ("/system.slice", 64 * M)
    assert found.sessions == ((812, "theirs"),)
    assert set(found.abis) == {"kho-v5", "luo-v5", "memfd-v3"}


def test_a_limit_that_cannot_be_read_is_said_and_is_no_refusal(desk: Desk) -> None:
    desk.tree.write("/proc/self/cgroup", "0::/gone\n")
    found = gathered(desk)
    assert found.limit is None
    assert found.limit_why


def test_sessions_that_are_kept_are_named_unless_they_are_to_be_finished(desk: Desk) -> None:
    desk.keep("incoming:memconsole:old")
    assert gathered(desk).kept == ("incoming:memconsole:old",)
    assert gathered(desk, HandoffRun(finish=True)).kept == ()


def test_the_kernel_that_runs_is_known_by_its_release_and_version_and_so_is_the_next(desk: Desk) -> None:
    assert gathered(desk).running == ""
    assert not gathered(desk).runs_already
    desk.tree.write("/proc/sys/kernel/version", "#1\n")
    (desk.root / "boot").mkdir()
    bzimage(desk.root / "boot/vmlinuz-7.3.4-test", PACKERS["none"](ELF))
    found = gathered(desk)
    assert (found.running, found.next_kernel) == ("7.3.4-test #1", "7.3.4-test #1")
    assert found.runs_already
    bzimage(desk.root / "boot/vmlinuz-7.3.4-test", PACKERS["none"](ELF), release=b"7.3.4-test (who@where) #2")
    assert not gathered(desk).runs_already


def test_fd_stores_of_other_units_are_asked_of_systemd_where_it_manages(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gathered(desk).stores == ()
    monkeypatch.setattr(manager, "manages", lambda _: True)
    monkeypatch.setattr(manager, "own_unit", lambda _: "memconsole.service")
    monkeypatch.setattr(manager, "stores", lambda but: (UnitFdStore("cache.service", 3),))
    assert gathered(desk).stores == (UnitFdStore("cache.service", 3),)

    def silent(but: object) -> None:
        raise subprocess.TimeoutExpired("systemctl", 5)

    monkeypatch.setattr(manager, "stores", silent)
    assert "the fd store are unknown" in gathered(desk).stores_why


# --- regions and guests ---------------------------------------------------------------------------------------------


def test_regions_are_counted_with_what_lies_loose_or_in_scratch_and_lost_ones_are_named(desk: Desk) -> None:
    desk.custody.drop("region:old:0")
    desk.close_fds("old")
    desk.frames["web"] = 0x1000
    held = facts._region_facts(desk, desk.state.regions["web"], (Range(0x1000 << 12, (0x1000 << 12) + M, "s"),))
    assert (held.resident, held.runs, held.loose, held.in_scratch) == (4 * M, 1, 0, M)
    assert gathered(desk, REHEARSE).lost == ("old",)


def test_guests_are_met_as_they_answer_and_a_silent_one_is_asked_nothing_more(desk: Desk) -> None:
    desk.change(StateChange(guests=(guest("db"), guest("gone"))))
    desk.add_guest(Vmm("db", GuestKind.PROCESS))
    silent = GuestReply(GuestState.SILENT, why="no answer within 5 s")

    class Silent(Desk):
        def guest_replies(self, deadline: float) -> dict[str, GuestReply]:
            return {**super().guest_replies(deadline), "web": silent}

    desk.lives("vm").shares_ram = False
    desk.__class__ = Silent
    met = {each.guest.name: each for each in gathered(desk, REHEARSE).guests}
    assert (met["web"].state, met["web"].why_not) == (GuestState.SILENT, "no answer within 5 s")
    assert "x-ignore-shared" in met["vm"].incapable
    assert (met["db"].state, met["db"].incapable) == (GuestState.RUNNING, "")
    assert met["gone"].state is GuestState.GONE
    assert desk.lives("web").did == []


def test_a_vmm_that_ends_as_it_is_asked_is_silent_and_one_with_devices_stays_in_a_rehearsal(desk: Desk) -> None:
    class Ending(Vmm):
        def shares(self) -> bool:
            raise Gone("guest vm ended", "", "")

    desk.add_guest(Ending("vm", GuestKind.QEMU, 4002, ram="g2"))
    met = {each.guest.name: each for each in gathered(desk, REHEARSE).guests}
    assert met["vm"].why_not == "guest vm ended"
    desk.address_spaces.vmm_filled = frozenset({"vm"})
    met = {each.guest.name: each for each in gathered(desk, REHEARSE).guests}
    assert (met["vm"].stays, met["vm"].why_not) == (True, "")


def test_lazy_grants_of_guests_that_end_are_named(desk: Desk) -> None:
    grants = tuple(but(each, lazy=True) for each in desk.state.grants.values())
    desk.change(StateChange(guests=(guest("db"),), grants=(*grants, grant("g5", "old", "db", lazy=True))))
    assert gathered(desk, REHEARSE).lazy == (("g1", "web"), ("g2", "vm"))
    assert gathered(desk).lazy == (("g1", "web"), ("g2", "vm"), ("g5", "db"))


def test_who_maps_a_region_besides_its_guest_and_who_maps_it_badly_is_seen(desk: Desk) -> None:
    segment = desk.state.regions["web"].segments[0]
    device = segment.device >> 8, segment.device & 0xFF
    path = "/memfd:memconsole:web:0 (deleted)"
    size = 128 * M  # less is not worth a word
    bad = maps_line(0x7F0000001000, 0x7F0000001000 + size, "rw-s", path=path, device=device, inode=segment.inode)
    desk.tree.process(FakeProcess(4001, maps=bad, start_ticks=77))
    desk.tree.process(FakeProcess(900, maps=bad))
    found = gathered(desk)
    assert found.users == ((900, "web"),)
    assert found.misplaced == (("web", "web"),)


# --- images ---------------------------------------------------------------------------------------------------------


def test_a_file_is_unpacked_once_however_often_it_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    answers: list[object] = [apart.TooSlow("slow"), BadFile("it is none"), IMAGE]

    def inspect(path: str, fd: int) -> object:
        looks.append(path)
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(apart, "inspect", inspect)
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"first")
    for _ in range(2):  # that it took too long is not remembered
        with pytest.raises(apart.TooSlow):
            facts._inspected(str(path))
    del answers[0]
    for _ in range(2):
        with pytest.raises(BadFile, match="it is none"):
            facts._inspected(str(path))
    assert len(looks) == 3
    del answers[0]
    for row in range(facts._UNPACKED_KEPT + 1):
        path.write_bytes(b"x" * (row + 10))
        assert facts._inspected(str(path)) == but(IMAGE, path=str(path))
    assert len(facts._unpacked) <= facts._UNPACKED_KEPT


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_device(tmp_path: Path) -> Iterator[Desk]:
    grants = (grant("g1", "web", "web", gpa=0, dma=BDF), grant("g2", "vm", "vm", gpa=0))
    with two_guests(tmp_path, grants=grants) as made:
        made.tree.pci(BDF, ids=(0x1234, 0x11E8), class_code=0xFF0000, driver="vfio-pci", group=7)
        made.tree.group(7, "DMA")
        made.address_spaces.devices[BDF] = "web"
        yield made


def passed(desk: Desk, *, jump: bool = True) -> device_facts.DeviceFacts:
    (found,) = device_facts.gather_devices(desk, IMAGE, LINE, Played(desk), jump=jump)
    return found


def test_a_device_is_seen_with_its_group_its_tables_and_who_wants_it_next(with_device: Desk) -> None:
    desk = with_device
    desk.tree.pci("0000:00:05.0", ids=(1, 2), class_code=0x020000, driver="e1000", group=7)
    desk.tree.pci("0000:00:06.0", ids=(1, 2), class_code=0x020000, group=7)
    desk.tree.write(f"/sys/bus/pci/devices/{BDF}/modalias", "pci:v00001234d000011E8sv0sd0bc00scFFi00\n")
    desk.tree.write("/lib/modules/7.3.5/modules.alias", "alias pci:v00001234d000011E8sv*sd*bc*sc*i* edu_host\n")
    found = passed(desk)
    assert (found.bdf, found.guest, found.grants, found.lost) == (BDF, "web", ("g1",), "")
    assert found.active == ("0000:00:05.0 (e1000)",)
    assert found.beside == ("0000:00:06.0",)
    assert found.wanted == ("edu_host",)
    assert found.unpreserved == ""
    assert "ENOTTY" in found.restless  # the file that stands for the device answers no ioctl
    assert found.hidden
    assert passed(desk, jump=False).unpreserved is None


def test_page_tables_that_are_shown_are_not_hidden_however_large(with_device: Desk) -> None:
    with_device.tree.iommu("dmar0", [BDF], "intel-iommu", {"cap": "0", "ecap": "0", "version": "1:0"})
    leaves = [(row, 0x1000 + row, 1, 3) for row in range(8)]
    with_device.tree.intel_tables(BDF, intel_dump(BDF, leaves[:1]))
    assert passed(with_device).hidden == ""
    with_device.tree.intel_tables(BDF, intel_dump(BDF, leaves))
    assert passed(with_device).hidden == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"devices": {}}, "it is not in custody"),
        ({"quiesced": {BDF}}, "bus mastering is off since the last handoff"),
        ({"vmm_filled": frozenset({"web"})}, "its VMM ended and still has it open"),
    ],
)
def test_why_a_device_is_lost_is_named(with_device: Desk, change: dict[str, object], why: str) -> None:
    for name, value in change.items():
        setattr(with_device.address_spaces, name, value)
    if "vmm_filled" in change:
        with_device.remove_guest("web")
    assert passed(with_device).lost == why


def test_a_device_that_was_unplugged_is_lost_and_a_vmms_own_is_no_part_of_a_rehearsal(tmp_path: Path) -> None:
    grants = (grant("g1", "web", "web", gpa=0), grant("g2", "vm", "vm", gpa=0, dma=BDF))
    with two_guests(tmp_path, grants=grants) as desk:
        assert passed(desk).lost == "the device is gone"
        desk.address_spaces.vmm_filled = frozenset({"vm"})
        assert device_facts.gather_devices(desk, None, "", Played(desk), jump=False) == ()


# --- this host's powers ---------------------------------------------------------------------------------------------


def test_this_host_without_live_update_and_without_a_keeper_says_so(tmp_path: Path) -> None:
    if Path(luo.DEVICE).exists():
        pytest.skip("this host has LUO")
    with pytest.raises(NotFound) as error:
        powers.HOST.create("memconsole:web")
    assert error.value.code == "NoLuo"
    with tempfile.TemporaryFile() as file, pytest.raises(KernelRefused):
        powers.HOST.adopt(file.fileno())
    with pytest.raises(NotFound):
        powers.HOST.load(str(tmp_path / "none"), None, LINE)
    with pytest.raises(GuestError, match="could not be started again") as failed:
        powers.HOST.revive(tmp_path, "manifest")
    assert failed.value.remedy == "their state is in custody"


# --- clocks ---------------------------------------------------------------------------------------------------------

REPORT = HandoffReport(
    "run",
    HandoffState.DONE,
    5,
    guests=(GuestResult("web", GuestKind.CANARY, 1, back=True), GuestResult("vm", GuestKind.QEMU, 1, back=True)),
)
VM = REPORT.guests[1]
HOUR = 3_600_000_000_000


@contextlib.contextmanager
def agent(refusing: bool = False) -> Iterator[Path]:
    """A guest's agent whose clock is an hour late until it is set."""
    with tempfile.TemporaryDirectory(prefix="mc-") as directory, socket.socket(socket.AF_UNIX) as server:
        path = Path(directory) / "agent"
        server.bind(str(path))
        server.listen()
        late = [HOUR]

        def answer(line: bytes) -> bytes:
            said = decoding.json(line.lstrip(b"\xff"), dict, what="a request")
            if said["execute"] == "guest-sync-delimited":
                return b'\xff{"return": %d}\n' % said["arguments"]["id"]
            if said["execute"] == "guest-get-time":
                return b'{"return": %d}\n' % (time.time_ns() - late[0])
            if refusing:
                return b'{"error": {"class": "GenericError", "desc": "no clock here"}}\n'
            late[0] = 0
            return b'{"return": {}}\n'

        def serve() -> None:
            with contextlib.suppress(OSError):
                peer, _ = server.accept()
                with peer, peer.makefile("rb") as lines:
                    for line in lines:
                        peer.sendall(answer(line))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            thread.join(30)


def test_a_late_clock_is_set_by_the_guests_agent(desk: Desk) -> None:
    with agent() as path:
        desk.lives("vm").channel = path
        clock = clocks.set_clock(desk, VM)
    assert clock is not None
    assert clock.sources == ("kvmclock",)
    assert clock.was_ns is not None
    assert clock.was_ns > HOUR // 2
    assert clock.late_ns is not None
    assert clock.late_ns < HOUR // 2
    assert clock.note == "its agent set the clock"


def test_an_agent_that_refuses_is_quoted_and_one_that_is_not_there_too(desk: Desk, tmp_path: Path) -> None:
    with agent(refusing=True) as path:
        desk.lives("vm").channel = path
        clock = clocks.set_clock(desk, VM)
    assert clock is not None
    assert "no clock here" in clock.note
    desk.lives("vm").channel = tmp_path / "none"
    clock = clocks.set_clock(desk, VM)
    assert clock is not None
    assert clock.note
    assert clock.late_ns is None


def test_a_guest_that_does_not_run_or_is_gone_is_looked_after_later(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "COMES_S", 0.0)
    desk.lives("vm").says = GuestState.PAUSED
    assert clocks.set_clock(desk, VM) is None
    desk.lives("vm").trouble = GuestError("guest vm does not answer", "it is busy")
    clock = clocks.set_clock(desk, VM)
    assert clock is not None
    assert "it is busy" in clock.note

    class Leaving(Vmm):
        def state(self) -> GuestState:
            desk.remove_guest("vm")
            raise Gone("guest vm ended", "", "")

    desk.add_guest(Leaving("vm", GuestKind.QEMU))
    assert clocks.set_clock(desk, VM) is None
    assert clocks.set_clock(desk, VM) is None


def test_a_guest_that_does_not_say_which_clocks_it_has_has_its_clock_looked_at_all_the_same(desk: Desk) -> None:
    desk.lives("vm").fails["clocks"] = refused("clocks")
    clock = clocks.set_clock(desk, VM)
    assert clock == GuestClock(sources=(), note="it has no channel for QEMU's guest agent")


def test_every_guest_that_is_back_is_looked_after_once_and_the_report_is_kept(desk: Desk) -> None:
    clocks.begin_clocks(desk)
    desk.handoff = but(REPORT, state=HandoffState.RUNNING)
    clocks.begin_clocks(desk)
    assert desk.handoff.guests == REPORT.guests
    desk.handoff = REPORT
    clocks.begin_clocks(desk)

    def known() -> bool:
        assert desk.handoff is not None
        return all(each.clock is not None for each in desk.handoff.guests)

    until(known, "both clocks are known")
    made = desk.handoff
    clocks.begin_clocks(desk)
    assert desk.handoff == made
    assert b"no wall clock" in desk.content("report")
