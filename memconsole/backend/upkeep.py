"""What a control process sees to of itself: once a second, whether or not somebody looks.

    quarantine   lets frames go whose pins have dropped           not while an action is under way
    readiness    whether a handoff would be refused               when something it depends on has changed
    report       what guests say of the blackout of a handoff     not while an action is under way
    moves        ends what became of guests whose RAM was on its way when somebody was killed     not while ...
    services     starts those that were told to save for a handoff and have ended; finds the process of a unit
    carried      has libvirt start the adopted guests that a handoff brought; resumes those of one that died
    domains      records that libvirt has started a domain, or that one has ended, when it happens (inotify)
    mount        files as the ledger has them, owned by the guests' users; status as a Snapshot has it, a new one where
                 the ledger, a guest's state or its user changed
    history      records a Snapshot where that is due

A Snapshot that somebody took is used for both; where nobody looks, one is taken.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from memconsole.backend import needs
from memconsole.backend.kernel import census
from memconsole.backend.ledger.state import EventRecord
from memconsole.backend.managers.comings import Comings
from memconsole.backend.peers import handle
from memconsole.backend.peers.asked import PATIENCE_S
from memconsole.backend.ticks import Ticks
from memconsole.errors import Denied, Gone, KernelRefused, Silent
from memconsole.model import GuestState, HandoffReport, Snapshot

if TYPE_CHECKING:
    from memconsole.actions import Action
    from memconsole.backend.history.recorder import HistoryRecorder, ScannedSince
    from memconsole.backend.ledger.state import Recorded, State
    from memconsole.backend.observe.survey import GuestReply
    from memconsole.backend.readiness import ReadinessCheck

EVERY_S = 1.0
AT_ONCE_S = 0.05
"""Between two times that a job waits for what it is told of."""
MOVES_S = 5.0
RECENT_S = 30.0
"""How old a Snapshot may be that says whether something changed: where nobody looks, one is taken as often."""


class Meant(NamedTuple):
    """What the mount shows: the ledger's state, what each guest says of itself (agent included), and its user."""

    state: State
    said: Mapping[str, tuple[GuestState, bool]]
    owners: Mapping[str, int]


class Mount(Protocol):
    """The mount, as it is kept up."""

    def ping(self) -> None:
        """Ask its server whether it is there; Gone, Silent."""

    def sync(self, owners: Mapping[str, int] | None = None) -> None:
        """Have it show what the ledger means, owned by the guests' users."""

    def show_status(self, snapshot: Snapshot) -> None:
        """Have it show what a Snapshot says of its guests."""


class Kept(needs.OwnRegionFds, needs.GuestStarting, Protocol):
    """What is kept up."""

    handoff: HandoffReport | None

    def guest_replies(self, deadline: float) -> Mapping[str, GuestReply]:
        """What every live guest says of itself."""

    @property
    def mount(self) -> Mount | None:
        """The mount, if there is one."""


class Carried(Protocol):
    """The adopted guests on their way through a handoff."""

    def see_to(self) -> None:
        """Do what is due."""


class Upkeep:
    """The upkeep of one control process.

    ``acting`` is its lock of actions, ``take`` takes a Snapshot, ``carry`` writes the records that are handed up, and
    ``ready`` looks whether a handoff could be made; ``carried`` makes what sees to adopted guests, where there are any.
    """

    def __init__(
        self,
        desk: Kept,
        acting: threading.RLock,
        take: Callable[[], Snapshot],
        carry: Callable[[Recorded[None]], None],
        ready: ReadinessCheck,
        *,
        apply: Callable[[Action], object],
        carried: Callable[[], Carried],
        past: HistoryRecorder | None = None,
        maps_since: ScannedSince = lambda _: (),
    ) -> None:
        self._desk = desk
        self._acting = acting
        self._take = take
        self._carry = carry
        self._ready = ready
        self._apply = apply
        self._tried: set[str] = set()
        self._carried = functools.cache(carried)
        self._past = past
        self._maps_since = maps_since
        self._mounted: Meant | None = None
        """What the mount was last shown a Snapshot for."""
        self._taking = threading.Lock()
        self._latest: Snapshot | None = None
        self._own_ns = 0
        """When the last Snapshot was taken that was taken for the history alone."""
        self._comings = Comings(desk.root)
        self._ticks = Ticks()
        self._ticks.begin("quarantine", EVERY_S, self.recheck)
        self._ticks.begin("readiness", EVERY_S, self.check_readiness)
        self._ticks.begin("services", EVERY_S, self.start_services)
        self._ticks.begin("carried", EVERY_S, self.see_to_carried)
        self._ticks.begin("moves", MOVES_S, self.settle_moves)
        self._ticks.begin("report", EVERY_S, self.amend_report)
        self._ticks.begin("domains", AT_ONCE_S, self.tell_domains)
        if desk.mount is not None:
            self._ticks.begin("mount", EVERY_S, self.show_on_mount)
        if past is not None and past.every_s:
            self._ticks.begin("history", min(EVERY_S, past.every_s), self.record_history)

    def note_snapshot(self, taken: Snapshot) -> None:
        """A Snapshot was taken."""
        self._latest = taken

    def close(self) -> None:
        """See to nothing more."""
        self._comings.stop()
        self._ticks.close()
        self._comings.close()

    def recheck(self) -> None:
        """Let quarantined frames go whose pins have dropped."""
        if self._desk.state.quarantine:
            from memconsole.backend.revoke import move

            with self._idle() as still:
                if still:
                    self._carry(move.recheck_quarantine(self._desk))

    def start_services(self) -> None:
        """Start services that a handoff ended, once each and once the clock allows; find the process a unit has by now.

        Raises:
            MemconsoleError: one cannot be started; it is a guest that is gone until somebody resumes it.
        """
        if not any(guest.service is not None for guest in self._desk.state.guests.values()):
            return
        from memconsole.backend.handoff import services

        with self._idle() as still:
            due = services.due(self._desk, self._tried) if still else None
            if due is not None:
                self._tried.add(due.name)
                self._apply(due)

    def see_to_carried(self) -> None:
        """Have adopted guests go on: where a handoff that died has left them, or where one brought them.

        Raises:
            MemconsoleError: one does not; it is tried again later.
        """
        if not any(guest.adopted for guest in self._desk.state.guests.values()):
            return
        with self._idle() as still:
            if still:
                self._carried().see_to()

    def settle_moves(self) -> None:
        """End the moves of guests' RAM that were cut short, as far as libvirt answers."""
        from memconsole.backend.stores import ramfiles

        if ramfiles.domains():
            from memconsole.backend.verbs import relocate

            with self._idle() as still:
                if still:
                    self._carry(relocate.settle(self._desk))

    def tell_domains(self) -> None:
        """Record the domains that have come and gone, once some have."""
        if self._comings.wait():
            self._carry(self._told())

    def _told(self) -> Recorded[None]:
        for managed, pid, came in self._comings.news():
            ours = (guest.name for guest in self._desk.state.guests.values() if guest.pid == pid)
            who = "libvirt" if managed.user is None else f"libvirt of user {managed.user}"
            text = f"{who} has started {managed.name}" if came else f"{managed.name} of {who} has ended"
            kind = "domain-started" if came else "domain-ended"
            yield EventRecord(time.time_ns(), kind, next(ours, managed.name), f"{text} (process {pid})")

    def amend_report(self) -> None:
        """Have the report of the last handoff say what guests say of their blackout."""
        made = self._desk.handoff
        if made is None:
            return
        from memconsole.backend.handoff import stored

        asked = stored.with_guests_blackouts(self._desk, made)
        with self._idle() as still:
            if still and asked != made:
                stored.amend_report(self._desk, lambda shown: asked if shown is made else shown)

    def check_readiness(self) -> None:
        """Look whether a handoff could be made, if that may have changed since the last Snapshot somebody took."""
        taken = self._recent(RECENT_S)
        with self._idle() as still:
            depends = self._ready.due(taken) if still else None
        if depends is not None:
            self._ready.check(depends)

    def show_on_mount(self) -> None:
        """Have the mount show what the ledger means, whose guests' processes are, and what a Snapshot says of them.

        Where neither the ledger nor what guests say of themselves has changed, the last Snapshot is good enough.
        """
        mount = self._desk.mount
        if mount is None:
            return
        try:
            mount.ping()
        except Silent:
            return  # which a Snapshot says; nobody waits for it meanwhile
        except Gone:
            pass  # it is started again
        now = self._meant()
        same = self._mounted is not None and self._mounted.state is now.state and self._mounted[1:] == now[1:]
        taken = self._recent(RECENT_S if same else 0)
        with self._idle() as still:
            if still:
                mount.sync(now.owners)
                self._mounted = now
        mount.show_status(taken)

    def _meant(self) -> Meant:
        state, replies = self._desk.state, self._desk.guest_replies(time.monotonic() + PATIENCE_S)
        owners = {}
        for guest in state.guests.values():
            if guest.pid is not None:
                with contextlib.suppress(Gone, Denied, KernelRefused):
                    uid = census.uid(self._desk.root, guest.pid)
                    if handle.stat(guest.pid)[1] == guest.start_ticks:  # it was no other's by then
                        owners[guest.name] = uid
        return Meant(state, {name: (reply.state, reply.agent) for name, reply in replies.items()}, owners)

    def record_history(self) -> None:
        """Record the PFN maps that somebody had scanned, then a Snapshot, where that is due."""
        past = self._past
        if past is None:
            return
        past.note_maps(self._maps_since)
        latest = self._latest
        if latest is not None and past.is_due(latest.taken_ns):
            past.note(latest)
        elif past.lacks(time.time_ns(), latest.taken_ns if latest is not None else None, self._own_ns):
            latest = self._recent(0)
            self._own_ns = latest.taken_ns
            past.note(latest)

    def _recent(self, within_s: float) -> Snapshot:
        """A Snapshot that is at most so old."""
        with self._taking:
            latest = self._latest
            if latest is None or time.time_ns() - latest.taken_ns > within_s * 1e9:
                latest = self._take()
            return latest

    @contextlib.contextmanager
    def _idle(self) -> Iterator[bool]:
        """Whether no action is under way; none begins before this ends. Nobody waits: the next second comes."""
        still = self._acting.acquire(blocking=False)
        try:
            yield still
        finally:
            if still:
                self._acting.release()
