"""A host with an IOMMU and a device in every state that a verb can meet."""

from __future__ import annotations

from support.trees import Tree

FREE, BUSY, BESIDE, BRIDGED = (f"0000:00:0{number}.0" for number in range(4, 8))
MSI = (0xFEE00000, 0xFEEFFFFF, "msi")


def add_devices(tree: Tree) -> None:
    """A device alone, one a driver has, one beside a driver's, one beside a bridge."""
    tree.write("/dev/iommu", "")
    tree.directory("/sys/bus/pci/drivers/vfio-pci")
    for group in range(4):
        tree.group(group, "DMA", [MSI])
    tree.pci(FREE, ids=(1, 1), class_code=0xFF0000, group=0)
    tree.pci(BUSY, ids=(1, 2), class_code=0x020000, driver="e1000", group=1)
    tree.pci(BESIDE, ids=(1, 3), class_code=0xFF0000, group=2)
    tree.pci("0000:00:08.0", ids=(1, 4), class_code=0x010000, driver="ahci", group=2)
    tree.pci(BRIDGED, ids=(1, 5), class_code=0xFF0000, driver="vfio-pci", group=3)
    tree.pci("0000:00:09.0", ids=(1, 6), class_code=0x060400, driver="shpchp", group=3)
