"""Every kind of finding by its id: what is required of a host, and what a host that lacks it risks.

What was observed, where, and the remedy belong to one finding and stand where it is made; these two are the same
whenever it is made. ``docs/audit.md`` has a row for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class FindingKind(NamedTuple):
    """What should be, and what it leads to where it is not: a sentence each, without a full stop."""

    requirement: str
    risk: str


_NO_DMA_GRANT = FindingKind(
    "a device reaches only what its guest was granted", "the device can read or overwrite memory of others by DMA"
)
_DEVICE_AS_BEFORE = FindingKind(
    "a device reaches after a handoff what it reached before", "its guest stays paused until the device is back"
)
_IN_CUSTODY = FindingKind(
    "custody holds all that a handoff carried", "memory or state that custody does not hold is lost"
)
_CARRIED_OUT = FindingKind(
    "memconsole-resume carries out the whole boot plan", "guests that were not started wait in custody"
)
_SESSION_FINISHED = FindingKind(
    "the sessions of a handoff are finished",
    "the kernel keeps what the session preserved, and the next handoff refuses",
)
_WHOLE_FILE = FindingKind("a file of memconsole is whole", "what stood in the damaged part is lost")
_ANSWERS = FindingKind("guests and helper processes answer within 2 s", "what is shown of it is old")

KINDS: Mapping[str, FindingKind] = {
    "action-unfinished": FindingKind(
        "an action is carried through or taken back", "what the action had changed already stays changed"
    ),
    "arena-file": FindingKind(
        "every file of an arena is a region in one aligned run", "what is in such a file is not taken up as a region"
    ),
    "arena-missing": FindingKind(
        "this kernel sets the range of every arena aside that this host had", "this kernel may write over what is in it"
    ),
    "arena-note": FindingKind(
        "which arenas this host has is written down in the state directory",
        "a kernel that does not set one aside is not told of",
    ),
    "arena-replayed": FindingKind(
        "a kernel ends after it has held every arena still",
        "what was under way when it ended was taken back or is done",
    ),
    "arena-unread": FindingKind("every arena can be mounted and read", "regions in it are not taken up"),
    "arena-unused": FindingKind(
        "every arena of this host is one memconsole's, and mounted with dax if it is a file system",
        "regions in it are not taken up",
    ),
    "audit-behind": FindingKind(
        "the audit trail has every record of the ledger", "the audit trail cannot say who did what since"
    ),
    "audit-damaged": _WHOLE_FILE,
    "custody-gone": FindingKind(
        "another process than this one holds the memory of the regions",
        "regions that no guest maps are lost when this process ends",
    ),
    "custody-lost": FindingKind(
        "custody holds all that it was given", "what custody lost is gone, unless a process still has it open"
    ),
    "custody-other": FindingKind(
        "custody holds the memory that the ledger names", "the region may have the contents of another one"
    ),
    "custody-replaced": FindingKind(
        "the keeper lives as long as it holds memory", "what only the keeper held before it ended is lost"
    ),
    "custody-silent": _ANSWERS,
    "custody-unguarded": FindingKind(
        "the keeper is exempt from the OOM killer and locked in memory",
        "memory that no other process holds is lost when the keeper is killed",
    ),
    "custody-unknown": FindingKind(
        "this memconsole can read all that custody holds", "what cannot be read is not used, and a jump loses it"
    ),
    "device-interrupts": FindingKind(
        "the interrupts of a guest's device are remapped", "the guest can send any interrupt to the host"
    ),
    "device-shared": FindingKind(
        "a guest's device is alone in its IOMMU group", "devices of one group can reach each other's memory by DMA"
    ),
    "devices-unsettled": FindingKind(
        "devices reach nothing that is granted no more", "a device can overwrite memory that another guest has by now"
    ),
    "dma-elsewhere": FindingKind(
        "a device's page tables lead to the frames of its guest's regions",
        "the device reads and writes frames that may belong to others by now",
    ),
    "dma-lost": FindingKind(
        "a device that memory was granted for is in custody", "the device's DMA fails until it is attached again"
    ),
    "dma-missing": FindingKind(
        "a device's page tables cover the whole grant", "the device's DMA fails where they do not"
    ),
    "dma-outside": FindingKind(
        "a device reaches only memory of regions", "a kexec loses that memory while the device writes to it"
    ),
    "dma-unknown": _NO_DMA_GRANT,
    "dma-unseen": FindingKind(
        "memconsole can read the page map of a VMM that fills its device's address space",
        "a device that reaches memory of others is not found",
    ),
    "dma-writable": FindingKind(
        "a device may only read what its guest may only read", "the device can overwrite the region"
    ),
    "faults-refused": FindingKind(
        "there is memory for the pages of lazy grants", "the guest stands still at the page it touched"
    ),
    "faults-unserved": FindingKind(
        "a handler serves the page faults of every lazy grant", "the guest stands still at the next page it touches"
    ),
    "frame-shared": _NO_DMA_GRANT,
    "frames-quarantined": FindingKind(
        "nothing pins frames of a revoked grant",
        "the frames stay allocated, and what pins them still sees old contents",
    ),
    "grant-unmapped": FindingKind(
        "a guest maps what it said it mapped", "the guest does not use the memory it was given"
    ),
    "guest-aside": FindingKind("every guest has its RAM", "the guest does not run until it is mapped RAM and resumed"),
    "guest-base-pages": FindingKind(
        "a guest's memory is mapped by huge pages", "the guest runs slower: it misses the TLB more often"
    ),
    "guest-between": FindingKind(
        "a guest whose RAM was moved runs, where it was or on what was copied", "it stands still until it is started"
    ),
    "guest-corrupt": FindingKind(
        "a guest finds in its memory what it wrote there", "the guest works on wrong data, or crashes"
    ),
    "guest-ended": FindingKind("guests outlive a kexec", "the guest's vCPU and device state is lost"),
    "ram-not-adopted": FindingKind(
        "custody holds all of an adopted guest's RAM", "what custody does not hold could not be carried"
    ),
    "guest-gone": FindingKind(
        "a guest's process runs until it is stopped", "the guest's vCPU and device state is lost"
    ),
    "guest-silent": _ANSWERS,
    "guest-stopped": FindingKind("a guest's vCPUs run", "the guest does nothing until it is started again"),
    "handoff-arena-unmarked": FindingKind(
        "an arena notes that guests were started from it",
        "after a crash of this kernel they would be started once more from the state they had before it",
    ),
    "handoff-contents": FindingKind(
        "regions have the contents after a handoff that they had before", "a guest that goes on works on wrong data"
    ),
    "handoff-device": _DEVICE_AS_BEFORE,
    "handoff-device-busy": FindingKind(
        "/dev/liveupdate is free after a jump", "guests stand still for as long as another process has it open"
    ),
    "handoff-guest-held": FindingKind(
        "every guest comes back from a handoff", "the next handoff or rehearsal drops the guest's saved state"
    ),
    "handoff-iova": _DEVICE_AS_BEFORE,
    "handoff-lost": _IN_CUSTODY,
    "handoff-name-taken": FindingKind(
        "custody holds one file of a name", "what came under the name is kept under another, and not found there"
    ),
    "handoff-no-keeper": _IN_CUSTODY,
    "handoff-no-memory": _CARRIED_OUT,
    "handoff-no-record": FindingKind(
        "memconsole-resume records what it did", "the control process cannot tell which guests were started"
    ),
    "handoff-not-in-custody": _IN_CUSTODY,
    "handoff-pages-moved": FindingKind(
        "every page is after a handoff in the frame it was in", "the region may have the contents of other memory"
    ),
    "handoff-plan-broken": _CARRIED_OUT,
    "handoff-session-kept": _SESSION_FINISHED,
    "handoff-session-missing": FindingKind(
        "the kernel hands over every session", "what the session preserved is lost, if it is not in custody already"
    ),
    "handoff-session-unfinished": _SESSION_FINISHED,
    "handoff-unread": FindingKind(
        "the record of a handoff can be read", "guests that came back are not managed, and others are not started"
    ),
    "handoff-window": FindingKind(
        "a guest has its windows again after a handoff", "the guest stays paused until it has the window"
    ),
    "handover-torn": FindingKind("a dump has all that the kernel hands over", "what is missing is not described"),
    "history-damaged": FindingKind("the history can be read to its end", "snapshots that were recorded are not shown"),
    "history-stopped": FindingKind("snapshots are recorded", "the history has a gap from now on"),
    "kexec-foreign": FindingKind(
        "kernels are booted by memconsole handoff run", "guests end with the kernel they ran on"
    ),
    "kexec-unguarded": FindingKind(
        "an ordinary systemctl kexec is refused while guests run", "systemctl kexec ends every guest"
    ),
    "image-damaged": FindingKind("a save image can be read to its end", "its guest cannot be restored from it"),
    "ledger-corrupt": FindingKind(
        "the ledger is whole", "regions and grants that the lost records made are not known any more"
    ),
    "ledger-torn": FindingKind("the ledger is whole", "the action that was under way is not recorded"),
    "ledger-unknown": FindingKind(
        "this memconsole can read every record of the ledger", "what those records changed is not shown"
    ),
    "manifest-unknown": FindingKind(
        "the manifest of a handoff can be read", "where pages were before the jump cannot be compared"
    ),
    "mapping-unknown": FindingKind(
        "every mapping of a region has a grant", "a process that was not granted the memory reads or overwrites it"
    ),
    "mount-behind": FindingKind(
        "the mount shows what the ledger says", "processes find old files, or none, on the mount"
    ),
    "mount-not-back": FindingKind(
        "the mount is there again after a handoff", "processes do not find their memory at the path they know"
    ),
    "mount-silent": _ANSWERS,
    "mount-without-ram": FindingKind("the mount shows the memory of regions", "processes cannot map regions by path"),
    "ram-not-preserved": FindingKind("every VM's RAM is a region", "a kexec loses the VM, memory and all"),
    "region-found": FindingKind("the ledger knows every region in custody", "the region has no owner"),
    "region-fragmented": FindingKind(
        "a region lies in few runs of frames", "the next kernel boots seconds slower, while guests stand still"
    ),
    "region-lost": FindingKind(
        "custody holds the memory of every region", "the contents are lost when the last process that maps it ends"
    ),
    "region-moved": FindingKind(
        "a region's pages stay in their frames", "a device that knows the old frames reads and writes wrong memory"
    ),
    "region-not-preserved": FindingKind(
        "a kexec can carry every region", "a handoff is refused, and any other kexec loses the region"
    ),
    "region-torn": FindingKind(
        "custody holds every segment of a region", "the contents of the missing segments are lost"
    ),
    "region-truncated": FindingKind(
        "a region keeps its size", "what was cut off is lost, and a guest that touches it gets SIGBUS"
    ),
    "session-outside-custody": FindingKind(
        "custody holds every live update session", "what the session preserved is lost when its holder ends"
    ),
    "snapshot-old": FindingKind("a survey of the host ends in time", "what is shown is old"),
    "tidying-failed": FindingKind(
        "what follows an action is done with it", "the ledger, the mount or device tables lag behind"
    ),
    "window-claimed": FindingKind(
        "a granted window belongs to one driver", "guest and kernel driver program the same device registers"
    ),
}
"""By id; a finding of a newer memconsole brings its own words along."""
