"""What a handoff needs of the desk beyond :mod:`memconsole.backend.needs`, a Protocol a facet.

The rooms of the handoff say which of these they need, the narrowest that does; :class:`Handover` is for the steps of a
handoff and what is taken over behind one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from memconsole.backend import needs
from memconsole.backend.observe.reach import RegionReaching
from memconsole.model import Finding, HandoffReport

if TYPE_CHECKING:
    from memconsole.backend.exports.mapped import BlockedMapping
    from memconsole.backend.observe.survey import GuestReply


class QuietSpaces(needs.DeviceSpaces, Protocol):
    """Address spaces whose devices can be made quiet, and are given back."""

    @property
    def quiesced(self) -> Collection[str]:
        """The devices from which the bus was taken, by BDF."""

    def attach(self, guest: str, bdf: str, *, quiet: bool = False) -> None:
        """Attach a device to a guest's address space, and unless ``quiet`` let it master the bus."""

    def hand_device(self, guest: str, bdf: str, *, quiet: bool = False) -> None:
        """Open a device, and an iommufd for it, that a VMM is to be started with."""

    def quiesce(self, bdf: str) -> None:
        """Take the bus from a device."""

    def restart(self, bdf: str) -> None:
        """Give it back."""

    def borrowed_fds(self, bdf: str) -> AbstractContextManager[tuple[int, int]]:
        """A device's VFIO file, and the file of its address space."""

    def close(self, guest: str) -> None:
        """Let go of all devices of a guest."""


class QuietDevices(needs.LedgerState, needs.HostTree, needs.InCustody, Protocol):
    """Devices on their way through a handoff."""

    @property
    def address_spaces(self) -> QuietSpaces:
        """The address spaces in which they reach memory."""


class DeviceLookups(QuietDevices, needs.LiveGuests, Protocol):
    """Devices and their guests, to look at."""


class DeviceTables(QuietDevices, needs.RegionFrames, Protocol):
    """Where devices reach the regions' pages."""


class DeviceReturn(DeviceTables, needs.LiveGuests, needs.GrantOffering, Protocol):
    """Devices and windows are given back to live guests."""


class SavedStates(needs.LedgerState, needs.InCustody, Protocol):
    """What custody has of guests that were saved."""


class HandoffReporting(needs.InCustody, Protocol):
    """The report of the last handoff, shown and kept."""

    handoff: HandoffReport | None


class GuestClocks(HandoffReporting, needs.LiveGuests, Protocol):
    """The clocks of guests that are back."""


class VmmRestarting(needs.GuestStarting, Protocol):
    """VMMs are started again by a boot plan."""

    @property
    def address_spaces(self) -> QuietSpaces:
        """The address spaces in which devices reach memory."""


class Handover(DeviceReturn, needs.GuestStarting, needs.FaultServing, HandoffReporting, Protocol):
    """All that the steps of a handoff, and what is taken over behind one, need."""


class HandoffChecks(
    DeviceTables,
    DeviceLookups,
    RegionReaching,
    needs.ForeignMemory,
    needs.GrantFiles,
    HandoffReporting,
    Protocol,
):
    """What a handoff is checked against."""

    @property
    def runtime_dir(self) -> Path:
        """Where the control process has its own files."""

    @property
    def blocked_mappings(self) -> tuple[BlockedMapping, ...]:
        """The mappings of guests that lead nowhere any more."""

    @property
    def standing(self) -> Callable[[], Sequence[Finding]]:
        """What says the findings of this control process's start that still stand."""

    def guest_replies(self, deadline: float) -> Mapping[str, GuestReply]:
        """What every live guest says of itself; all are asked at once, until ``deadline`` (monotonic)."""
