"""What rooms need of the desk, a Protocol a facet; each room says at its top which of them it needs.

:class:`~memconsole.backend.desk.Desk` satisfies them all by its shape and knows none of them; so does the value that
stands for a desk in the tests (``tests/support/desks.py``), on which verbs are planned and run without a live kernel.
Two facets do not know of each other unless one cannot be used without the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memconsole.model import Grant, Guest, GuestState, HandoffReport, Unread, Window

if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody
    from memconsole.backend.exports.offer import Offer
    from memconsole.backend.guests.base import GuestDriver as LiveGuest
    from memconsole.backend.holdings import Backing
    from memconsole.backend.ledger.state import State, WindowGrant
    from memconsole.backend.managers.guest_memory import Block
    from memconsole.backend.stores.adopted import RamFile
    from memconsole.backend.stores.base import Store, Stores
    from memconsole.backend.stores.noted import ArenaNotes
    from memconsole.extents import ExtentTable


class LedgerState(Protocol):
    """What the ledger means."""

    @property
    def state(self) -> State:
        """What it means now; a state never changes, the next record makes another."""


class HostTree(Protocol):
    """The tree of the host: where /proc, /sys and /dev are read."""

    @property
    def root(self) -> Path:
        """Where it stands; ``/`` unless it is a recorded one."""


class RuntimeFiles(Protocol):
    """Where the control process has its own files."""

    @property
    def runtime_dir(self) -> Path:
        """Sockets, the guests' directories, the arenas' mounts."""


class NotedArenas(Protocol):
    """Which arenas this host had."""

    @property
    def noted(self) -> ArenaNotes | None:
        """They; None in a process that keeps no state."""


class InCustody(Protocol):
    """What custody holds."""

    @property
    def custody(self) -> Custody:
        """Who holds the descriptors without which memory would vanish."""


class Stored(LedgerState, Protocol):
    """Where regions' frames live."""

    @property
    def stores(self) -> Stores:
        """The stores of this host, by name."""

    def store_of(self, region: str) -> Store:
        """The store of a region; NotFound or Refused where there is none."""


class RegionFds(Stored, HostTree, InCustody, Protocol):
    """The regions' descriptors, to look at."""

    def holds_region(self, region: str) -> bool:
        """Whether a region's memory is held."""

    def fds(self, region: str) -> tuple[int, ...]:
        """The segments' fds of a region; NotFound where its memory is lost."""

    def promised_bytes(self) -> int:
        """Bytes of reserved base pages that have no frame yet."""


class OwnRegionFds(RegionFds, Protocol):
    """The regions' descriptors, to change."""

    def hold_region(self, region: str, fds: tuple[int, ...]) -> None:
        """Keep a region's fds."""

    def replace_segment(self, region: str, segment: int, fd: int) -> None:
        """Keep a duplicate of ``fd`` as a segment of a region, in the place of the fd held."""

    def close_fds(self, region: str) -> None:
        """Close a region's fds."""

    def free_region(self, region: str) -> None:
        """Take a region's frames from every process and close its fds."""


class Borrowed(Stored, Protocol):
    """The regions' descriptors, for long looks."""

    def borrowed_fds(self, region: str) -> AbstractContextManager[tuple[int, ...]]:
        """Copies of a region's fds; NotFound where its memory is lost."""


class RegionFrames(RegionFds, Borrowed, Protocol):
    """Where the regions' pages are."""

    def segment_frames(self, region: str, segment: int) -> ExtentTable:
        """The frames of one segment of a region by its pages, to be closed; NotFound where its memory is lost."""


class Backed(LedgerState, Protocol):
    """The regions' segments as their descriptors show them."""

    def backings(self) -> dict[str, tuple[Backing, ...]]:
        """Those of every region that is held."""


class LiveGuests(LedgerState, Protocol):
    """The live guests: those that answer."""

    def live_guest(self, guest: str) -> LiveGuest | None:
        """A guest as something that answers; None when its process is gone."""

    def state_of(self, live: LiveGuest) -> GuestState:
        """A guest's state, as it says; Gone when it ended, GuestError when it does not answer."""

    def connected(self, guest: str, *, patient: bool = True) -> bool:
        """Whether a guest's agent is connected; ``patient``: one that is busy is given the time to connect again."""

    def remove_guest(self, guest: str) -> None:
        """Let go of a guest, whose process may go on."""

    def foreign_guests(self) -> tuple[Guest, ...]:
        """The VMs of this host that memconsole does not manage."""

    def directory(self, guest: str) -> Path:
        """Where a guest's sockets and log lie."""


class GuestStarting(LiveGuests, HostTree, Protocol):
    """Guests come into being, or are taken hold of."""

    @property
    def runtime_dir(self) -> Path:
        """Where the agents socket and the guests' directories lie."""

    def start_guest(self, guest: Guest, grant: Grant, args: tuple[str, ...]) -> LiveGuest:
        """Start a VM and wait until it is up; GuestError when it does not come up."""

    def attach_guest(self, name: str, pid: int) -> LiveGuest:
        """Take hold of a process as a guest; Gone when it ended."""

    def adopt_guest(self, guest: Guest, *, windows: bool = True) -> LiveGuest:
        """Take hold of a guest's process again, with the grants it has; ``windows``: those of devices too."""


class ForeignMemory(HostTree, Protocol):
    """The RAM of VMs that others run."""

    def ram_files(self, guest: Guest) -> tuple[RamFile, ...]:
        """The files that its process maps shared, in the shape of RAM; Gone, Denied, KernelRefused: it is not shown."""

    def monitor_process(self, qmp: str) -> int:
        """The PID of who listens at a QMP socket; NotFound, Denied, KernelRefused: nobody, or it cannot be told."""

    def ask_ram(self, guest: Guest, qmp: str) -> tuple[Block, ...]:
        """What its QEMU says of its blocks, by its manager or by ``qmp``; GuestError: it says nothing."""

    def open_ram(self, guest: Guest, file: RamFile) -> int:
        """A descriptor of a file that its process has open, to be closed; Gone, GuestError: it has not."""


class GrantOffering(Protocol):
    """Grants are handed to guests as descriptors."""

    def grant_offer(self, grant: Grant) -> AbstractContextManager[Offer]:
        """A grant as its guest receives it; NotFound where the region's memory is lost."""

    def window_offer(self, grant: WindowGrant) -> AbstractContextManager[Offer]:
        """A window as its guest receives it; NotFound, Denied, KernelRefused where it cannot be opened."""

    def withdraw(self, grant: Grant | WindowGrant) -> None:
        """Offer a grant no more to a guest's agent, should it connect again."""


class FaultBroker(Protocol):
    """The userfaultfds that guests handed over, by grant."""

    def has_uffd(self, grant: str) -> bool:
        """Whether the faults of a grant are served."""

    def block_access(self, grant: str) -> str:
        """Take a grant's page table entries away; why it cannot be done, or an empty string."""

    def drop_uffd(self, grant: str) -> None:
        """Let go of a grant's userfaultfd, if there is one."""


class FaultServing(Protocol):
    """Mappings whose page faults are served."""

    @property
    def userfaults(self) -> FaultBroker:
        """What guests handed over to have their faults served, or to be barred."""


class DeviceSpaces(Protocol):
    """What devices reach."""

    @property
    def devices(self) -> Mapping[str, str]:
        """The guest each device is attached to, by BDF."""

    @property
    def vmm_filled(self) -> Collection[str]:
        """The guests whose VMM fills their address space."""

    def attach(self, guest: str, bdf: str) -> None:
        """Attach a device to a guest's address space; nothing is mapped."""

    def hand_device(self, guest: str, bdf: str) -> None:
        """Open a device, and an iommufd for it, that a VMM is to be started with."""

    def map(self, grant: Grant) -> None:
        """Let the devices of a grant's guest reach it."""

    def unmap(self, grant: Grant) -> None:
        """Take a grant from the devices of its guest."""

    def reconcile(self) -> None:
        """Unmap what no grant means, and close the devices that none names."""


class DeviceReaching(LedgerState, HostTree, Protocol):
    """Devices reach the memory of their guests."""

    @property
    def address_spaces(self) -> DeviceSpaces:
        """The address spaces in which they do."""


class MmioWindows(Protocol):
    """The MMIO windows of devices."""

    def windows(self, gaps: list[Unread]) -> tuple[Window, ...]:
        """The windows of this host, with who has them; what could not be read is added to ``gaps``."""

    def reaches_window(self, guest: Guest, window: Window) -> bool:
        """Whether a guest's process maps a window, or holds a file through which it can be mapped."""


class MountFiles(Protocol):
    """The files of grants on the mount."""

    def sync(self) -> None:
        """Have it show what the ledger means, now."""

    def block_access(self, grant: Grant) -> None:
        """Have a grant's file opened and mapped no more."""

    def ram_path(self, guest: str, region: str) -> Path:
        """Where the file of a guest's region is, or would be; NotFound where nothing is mounted."""

    def file_path(self, path: str) -> Path:
        """Where a user's file is, or would be; NotFound where nothing is mounted."""

    def why_open(self, grant: Grant) -> str:
        """Why a grant's file may be open without being seen; empty if it is not."""


class GrantFiles(Protocol):
    """Grants are shown as files."""

    @property
    def mount(self) -> MountFiles | None:
        """The mount, if there is one."""


class LastHandoff(Protocol):
    """The last handoff."""

    @property
    def handoff(self) -> HandoffReport | None:
        """Its report, if there was one."""
