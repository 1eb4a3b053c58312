"""The control process: the only writer. It plans and applies Actions, and takes Snapshots meanwhile.

    apply   intent record → steps (steps.py, made by a verb) → done or failed record → event → tidying
    look    everybody is asked at once (looking.py); nothing is written
    tick    history, quarantine, mount and reports, by threads of its own (ticks.py, upkeep.py)
    start   ledger and fds out of custody → state → regions and guests taken over → what was unfinished is ended

An embedded control process has custody itself and ends with its guests and regions; one whose custody survives it
leaves everything as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from msgspec.structs import replace

from memconsole import actions, paths, unforeseen
from memconsole.actions import Action, AnyAction
from memconsole.backend.additions import Additions
from memconsole.backend.custody.names import MOUNT
from memconsole.backend.desk import Desk
from memconsole.backend.guests.base import STOP_S
from memconsole.backend.ledger.state import DoneRecord, EventRecord, FailedRecord, Intent, State, StateChange
from memconsole.backend.ledger.writer import LEDGER, Writer
from memconsole.backend.looking import SnapshotTaker
from memconsole.backend.observe.steady import SteadyFindings, action_scope
from memconsole.backend.readiness import ReadinessCheck
from memconsole.errors import MemconsoleError, Refused
from memconsole.model import (
    Danger,
    Event,
    Finding,
    FrameState,
    GrantState,
    GuestKind,
    Outcome,
    Part,
    Plan,
    Refusal,
    Severity,
    Snapshot,
)
from memconsole.source import no_map_at, nothing_at

# A survey needs none of these: they are imported by those who act.
if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody
    from memconsole.backend.custody.manager import KexecGuard
    from memconsole.backend.exports.mount import GuestMount
    from memconsole.backend.handoff import carried_back
    from memconsole.backend.history.recorder import HistoryRecorder
    from memconsole.backend.observe.pfn_tables import PfnTables
    from memconsole.backend.observe.survey import ScanResult
    from memconsole.backend.upkeep import Upkeep
    from memconsole.backend.work import PreparedAction
    from memconsole.extents import ExtentTable

log = logging.getLogger("memconsole.control")

HISTORY = "history"
"""Where an embedded control process records, in its runtime directory; it is removed with the regions it shows."""


class Control:
    """A Source over this host; every method may be called from any thread."""

    def __init__(
        self,
        runtime_dir: Path,
        custody: Custody,
        *,
        state_dir: Path | None = None,
        past: HistoryRecorder | None = None,
        label: str = "",
        read_only: str = "",
        root: Path = Path("/"),
        mountpoint: Path | None = None,
        raw: Sequence[int] = (),
        brief: bool = False,
    ) -> None:
        """Take over what custody holds, or begin with nothing; ``custody`` is closed with this.

        Sockets and files of guests lie in ``runtime_dir``, the audit trail in ``state_dir``, if any. ``past`` records
        Snapshots, and is closed with this. ``raw``: ranges of the raw store. Grants are shown at ``mountpoint``. A
        ``brief`` one does nothing of itself: it is closed before anything would be due.

        Raises:
            Refused, MemconsoleError: nothing can be mounted there.
            BadFile: ledger or audit trail cannot be believed, or is newer. KernelRefused: no memory for a ledger.
        """
        self._label = label or f"control process {os.getpid()}"
        self._read_only = read_only
        self._root = root
        self._custody = custody
        self._acting = threading.RLock()
        self._making = threading.Lock()
        self._steady = SteadyFindings()
        self._untidy: dict[str, Finding] = {}
        self._past = past
        self._closed = False
        self._tables: PfnTables | None = None
        with contextlib.ExitStack() as undo:
            self._ledger = Writer(custody, root, state_dir)
            undo.callback(self._ledger.close)
            self._desk = Desk(runtime_dir, custody, lambda: self._state, self._guest_changed, root, state_dir=state_dir)
            self._desk.raw = raw
            undo.callback(self._desk.close)
            self._looking = SnapshotTaker(self._desk, root, self._steady)
            undo.callback(self._looking.close)
            self._additions = Additions(self._desk, root)
            self._desk.mount = _mount(self._desk, mountpoint)
            self._standing = self._ledger.dropped()
            self._desk.standing = lambda: self._standing
            self._take_over()
            self._desk.guard = _guard(self._desk)
            self._watch()
            self._ready = ReadinessCheck(self.plan, root)
            self._upkeep = None if brief else self._see_to(past)
            undo.pop_all()

    def _see_to(self, past: HistoryRecorder | None) -> Upkeep:
        from memconsole.backend.upkeep import Upkeep

        return Upkeep(
            self._desk,
            self._acting,
            self.snapshot,
            self._ledger.carry,
            self._ready,
            apply=self.apply,
            carried=self._carried,
            past=past,
            maps_since=self._maps_since,
        )

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Where this comes from."""
        return self._label

    @property
    def read_only(self) -> str:
        """Why no Action can be applied, or an empty string."""
        return self._read_only

    @property
    def runtime_dir(self) -> Path:
        """Where the agents socket and the guests' files are."""
        return self._desk.runtime_dir

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """The present Snapshot with these parts.

        An action under way does not hold it up, and one who does not answer only for moments.

        Raises:
            NotFound, Denied, KernelRefused, BadFile: this host cannot be read at all.
        """
        standing = (
            *self._standing,
            *self._untidy.values(),
            *self._ledger.findings(),
            *(self._past.findings() if self._past is not None else ()),
        )
        taken = self._looking.take_snapshot(standing, self._scanned())
        if not self._closed:
            taken = self._additions.with_truth(self._additions.with_paging(taken))
        taken = replace(taken, readiness=self._ready.found)
        if parts and not self._closed:
            taken = self._additions.with_parts(taken, parts)
        if self._upkeep is not None:
            self._upkeep.note_snapshot(taken)
        return taken

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        """The PFN map of ``region:NAME`` or ``guest:NAME``, which the caller closes; see :class:`tables.Tables`.

        Raises:
            NotFound, Denied, Gone, KernelRefused: there is none, or it cannot be read. BadFile: the record is damaged.
        """
        if at_ns is not None:
            if self._past is None:
                raise no_map_at(key, at_ns)
            return self._past.map_at(key, at_ns)
        from memconsole.backend.observe.pfn_tables import PfnTables

        with self._making:
            self._tables = self._tables or PfnTables(self._desk)
        return self._tables.get(key)

    def frame(self, pfn: int) -> FrameState:
        """What the kernel says of a page frame; NotFound, Denied, KernelRefused."""
        from memconsole.backend.kernel import kpage

        return kpage.frame(self._root, pfn)

    def events(self, after: int) -> Sequence[Event]:
        """The last events (1000 at most) above ``after``, oldest first."""
        return [event for event in self._state.events if event.seq > after]

    def history(self, after: int = 0) -> Sequence[int]:
        """When Snapshots were recorded, ns since the epoch, oldest first; nothing where none are."""
        return self._past.times(after) if self._past is not None else []

    def at(self, time_ns: int) -> Snapshot:
        """The last Snapshot recorded until ``time_ns``.

        Raises:
            NotFound: none was.
            BadFile: it was, and its file is damaged.
        """
        if self._past is None:
            raise nothing_at([])
        return self._past.at(time_ns)

    # --- doing ----------------------------------------------------------------------------------------------------

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        """What the Action would do now, or once those of ``after`` are done; or by what name it is refused."""
        work, note = self._foreseen(action, after) if after else (self._prepare(action), "")
        refusals = [self._not_here(action)] if self._read_only else []
        spec = action.spec
        return Plan(
            spec.id,
            actions.cli_form(action),
            spec.danger,
            tuple(step.effect for step in work.steps),
            (*refusals, *work.refusals),
            work.subject if spec.danger is Danger.DESTROYS else None,
            work.conditions,
            work.subject,
            "; ".join(filter(None, [work.note, note])),
            work.from_kernel,
            work.to_kernel,
        )

    def apply(self, action: Action, *, peer: str = "") -> Outcome:
        """Plan once more and do it; ``peer`` is who asked, for the ledger.

        Raises:
            Refused: the first refusal of the plan; nothing was done.
            MemconsoleError: a step failed; those before it were undone.
        """
        with self._acting, self._mounted():
            began = time.monotonic_ns()
            if self._read_only or self._closed:
                raise _refused_error(self._not_here(action))
            work = self._prepare(action)
            if work.refusals:
                raise _refused_error(work.refusals[0])
            with self._steady.acting(action_scope(self._state, action, work.subject, work.aims)):
                self._carry_out(action, work, peer)
            self._bring_back(work)
        return Outcome(
            action.spec.id,
            work.subject,
            work.text,
            tuple(step.effect for step in work.steps),
            time.monotonic_ns() - began,
            work.revoke,
        )

    def open_readonly(self, region: str, *, peer: str = "") -> tuple[int, ...]:
        """Read-only fds of a region's segments, in order, which the caller closes; that ``peer`` got them is an event.

        Raises:
            NotFound: there is no such region, or nobody holds its memory any more.
        """
        store = self._desk.store_of(region)
        lent: list[int] = []
        with self._desk.borrowed_fds(region) as fds, contextlib.ExitStack() as undo:
            for fd in fds:
                lent.append(store.readable_fd(fd))
                undo.callback(os.close, lent[-1])
            self._ledger.record(EventRecord(time.time_ns(), "lent", region, f"{region} can be read by {peer}", peer))
            undo.pop_all()
        return tuple(lent)

    def denied(self, peer: str, what: str) -> None:
        """Record as an event that a peer was denied something."""
        self._ledger.record(EventRecord(time.time_ns(), "denied", peer, f"{what} was denied", peer))

    def close(self) -> None:
        """Let go of everything; with custody of its own, guests it started end and its regions are freed."""
        if self._upkeep is not None:
            self._upkeep.close()
        with self._acting:
            if self._closed:
                return
            self._closed = True
            self._looking.close()
            self._additions.close()
            if not self._custody.survives:
                self._end_guests()
            if self._tables is not None:
                self._tables.close()
            self._desk.close()
            self._custody.close()
            self._ledger.close()
            if self._past is not None:
                self._past.close()
            if not self._custody.survives:
                for directory in ("vmm", HISTORY):
                    shutil.rmtree(self._desk.runtime_dir / directory, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self._desk.runtime_dir.rmdir()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _carried(self) -> carried_back.Upkeep:
        from memconsole.backend.handoff import carried_back

        return carried_back.Upkeep(self._desk, self.apply)

    def _take_over(self) -> None:
        """Adopt what is left, if anything is, and have the mount show it."""
        if self._is_something_left():
            from memconsole.backend import adoption

            self._standing += self._ledger.carry(adoption.adopt_all(self._desk))
        if self._desk.mount is not None:
            self._desk.mount.sync()

    def _is_something_left(self) -> bool:
        """Whether there may be anything to adopt: of an earlier control process, or in a store that outlives them."""
        if self._custody.names() != [LEDGER] or self._state.unfinished or self._state.guests:
            return True
        return self._custody.survives and any(store.may_know() for store in self._desk.stores.values())

    @property
    def _state(self) -> State:
        return self._ledger.state

    def _carry_out(self, action: Action, work: PreparedAction, peer: str) -> None:
        """From the intent's record to the end's, and what is due then: an action is done once the ledger says so."""
        from memconsole.backend import steps

        number = self._ledger.record(Intent(time.time_ns(), cast("AnyAction", action), work.subject, peer, work.aims))
        try:
            self._ledger.carry(steps.run(action.spec.id, work.steps))
        except BaseException as error:
            code = error.code if isinstance(error, MemconsoleError) else type(error).__name__
            self._ledger.record(FailedRecord(number, time.time_ns(), code, str(error), work.lasting))
            self._bring_back(work)
            raise
        self._ledger.record(DoneRecord(number, time.time_ns(), work.text, work.change))
        self._reconcile(work)

    def _bring_back(self, work: PreparedAction) -> None:
        """What comes of itself after an action; a guest that is not brought back is a finding as long as it waits."""
        for action in work.then:
            with unforeseen.contained(actions.cli_form(action), "job"):  # what it follows is done, and told as done
                self.apply(action)

    def _not_here(self, action: Action) -> Refusal:
        why = self._read_only or "it is closed"
        return Refusal("ReadOnly", f"{action.spec.title} is refused here", why, "open it without --read-only")

    def _prepare(self, action: Action) -> PreparedAction:
        from memconsole.backend import verbs

        return verbs.prepare(self._desk, action)

    def _foreseen(self, action: Action, after: Sequence[Action]) -> tuple[PreparedAction, str]:
        """What an Action amounts to once others are done, and what its plan leaves out."""
        from memconsole.backend import foreseen, verbs

        desk = foreseen.desk_after(self._desk, after)
        desk, note = foreseen.for_handoff(desk) if isinstance(action, actions.HandoffAction) else (desk, "")
        return verbs.prepare(desk, action), note

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[None]:
        """The mount shows what the ledger means, however an action ends, and an ordinary kexec does not end it."""
        try:
            yield
        finally:
            if self._desk.mount is not None and not self._closed:
                self._tidy("the mount", self._desk.mount.sync)
            self._tidy("the guard against an ordinary kexec", self._watch)

    def _watch(self) -> None:
        if self._desk.guard is not None:
            self._desk.guard.keep(on=bool(self._state.regions or self._state.guests))

    def _maps_since(self, known: Mapping[str, int]) -> Sequence[tuple[str, ExtentTable]]:
        return self._tables.scanned_since(known) if self._tables is not None else ()

    def _scanned(self) -> dict[str, ScanResult]:
        return dict(self._tables.scanned) if self._tables is not None else {}

    def _reconcile(self, work: PreparedAction) -> None:
        """What is due after an action: tables of what is gone, grants mapped meanwhile, a ledger grown long."""
        change, gone = work.change, set(work.change.without_regions)
        self._standing = [finding for finding in self._standing if finding.subject not in gone]
        if self._tables is not None:
            self._tidy("tables of frames", self._tables.forget)
        self._tidy("what regions say of themselves", self._desk.describe_regions)
        self._tidy("userfaultfds", self._desk.userfaults.forget_ended)
        self._tidy("devices", self._desk.address_spaces.reconcile)
        for guest in {grant.guest for grant in change.grants if grant.state is GrantState.OFFERED}:
            self._tidy("grants that were mapped", partial(self._guest_changed, guest, self._desk.mapped_grants(guest)))
        self._tidy("the ledger", self._ledger.compact)
        if work.after is not None:
            self._tidy(work.subject, work.after)
        self._standing = [*self._standing, *work.findings]  # some are found only by what was due

    def _tidy(self, what: str, do: Callable[[], None]) -> None:
        """Tidy up behind an action that is done, whatever comes of it: a failure is a finding until it works."""
        failed = unforeseen.attempt(f"what is due after an action ({what})", "job", do)
        if isinstance(failed, MemconsoleError):
            if failed.code != unforeseen.CODE:
                log.warning("what is due after an action failed: %s: %s", what, failed)
            told = f"the action is done, but {what} could not be brought up to date"
            remedy = "nothing need be done: it is tried again after the next action; if it fails again, see the log"
            self._untidy = {
                **self._untidy,
                what: Finding("tidying-failed", Severity.WARNING, what, told, str(failed), remedy),
            }
        else:
            self._untidy = {name: finding for name, finding in self._untidy.items() if name != what}

    def _guest_changed(self, name: str, mapped: frozenset[str]) -> None:
        """A guest's agent came, went, mapped or unmapped: what was only offered may be mapped now."""
        self._ledger.record_if(partial(_mapped, name, mapped))

    def _end_guests(self) -> None:
        for guest in list(self._state.guests.values()):
            live = self._desk.live_guest(guest.name)
            if live is not None and guest.kind in {GuestKind.CANARY, GuestKind.QEMU}:
                with contextlib.suppress(MemconsoleError):
                    live.stop(STOP_S)


def _mapped(guest: str, mapped: frozenset[str], state: State) -> EventRecord | None:
    """What is to be recorded when a guest has mapped these grants: those that were only offered until now."""
    offered = [grant for grant in state.grants_of(guest=guest) if grant.state is GrantState.OFFERED]
    now = [grant for grant in offered if grant.id in mapped]
    if not now:
        return None
    change = StateChange(grants=tuple(replace(grant, state=GrantState.MAPPED) for grant in now))
    text = f"{guest} maps {', '.join(grant.id for grant in now)}"
    return EventRecord(time.time_ns(), "mapped", guest, text, change=change)


def _refused_error(refusal: Refusal) -> Refused:
    return Refused(refusal.what, refusal.why, refusal.remedy, code=refusal.code)


def _mount(desk: Desk, mountpoint: Path | None) -> GuestMount | None:
    """The mount that is asked for, or that an earlier control process left; none costs nothing."""
    if mountpoint is None and not (desk.custody.survives and MOUNT in desk.custody.names()):
        return None
    from memconsole.backend.exports.mount import GuestMount

    return GuestMount(desk, mountpoint)


def _guard(desk: Desk) -> KexecGuard | None:
    """What keeps an ordinary kexec from ending the guests: for the host's own service, whose memory outlives it."""
    if os.geteuid() or not desk.custody.survives or desk.runtime_dir.absolute() != paths.HOST:
        return None
    from memconsole.backend.custody.manager import KexecGuard

    return KexecGuard(desk.root)
