"""Address spaces that a VMM makes itself, in an iommufd of ours.

QEMU (``-object iommufd,fd=``, ``-device vfio-pci,iommufd=,fd=``) binds a device it is given to the iommufd it is given,
which can be done once for each opening of the device's file; allocates an address space (IOMMU_IOAS_ALLOC) and a page
table (IOMMU_HWPT_ALLOC) there; and maps its RAM and firmware, from its own address space, wherever its guest sees them
(hw/vfio/iommufd.c, backends/iommufd.c). Both files are also in custody, so what they were told can be taken back:

    detach the devices    whatever is mapped, and whatever the VMM maps next, no device reaches it
    unmap everything      the pins are let go of
"""

from __future__ import annotations

from collections.abc import Iterable

from memconsole.backend.dma import iommufd


def cut(fd: int, devices: Iterable[int]) -> None:
    """Take all memory from the devices of an iommufd that a VMM has; when this returns they reach none.

    Raises:
        KernelRefused: the kernel will not, and they reach it still.
    """
    for device in devices:
        iommufd.detach(device)
    for space in iommufd.spaces(fd):
        iommufd.unmap(fd, space, 0, iommufd.EVERYTHING)
