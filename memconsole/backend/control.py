"""The control process: the only writer. It plans and applies Actions, and takes Snapshots meanwhile.

    apply   intent record → steps (steps.py, made by a verb) → done or failed record → event
    start   ledger and fds out of custody → state → regions and guests taken over → what was unfinished is ended

An embedded control process has custody itself and ends with its guests and regions; one whose custody survives it
leaves everything as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
from msgspec.structs import replace

from memconsole import actions
from memconsole.actions import Action, AnyAction
from memconsole.backend import beside, ledger, survey
from memconsole.backend.desk import MOUNT, STOP_S, Desk
from memconsole.backend.kernel import kho, tree
from memconsole.backend.ledger import Ledger
from memconsole.backend.state import KINDS, Change, Done, Failed, Happened, Intent, Record, fold
from memconsole.backend.survey import Meant
from memconsole.errors import MemconsoleError, NotFound, Refused
from memconsole.model import (
    Access,
    Danger,
    Event,
    Finding,
    GrantState,
    GuestKind,
    Outcome,
    Plan,
    Refusal,
    Snapshot,
)
from memconsole.source import nothing_at

# A survey needs none of these: they are imported by those who act.
if TYPE_CHECKING:
    from memconsole.backend.audit import Audit
    from memconsole.backend.custody import Custody
    from memconsole.backend.mounting import Mounting
    from memconsole.backend.past import Past
    from memconsole.backend.survey import Scanned
    from memconsole.backend.tables import Tables
    from memconsole.backend.truth import Truth
    from memconsole.backend.verbs.work import Work
    from memconsole.extents import ExtentTable

RECHECK_S = 1.0
"""Seconds between two looks at frames that are pinned."""
LEDGER = "ledger"
"""What the ledger is called in custody."""

HISTORY = "history"
"""Where an embedded control process records, in its runtime directory; it is removed with the regions it shows."""

EMBEDDED_HISTORY = 16 << 20
"""Bytes such a history may have: hours at a snapshot a second, in memory where the directory is a tmpfs."""


class Control:
    """A Source over this host; every method may be called from any thread."""

    def __init__(
        self,
        runtime_dir: Path,
        custody: Custody,
        *,
        state_dir: Path | None = None,
        past: Past | None = None,
        label: str = "",
        read_only: str = "",
        root: Path = Path("/"),
        mountpoint: Path | None = None,
    ) -> None:
        """Take over what custody holds, or begin with nothing; ``custody`` is closed with this.

        Sockets and files of guests lie in ``runtime_dir``, which is made when the first is needed; the audit trail in
        ``state_dir``, if there is one. ``past``, if there is one, records the Snapshots, and is closed with this.
        Grants are shown as files at ``mountpoint``, if there is one, or where an earlier control process showed them.

        Raises:
            Refused, MemconsoleError: nothing can be mounted there.
            BadFile: the ledger in custody cannot be believed, or is of a newer version; or the audit trail is.
            KernelRefused: there is no memory for a ledger.
        """
        self._label = label or f"control process {os.getpid()}"
        self._read_only = read_only
        self._root = root
        self._custody = custody
        self._acting = threading.RLock()
        self._recording = threading.Lock()
        self._rechecking = threading.Lock()
        self._rechecked = 0.0
        self._past = past
        self._closed = False
        self._tables: Tables | None = None
        self._truth: Truth | None = None
        with contextlib.ExitStack() as undo:
            self._ledger = _ledger(custody, root)
            undo.callback(self._ledger.close)
            self._state = fold(self._ledger.records())
            self._audit = _audit(state_dir, self._ledger, root) if state_dir is not None else None
            if self._audit is not None:
                undo.callback(self._audit.close)
            self._desk = Desk(runtime_dir, custody, lambda: self._state, self._guest_changed, self._record, root)
            undo.callback(self._desk.close)
            self._desk.mount = _mount(self._desk, mountpoint)
            self._standing: list[Finding] = [self._ledger.dropped.finding()] if self._ledger.dropped else []
            if custody.names() != [LEDGER] or self._state.unfinished or self._state.guests:
                from memconsole.backend import adoption

                self._standing += adoption.adopt(self._desk, self._record)
            if self._desk.mount is not None:
                self._desk.mount.sync()
            undo.pop_all()

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

    def snapshot(self) -> Snapshot:
        """The present Snapshot; an action under way does not hold it up.

        Raises:
            NotFound, Denied, KernelRefused, BadFile: this host cannot be read at all.
        """
        self._recheck()
        meant = Meant(
            self._state,
            self._desk.backings(),
            self._desk.answers(),
            self._scanned(),
            self._desk.exempt,
            (
                *self._standing,
                *(self._audit.findings() if self._audit is not None else ()),
                *(self._past.findings() if self._past is not None else ()),
                *(beside.findings(self._desk) if not self._closed else ()),
            ),
            self._desk.faces,
            self._desk.shields,
            self._desk.faults,
            beside.handed_off(self._desk),
            beside.sessions(self._desk) if not self._closed else (),
        )
        taken = self._with_truth(survey.survey(meant, self._root))
        if self._past is not None:
            self._past.note(taken)
        self._show(taken)
        return taken

    def extents(self, key: str) -> ExtentTable:
        """The PFN map of ``region:NAME`` or ``guest:NAME``, which the caller closes; see :class:`tables.Tables`.

        Raises:
            NotFound, Denied, Gone, KernelRefused: there is none, or it cannot be read.
        """
        from memconsole.backend.tables import Tables

        with self._recording:
            self._tables = self._tables or Tables(self._desk)
        return self._tables.get(key)

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

    def plan(self, action: Action) -> Plan:
        """What the Action would do now, or by what name it is refused; nothing is changed."""
        work = self._work(action)
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
        )

    def apply(self, action: Action, *, peer: str = "") -> Outcome:
        """Plan once more and do it; ``peer`` is who asked, for the ledger.

        Raises:
            Refused: the first refusal of the plan; nothing was done.
            MemconsoleError: a step failed; those before it were undone.
        """
        from memconsole.backend import steps

        with self._acting, self._mounted():
            began = time.monotonic_ns()
            if self._read_only or self._closed:
                raise _refused(self._not_here(action))
            work = self._work(action)
            if work.refusals:
                raise _refused(work.refusals[0])
            number = self._record(Intent(time.time_ns(), cast("AnyAction", action), work.subject, peer, work.aims))
            try:
                steps.run(action.spec.id, work.steps)
            except BaseException as error:
                code = error.code if isinstance(error, MemconsoleError) else type(error).__name__
                self._record(Failed(number, time.time_ns(), code, str(error), work.lasting))
                self._follow(work)
                raise
            self._record(Done(number, time.time_ns(), work.text, work.change))
            self._settle(work.change)
            if work.after is not None:
                work.after()
            self._standing += work.findings
            self._follow(work)
        return Outcome(
            action.spec.id,
            work.subject,
            work.text,
            tuple(step.effect for step in work.steps),
            time.monotonic_ns() - began,
            work.revoke,
        )

    def lend(self, region: str, *, peer: str = "") -> tuple[int, ...]:
        """Read-only fds of a region's segments, in order, which the caller closes; that ``peer`` got them is an event.

        Raises:
            NotFound: there is no such region, or nobody holds its memory any more.
        """
        from memconsole.backend.stores import memfd

        if region not in self._state.regions:
            raise NotFound(f"there is no region {region}", "", "see memconsole regions")
        lent: list[int] = []
        with self._desk.borrowed(region) as fds, contextlib.ExitStack() as undo:
            for fd in fds:
                lent.append(memfd.give(fd, Access.RO))
                undo.callback(os.close, lent[-1])
            self._record(Happened(time.time_ns(), "lent", region, f"{region} can be read by {peer}", peer))
            undo.pop_all()
        return tuple(lent)

    def denied(self, peer: str, what: str) -> None:
        """Record as an event that a peer was denied something."""
        self._record(Happened(time.time_ns(), "denied", peer, f"{what} was denied", peer))

    def close(self) -> None:
        """Let go of everything; with custody of its own, guests it started end and its regions are freed."""
        with self._acting:
            if self._closed:
                return
            self._closed = True
            if not self._custody.survives:
                self._end_guests()
            if self._tables is not None:
                self._tables.close()
            self._desk.close()
            self._custody.close()
            self._ledger.close()
            if self._audit is not None:
                self._audit.close()
            if self._past is not None:
                self._past.close()
            if not self._custody.survives:
                for directory in ("vmm", HISTORY):
                    shutil.rmtree(self._desk.runtime_dir / directory, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self._desk.runtime_dir.rmdir()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _follow(self, work: Work) -> None:
        """What comes of itself after an action; a guest that is not brought back is a finding as long as it waits."""
        for action in work.then:
            with contextlib.suppress(MemconsoleError):
                self.apply(action)

    def _not_here(self, action: Action) -> Refusal:
        why = self._read_only or "it is closed"
        return Refusal("ReadOnly", f"{action.spec.title} is not done here", why, "open it without --read-only")

    def _work(self, action: Action) -> Work:
        from memconsole.backend import verbs

        return verbs.work(self._desk, action)

    def _with_truth(self, taken: Snapshot) -> Snapshot:
        """What KHO hands over of each region, where this kernel has it."""
        if not taken.survival.luo or self._closed:
            return taken
        from memconsole.backend.truth import Truth

        with self._recording:
            self._truth = self._truth or Truth(self._desk)
        return self._truth.shown(taken)

    def _recheck(self) -> None:
        """Let quarantined frames go whose pins have dropped; asked at most once a second."""
        if self._state.quarantine and time.monotonic() > self._rechecked + RECHECK_S:
            from memconsole.backend.revoke import move

            self._rechecked = time.monotonic()
            with self._rechecking:
                move.recheck(self._desk)

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[None]:
        """The mount shows what the ledger means, however an action ends."""
        try:
            yield
        finally:
            if self._desk.mount is not None and not self._closed:
                self._desk.mount.sync()

    def _show(self, taken: Snapshot) -> None:
        """The mount says what a Snapshot does, and follows guests that run as another user now."""
        mount = self._desk.mount
        if mount is None:
            return
        if self._acting.acquire(blocking=False):  # an action under way shows its own end
            try:
                if not self._closed:
                    mount.sync({guest.name: guest.seen.uid for guest in taken.guests if guest.seen is not None})
            finally:
                self._acting.release()
        mount.note(taken)

    def _scanned(self) -> dict[str, Scanned]:
        return dict(self._tables.scanned) if self._tables is not None else {}

    def _record(self, record: Record) -> int:
        """Append a record and fold it in; its number."""
        with self._recording:
            return self._append(record)

    def _append(self, record: Record) -> int:
        kind, payload = KINDS[type(record)], msgspec.json.encode(record)
        seq = self._ledger.append(kind, payload)
        if self._audit is not None:
            self._audit.note(ledger.Record(seq, kind, payload))
        self._state = self._state.after(seq, record)
        return seq

    def _settle(self, change: Change) -> None:
        """What is due after an action: tables of what is gone, grants mapped meanwhile, a ledger grown long."""
        if self._tables is not None:
            self._tables.forget()
        self._desk.uffds.forget()
        self._desk.spaces.settle()
        gone = set(change.without_regions)
        self._standing = [finding for finding in self._standing if finding.subject not in gone]
        for guest in {grant.guest for grant in change.grants if grant.state is GrantState.OFFERED}:
            self._guest_changed(guest)
        with self._recording:
            if self._ledger.worth_compacting and not self._state.unfinished:
                whole = self._state.whole()
                self._ledger.compact([(KINDS[type(whole)], whole)])

    def _guest_changed(self, name: str) -> None:
        """A guest's agent came, went, mapped or unmapped: what was only offered may be mapped now."""
        mapped = self._desk.mapped(name)
        with self._recording:
            now = tuple(
                grant
                for grant in self._state.grants_of(guest=name)
                if grant.state is GrantState.OFFERED and grant.id in mapped
            )
            if now:
                ids = ", ".join(grant.id for grant in now)
                change = Change(grants=tuple(replace(grant, state=GrantState.MAPPED) for grant in now))
                self._append(Happened(time.time_ns(), "mapped", name, f"{name} maps {ids}", change=change))

    def _end_guests(self) -> None:
        for guest in list(self._state.guests.values()):
            live = self._desk.live(guest.name)
            if live is not None and guest.kind is not GuestKind.PROCESS:
                with contextlib.suppress(MemconsoleError):
                    live.stop(STOP_S)


def _refused(refusal: Refusal) -> Refused:
    return Refused(refusal.what, refusal.why, refusal.remedy, code=refusal.code)


def _ledger(custody: Custody, root: Path) -> Ledger:
    """The ledger in custody, or a new one put there."""
    if LEDGER in custody.names():
        fd, _ = custody.get(LEDGER)
        try:
            return Ledger.open(fd)
        except BaseException:
            os.close(fd)
            raise
    ledger = Ledger.create(tree.line(root, "/proc/sys/kernel/random/boot_id"))
    try:
        custody.put(LEDGER, ledger.fd)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _mount(desk: Desk, mountpoint: Path | None) -> Mounting | None:
    """The mount that is asked for, or that an earlier control process left; none costs nothing."""
    if mountpoint is None and not (desk.custody.survives and MOUNT in desk.custody.names()):
        return None
    from memconsole.backend.mounting import Mounting

    return Mounting(desk, mountpoint)


def _audit(state_dir: Path, ledger: Ledger, root: Path) -> Audit:
    """The audit trail, with what it lacks of the ledger."""
    from memconsole.backend.audit import Audit

    boot_id, survival = tree.line(root, "/proc/sys/kernel/random/boot_id"), kho.survival(root)
    audit = Audit(state_dir / "audit.sqlite", ledger.chain, boot_id, survival.kexec_count)
    try:
        audit.absorb(ledger.records())
    except BaseException:
        audit.close()
        raise
    return audit


def embedded(
    runtime_dir: Path | None = None, *, read_only: str = "", root: Path = Path("/"), record_s: float = 0
) -> Control:
    """A control process inside this one, which has custody itself; its directory is private unless one is given.

    With ``record_s`` it records a history of its own, at most one Snapshot every so many seconds.
    """
    from memconsole.backend.custody import OwnCustody

    if runtime_dir is None:
        base = Path("/run") if os.access("/run", os.W_OK) else Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"))  # noqa: S108
        runtime_dir = base / f"memconsole-{os.getpid()}-{os.urandom(3).hex()}"
    past = None
    if record_s:
        from memconsole.backend.past import Past

        runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        past = Past(runtime_dir / HISTORY, record_s, max_bytes=EMBEDDED_HISTORY)
    try:
        return Control(runtime_dir, OwnCustody(), past=past, label="embedded", read_only=read_only, root=root)
    except BaseException:
        if past is not None:
            past.close()
        raise
