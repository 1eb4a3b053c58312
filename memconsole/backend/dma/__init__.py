"""Memory for devices: one IOMMU address space for each guest, in which an IOVA is a guest physical address.

    grant of the guest ─→ IOAS_MAP_FILE of the region's memfd at its GPA ─→ custody ``iommu:GUEST`` (an iommufd)
    device of the grant ─→ vfio-pci ─→ attached to that address space    ─→ custody ``vfio:BDF`` (its cdev)

Nothing but custody holds these fds, so DMA goes on when the control process dies, and ends with custody. Whatever
device of a guest is attached reaches all that the guest was granted for DMA, as its vCPUs do, and nothing else.

:mod:`.vfio` is the driver's side, :mod:`.iommufd` the calls, :mod:`.spaces` what one control process does with both.
"""
