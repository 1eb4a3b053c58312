"""What ``map --dma``, ``guest start --device`` and taking back add for a device, on a host of synthetic devices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desks import Desk, Live, M, desks, grant, guest, region
from support.iommu_host import BESIDE, BRIDGED, BUSY, FREE, add_devices

from memconsole import actions as do
from memconsole.backend import steps
from memconsole.backend.verbs import prepare
from memconsole.errors import KernelRefused, MemconsoleError
from memconsole.model import GuestKind


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A device alone, one that a driver has, one beside a driver's, one beside a bridge; a process ``db``."""
    binary = tmp_path / "qemu-system-x86_64"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with desks(
        tmp_path,
        regions=(region("ram"),),
        guests=(guest(), guest("vm", GuestKind.QEMU, pid=4001)),
        live=(Live("db"), Live("vm", GuestKind.QEMU, 4001)),
    ) as made:
        tree = made.tree
        add_devices(tree)
        tree.link(f"/sys/bus/pci/devices/{BRIDGED}/driver", "../../../bus/pci/drivers/vfio-pci")
        yield made


def given(bdf: str, gpa: int | None = M) -> do.Map:
    return do.Map("ram", "db", gpa=gpa, dma=bdf)


def codes(desk: Desk, action: do.Action) -> list[str]:
    made = prepare(desk, action)
    assert bool(made.refusals) != bool(made.steps)
    assert all(each.remedy for each in made.refusals)
    return [each.code for each in made.refusals]


@pytest.mark.parametrize(
    ("action", "refused"),
    [
        (given("0000:00:1f.7"), ["NoSuchDevice"]),
        (given(BUSY), ["DeviceInUse"]),
        (given(BESIDE), ["DeviceInUse"]),
        (given(FREE, None), ["NoGpa"]),
        (given(FREE, 0xFEE00000), ["BadIova"]),
        (given(FREE, 0xFE000000), []),
        (given(BRIDGED), []),
        (do.GuestStart("new", vmm="canary", device=FREE), ["NoDevices"]),
        (do.GuestStart("new", vmm="qemu", device=BUSY), ["DeviceInUse"]),
        (do.GuestStart("new", vmm="qemu", device="0000:00:1f.7"), ["NoSuchDevice"]),
        (do.GuestStart("new", vmm="qemu", device=FREE), []),
    ],
)
def test_a_device_that_cannot_be_given_is_refused_by_name(desk: Desk, action: do.Action, refused: list[str]) -> None:
    assert codes(desk, action) == refused


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        (f"sys/bus/pci/devices/{FREE}/iommu_group", "NoIommu"),
        ("dev/iommu", "NoIommu"),
        ("sys/bus/pci/drivers/vfio-pci", "NoVfio"),
    ],
)
def test_what_this_host_lacks_for_devices_is_named(desk: Desk, missing: str, code: str) -> None:
    path = desk.root / missing
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)
    assert codes(desk, given(FREE)) == [code]


def test_a_vm_gets_a_device_through_an_iommufd_only(desk: Desk) -> None:
    desk.tree.write("/dev/vfio/vfio", "")
    (desk.root / "dev/iommu").unlink()
    assert codes(desk, given(FREE)) == []
    assert codes(desk, do.GuestStart("new", vmm="qemu", device=FREE)) == ["NoIommu"]


def test_who_has_the_device_is_said_with_what_takes_it_from_them(desk: Desk) -> None:
    (refusal,) = prepare(desk, given(BESIDE)).refusals
    assert "0000:00:08.0, which is in IOMMU group 2" in refusal.what
    assert refusal.remedy == "echo 0000:00:08.0 > /sys/bus/pci/devices/0000:00:08.0/driver/unbind"


@pytest.mark.parametrize(
    ("filled", "remedy"), [(frozenset({"vm"}), "memconsole guest stop vm"), (frozenset(), "revoke its grants")]
)
def test_a_device_of_another_guest_stays_its_own(desk: Desk, filled: frozenset[str], remedy: str) -> None:
    desk.address_spaces.devices[FREE], desk.address_spaces.vmm_filled = "vm", filled
    (refusal,) = prepare(desk, given(FREE)).refusals
    assert (refusal.code, refusal.remedy) == ("DeviceInUse", remedy)


def test_a_device_reaches_memory_after_its_guest_does(desk: Desk) -> None:
    made = prepare(desk, given(BRIDGED))
    assert [step.id for step in made.steps] == ["attach", "offer", "dma"]
    desk.carry(steps.run("map", made.steps))
    assert desk.address_spaces.devices == {BRIDGED: "db"}
    assert desk.address_spaces.mapped == {"g1"}
    assert [each.dma for each in made.change.grants] == [BRIDGED]
    second = [step.id for step in prepare(desk, do.Map("ram", "db", gpa=8 * M, dma=BRIDGED)).steps]
    assert second == ["offer", "dma"], "it is attached already"


def test_a_device_that_cannot_be_attached_is_given_up_before_the_guest_hears_of_it(desk: Desk) -> None:
    made = prepare(desk, given(BRIDGED))
    desk.address_spaces.trouble = KernelRefused("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 16)
    with pytest.raises(KernelRefused):
        desk.carry(steps.run("map", made.steps))
    live = desk.live_guest("db")
    assert live is not None
    assert live.did == []
    assert desk.address_spaces.settled == 1


def test_a_device_that_cannot_reach_it_takes_the_grant_back(desk: Desk) -> None:
    made = prepare(desk, given(BRIDGED))
    attach, offer, dma = made.steps

    def fails() -> None:
        raise KernelRefused("IOMMU_IOAS_MAP", 12)

    with pytest.raises(KernelRefused):
        desk.carry(steps.run("map", [attach, offer, steps.Step("dma", dma.text, fails, dma.undo)]))
    live = desk.live_guest("db")
    assert live is not None
    assert live.did == ["offer g1", "unmap g1"]
    assert desk.address_spaces.settled == 1


def test_a_driver_that_does_not_take_the_device_leaves_nothing(desk: Desk) -> None:
    override = f"/sys/bus/pci/devices/{FREE}/driver_override"
    desk.tree.write(override, "(null)\n")
    desk.tree.write("/sys/bus/pci/drivers_probe", "")
    made = prepare(desk, given(FREE))
    assert [step.id for step in made.steps] == ["bind", "attach", "offer", "dma"]
    with pytest.raises(MemconsoleError, match="does not bind"):
        desk.carry(steps.run("map", made.steps))
    assert (desk.root / override[1:]).read_text().startswith("\n"), "no driver is preferred any more"


def test_a_vm_is_handed_a_device_before_it_starts(desk: Desk) -> None:
    made = prepare(desk, do.GuestStart("new", vmm="qemu", memory=8 * M, device=BRIDGED))
    assert [step.id for step in made.steps] == ["create", "hold", "hand", "spawn"]
    desk.carry(steps.run("guest-start", made.steps))
    assert (desk.address_spaces.devices, desk.address_spaces.vmm_filled) == ({BRIDGED: "new"}, frozenset({"new"}))
    assert made.aims.grants[0].dma == BRIDGED


def test_a_stopped_vm_loses_its_devices_first(desk: Desk) -> None:
    from memconsole.backend.ledger.state import StateChange

    desk.change(StateChange(grants=(grant("g1", "ram", "vm", gpa=0, dma=BRIDGED),)))
    desk.address_spaces.mapped.add("g1")
    made = prepare(desk, do.GuestStop("vm"))
    assert [step.id for step in made.steps] == ["dma", "end", "part"]
    desk.carry(steps.run("guest-stop", made.steps))
    assert desk.address_spaces.mapped == set()
