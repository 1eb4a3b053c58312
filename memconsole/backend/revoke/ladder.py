"""One climb of the ladder, and what the ledger says after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple, Protocol

from memconsole.backend import needs
from memconsole.backend.guests.base import GuestDriver, is_qemu
from memconsole.backend.ledger.state import Recorded, StateChange
from memconsole.backend.observe.reach import RegionReach, RegionReaching
from memconsole.backend.peers.handle import Handle
from memconsole.backend.revoke import move
from memconsole.backend.revoke.move import MoveResult
from memconsole.backend.revoke.points import pass_by
from memconsole.backend.revoke.stop_processes import processes_stopped
from memconsole.backend.revoke.suspend_vm import GuestSuspending
from memconsole.backend.stores import files
from memconsole.errors import Gone, GuestError, MemconsoleError
from memconsole.model import Grant, GuestKind, GuestState, RevokeOutcome, RevokeReport, Rung
from memconsole.model import Guest as LedgerGuest

_LOOK_S = 0.02


class Revoking(
    GuestSuspending,
    move.SegmentMoving,
    RegionReaching,
    needs.GrantOffering,
    needs.FaultServing,
    needs.GrantFiles,
    Protocol,
):
    """What taking a mapping back needs."""


class _RungFailed(NamedTuple):
    """A rung that did not do: ``why``, and whether it was tried at all."""

    why: str
    tried: bool = True


class Ladder:
    """One climb for one grant: ``within`` seconds a rung, none harder than ``at_most``."""

    def __init__(self, desk: Revoking, grant: Grant, within: float, at_most: Rung) -> None:
        self._desk = desk
        self._grant = grant
        self._within = within
        self._at_most = at_most
        self._segment = grant.offset // files.SEGMENT
        self._killed: set[int] = set()
        self._last: RegionReach | None = None

    def climb(self) -> Recorded[RevokeReport]:
        """Climb until nobody reaches the segment the range lies in: who had its descriptor may have mapped any of it.

        Raises:
            GuestError: somebody still does (``StillMapped``), and no harder rung is allowed or left.
        """
        began = time.monotonic_ns()
        if self._desk.mount is not None:
            self._desk.mount.block_access(self._grant)
        order = list(Rung)
        tried: list[Rung] = []
        whys: list[str] = []
        for rung in order[: order.index(self._at_most) + 1]:
            pass_by(rung, "before")
            end = yield from self._try(rung)
            pass_by(rung, "after")
            if isinstance(end, MoveResult):
                took = time.monotonic_ns() - began
                note = "; ".join(filter(None, [self._killed_note(), end.note, *whys]))
                return RevokeReport(self._grant.id, rung, end.outcome, took, (*tried, rung), note)
            whys.append(f"{rung}: {end.why}")
            tried += [rung] if end.tried else []
        raise GuestError(
            f"{self._grant.id} is still mapped: {self._reach()}",
            "; ".join(whys),
            f"memconsole revoke {self._grant.id} --at-most {self._harder()}"
            if self._at_most is not Rung.KILL
            else "see /proc/PID/stack of these processes",
            code="StillMapped",
        )

    def _harder(self) -> Rung:
        """The next rung that may do: *protect* where it is tried; where files cannot be cut, the last alone."""
        store = self._desk.store_of(self._grant.region)
        if not store.CUTS:
            return Rung.KILL
        protects = store.FAULTS and not self._is_doubtful()
        order = list(Rung)
        later = order[order.index(self._at_most) + 1 :]
        return next(rung for rung in later if protects or rung is not Rung.PROTECT)

    def _try(self, rung: Rung) -> Recorded[MoveResult | _RungFailed]:
        match rung:
            case Rung.ASK:
                return (yield from self._ask())
            case Rung.PROTECT:
                return self._protect()
            case Rung.COPY:
                return (yield from self._copy())
            case Rung.KILL:
                return (yield from self._kill())

    def change(self) -> StateChange:
        """What the ledger says after the climb: a guest that was killed is no guest any more."""
        state = self._desk.state
        dead = [guest.name for guest in state.guests.values() if guest.pid in self._killed]
        grants = {self._grant.id} | {grant.id for name in dead for grant in state.grants_of(guest=name)}
        windows = [grant.id for grant in state.windows.values() if grant.guest in dead]
        self._desk.withdraw(self._grant)
        for name in dead:
            self._desk.remove_guest(name)
        return StateChange(
            guests=self._suspended_entry(),
            without_grants=tuple(sorted(grants)),
            without_guests=tuple(dead),
            without_windows=tuple(windows),
        )

    # --- rungs ----------------------------------------------------------------------------------------------------

    def _ask(self) -> Recorded[MoveResult | _RungFailed]:
        live = self._desk.live_guest(self._grant.guest)
        why = "its guest is gone"
        agreed = False
        if live is not None:
            try:
                answers = self._desk.connected(live.name, patient=False) or live.kind is GuestKind.QEMU
                agreed = self._asked(live) and answers  # an offer that nobody took is withdrawn, and nobody said so
                why = f"guest {self._grant.guest} " + (
                    "said that it unmapped it" if agreed else "has no agent to unmap it"
                )
            except MemconsoleError as error:
                why = str(error)
        reach = self._await_unmapped(self._within if agreed else 0)
        return _RungFailed(f"{why}; {reach}") if reach.pids else (yield from self._outcome(reach))

    def _asked(self, live: GuestDriver) -> bool:
        """Whether a guest did what it was asked: to unmap the grant, or, a QEMU, to end once it was saved."""
        if live.kind is not GuestKind.QEMU:
            return live.request_unmap(self._grant.id, self._within)
        from memconsole.backend.revoke import suspend_vm

        if not is_qemu(live) or self._grant.id != live.ram:
            return False
        suspend_vm.suspend_guest(self._desk, live, self._grant, self._within)
        return True

    def _suspended_entry(self) -> tuple[LedgerGuest, ...]:
        """The grant's guest, if it gave its RAM back by ending, as the ledger is to have it."""
        guest = self._desk.state.guests.get(self._grant.guest)
        if guest is None or guest.kind is not GuestKind.QEMU:
            return ()
        from memconsole.backend.revoke import suspend_vm

        return (suspend_vm.suspended_entry(self._desk, guest),) if suspend_vm.is_saved(self._desk, guest.name) else ()

    def _protect(self) -> MoveResult | _RungFailed:
        """Only a guest whose code is ours can be trusted to have kept no second uffd, which could undo it."""
        if self._is_doubtful():
            return _RungFailed("a process that memconsole does not control could undo it", tried=False)
        if why := self._desk.userfaults.block_access(self._grant.id):
            return _RungFailed(why, tried=False)
        reach = self._reach()
        if reach.pids or (opened := self._opened()):
            return _RungFailed(str(reach) if reach.pids else opened)
        return MoveResult(RevokeOutcome.CUT, "its mapping stays, without pages")

    def _copy(self) -> Recorded[MoveResult | _RungFailed]:
        region = self._desk.state.regions[self._grant.region]
        if why := move.why_not(self._desk, region, self._segment):
            return _RungFailed(why, tried=False)
        try:
            with processes_stopped(self._desk, self._who(), self._within) as note:
                pass_by("copy", "stopped")
                end = yield from move.move_segment(self._desk, self._grant, self._segment)
                reach = self._reach()
            if reach.pids:  # a file that shows the region and was not emptied with it
                return _RungFailed(str(reach))
            return MoveResult(end.outcome, "; ".join(filter(None, [end.note, note()])))
        except MemconsoleError as error:
            return _RungFailed(str(error))

    def _who(self) -> Callable[[], tuple[int, ...]]:
        """Who reaches it: those who did when a rung last looked, and from then on those who do."""
        known = [self._last.pids] if self._last is not None and self._last.pids else []
        return lambda: known.pop() if known else self._reach().pids

    def _kill(self) -> Recorded[MoveResult | _RungFailed]:
        deadline = time.monotonic() + self._within
        while (reach := self._await_unmapped(0)).pids and time.monotonic() < deadline:
            for pid in reach.pids:
                self._end(pid)
        if reach.pids:
            return _RungFailed(str(reach))
        end = yield from self._outcome(reach)
        live = self._desk.live_guest(self._grant.guest)
        if isinstance(end, _RungFailed) and live is not None and live.state() is not GuestState.GONE:
            self._end(live.pid)  # who had the grant may be who keeps it out of sight
            end = yield from self._outcome(self._reach())
        return end

    def _end(self, pid: int) -> None:
        if pid == 1:
            raise GuestError("process 1 reaches it", "process 1 is never killed", "stop the service it started")
        owner = next((guest for guest in self._desk.state.guests.values() if guest.pid == pid), None)
        live = self._desk.live_guest(owner.name) if owner else None
        self._killed.add(pid)
        if live is not None:
            live.kill()
            return
        with contextlib.suppress(Gone), contextlib.closing(Handle(pid)) as handle:
            handle.kill()

    # --- how strong the end is ------------------------------------------------------------------------------------

    def _outcome(self, reach: RegionReach) -> Recorded[MoveResult | _RungFailed]:
        """Nobody reaches the segment; move the contents away from pins, where there may be some.

        A file on the mount that somebody unseen has open can be mapped until the contents have moved.
        """
        opened = self._opened()
        unsure = (
            _RungFailed(opened)
            if opened
            else MoveResult(RevokeOutcome.QUARANTINED, reach.unseen)
            if reach.unseen
            else None
        )
        if not self._is_doubtful() and not opened:
            return unsure or MoveResult(RevokeOutcome.CUT)
        region = self._desk.state.regions[self._grant.region]
        if why := move.why_not(self._desk, region, self._segment):
            return unsure or self._unmoved(why)
        try:
            return (yield from move.move_segment(self._desk, self._grant, self._segment))
        except MemconsoleError as error:
            return unsure or self._unmoved(str(error))

    def _unmoved(self, why: str) -> MoveResult | _RungFailed:
        """The contents stay in the file that somebody had the descriptor of: nobody may have kept it out of sight."""
        deadline = time.monotonic() + self._within
        while (pids := self._desk.keepers()) and time.monotonic() < deadline:
            _wait_while(partial(self._desk.keepers, pids), deadline)
        if pids:
            who = ", ".join(map(str, pids))
            where = "a socket's queue, a ring, or a thread's own table"
            return _RungFailed(f"its descriptor may be in {where} of {who}: {why}")
        return MoveResult(RevokeOutcome.CUT, f"pins are not ruled out: {why}")

    def _opened(self) -> str:
        """Why the grant's file on the mount may be open in nobody's hands that are seen; empty if it is not."""
        return self._desk.mount.why_open(self._grant) if self._desk.mount is not None else ""

    def _is_doubtful(self) -> bool:
        """Whether a process was involved whose code is not ours, and which may have handed pages or the fd on."""
        guests = self._desk.state.guests
        ours = {guest.pid for guest in guests.values() if guest.kind in {GuestKind.CANARY, GuestKind.QEMU}}
        guest = guests.get(self._grant.guest)
        return guest is None or guest.pid not in ours or not self._killed <= ours

    # --- what the kernel says -------------------------------------------------------------------------------------

    def _reach(self) -> RegionReach:
        self._last = self._desk.region_reach(self._desk.state.regions[self._grant.region], self._segment)
        return self._last

    def _await_unmapped(self, within: float) -> RegionReach:
        """Who reaches the segment, once nobody does or the time is over: what was unmapped just now may linger.

        Meanwhile those are looked at who still do, and not every process of the host.
        """
        deadline = time.monotonic() + within
        while (reach := self._reach()).pids and time.monotonic() < deadline:
            _wait_while(partial(self._among, reach.pids), deadline)
        return reach

    def _among(self, pids: Collection[int]) -> Collection[int]:
        """Those of some processes that still reach the segment."""
        return self._desk.region_reach(self._desk.state.regions[self._grant.region], self._segment, pids).pids

    def _killed_note(self) -> str:
        return f"killed {', '.join(str(pid) for pid in sorted(self._killed))}" if self._killed else ""


def _wait_while(some: Callable[[], Collection[int]], deadline: float) -> None:
    """Wait until none of some processes is left, or the time is over."""
    while time.monotonic() < deadline and some():
        time.sleep(_LOOK_S)
