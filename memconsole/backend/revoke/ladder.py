"""One climb of the ladder, and what the ledger says after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

from memconsole.backend import reach as reach_of
from memconsole.backend.desk import Desk
from memconsole.backend.guests.base import Guest
from memconsole.backend.guests.handle import Handle
from memconsole.backend.reach import Reach
from memconsole.backend.revoke import move
from memconsole.backend.revoke.halt import halted
from memconsole.backend.revoke.move import End
from memconsole.backend.revoke.points import pass_by
from memconsole.backend.state import Change
from memconsole.backend.stores import memfd
from memconsole.errors import Gone, GuestError, MemconsoleError
from memconsole.model import Grant, GuestKind, GuestState, RevokeOutcome, RevokeReport, Rung
from memconsole.model import Guest as LedgerGuest

_LOOK_S = 0.02


class _Passed(NamedTuple):
    """A rung that did not do: ``why``, and whether it was tried at all."""

    why: str
    tried: bool = True


class Ladder:
    """One climb for one grant: ``within`` seconds a rung, none harder than ``at_most``."""

    def __init__(self, desk: Desk, grant: Grant, within: float, at_most: Rung) -> None:
        self._desk = desk
        self._grant = grant
        self._within = within
        self._at_most = at_most
        self._segment = grant.offset // memfd.SEGMENT
        self._killed: set[int] = set()
        self._last: Reach | None = None

    def climb(self) -> RevokeReport:
        """Climb until nobody reaches the segment the range lies in: who had its descriptor may have mapped any of it.

        Raises:
            GuestError: somebody still does (``StillMapped``), and no harder rung is allowed or left.
        """
        began = time.monotonic_ns()
        if self._desk.mount is not None:
            self._desk.mount.bar(self._grant)
        rungs: dict[Rung, Callable[[], End | _Passed]] = {
            Rung.ASK: self._ask,
            Rung.PROTECT: self._protect,
            Rung.COPY: self._copy,
            Rung.KILL: self._kill,
        }
        order = list(rungs)
        tried: list[Rung] = []
        whys: list[str] = []
        for rung in order[: order.index(self._at_most) + 1]:
            pass_by(rung, "before")
            end = rungs[rung]()
            pass_by(rung, "after")
            if isinstance(end, End):
                took = time.monotonic_ns() - began
                note = "; ".join(filter(None, [self._killed_note(), end.note, *whys]))
                return RevokeReport(self._grant.id, rung, end.outcome, took, (*tried, rung), note)
            whys.append(f"{rung}: {end.why}")
            tried += [rung] if end.tried else []
        raise GuestError(
            f"{self._grant.id} is still mapped: {self._reach()}",
            "; ".join(whys),
            f"memconsole revoke {self._grant.id} --at-most kill"
            if self._at_most is not Rung.KILL
            else "look at /proc/PID/stack of these processes",
            code="StillMapped",
        )

    def change(self) -> Change:
        """What the ledger says after the climb: a guest that was killed is no guest any more."""
        state = self._desk.state
        dead = [guest.name for guest in state.guests.values() if guest.pid in self._killed]
        grants = {self._grant.id} | {grant.id for name in dead for grant in state.grants_of(guest=name)}
        windows = [grant.id for grant in state.windows.values() if grant.guest in dead]
        self._desk.withdraw(self._grant)
        for name in dead:
            self._desk.part(name)
        return Change(
            guests=self._aside(),
            without_grants=tuple(sorted(grants)),
            without_guests=tuple(dead),
            without_windows=tuple(windows),
        )

    # --- rungs ----------------------------------------------------------------------------------------------------

    def _ask(self) -> End | _Passed:
        live = self._desk.live(self._grant.guest)
        why = "its guest is gone"
        agreed = False
        if live is not None:
            try:
                self._desk.connected(live.name)
                agreed = self._asked(live)
                why = f"guest {self._grant.guest} " + ("said it did" if agreed else "has no agent that would unmap it")
            except MemconsoleError as error:
                why = str(error)
        reach = self._look(self._within if agreed else 0)
        return _Passed(f"{why}; {reach}") if reach.pids else self._settled(reach)

    def _asked(self, live: Guest) -> bool:
        """Whether a guest did what it was asked: to unmap the grant, or, a QEMU, to end once it was saved."""
        if live.kind is not GuestKind.QEMU:
            return live.ask_unmap(self._grant.id, self._within)
        from memconsole.backend.guests.qemu import QemuGuest
        from memconsole.backend.revoke import aside

        if not isinstance(live, QemuGuest) or self._grant.id != live.ram:
            return False
        aside.ask(self._desk, live, self._grant, self._within)
        return True

    def _aside(self) -> tuple[LedgerGuest, ...]:
        """The grant's guest, if it gave its RAM back by ending, as the ledger is to have it."""
        guest = self._desk.state.guests.get(self._grant.guest)
        if guest is None or guest.kind is not GuestKind.QEMU:
            return ()
        from memconsole.backend.revoke import aside

        return (aside.put_aside(self._desk, guest),) if aside.waits(self._desk, guest.name) else ()

    def _protect(self) -> End | _Passed:
        """Only a guest whose code is ours can be trusted to have kept no second uffd, which could undo it."""
        if self._is_doubtful():
            return _Passed("a process that is not ours could undo it", tried=False)
        if why := self._desk.uffds.bar(self._grant.id):
            return _Passed(why, tried=False)
        reach = self._reach()
        if reach.pids or (opened := self._opened()):
            return _Passed(str(reach) if reach.pids else opened)
        return End(RevokeOutcome.CUT, "its mapping stays, and leads nowhere")

    def _copy(self) -> End | _Passed:
        region = self._desk.state.regions[self._grant.region]
        if why := move.why_not(self._desk, region, self._segment):
            return _Passed(why, tried=False)
        try:
            with halted(self._desk, self._who(), self._within) as note:
                pass_by("copy", "stopped")
                end = move.move(self._desk, self._grant, self._segment)
                reach = self._reach()
            if reach.pids:  # a file that shows the region and was not emptied with it
                return _Passed(str(reach))
            return End(end.outcome, "; ".join(filter(None, [end.note, note()])))
        except MemconsoleError as error:
            return _Passed(str(error))

    def _who(self) -> Callable[[], tuple[int, ...]]:
        """Who reaches it: those who did when a rung last looked, and from then on those who do."""
        known = [self._last.pids] if self._last is not None and self._last.pids else []
        return lambda: known.pop() if known else self._reach().pids

    def _kill(self) -> End | _Passed:
        deadline = time.monotonic() + self._within
        while (reach := self._look(0)).pids and time.monotonic() < deadline:
            for pid in reach.pids:
                self._end(pid)
        if reach.pids:
            return _Passed(str(reach))
        end = self._settled(reach)
        live = self._desk.live(self._grant.guest)
        if isinstance(end, _Passed) and live is not None and live.state() is not GuestState.GONE:
            self._end(live.pid)  # who had the grant may be who keeps it out of sight
            end = self._settled(self._reach())
        return end

    def _end(self, pid: int) -> None:
        if pid == 1:
            raise GuestError("the first process reaches it", "it is never killed", "stop what it started")
        owner = next((guest for guest in self._desk.state.guests.values() if guest.pid == pid), None)
        live = self._desk.live(owner.name) if owner else None
        self._killed.add(pid)
        if live is not None:
            live.kill()
            return
        with contextlib.suppress(Gone), contextlib.closing(Handle(pid)) as handle:
            handle.kill()

    # --- how strong the end is ------------------------------------------------------------------------------------

    def _settled(self, reach: Reach) -> End | _Passed:
        """Nobody reaches the segment; move the contents away from pins, where there may be some.

        A file on the mount that somebody unseen has open can be mapped until the contents have moved.
        """
        opened = self._opened()
        unsure = _Passed(opened) if opened else End(RevokeOutcome.QUARANTINED, reach.unseen) if reach.unseen else None
        if not self._is_doubtful() and not opened:
            return unsure or End(RevokeOutcome.CUT)
        region = self._desk.state.regions[self._grant.region]
        if why := move.why_not(self._desk, region, self._segment):
            return unsure or self._unmoved(why)
        try:
            return move.move(self._desk, self._grant, self._segment)
        except MemconsoleError as error:
            return unsure or self._unmoved(str(error))

    def _unmoved(self, why: str) -> End | _Passed:
        """The contents stay in the file that somebody had the descriptor of: nobody may have kept it out of sight."""
        deadline = time.monotonic() + self._within
        while pids := reach_of.keepers(self._desk.exempt, self._desk.faces):
            if time.monotonic() > deadline:
                who = ", ".join(map(str, pids))
                return _Passed(
                    f"its descriptor may be in a socket's queue, a ring, or a thread's own table of {who}: {why}"
                )
            time.sleep(_LOOK_S)
        return End(RevokeOutcome.CUT, f"pins are not ruled out: {why}")

    def _opened(self) -> str:
        """Why the grant's file on the mount may be open in nobody's hands that are seen; empty if it is not."""
        return self._desk.mount.opened(self._grant) if self._desk.mount is not None else ""

    def _is_doubtful(self) -> bool:
        """Whether a process was involved whose code is not ours, and which may have handed pages or the fd on."""
        guests = self._desk.state.guests
        ours = {guest.pid for guest in guests.values() if guest.kind in {GuestKind.CANARY, GuestKind.QEMU}}
        guest = guests.get(self._grant.guest)
        return guest is None or guest.pid not in ours or not self._killed <= ours

    # --- what the kernel says -------------------------------------------------------------------------------------

    def _reach(self) -> Reach:
        self._last = self._desk.reach(self._desk.state.regions[self._grant.region], self._segment)
        return self._last

    def _look(self, within: float) -> Reach:
        """Who reaches the segment, once nobody does or the time is over: what was unmapped just now may linger."""
        deadline = time.monotonic() + within
        while True:
            reach = self._reach()
            if not reach.pids or time.monotonic() >= deadline:
                return reach
            time.sleep(_LOOK_S)

    def _killed_note(self) -> str:
        return f"killed {', '.join(str(pid) for pid in sorted(self._killed))}" if self._killed else ""
