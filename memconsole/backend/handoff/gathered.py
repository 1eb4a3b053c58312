"""What a handoff gathers on its way to the manifest: where regions are, which guests and devices stand still.

The steps fill it (:mod:`.sequence`); from it come the two parts of the manifest, the boot plan and its description.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from memconsole import __version__
from memconsole.backend.custody.names import MOUNT, custody_name
from memconsole.backend.dma import address_spaces
from memconsole.backend.handoff import bootplan, carried, fast, save_restore, services
from memconsole.backend.handoff.bootplan import MANIFEST_SESSION, BootPlan, ClockReading, Hold, Verify
from memconsole.backend.handoff.cargo import SessionContents
from memconsole.backend.handoff.facets import Handover
from memconsole.backend.handoff.manifest import Manifest, PreservedDevice, PreservedRegion, SavedGuest
from memconsole.backend.handoff.report import ReportWriter
from memconsole.backend.kernel import host, tree
from memconsole.errors import NotFound
from memconsole.model import Guest, GuestState

LEDGER = "ledger"
LEDGER_TOKEN = bootplan.MANIFEST_TOKEN + 1


def session_held(session: str) -> str:
    """What an outgoing session is called in custody."""
    return f"session:{session}"


def state_held(guest: str) -> str:
    """What a guest's state is called in custody."""
    return f"state:{guest}"


@dataclass
class Gathered:
    """What is known so far, by name; ``contents``: whether they are to be compared."""

    desk: Handover
    contents: bool = False
    placed: dict[str, PreservedRegion] = field(default_factory=dict)
    stopped: dict[str, SavedGuest] = field(default_factory=dict)
    recorded: dict[str, PreservedDevice] = field(default_factory=dict)
    began: ClockReading = field(default_factory=ClockReading)
    progress: ReportWriter | None = None

    def holds(
        self,
        cargo: Iterable[SessionContents],
        going: Iterable[Guest],
        adopted: Iterable[str] = (),
        place: str = MANIFEST_SESSION,
    ) -> tuple[tuple[Hold, ...], dict[int, int]]:
        """What is to be in custody afterwards, and the fds by token that go with the manifest, to be closed.

        ``place``: where the manifest goes: a session of live update, or what a store can leave something in.
        """
        desk = self.desk
        holds, fds = [], {}
        for each in cargo:
            for region in each.regions:
                for index, token in enumerate(self.placed[region.name].tokens):
                    name = custody_name(region.name, index)
                    fd, payload = desk.custody.get(name)
                    os.close(fd)
                    holds.append(Hold(each.session, token, name, payload))
        token = LEDGER_TOKEN
        mounted = [MOUNT] if MOUNT in desk.custody.names() else []
        kept = set(desk.custody.names())
        images = [each for name in adopted for each in (carried.held(name), fast.held(name)) if each in kept]
        told = [services.TOLD + name for name in services.marked(desk)]
        for name in (
            LEDGER,
            *mounted,
            *told,
            *images,
            *(state_held(guest.name) for guest in going),
            *self._of_devices(),
        ):
            fds[token], payload = desk.custody.get(name)
            holds.append(Hold(place, token, name, payload))
            token += 1
        return tuple(holds), fds

    def _of_devices(self) -> list[str]:
        """What custody has of devices that goes along: their tables, and they themselves where the kernel can."""
        names = [each.table for each in self.recorded.values()]
        for each in self.recorded.values():
            if each.preserved:
                names += [name for name in address_spaces.custody_names(each.guest, [each.bdf]) if name not in names]
        return names

    def verifies(self) -> tuple[Verify, ...]:
        """Where every segment's pages are to be afterwards."""
        return tuple(
            Verify(custody_name(name, index), segment.size, digest)
            for name, placed in self.placed.items()
            for index, (segment, digest) in enumerate(zip(placed.region.segments, placed.digests, strict=True))
        )

    def starts(self, going: Iterable[Guest]) -> tuple[tuple[bootplan.Start, ...], tuple[bootplan.MonitorLines, ...]]:
        """How the guests' VMMs are started, and what is said to their monitors then.

        Raises:
            GuestError, Gone: one does not answer.
        """
        starts, says = [], []
        for guest in going:
            if guest.name in self.desk.address_spaces.vmm_filled:
                continue  # its VMM is given its devices when it starts: the next control process has them first
            grants = self.desk.state.grants_of(guest=guest.name)
            paused = guest.state is GuestState.PAUSED or self.waits(guest)
            start, say = save_restore.restart_of_live(self.desk, guest, grants, state_held(guest.name), paused=paused)
            starts.append(start)
            if say is not None:
                says.append(say)
        return tuple(starts), tuple(says)

    def plan(self, holds: tuple[Hold, ...], going: Iterable[Guest], takings: Iterable[carried.Taking]) -> BootPlan:
        """The boot plan, once all that goes stands still: those whose VMMs we run, and those in the fast lane.

        Raises:
            GuestError, Gone: one does not answer.
        """
        starts, says = self.starts(going)
        files: tuple[bootplan.GuestFile, ...] = ()
        for each in takings:
            said, found = each.said, each.planned()
            if found is not None and said.at is not None:
                starts, says, files = (*starts, found[0]), (*says, found[1]), (*files, *found[2])
                state = fast.held(each.guest.name)
                self.stopped[each.guest.name] = SavedGuest(each.guest, state, said.at, stood_ns=said.stood_ns)
        return BootPlan(holds, self.verifies(), starts, says, bootplan.moment(), files)

    def waits(self, guest: Guest) -> bool:
        """Whether a guest that ran stays paused when it is back, until its contents and its devices were compared."""
        mine = [each for each in self.recorded.values() if each.guest == guest.name]
        windows = [each for each in self.desk.state.windows.values() if each.guest == guest.name]
        return guest.state is not GuestState.PAUSED and bool(self.contents or mine or windows)

    def described(self, written: ClockReading) -> Manifest:
        """The manifest's second part, of the moment at which the first was ``written``."""
        desk, here = self.desk, host.host(self.desk.root)
        progress = self.progress
        if progress is None:
            raise NotFound("the handoff has not begun", "its first step was left out", "begin it again")
        state = desk.state
        return Manifest(
            tool=f"memconsole {__version__}",
            kernel=here.kernel,
            boot_id=here.boot_id,
            command_line=tree.line(desk.root, "/proc/cmdline"),
            number=max(state.unfinished, default=0),
            began=self.began,
            written=written,
            regions=tuple(self.placed.values()),
            guests=tuple(self.stopped.values()),
            grants=tuple(state.grants.values()),
            windows=tuple(state.windows.values()),
            devices=tuple(self.recorded.values()),
            report=progress.report,
        )
