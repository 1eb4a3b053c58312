"""Which devices are given memory: a host of synthetic devices and groups, each refusal by its name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing

import pytest
from support.controls import M, runtime_dir
from support.guests import AgentProcess
from support.iommu_host import BESIDE, BRIDGED, BUSY, FREE, add_devices
from support.trees import Tree

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.embedded import embedded
from memconsole.backend.guests.commandline import BINARY
from memconsole.errors import Refused


@pytest.fixture
def tree() -> Iterator[Tree]:
    """A host with an IOMMU: a device alone, one a driver has, one beside a driver's, one beside a bridge."""
    with runtime_dir() as directory:
        made = Tree(directory / "host")
        made.link("/proc", "/proc")
        made.write("/sys/devices/system/cpu/online", "0\n")
        add_devices(made)
        yield made


@pytest.fixture
def control(tree: Tree) -> Iterator[Control]:
    """A control process of that host, with a region and a guest."""
    with closing(embedded(tree.root.parent / "run", root=tree.root)) as made:
        made.apply(do.Reserve("ram", M))
        with AgentProcess(made.runtime_dir / "agents") as process:
            made.apply(do.GuestAttach("driver", process.pid))
            yield made


def codes(control: Control, bdf: str, gpa: int | None = 0x100000) -> list[str]:
    return [refusal.code for refusal in control.plan(do.Map("ram", "driver", gpa=gpa, dma=bdf)).refusals]


def test_a_device_in_use_is_refused_by_who_has_it(control: Control) -> None:
    assert codes(control, BUSY) == codes(control, BESIDE) == ["DeviceInUse"]
    for bdf, driver, busy in ((BUSY, "e1000", BUSY), (BESIDE, "ahci", "0000:00:08.0")):
        (refusal,) = control.plan(do.Map("ram", "driver", gpa=0x100000, dma=bdf)).refusals
        assert driver in refusal.why
        assert refusal.remedy == f"echo {busy} > /sys/bus/pci/devices/{busy}/driver/unbind"
    with pytest.raises(Refused, match="e1000"):
        control.apply(do.Map("ram", "driver", gpa=0x100000, dma=BUSY))


def test_bridges_do_not_count(control: Control) -> None:
    assert codes(control, BRIDGED) == []


def test_addresses_a_device_cannot_have_are_refused(control: Control) -> None:
    assert codes(control, FREE, None) == ["NoGpa"]
    assert codes(control, FREE, 0xFEE00000) == codes(control, FREE, 0xFED80000) == ["BadIova"]
    assert codes(control, FREE, 0xFED00000) == codes(control, FREE, 0xFEF00000) == []


def test_without_its_driver_no_device_is_given(control: Control, tree: Tree) -> None:
    (tree.root / "sys/bus/pci/drivers/vfio-pci").rmdir()
    assert codes(control, FREE) == ["NoVfio"]


def test_devices_come_before_the_guest_and_go_before_it(control: Control) -> None:
    steps = [effect.id for effect in control.plan(do.Map("ram", "driver", gpa=0, dma=FREE)).effects]
    assert steps == ["bind", "attach", "offer", "dma"]
    assert all(effect.undo for effect in control.plan(do.Map("ram", "driver", gpa=0, dma=FREE)).effects)


def test_a_driver_that_does_not_take_the_device_leaves_nothing(control: Control, tree: Tree) -> None:
    override = f"/sys/bus/pci/devices/{FREE}/driver_override"
    tree.write(override, "(null)\n")
    tree.write("/sys/bus/pci/drivers_probe", "")
    with pytest.raises(Exception, match="does not bind device"):
        control.apply(do.Map("ram", "driver", gpa=0, dma=FREE))
    assert (tree.root / override[1:]).read_text().startswith("\n"), "no driver is preferred any more"
    assert control.snapshot().grants == ()


def start_codes(control: Control, bdf: str, vmm: str = "qemu") -> list[str]:
    """What a VM that is to have a device is refused for."""
    plan = control.plan(do.GuestStart("vm", vmm=vmm, memory=4 * M, device=bdf))
    return [refusal.code for refusal in plan.refusals if refusal.code != "NoVmm"]


def test_a_vm_is_refused_the_same_devices(control: Control, tree: Tree) -> None:
    assert start_codes(control, BUSY) == start_codes(control, BESIDE) == ["DeviceInUse"]
    assert start_codes(control, "0000:00:1f.7") == ["NoSuchDevice"]
    assert start_codes(control, FREE, "canary") == ["NoDevices"]
    assert start_codes(control, FREE) == start_codes(control, BRIDGED) == []
    tree.write("/dev/vfio/vfio", "")
    (tree.root / "dev/iommu").unlink()
    assert start_codes(control, FREE) == ["NoIommu"], "QEMU takes no device of a container by fd"
    assert codes(control, FREE) == [], "a process does"


@pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")
def test_the_device_is_opened_before_its_vm(control: Control) -> None:
    effects = control.plan(do.GuestStart("vm", vmm="qemu", memory=4 * M, device=FREE)).effects
    assert [effect.id for effect in effects][-3:] == ["bind", "hand", "spawn"]
    assert FREE in effects[-1].text
