"""Devices, windows and single guests behind a handoff: given back as they were, or kept still with a word of why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as but
from support.desks import Spaces, grant, guest
from support.handoffs import BDF, PAGE, Desk, Played, Vmm, refused, two_guests
from support.trees import intel_dump

from memconsole.backend.handoff import bootplan, devices, manifest, restart_one, save_restore, stored
from memconsole.backend.handoff.bootplan import BootPlan, Start
from memconsole.backend.handoff.manifest import Manifest, SavedGuest
from memconsole.backend.handoff.report import Clock
from memconsole.backend.ledger.state import StateChange, WindowGrant
from memconsole.errors import BadFile, GuestError, KernelRefused
from memconsole.extents import ChangeKind
from memconsole.extents import PageChange as Difference
from memconsole.model import (
    Access,
    GuestKind,
    GuestResult,
    GuestState,
    HandoffReport,
    HandoffState,
    Window,
)

WINDOW = Window(f"{BDF}:0", BDF, 0, 0xFE000000, 1 << 12)
IOVA = f"iova:{BDF}"


def with_devices(directory: Path, owner: str = "web", **facts: Any) -> AbstractContextManager[Desk]:
    grants = (
        grant("g1", "web", "web", gpa=0, dma=BDF if owner == "web" else None),
        grant("g2", "vm", "vm", gpa=0, dma=BDF if owner == "vm" else None),
    )
    made: dict[str, Any] = {
        "grants": grants,
        "windows": (WINDOW,),
        "window_grants": (WindowGrant("g3", WINDOW.id, owner, 0),),
    }
    return two_guests(directory, **made | facts)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """The canary has a device and a window of it."""
    with with_devices(tmp_path) as made:
        vfio(made)
        made.address_spaces.devices[BDF] = "web"
        yield made


def vfio(desk: Desk, driver: str | None = "vfio-pci") -> None:
    desk.tree.pci(BDF, ids=(0x1234, 0x11E8), class_code=0xFF0000, driver=driver)
    if driver is not None:
        desk.tree.link(f"/sys/bus/pci/devices/{BDF}/driver", f"../../../../bus/pci/drivers/{driver}")


def describe(desk: Desk, owner: str = "web", kind: str = "run", **more: object) -> Manifest:
    """A manifest of the desk, with the device recorded as it is now; it is in custody, too."""
    recorded = devices.preserved_device(desk, BDF, owner, "PRESERVE_FD of its iommufd: ENOENT")
    now = bootplan.moment()
    guests = tuple(GuestResult(each.name, each.kind, each.memory) for each in desk.state.guests.values())
    made = Manifest(
        tool="memconsole 0",
        kernel="7.3.4",
        boot_id="b",
        command_line="",
        number=1,
        began=now,
        written=bootplan.moment(),
        regions=(),
        guests=tuple(SavedGuest(each, f"state:{each.name}", now) for each in desk.state.guests.values()),
        grants=tuple(desk.state.grants.values()),
        windows=tuple(desk.state.windows.values()),
        devices=(recorded,),
        report=HandoffReport(kind, HandoffState.RUNNING, 1, guests=guests),  # type: ignore[arg-type]
    )
    made = but(made, **more)
    keep_manifest(desk, made)
    return made


def keep_manifest(desk: Desk, made: Manifest, plan: BootPlan = BootPlan(())) -> None:  # noqa: B008 - a value
    fd = manifest.write(plan, made)
    desk.keep(bootplan.MANIFEST, manifest.content(fd))


def clock(described: Manifest) -> Clock:
    return Clock(described.began, [(described.began, described.written)])


def jumped(desk: Desk) -> None:
    """The next kernel knows of no device; its guest stands still."""
    desk.address_spaces = Spaces()
    desk.lives("web").says = GuestState.PAUSED


# --- devices --------------------------------------------------------------------------------------------------------


def test_a_device_is_attached_quiet_mapped_compared_and_only_then_given_the_bus(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    assert [each.bdf for each in devices.missing_devices(desk, described, "web")] == [BDF]
    back = devices.rebuild_devices(desk, described, clock(described))
    assert desk.address_spaces.did == [f"attach {BDF}", "map g1", f"restart {BDF}"]
    (made,) = back.devices
    assert (made.same, made.how, made.source, made.pages) == (True, "rebuilt", "ledger", 1024)
    assert made.back_ns is not None
    assert (back.findings, back.waiting) == ((), frozenset())
    assert [(each.window, each.back) for each in back.windows] == [(WINDOW.id, True)]
    assert devices.missing_devices(desk, described, "web") == []
    devices.reconcile(desk, described)
    assert IOVA not in desk.custody.names()


def test_what_a_device_reaches_elsewhere_keeps_it_quiet_and_its_guest_waiting(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    desk.frames["web"] += 3
    back = devices.rebuild_devices(desk, described, clock(described))
    assert desk.address_spaces.quiesced == {BDF}
    (finding,) = back.findings
    assert (finding.id, finding.subject) == ("handoff-iova", BDF)
    assert "4M differ: IOVA 0x00000000 led to PFN" in finding.observed
    assert back.waiting == {"web"}
    assert back.devices[0].same is False
    devices.reconcile(desk, described)
    assert IOVA in desk.custody.names()


@pytest.mark.parametrize("what", ["attach", "map"])
def test_a_device_that_cannot_be_had_is_told_with_why(desk: Desk, what: str) -> None:
    described = describe(desk)
    jumped(desk)
    desk.address_spaces.fails[what] = refused(what)
    back = devices.rebuild_devices(desk, described, clock(described))
    (finding,) = back.findings
    assert (finding.id, set(back.waiting)) == ("handoff-device", {"web"})
    assert f"{what} cannot be done" in finding.observed
    assert "memconsole guest resume web" in finding.remedy


def test_an_iova_that_is_mapped_already_is_no_error(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    desk.address_spaces.fails["map"] = KernelRefused("ioctl", 17, code="IovaTaken")
    assert devices.rebuild_devices(desk, described, clock(described)).findings == ()


def test_a_device_that_another_driver_took_is_refused_by_name(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    (desk.tree.root / f"sys/bus/pci/devices/{BDF}/driver").unlink()
    desk.tree.link(f"/sys/bus/pci/devices/{BDF}/driver", "../../../../bus/pci/drivers/edu_host")
    (finding,) = devices.rebuild_devices(desk, described, clock(described)).findings
    assert "the kernel's edu_host has it" in finding.observed


def test_devices_that_no_grant_means_any_more_are_let_be(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    desk.change(StateChange(without_grants=("g1",), without_windows=("g3",)))
    back = devices.rebuild_devices(desk, described, clock(described))
    assert (back.devices, back.windows, desk.address_spaces.did) == ((), (), [])
    devices.reconcile(desk, described)
    assert IOVA not in desk.custody.names()


def test_only_one_guests_are_looked_at_where_that_was_asked(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    assert devices.rebuild_devices(desk, described, clock(described), "vm").devices == ()
    assert desk.address_spaces.did == []


def test_a_device_whose_guest_is_not_back_stays_quiet_until_it_is(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    desk.remove_guest("web")
    back = devices.rebuild_devices(desk, described, clock(described))
    assert desk.address_spaces.quiesced == {BDF}
    assert back.findings == ()
    assert back.windows[0].why == "its guest is not back"


def test_a_window_that_a_guest_does_not_take_is_told_and_one_without_agent_gets_it_later(desk: Desk) -> None:
    described = describe(desk)
    jumped(desk)
    desk.lives("web").maps = False
    (window,) = devices.rebuild_devices(desk, described, clock(described)).windows
    assert (window.back, window.why) == (False, "the guest gets it as soon as its agent connects")
    desk.lives("web").fails["offer g3"] = GuestError("it will not", "", "")
    back = devices.rebuild_devices(desk, described, clock(described))
    assert [each.id for each in back.findings] == ["handoff-window"]
    assert back.waiting == {"web"}


def test_a_rehearsal_leaves_windows_of_processes_alone_and_says_that_devices_were_kept(desk: Desk) -> None:
    described = describe(desk, kind="rehearse", guests=())
    back = devices.rebuild_devices(desk, described, clock(described))
    assert back.windows == ()
    assert back.devices[0].how == "kept"


def test_a_devices_tables_are_the_kernels_where_it_shows_them(desk: Desk) -> None:
    desk.tree.intel_tables(BDF, intel_dump(BDF, [(0, 0x1000, 2, 3)]))
    desk.tree.iommu("dmar0", [BDF], "intel-iommu", {"cap": "0", "ecap": "0", "version": "1:0"})
    desk.tree.link(f"/sys/bus/pci/devices/{BDF}/iommu_group", "../../../kernel/iommu_groups/7")
    desk.tree.directory(f"/sys/kernel/iommu_groups/7/devices/{BDF}")
    desk.tree.group(7, "DMA")
    table, source = devices.device_table(desk, BDF, "web")
    with table:
        assert (source, table.stats().present) == ("kernel", 512)
    desk.address_spaces.vmm_filled = frozenset({"web"})  # a VMM maps more than the guest's RAM, which is anew with each
    desk.frames["web"] = 0x1100
    table, source = devices.device_table(desk, BDF, "web")
    with table:
        assert (source, table.stats().present, next(iter(table)).offset) == ("kernel", 256, 256)


def test_tables_that_the_kernel_does_not_show_any_more_are_no_difference_but_an_error(desk: Desk) -> None:
    described = describe(desk)
    described = but(described, devices=(but(described.devices[0], source="kernel"),))
    jumped(desk)
    (finding,) = devices.rebuild_devices(desk, described, clock(described)).findings
    assert finding.id == "handoff-device"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ChangeKind.VANISHED, "led to PFN 0x10, and leads nowhere"),
        (ChangeKind.APPEARED, "led nowhere, and leads to PFN 0x20"),
        (ChangeKind.MOVED, "led to PFN 0x10, and leads to 0x20"),
        (ChangeKind.FLAGS, "may be written where it could only be read"),
    ],
)
def test_every_difference_is_said_in_words(kind: ChangeKind, said: str) -> None:
    change = Difference(kind, 16, 1, 0x10, 0x20, 0, 0)
    assert said in devices._change_text(change)


def test_a_read_only_grant_is_recorded_as_such(desk: Desk) -> None:
    desk.change(
        StateChange(grants=(but(desk.state.grants["g1"], access=Access.RO, gpa=PAGE, offset=PAGE, length=2 * PAGE),))
    )
    table, _ = devices.device_table(desk, BDF, "web")
    with table:
        (row,) = table
        assert (row.offset, row.pfn - desk.frames["web"], row.count, row.flags & 0x20) == (1, 1, 2, row.flags & 0x20)
        assert table.stats().present == 2


def test_whether_the_kernel_can_carry_a_device_is_tried_in_a_session_that_is_thrown_away(desk: Desk) -> None:
    played = Played(desk)
    assert devices.cannot_preserve(desk, BDF, played) == ""
    (probe,) = played.preserved
    assert probe.startswith("memconsole:probe-")
    played.fails["preserve"] = refused("preserve")
    why = devices.cannot_preserve(desk, BDF, played)
    assert why == "PRESERVE_FD of its iommufd: EIO, PRESERVE_FD of its VFIO device: EIO"
    played.fails["create"] = refused("a session")
    assert "a session cannot be done" in devices.cannot_preserve(desk, BDF, played)
    assert "not in custody" in devices.cannot_preserve(desk, "0000:00:09.0", played)


# --- a VMM that confines its devices itself -------------------------------------------------------------------------


def test_a_vmm_is_given_its_devices_before_it_is_started_quiet_if_they_were_recorded(tmp_path: Path) -> None:
    with with_devices(tmp_path, "vm") as desk:
        vfio(desk)
        desk.address_spaces.devices[BDF] = "vm"
        described = describe(desk, "vm")
        desk.address_spaces = Spaces()
        devices.hand_devices(desk, described, desk.state.guests["vm"])
        assert desk.address_spaces.did == ["close vm", f"hand {BDF}"]
        assert desk.address_spaces.quiesced == {BDF}
        desk.remove_guest("vm")
        assert devices.rebuild_devices(desk, described, clock(described)).devices == ()  # it is, once its VMM is there
        desk.add_guest(Vmm("vm", GuestKind.QEMU, 4002, ram="g2"))
        assert devices.rebuild_devices(desk, described, clock(described)).devices[0].same is True
        desk.frames["vm"] += 1
        (finding,) = devices.rebuild_devices(desk, described, clock(described)).findings
        assert "see the guest's log" in finding.remedy
        devices.hand_devices(desk, None, desk.state.guests["vm"])
        assert desk.address_spaces.quiesced == set()


def test_a_guest_without_devices_is_handed_none(desk: Desk) -> None:
    devices.hand_devices(desk, None, desk.state.guests["vm"])
    devices.hand_devices(desk, None, desk.state.guests["web"])  # its device is the address space's own
    assert desk.address_spaces.did == []


def test_a_device_no_driver_has_is_bound(desk: Desk) -> None:
    (desk.tree.root / f"sys/bus/pci/devices/{BDF}/driver").unlink()
    described = describe(desk)
    jumped(desk)
    (finding,) = devices.rebuild_devices(desk, described, clock(described)).findings
    assert finding.id == "handoff-device"  # this tree's driver_override takes no write
    assert not desk.address_spaces.did


# --- one guest alone ------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(desk: Desk) -> Desk:
    """The canary did not come back: its state is in custody."""
    describe(desk)
    jumped(desk)
    desk.remove_guest("web")
    desk.keep("state:web", b"state of web")
    desk.on_return = {"web": GuestState.PAUSED}
    return desk


def test_a_guest_that_waits_is_started_again_from_what_was_saved(waiting: Desk) -> None:
    assert restart_one.is_saved(waiting, "web")
    assert not restart_one.is_saved(waiting, "vm")
    played = Played(waiting)
    back = restart_one.restart_saved_guest(waiting, waiting.state.guests["web"], played)
    assert (back.pid, back.state) == (6000, GuestState.RUNNING)
    assert played.did == ["revive again:web"]
    assert waiting.lives("web").pid == 6000
    assert "again:web" not in waiting.custody.names()
    assert bootplan.RESUME in waiting.custody.names()  # until the ledger knows
    restart_one.drop_saved_state(waiting, "web")
    assert not {bootplan.RESUME, "state:web"} & set(waiting.custody.names())


def test_the_boot_plan_says_how_it_starts_where_there_is_one(waiting: Desk) -> None:
    described, _ = stored.stored_manifest(waiting)
    assert described is not None
    plan = BootPlan((), (), (Start("web", ("canary", "--as-planned"), "/run", "/run/log", (("state:web", 3),)),))
    keep_manifest(waiting, described, plan)
    assert restart_one._boot_plan(waiting, waiting.state.guests["web"]).starts == plan.starts
    waiting.keep(bootplan.MANIFEST, b"no plan")
    (start,) = restart_one._boot_plan(waiting, waiting.state.guests["web"]).starts
    assert start.words[0].endswith("memconsole-canary")


@pytest.mark.parametrize("planned", [True, False])
def test_a_guest_that_does_not_come_back_keeps_its_state_and_says_why(waiting: Desk, planned: bool) -> None:
    played = Played(waiting, stuck=frozenset({"web"}))
    if not planned:
        played.fails["revive"] = GuestError("the VMMs could not be started again", "", "")
    with pytest.raises(GuestError) as ended:
        restart_one.restart_saved_guest(waiting, waiting.state.guests["web"], played)
    assert ended.value.why == ("its state cannot be read" if planned else "")
    assert "state:web" in waiting.custody.names()
    assert not {bootplan.RESUME, "again:web"} & set(waiting.custody.names())


def test_one_that_the_record_does_not_know_did_not_come_back(waiting: Desk) -> None:
    waiting.resumed(["vm"])
    with pytest.raises(GuestError) as ended:
        restart_one.restarted_guest(waiting, waiting.state.guests["web"])
    assert ended.value.why == "the boot plan has no entry for it"


def test_one_that_was_set_aside_is_started_by_a_plan_of_its_own(waiting: Desk) -> None:
    plan = BootPlan((), (), (Start("web", ("canary",), "/run", "/run/log", ()),))
    fd = manifest.memfd("plan", bootplan.encode(plan))
    back = restart_one.start_alone(waiting, waiting.state.guests["web"], fd, Played(waiting))
    assert back.pid == 6000
    assert bootplan.RESUME not in waiting.custody.names()


def test_it_goes_on_with_its_devices_and_windows_and_the_report_knows(waiting: Desk) -> None:
    described, _ = stored.stored_manifest(waiting)
    assert described is not None
    waiting.handoff = described.report
    restart_one.restart_saved_guest(waiting, waiting.state.guests["web"], Played(waiting))
    assert restart_one.awaits_devices(waiting, "web")
    restart_one.resume_guest(waiting, "web")
    assert waiting.lives("web").did == ["offer g3", "resume"]
    assert not waiting.address_spaces.quiesced
    report = stored.stored_report(waiting)
    assert report is not None
    back = {each.name: each for each in report.guests}["web"]
    assert (back.back, back.pid, back.by) == (True, 6000, "its VMM")
    assert not restart_one.awaits_devices(waiting, "web")


def test_it_stays_paused_while_its_devices_are_not_as_they_were(waiting: Desk) -> None:
    restart_one.restart_saved_guest(waiting, waiting.state.guests["web"], Played(waiting))
    waiting.frames["web"] += 1
    with pytest.raises(GuestError, match="web stays paused") as ended:
        restart_one.resume_guest(waiting, "web")
    assert "leads elsewhere than before" in ended.value.why
    assert waiting.lives("web").says is GuestState.PAUSED
    assert "state:web" not in waiting.custody.names()  # it is a live guest that waits by now
    with pytest.raises(GuestError):
        restart_one.reattach_devices(waiting, "web")
    waiting.frames["web"] -= 1
    restart_one.reattach_devices(waiting, "web")
    assert not waiting.address_spaces.quiesced


def test_one_that_runs_or_has_no_agent_or_is_gone_is_let_be(waiting: Desk) -> None:
    restart_one.resume_guest(waiting, "web")
    waiting.add_guest(Vmm("web", has_agent=False, says=GuestState.PAUSED))
    restart_one.resume_guest(waiting, "web")
    assert waiting.lives("web").did == []
    waiting.lives("web").has_agent = True
    waiting.lives("web").says = GuestState.RUNNING
    restart_one.resume_guest(waiting, "web")
    assert waiting.lives("web").did == []


def test_without_a_manifest_it_goes_on_without_more_and_none_waits_for_devices(waiting: Desk) -> None:
    waiting.keep(bootplan.MANIFEST, b"none")
    assert not restart_one.awaits_devices(waiting, "web")
    waiting.add_guest(Vmm("web", says=GuestState.PAUSED))
    restart_one.resume_guest(waiting, "web")
    assert waiting.lives("web").says is GuestState.RUNNING
    with pytest.raises(BadFile):
        restart_one.reattach_devices(waiting, "web")


# --- how VMMs are saved ---------------------------------------------------------------------------------------------


def test_what_a_vmm_lacks_to_be_carried_is_named(desk: Desk) -> None:
    canary, qemu = desk.lives("web"), desk.lives("vm")
    assert save_restore.why_not_savable(desk, canary) == ""
    assert save_restore.why_not_savable(desk, qemu) == ""
    qemu.shares_ram = False
    assert "x-ignore-shared" in save_restore.why_not_savable(desk, qemu)
    qemu.vfio = True
    assert "not in custody" in save_restore.why_not_savable(desk, qemu)
    desk.address_spaces.vmm_filled = frozenset({"vm"})
    assert "suspended to RAM" in save_restore.why_not_savable(desk, qemu)
    qemu.says, qemu.shares_ram = GuestState.SUSPENDED, True
    assert save_restore.why_not_savable(desk, qemu) == ""


def test_a_process_is_neither_saved_nor_started_again(desk: Desk) -> None:
    process = Vmm("db", GuestKind.PROCESS)
    with pytest.raises(GuestError, match="cannot be saved"):
        save_restore.save(process, 0, 1.0)
    desk.add_guest(process)
    for how in (save_restore.restart_of_live, save_restore.restart_of_ledger):
        with pytest.raises(GuestError, match="cannot be started again"):
            how(desk, guest("db"), [], "state:db", paused=False)


def test_a_qemu_that_is_gone_starts_as_it_was_begun_with_its_devices_from_custody(tmp_path: Path) -> None:
    with with_devices(tmp_path, "vm") as desk:
        known = but(desk.state.guests["vm"], command=("-smp", "2"))
        start, say = save_restore.restart_of_ledger(
            desk, known, desk.state.grants_of(guest="vm"), "state:vm", paused=False
        )
        assert [name for name, _ in start.fds] == ["region:vm:0", "iommu:vm", f"vfio:{BDF}", "state:vm"]
        assert tuple(word for word in start.words if word in {"-smp", "2"}) == ("-smp", "2")
        assert say is not None
        assert "cont" in say.lines[-1][0]
