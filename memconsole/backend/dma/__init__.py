"""Memory for devices: one IOMMU address space for each guest, in which an IOVA is a guest physical address.

    grant of the guest ─→ mapped from the region's memfd at its GPA   ─→ custody ``iommu:GUEST`` (iommufd or container)
    device of the grant ─→ vfio-pci ─→ attached to that address space ─→ custody ``vfio:BDF``, ``group:N`` (type 1)

Nothing but custody holds these fds, so DMA goes on when the control process dies, and ends with custody. Whatever
device of a guest is attached reaches all that the guest was granted for DMA, as its vCPUs do, and nothing else. A VMM
that confines its devices itself is handed duplicates, and fills the address space: there an IOVA is what it says.

:mod:`.vfio` is the driver's side, :mod:`.iommufd` and :mod:`.type1` the calls, :mod:`.backends` both behind one
interface, :mod:`.spaces` what one control process does with them, :mod:`.vmm` what is a VMM's; :mod:`.check` and
:mod:`.filled` compare kernel truth.
"""
