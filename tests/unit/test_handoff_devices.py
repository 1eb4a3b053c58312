"""Devices of a handoff: what their tables say however the kernel splits them, and what the next kernel has for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.handoffs import IMAGE
from support.trees import Tree, intel_dump

from memconsole.backend.handoff import device_facts, devices
from memconsole.backend.kernel import vtd
from memconsole.extents import ChangeKind, ExtentTable
from memconsole.model import Device

RELEASE = IMAGE.release
MODULES = f"/lib/modules/{RELEASE}"
BDF = "0000:00:04.0"
EDU = Device(BDF, 0x1234, 0x11E8, 0xFF0000)
FILE = f"/sys/kernel/debug/iommu/intel/{BDF}/domain_translation_struct"


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def table(tree: Tree, leaves: Sequence[tuple[int, int, int, int]]) -> ExtentTable:
    tree.write(FILE, intel_dump(BDF, leaves))
    return vtd.table(tree.root, BDF)


def test_a_large_page_is_the_small_ones_it_covers(made: Tree) -> None:
    large = table(made, [(0x10000, 0x4000, 2, 3)])
    small = table(made, [(0x10000 + n, 0x4000 + n, 1, 3) for n in range(512)])
    assert devices.differences(large, small) == []
    assert large.stats().present == small.stats().present == 512


@pytest.mark.parametrize(
    ("now", "kind"),
    [
        ([(16, 64, 1, 3), (17, 66, 1, 3)], ChangeKind.MOVED),
        ([(16, 64, 1, 3)], ChangeKind.VANISHED),
        ([(16, 64, 1, 3), (17, 65, 1, 3), (18, 66, 1, 3)], ChangeKind.APPEARED),
        ([(16, 64, 1, 3), (17, 65, 1, 1)], ChangeKind.FLAGS),
    ],
)
def test_every_difference_is_one(made: Tree, now: list[tuple[int, int, int, int]], kind: ChangeKind) -> None:
    before = table(made, [(16, 64, 1, 3), (17, 65, 1, 3)])
    (change,) = devices.differences(before, table(made, now))
    assert (change.kind, change.count) == (kind, 1)


def test_what_devices_need_is_built_in_or_a_module_or_missing_or_not_known(made: Tree) -> None:
    assert device_facts.missing_modules(IMAGE, made.root) == ()
    assert device_facts.missing_modules(replace(IMAGE, modules=()), made.root) == ("vfio_pci", "iommufd")
    assert device_facts.missing_modules(replace(IMAGE, modules=None), made.root) is None
    assert device_facts.missing_modules(None, made.root) is None
    made.write(
        f"{MODULES}/modules.dep",
        "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n",
    )
    assert device_facts.missing_modules(replace(IMAGE, modules=()), made.root) == ("iommufd",)
    made.write(f"{MODULES}/modules.builtin", "kernel/drivers/iommu/iommufd/iommufd.ko\n")
    assert device_facts.missing_modules(replace(IMAGE, modules=None), made.root) == ()


def test_who_takes_a_device_is_known_by_its_alias_unless_vfio_is_told_to(made: Tree) -> None:
    made.write(f"/sys/bus/pci/devices/{BDF}/modalias", "pci:v00001234d000011E8sv00001AF4sd00001100bc00scFFi00\n")
    assert device_facts.taking_modules(made.root, EDU, RELEASE, "") == ()
    aliases = [
        "alias pci:v00001234d000011E8sv*sd*bc*sc*i* edu_host",
        "alias pci:v00001234d000011E9sv*sd*bc*sc*i* another",
        "alias pci:v*d*sv*sd*bc01sc06i01* ahci",
        "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci",
    ]
    made.write(f"{MODULES}/modules.alias", "\n".join(aliases) + "\n")
    assert device_facts.taking_modules(made.root, EDU, RELEASE, "quiet") == ("edu_host",)
    assert device_facts.taking_modules(made.root, EDU, RELEASE, "vfio-pci.ids=8086:1,1234:11e8") == ()
    assert (
        device_facts.taking_modules(made.root, EDU, RELEASE, 'dyndbg="a b" vfio_pci.ids="8086:1,1234:11E8:0:0"') == ()
    )
    for line in ("quiet -- vfio-pci.ids=1234:11e8", "vfio-pci.ids=11234:11e8,x", 'a="b vfio-pci.ids=1234:11e8"'):
        assert device_facts.taking_modules(made.root, EDU, RELEASE, line) == ("edu_host",)
