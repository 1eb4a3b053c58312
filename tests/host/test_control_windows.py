"""MMIO windows through the verbs: a synthetic PCI device whose BARs are files, and a real process that maps one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.controls import M, goes_on, runtime_dir
from support.guests import AgentProcess
from support.trees import Tree

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.embedded import embedded
from memconsole.backend.guests.commandline import BINARY
from memconsole.backend.handoff import bootplan, devices
from memconsole.backend.handoff.manifest import Manifest
from memconsole.backend.handoff.report import Clock
from memconsole.errors import GuestError, Refused
from memconsole.model import HandoffReport, HandoffState, Severity, Window

FREE, TAKEN, PASSED = "0000:00:04.0", "0000:00:05.0", "0000:00:06.0"
MEM, PORTS = 0x40200, 0x40101


@pytest.fixture
def control() -> Iterator[Control]:
    """A host of this one's processes, and three devices: one without a driver, one with, one for VFIO."""
    with runtime_dir() as directory:
        tree = Tree(directory / "host")
        tree.link("/proc", "/proc")
        bars = [(0xFE000000, 0xFE00FFFF, MEM), (0xC000, 0xC01F, PORTS), (0xFE010000, 0xFE0100FF, MEM)]
        tree.pci(FREE, ids=(0x1234, 0x11E8), class_code=0xFF0000, bars=bars)
        tree.pci(TAKEN, ids=(0x8086, 0x100E), class_code=0x020000, driver="e1000", bars=[(0xFD000000, 0xFD000FFF, MEM)])
        tree.pci(PASSED, ids=(1, 2), class_code=0, driver="vfio-pci", group=7, bars=[(0xFC000000, 0xFC000FFF, MEM)])
        tree.write(f"/sys/bus/pci/devices/{FREE}/resource0", bytes(64 << 10))
        tree.write("/sys/devices/system/cpu/online", "0\n")
        with closing(embedded(directory / "run", root=tree.root)) as made:
            yield made


@pytest.fixture
def driver(control: Control) -> Iterator[AgentProcess]:
    """A process with an agent, attached as ``driver``."""
    with AgentProcess(control.runtime_dir / "agents") as process:
        control.apply(do.GuestAttach("driver", process.pid))
        assert control._desk.connected("driver") or control._desk.hub.connected("driver", 30)
        yield process


def window(control: Control, id: str) -> Window:
    return next(window for window in control.snapshot().windows if window.id == id)


def code(control: Control, action: do.Action) -> list[str]:
    return [refusal.code for refusal in control.plan(action).refusals]


def test_a_window_is_mapped_seen_and_taken_back(control: Control, driver: AgentProcess) -> None:
    control.apply(do.WindowMap(f"{FREE}:0", "driver"))
    assert driver.do("write g1 hello") == "done"
    seen = window(control, f"{FREE}:0")
    assert (seen.grant, seen.guest, seen.holders) == ("g1", "driver", (driver.pid,))
    assert (control._root / f"sys/bus/pci/devices/{FREE}/resource0").read_bytes()[:5] == b"hello"
    assert code(control, do.WindowMap(f"{FREE}:0", "driver")) == ["Granted"]
    assert code(control, do.GuestStop("driver")) == ["Granted"]
    control.apply(do.WindowRevoke(f"{FREE}:0"))
    assert driver.do("grants") == "none"
    assert (window(control, f"{FREE}:0").grant, window(control, f"{FREE}:0").holders) == (None, ())
    control.apply(do.GuestStop("driver"))


def test_a_guest_that_keeps_a_window_is_named(control: Control, driver: AgentProcess) -> None:
    control.apply(do.WindowMap(f"{FREE}:0", "driver"))
    driver.do("hold g1")
    with pytest.raises(GuestError) as kept:
        control.apply(do.WindowRevoke(f"{FREE}:0"))
    assert kept.value.code == "StillMapped"
    assert window(control, f"{FREE}:0").guest == "driver"
    driver.do("let-go")
    control.apply(do.WindowRevoke(f"{FREE}:0"))


def test_what_cannot_be_granted_is_refused_by_name(control: Control, driver: AgentProcess) -> None:
    assert driver.pid
    assert code(control, do.WindowMap(f"{TAKEN}:0", "driver")) == ["Claimed"]
    assert code(control, do.WindowMap(f"{PASSED}:0", "driver")) == []
    assert code(control, do.WindowMap(f"{FREE}:1", "driver")) == ["NotMmio"]
    assert code(control, do.WindowMap(f"{FREE}:2", "driver")) == ["BadRange"]
    assert code(control, do.WindowMap(f"{FREE}:3", "driver")) == ["NoSuchWindow"]
    assert code(control, do.WindowMap(f"{FREE}:0", "nobody")) == ["NoSuchGuest"]
    assert code(control, do.WindowRevoke(f"{FREE}:0")) == ["NoSuchGrant"]
    with pytest.raises(Refused, match="e1000"):
        control.apply(do.WindowMap(f"{TAKEN}:0", "driver"))


def test_dma_says_what_is_missing(control: Control, driver: AgentProcess) -> None:
    assert driver.pid
    control.apply(do.Reserve("ring", M))
    found = {bdf: control.plan(do.Map("ring", "driver", dma=bdf)).refusals for bdf in (FREE, PASSED)}
    assert [refusal.code for refusals in found.values() for refusal in refusals] == ["NoIommu", "NoIommu"]
    assert "no IOMMU confines it" in found[FREE][0].why
    assert "/dev/iommu" in found[PASSED][0].why


def test_a_resource_file_that_cannot_be_opened_leaves_nothing(control: Control, driver: AgentProcess) -> None:
    assert driver.pid
    (Path(control._root) / f"sys/bus/pci/devices/{FREE}/resource0").unlink()
    with pytest.raises(Exception, match="resource0"):
        control.apply(do.WindowMap(f"{FREE}:0", "driver"))
    assert window(control, f"{FREE}:0").grant is None


def test_a_canary_takes_a_window_and_not_for_ram(control: Control) -> None:
    control.apply(do.GuestStart("vm", memory=M))
    control.apply(do.WindowMap(f"{FREE}:0", "vm"))
    seen = window(control, f"{FREE}:0")
    (guest,) = [guest for guest in control.snapshot().guests if guest.name == "vm"]
    assert seen.holders == (guest.pid,)
    goes_on(control, "vm")
    control.apply(do.WindowRevoke(f"{FREE}:0"))
    assert window(control, f"{FREE}:0").holders == ()


def test_a_window_behind_which_no_device_answers_is_not_mapped(control: Control) -> None:
    control.apply(do.GuestStart("vm", memory=M))
    Path(control._root, f"sys/bus/pci/devices/{FREE}/resource0").write_bytes(b"\xff" * (64 << 10))
    with pytest.raises(GuestError, match="no device answers"):
        control.apply(do.WindowMap(f"{FREE}:0", "vm"))
    assert window(control, f"{FREE}:0").holders == ()


def test_a_window_that_is_gone_after_a_handoff_keeps_its_guest_waiting(control: Control) -> None:
    control.apply(do.GuestStart("vm", memory=M))
    control.apply(do.WindowMap(f"{FREE}:0", "vm"))
    now = bootplan.moment()
    (grant,) = control._desk.state.windows.values()
    described = Manifest(
        tool="memconsole 0",
        kernel="",
        boot_id="",
        command_line="",
        number=1,
        began=now,
        written=now,
        regions=(),
        guests=(),
        grants=(),
        windows=(grant,),
        report=HandoffReport("run", HandoffState.RUNNING, 0, "", ""),
    )
    back = devices.rebuild_devices(control._desk, described, Clock(now, []))
    assert ([each.back for each in back.windows], back.findings, back.waiting) == ([True], (), frozenset())
    Path(control._root, f"sys/bus/pci/devices/{FREE}/resource0").unlink()
    gone = devices.rebuild_devices(control._desk, described, Clock(now, []))
    (found,) = gone.findings
    assert (found.id, found.severity, found.subject) == ("handoff-window", Severity.ERROR, f"{FREE}:0")
    assert "resource0" in found.observed
    assert "guest resume vm" in found.remedy
    assert gone.waiting == {"vm"}


@pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")
def test_qemu_takes_no_window_while_it_runs(control: Control) -> None:
    control.apply(do.GuestStart("vm", vmm="qemu", memory=16 * M))
    assert code(control, do.WindowMap(f"{FREE}:0", "vm")) == ["NoWindows"]
