"""The handoff as steps, each with its undo: until the jump, a failure leaves every guest running where it was.

    run         load ─ preserve-SESSION... ─ place ─ iova-BDF... ─ pause-GUEST... ─ save-GUEST... ─ quiesce-BDF...
                ─ pause-GUEST... ─ save-GUEST... ─ manifest ─ jump
    rehearse    iova-BDF... ─ pause-GUEST... ─ save-GUEST... ─ quiesce-BDF... ─ pause-GUEST... ─ save-GUEST... ─ place
                ─ manifest ─ end ─ early ─ adopt

Every step is a fault point; what a control process that died at one leaves, :mod:`~.adopt` takes back or carries on.

* A session carries what belongs to one guest, so that one guest's memory can be let go alone. Its fd is in custody and
  nowhere else: the control process may die.
* Preserving moves frames out of KHO's scratch, so it is done while guests run, and only then their places are read.
* What is in the blackout is small: the guests' state, the ledger, the manifest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from msgspec.structs import replace

from memconsole import __version__
from memconsole.actions import GuestResume, Handoff, HandoffRehearse, HandoffRun
from memconsole.backend.desk import MOUNT, Desk, custody_name
from memconsole.backend.dma import spaces
from memconsole.backend.handoff import adopt, bootplan, check, devices, facts, image, luo, manifest, report, vmm
from memconsole.backend.handoff.bootplan import MANIFEST_SESSION, Hold, Moment, Verify
from memconsole.backend.handoff.manifest import Manifest, Placed, Recorded, Stopped
from memconsole.backend.handoff.passed import Passed
from memconsole.backend.handoff.report import Progress
from memconsole.backend.kernel import host, tree
from memconsole.backend.steps import Step
from memconsole.backend.stores import memfd
from memconsole.backend.verbs.work import Work
from memconsole.errors import NotFound
from memconsole.extents import ExtentTable, digest_fd
from memconsole.model import Carried, Guest, GuestKind, GuestState, HandoffReport, HandoffState, Region
from memconsole.units import format_size

SAVE_S = 30.0
"""Seconds a guest has to write down what it is."""
LEDGER = "ledger"
LEDGER_TOKEN = bootplan.MANIFEST_TOKEN + 1
_PHASES = dict(report.BEFORE)


def run(desk: Desk, action: HandoffRun) -> Work:
    """Carry every guest into another kernel."""
    return _Sequence(desk, action, "run").work()


def rehearse(desk: Desk, action: HandoffRehearse) -> Work:
    """The same with every VMM restarted on this kernel."""
    return _Sequence(desk, action, "rehearse").work()


@dataclass(frozen=True)
class Cargo:
    """What one session carries: regions of one guest, or one region of several guests or none."""

    session: str
    regions: tuple[Region, ...]

    @property
    def size(self) -> int:
        """Bytes of all its regions."""
        return sum(region.size for region in self.regions)


def cargoes(desk: Desk) -> list[Cargo]:
    """The regions whose memory is held, by the session that is to carry each."""
    found: dict[str, list[Region]] = {}
    for region in desk.state.regions.values():
        if desk.has(region.name):
            guests = {grant.guest for grant in desk.state.grants_of(region=region.name)}
            owner = guests.pop() if len(guests) == 1 else f"={region.name}"
            found.setdefault(luo.session_name(owner), []).append(region)
    return [Cargo(session, tuple(regions)) for session, regions in found.items()]


@dataclass
class _Sequence:
    """One handoff on its way."""

    desk: Desk
    action: Handoff
    kind: Literal["run", "rehearse"]
    placed: dict[str, Placed] = field(default_factory=dict)
    stopped: dict[str, Stopped] = field(default_factory=dict)
    preserved_ns: dict[str, int] = field(default_factory=dict)
    recorded: dict[str, Recorded] = field(default_factory=dict)
    began: Moment = field(default_factory=Moment)
    progress: Progress | None = None
    suspended: set[str] = field(default_factory=set)

    def work(self) -> Work:
        """The steps, or why they are refused."""
        desk, jump = self.desk, self.kind == "run"
        name = host.host(desk.root).name
        work = Work(name, "")
        seen = facts.gather(desk, self.action, jump=jump)
        work.conditions = check.check(seen)
        work.refusals = check.refusals(work.conditions)
        if work.refusals:
            return work
        cargo = cargoes(desk)
        going = [met.guest for met in seen.guests if _goes(met)]
        self._begin(work, going, seen.image.release if seen.image else "")
        if jump:
            self._finish(work, facts.kept(desk))
            self._load(work, facts.target(self.action, desk.root))
            for load in cargo:
                self._preserve(work, load)
            self._place(work, cargo)
        # In a rehearsal, processes go on, and their devices with them.
        names = {guest.name for guest in going}
        passed = [each for each in seen.devices if jump or each.guest in names]
        for each in passed:
            self._record(work, each)
        busy = {each.guest for each in passed}
        self._still(work, [guest for guest in going if guest.name in busy])
        for each in passed:
            self._quiesce(work, each)
        # Those without devices stand still last: what devices take is not in their blackout.
        self._still(work, [guest for guest in going if guest.name not in busy])
        if not jump:  # nothing is pinned: pages come to be as long as guests run
            self._place(work, cargo)
        self._manifest(work, cargo, going, jump=jump)
        if jump:
            self._add(work, "jump", Step("jump", f"boot {seen.kernel}: the keeper makes the jump", desk.custody.jump))
        else:
            self._restart(work, going)
        return work

    # --- steps ------------------------------------------------------------------------------------------------------

    def _add(self, work: Work, phase: str, step: Step) -> None:
        """A step that is part of a phase; its failure is the handoff's."""

        def passed() -> None:
            if self.progress is not None:
                self.progress.phase(phase, _PHASES.get(phase, step.text))
            try:
                step.do()
            except BaseException as error:
                if self.progress is not None:
                    self.progress.fail(str(error))
                raise

        work.steps.append(Step(step.id, step.text, passed, step.undo, step.undo_text))

    def _begin(self, work: Work, going: Sequence[Guest], release: str) -> None:
        verb = "is handed off" if self.kind == "run" else "has rehearsed a handoff"
        work.text = f"{work.subject} {verb}: {len(going)} guests"
        here = host.host(self.desk.root)

        def do() -> None:
            self.began = bootplan.moment()
            clean(self.desk)
            guests = tuple(Carried(guest.name, guest.kind, guest.memory) for guest in going)
            self.progress = Progress(
                HandoffReport(
                    self.kind,
                    HandoffState.RUNNING,
                    time.time_ns(),
                    here.kernel,
                    release or here.kernel,
                    guests=guests,
                ),
                partial(setattr, self.desk, "handoff"),
            )
            self.progress.phase("check", _PHASES["check"])

        count = len(work.conditions)
        self._add(work, "check", Step("check", f"{count} conditions are looked at, none of them refuses", do))

    def _finish(self, work: Work, kept: Sequence[str]) -> None:
        """Only who asked for it gets here with sessions that are kept."""

        def do() -> None:
            for name in kept:
                fd, _ = self.desk.custody.get(name)
                with luo.Session.adopt(fd) as session:
                    session.finish()
                self.desk.custody.drop(name)

        if kept:
            text = f"finish {', '.join(kept)}: what nobody knows in them is discarded"
            self._add(work, "load", Step("finish", text, do))

    def _load(self, work: Work, aim: facts.Target) -> None:
        text = f"load {aim.kernel} with {aim.initrd or 'no initrd'} by kexec_file_load: {aim.line}"
        do = partial(image.load, aim.kernel, aim.initrd or None, aim.line)
        self._add(work, "load", Step("load", text, do, image.unload, "unload it"))

    def _preserve(self, work: Work, cargo: Cargo) -> None:
        owner = cargo.session.removeprefix(luo.PREFIX)
        held = session_held(cargo.session)

        def do() -> None:
            # preserving fills holes too, in 4 KiB folios, which take long to retrieve
            for region in cargo.regions:
                memfd.fill(self.desk.fds(region.name))
            began = time.monotonic_ns()
            with luo.Session.create(cargo.session) as session:
                token = 0
                for region in cargo.regions:
                    for fd in self.desk.fds(region.name):
                        token += 1
                        session.preserve(fd, token)
                self.desk.custody.put(held, session.fd)
            took = time.monotonic_ns() - began
            for region in cargo.regions:
                self.preserved_ns[region.name] = took * region.size // cargo.size

        text = f"preserve {format_size(cargo.size)} of {', '.join(r.name for r in cargo.regions)} while guests run"
        undo = partial(self.desk.custody.drop, held)
        self._add(work, "preserve", Step(f"preserve-{owner.removeprefix('=')}", text, do, undo, "close the session"))

    def _place(self, work: Work, cargo: Iterable[Cargo]) -> None:
        def do() -> None:
            for each in cargo:
                token = 0
                for region in each.regions:
                    tokens = tuple(range(token + 1, token + 1 + len(region.segments)))
                    token += len(tokens)
                    self.placed[region.name] = self._placed(region, each.session, tokens)

        self._add(work, "place", Step("place", "read where every page is: it must be there afterwards", do))

    def _placed(self, region: Region, session: str, tokens: tuple[int, ...]) -> Placed:
        digests, runs = [], 0
        for fd, segment in zip(self.desk.fds(region.name), region.segments, strict=True):
            with ExtentTable.scan_fd(fd, segment.size) as table:
                digests.append(table.digest())
                runs += len(table)
        return Placed(region, session, tokens, tuple(digests), runs, self.preserved_ns.get(region.name, 0))

    def _record(self, work: Work, device: Passed) -> None:
        bdf = device.bdf

        def do() -> None:
            self.recorded[bdf] = devices.record(self.desk, bdf, device.guest, device.unpreserved)

        text = f"record where the page tables of device {bdf} lead: they must lead there afterwards"
        undo = partial(_drop, self.desk, devices.IOVA + bdf)
        self._add(work, "iova", Step(f"iova-{bdf}", text, do, undo, "forget it"))

    def _quiesce(self, work: Work, device: Passed) -> None:
        bdf = device.bdf

        def do() -> None:
            self.desk.spaces.quiesce(bdf)
            at = self.progress.now() if self.progress is not None else None
            self.recorded[bdf] = replace(self.recorded[bdf], quiesced_ns=at)

        text = f"take the bus from device {bdf} of {device.guest}: no byte arrives from then on"
        undo = partial(self.desk.spaces.restart, bdf)
        self._add(work, "quiesce", Step(f"quiesce-{bdf}", text, do, undo, "give it back"))

    def _still(self, work: Work, guests: Sequence[Guest]) -> None:
        for guest in guests:
            self._pause(work, guest)
        for guest in guests:
            self._save(work, guest)

    def _pause(self, work: Work, guest: Guest) -> None:
        live = self.desk.live(guest.name)
        if live is None:
            raise NotFound(f"guest {guest.name} is gone", "its process ended", f"memconsole guest stop {guest.name}")
        if guest.state is GuestState.PAUSED:
            return

        def do() -> None:
            if guest.kind is GuestKind.QEMU and live.state() is GuestState.SUSPENDED:
                self.suspended.add(guest.name)
            live.pause()

        def undo() -> None:
            if self.desk.live(guest.name) is live:  # else it was ended, see _save
                live.resume()

        text = f"stop the vCPUs of {guest.name}"
        self._add(work, "pause", Step(f"pause-{guest.name}", text, do, undo, "let it go on"))

    def _save(self, work: Work, guest: Guest) -> None:
        """One that is suspended has to be started again from what was saved: QEMU 10 aborts when it is to go on."""
        desk, held = self.desk, state_held(guest.name)

        def do() -> None:
            live = desk.live(guest.name)
            if live is None:
                raise NotFound(f"guest {guest.name} is gone", "its process ended", "try again without it")
            fd = manifest.memfd(f"memconsole-state-{guest.name}", b"")
            with contextlib.closing(os.fdopen(fd, "rb", closefd=True)):
                # Custody has it first: whoever comes after a death in here must know how this guest goes on.
                desk.custody.put(held, fd, adopt.SUSPENDED if guest.name in self.suspended else b"")
                try:
                    vmm.save(live, fd, SAVE_S)
                except BaseException:
                    desk.custody.drop(held)
                    raise
            self.stopped[guest.name] = Stopped(guest, held, bootplan.moment(), self._waits(guest))

        def undo() -> None:
            if guest.name not in self.suspended:
                desk.custody.drop(held)
                return
            adopt.end(desk, [guest])
            gone = replace(guest, pid=None, start_ticks=None, state=GuestState.GONE)
            work.lasting = replace(work.lasting, guests=(*work.lasting.guests, gone))
            work.then.append(GuestResume(guest.name))

        text = f"write down what {guest.name} is besides its RAM"
        self._add(work, "save", Step(f"save-{guest.name}", text, do, undo, "drop it"))

    # --- what is handed over -----------------------------------------------------------------------------------------

    def _manifest(self, work: Work, cargo: Sequence[Cargo], going: Sequence[Guest], *, jump: bool) -> None:
        def do() -> None:
            if self.action.contents:
                self.placed = {name: self._digested(placed) for name, placed in self.placed.items()}
            holds, fds = self._holds(cargo, going)
            plan = bootplan.Plan(holds, self._verifies(), *self._starts(going), bootplan.moment())
            fd = manifest.write(plan, self._described(plan.written))
            try:
                if jump:
                    self._preserve_manifest({bootplan.MANIFEST_TOKEN: fd, **fds})
                self.desk.custody.put(bootplan.MANIFEST, fd)
            finally:
                os.close(fd)
                for each in fds.values():
                    os.close(each)

        what = "preserve" if jump else "write"
        undo = partial(_drop, self.desk, session_held(MANIFEST_SESSION), bootplan.MANIFEST)
        self._add(work, "manifest", Step("manifest", f"{what} state, ledger and manifest", do, undo, "drop them"))

    def _holds(self, cargo: Iterable[Cargo], going: Iterable[Guest]) -> tuple[tuple[Hold, ...], dict[int, int]]:
        """What is to be in custody afterwards, and the fds of the manifest's session by token, to be closed."""
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
        for name in (LEDGER, *mounted, *(state_held(guest.name) for guest in going), *self._of_devices()):
            fds[token], payload = desk.custody.get(name)
            holds.append(Hold(MANIFEST_SESSION, token, name, payload))
            token += 1
        return tuple(holds), fds

    def _of_devices(self) -> list[str]:
        """What custody has of devices that goes along: their tables, and they themselves where the kernel can."""
        names = [each.table for each in self.recorded.values()]
        for each in self.recorded.values():
            if each.preserved:
                names += [name for name in spaces.names(each.guest, [each.bdf]) if name not in names]
        return names

    def _preserve_manifest(self, fds: dict[int, int]) -> None:
        with luo.Session.create(MANIFEST_SESSION) as session:
            for token, fd in fds.items():
                session.preserve(fd, token)
            self.desk.custody.put(session_held(MANIFEST_SESSION), session.fd)

    def _digested(self, placed: Placed) -> Placed:
        fds = self.desk.fds(placed.region.name)
        return replace(placed, contents=tuple(digest_fd(fd) for fd in fds))

    def _verifies(self) -> tuple[Verify, ...]:
        return tuple(
            Verify(custody_name(name, index), segment.size, digest)
            for name, placed in self.placed.items()
            for index, (segment, digest) in enumerate(zip(placed.region.segments, placed.digests, strict=True))
        )

    def _starts(self, going: Iterable[Guest]) -> tuple[tuple[bootplan.Start, ...], tuple[bootplan.Say, ...]]:
        starts, says = [], []
        for guest in going:
            if guest.name in self.desk.spaces.filled:
                continue  # its VMM is given its devices when it starts: the next control process has them first
            grants = self.desk.state.grants_of(guest=guest.name)
            paused = guest.state is GuestState.PAUSED or self._waits(guest)
            start, say = vmm.revival(self.desk, guest, grants, state_held(guest.name), paused=paused)
            starts.append(start)
            if say is not None:
                says.append(say)
        return tuple(starts), tuple(says)

    def _waits(self, guest: Guest) -> bool:
        """Whether a guest that ran stays paused when it is back, until its contents and its devices were compared."""
        mine = [each for each in self.recorded.values() if each.guest == guest.name]
        windows = [each for each in self.desk.state.windows.values() if each.guest == guest.name]
        return guest.state is not GuestState.PAUSED and bool(self.action.contents or mine or windows)

    def _described(self, written: Moment) -> Manifest:
        desk, here = self.desk, host.host(self.desk.root)
        progress = self.progress
        if progress is None:
            raise NotFound("the handoff has not begun", "its first step was left out")
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

    # --- the rehearsal's own -----------------------------------------------------------------------------------------

    def _restart(self, work: Work, going: Sequence[Guest]) -> None:
        desk = self.desk
        names = ", ".join(guest.name for guest in going) or "no guest"

        def back() -> None:
            adopt.end(desk, going)  # those that the failure left alive
            adopt.revive(desk)
            landing = adopt.land(desk, self.progress)
            adopt.take_hold(desk, landing.change.guests, windows=True)
            work.lasting = landing.change

        end = Step("end", f"end the VMMs of {names}", partial(adopt.end, desk, going), back, "start them again")
        self._add(work, "end", end)
        early = Step(
            "early", "start them from what was saved (memconsole-resume --rehearse)", partial(adopt.revive, desk)
        )
        self._add(work, "early", early)

        def land() -> None:
            landing = adopt.land(desk, self.progress)
            work.change = landing.change
            adopt.take_hold(desk, landing.change.guests)
            work.after = partial(settle, landing)

        def settle(landing: adopt.Landing) -> None:
            adopt.settle(desk, landing)
            work.findings = landing.findings

        self._add(work, "adopt", Step("adopt", "take hold of them, and compare", land))


def _goes(met: facts.Met) -> bool:
    """Whether a guest can go along: it is a VM that runs, is paused, or is suspended."""
    able = {GuestState.RUNNING, GuestState.PAUSED, GuestState.SUSPENDED}
    return met.guest.kind in {GuestKind.CANARY, GuestKind.QEMU} and met.state in able and not met.stays


def session_held(session: str) -> str:
    """What an outgoing session is called in custody."""
    return f"session:{session}"


def state_held(guest: str) -> str:
    """What a guest's state is called in custody."""
    return f"state:{guest}"


def clean(desk: Desk) -> None:
    """Let go of what an earlier handoff left in custody: sessions, states, its manifest and its resume."""
    before = ("session:", "state:", bootplan.STARTED, devices.IOVA)
    left = [name for name in desk.custody.names() if name.startswith(before)]
    _drop(desk, *left, bootplan.MANIFEST, bootplan.RESUME, bootplan.LANDED)


def _drop(desk: Desk, *names: str) -> None:
    for name in names:
        with contextlib.suppress(NotFound):
            desk.custody.drop(name)
