"""The handoff as steps, each with its undo: until the jump, a failure leaves every guest running where it was.

    run         load ─ unname-ADOPTED... ─ preserve-SESSION... ─ place ─ iova-BDF... ─ tell-SERVICE...
                ─ saved-SERVICE... ─ (look ─ set ─ stream)-ADOPTED... ─ pause-GUEST... ─ save-GUEST... ─ quiesce-BDF...
                ─ pause-GUEST... ─ save-GUEST... ─ manifest ─ still ─ jump
    rehearse    iova-BDF... ─ tell-SERVICE... ─ saved-SERVICE... ─ (look ─ set ─ stream)-ADOPTED... ─ pause-GUEST...
                ─ save-GUEST... ─ quiesce-BDF... ─ pause-GUEST... ─ save-GUEST... ─ place ─ manifest ─ end-ADOPTED...
                ─ end ─ early ─ adopt

Every step is a fault point; what a control process that died at one leaves, :mod:`~.adopt` takes back or carries on.

* A session carries what belongs to one guest, so that one guest's memory can be let go alone. Its fd is in custody and
  nowhere else: the control process may die.
* Preserving moves frames out of KHO's scratch, so it is done while guests run, and only then their places are read.
* What is in the blackout is small: the guests' state, the ledger, the manifest.
* Regions of an arena are preserved by nobody: they are where they are, and the plan says where. Without live update the
  manifest, and what it names, are left in an arena, too; it is held still then, until the jump.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from msgspec.structs import replace

from memconsole.actions import Action, GuestResume, HandoffAction, HandoffRehearse, HandoffRun
from memconsole.backend import needs
from memconsole.backend.handoff import (
    bootplan,
    carried,
    check,
    clocks,
    devices,
    facts,
    fast,
    landing,
    luo,
    manifest,
    report,
    save_restore,
    services,
)
from memconsole.backend.handoff.bootplan import MANIFEST_SESSION
from memconsole.backend.handoff.cargo import SessionContents, cargoes, leave, still, take_back
from memconsole.backend.handoff.device_facts import DeviceFacts
from memconsole.backend.handoff.facets import HandoffChecks as Looked
from memconsole.backend.handoff.facets import Handover
from memconsole.backend.handoff.gathered import Gathered, session_held, state_held
from memconsole.backend.handoff.leftovers import drop, drop_leftovers
from memconsole.backend.handoff.manifest import PreservedRegion, SavedGuest
from memconsole.backend.handoff.powers import HOST, Powers
from memconsole.backend.handoff.report import ReportWriter
from memconsole.backend.kernel import host
from memconsole.backend.steps import Step
from memconsole.backend.work import PreparedAction
from memconsole.errors import NotFound
from memconsole.extents import digest_fd
from memconsole.model import Guest, GuestKind, GuestResult, GuestState, HandoffReport, HandoffState, Region
from memconsole.units import format_size

SAVE_S = 30.0
"""Seconds a guest has to write down what it is."""
_PHASES = dict(report.BEFORE)


class Sequenced(Handover, needs.OwnRegionFds, needs.ForeignMemory, Protocol):
    """What the steps of a handoff change."""


class HandoffDesk(Sequenced, Looked, Protocol):
    """What a handoff needs of the desk: what it is checked against, and what its steps change."""


def run(desk: HandoffDesk, action: HandoffRun, powers: Powers = HOST) -> PreparedAction:
    """Carry every guest into another kernel."""
    return made_of(desk, action, facts.gather_facts(desk, action, powers, jump=True), powers)


def rehearse(desk: HandoffDesk, action: HandoffRehearse, powers: Powers = HOST) -> PreparedAction:
    """The same with every VMM restarted on this kernel."""
    return made_of(desk, action, facts.gather_facts(desk, action, powers, jump=False), powers)


def made_of(desk: Sequenced, action: HandoffAction, seen: facts.HandoffFacts, powers: Powers) -> PreparedAction:
    """What the facts make of a handoff, or of a rehearsal where they are those of one: its steps, or why it is refused.

    Raises:
        NotFound: a guest is gone by now.
    """
    kind: Literal["run", "rehearse"] = "run" if seen.jump else "rehearse"
    return _Sequence(desk, action, kind, powers, Gathered(desk, contents=action.contents)).work(seen)


@dataclass
class _Sequence:
    """One handoff on its way."""

    desk: Sequenced
    action: HandoffAction
    kind: Literal["run", "rehearse"]
    powers: Powers
    got: Gathered
    preserved_ns: dict[str, int] = field(default_factory=dict)
    suspended: set[str] = field(default_factory=set)
    takings: list[carried.Taking] = field(default_factory=list)
    lanes: dict[str, str] = field(default_factory=dict)

    def work(self, seen: facts.HandoffFacts) -> PreparedAction:
        """The steps, or why they are refused."""
        desk, jump = self.desk, seen.jump
        name = host.host(desk.root).name
        work = PreparedAction(name, "", from_kernel=seen.running, to_kernel=seen.next_kernel)
        if isinstance(self.action, HandoffRun) and self.action.unless_running and seen.runs_already:
            work.text = f"{name} runs {seen.running} already: nothing was done"
            return work
        work.conditions = check.check_conditions(seen)
        work.refusals = check.refusals(work.conditions)
        if work.refusals:
            return work
        adopted = [met.guest for met in seen.guests if met.is_carried]
        self.lanes = {met.guest.name: carried.lane(met.slow) for met in seen.guests if met.is_carried}
        work.note = "; ".join(f"{name}: {lane}" for name, lane in self.lanes.items())
        cargo = cargoes(desk, () if jump else [met.guest.name for met in seen.guests if met.is_left])
        going = [met.guest for met in seen.guests if _can_go(met)]
        told = [met.guest for met in seen.guests if services.runs(met.guest, met.state)]
        self._begin(work, going, told, adopted, seen.image.release if seen.image else "")
        if jump:
            self._finish(work, facts.unfinished_sessions(desk))
            self._load(work, seen)
            self._preserve_all(work, adopted, cargo)
            self._place(work, cargo)
        # In a rehearsal, processes go on, and their devices with them.
        names = {guest.name for guest in going}
        passed = [each for each in seen.devices if jump or each.guest in names]
        for each in passed:
            self._record(work, each)
        self._tell(work, told)
        self._take(work, adopted)
        busy = {each.guest for each in passed}
        self._still(work, [guest for guest in going if guest.name in busy])
        for each in passed:
            self._quiesce(work, each)
        # Those without devices stand still last: what devices take is not in their blackout.
        self._still(work, [guest for guest in going if guest.name not in busy])
        if not jump:  # nothing is pinned: pages come to be as long as guests run
            self._place(work, cargo)
        self._manifest(work, cargo, going, adopted, seen.road, jump=jump)
        if jump:
            for step in still(self.desk, cargo, seen.road):
                self._add(work, "manifest", step)
            self._add(work, "jump", Step("jump", f"boot {seen.kernel}: the keeper jumps", desk.custody.jump))
        else:
            self._restart(work, going, told)
        return work

    # --- steps ------------------------------------------------------------------------------------------------------

    def _add(self, work: PreparedAction, phase: str, step: Step) -> None:
        """A step that is part of a phase; its failure is the handoff's."""

        def passed() -> None:
            if self.got.progress is not None:
                self.got.progress.phase(phase, _PHASES.get(phase, step.text))
            try:
                step.do()
            except BaseException as error:
                if self.got.progress is not None:
                    self.got.progress.fail(str(error))
                raise

        work.steps.append(Step(step.id, step.text, passed, step.undo, step.undo_text))

    def _begin(
        self,
        work: PreparedAction,
        going: Sequence[Guest],
        told: Sequence[Guest],
        adopted: Sequence[Guest],
        release: str,
    ) -> None:
        verb = "is handed off" if self.kind == "run" else "has rehearsed a handoff"
        work.text = f"{work.subject} {verb}: {len(going) + len(told) + len(adopted)} guests"
        here = host.host(self.desk.root)

        def do() -> None:
            self.got.began = bootplan.moment()
            drop_leftovers(self.desk)
            guests = tuple(GuestResult(guest.name, guest.kind, guest.memory) for guest in going)
            self.got.progress = ReportWriter(
                HandoffReport(
                    self.kind,
                    HandoffState.RUNNING,
                    time.time_ns(),
                    here.kernel,
                    release or here.kernel,
                    guests=(*guests, *services.results(self.desk, told), *carried.results(adopted, self.lanes)),
                ),
                partial(setattr, self.desk, "handoff"),
            )
            self.got.progress.phase("check", _PHASES["check"])

        count = len(work.conditions)
        self._add(work, "check", Step("check", f"check {count} conditions; none of them refuses", do))

    def _finish(self, work: PreparedAction, kept: Sequence[str]) -> None:
        """Only who asked for it gets here with sessions that are kept."""

        def do() -> None:
            for name in kept:
                fd, _ = self.desk.custody.get(name)
                with self.powers.adopt(fd) as session:
                    session.finish()
                self.desk.custody.drop(name)

        if kept:
            text = f"finish {', '.join(kept)}; files that no entry refers to are discarded"
            self._add(work, "load", Step("finish", text, do))

    def _load(self, work: PreparedAction, aim: facts.HandoffFacts) -> None:
        text = f"load {aim.kernel} with {aim.initrd or 'no initrd'} by kexec_file_load: {aim.line}"
        do = partial(self.powers.load, aim.kernel, aim.initrd or None, aim.line)
        self._add(work, "load", Step("load", text, do, self.powers.unload, "unload it"))

    def _preserve_all(self, work: PreparedAction, adopted: Sequence[Guest], cargo: Sequence[SessionContents]) -> None:
        for guest in adopted:
            for step in carried.unnaming(self.desk, self.desk, guest):
                self._add(work, "preserve", step)
        for load in cargo:
            self._preserve(work, load)

    def _preserve(self, work: PreparedAction, cargo: SessionContents) -> None:
        if cargo.by_itself:
            return
        owner = cargo.session.removeprefix(luo.PREFIX)
        held = session_held(cargo.session)

        def do() -> None:
            # preserving fills holes too, in 4 KiB folios, which take long to retrieve
            for region in cargo.regions:
                self.desk.store_of(region.name).fill_segments(self.desk.fds(region.name))
            began = time.monotonic_ns()
            with self.powers.create(cargo.session) as session:
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

    def _place(self, work: PreparedAction, cargo: Iterable[SessionContents]) -> None:
        def do() -> None:
            for each in cargo:
                token = 0
                for region in each.regions:
                    tokens = tuple(range(token + 1, token + 1 + len(region.segments)))
                    token += len(tokens)
                    if each.by_itself:
                        fds = self.desk.fds(region.name)
                        self.desk.store_of(region.name).fill_segments(fds)
                        tokens = tuple(os.fstat(fd).st_ino for fd in fds)
                    self.got.placed[region.name] = self._placed(region, each.session, tokens)

        self._add(work, "place", Step("place", "record where every page is, to compare afterwards", do))

    def _placed(self, region: Region, session: str, tokens: tuple[int, ...]) -> PreservedRegion:
        digests, runs = [], 0
        for index in range(len(region.segments)):
            with self.desk.segment_frames(region.name, index) as table:
                digests.append(table.digest())
                runs += len(table)
        return PreservedRegion(region, session, tokens, tuple(digests), runs, self.preserved_ns.get(region.name, 0))

    def _record(self, work: PreparedAction, device: DeviceFacts) -> None:
        bdf = device.bdf

        def do() -> None:
            self.got.recorded[bdf] = devices.preserved_device(self.desk, bdf, device.guest, device.unpreserved)

        text = f"record where the page tables of device {bdf} lead, to compare afterwards"
        undo = partial(drop, self.desk, devices.IOVA + bdf)
        self._add(work, "iova", Step(f"iova-{bdf}", text, do, undo, "forget it"))

    def _quiesce(self, work: PreparedAction, device: DeviceFacts) -> None:
        bdf = device.bdf

        def do() -> None:
            self.desk.address_spaces.quiesce(bdf)
            at = self.got.progress.now() if self.got.progress is not None else None
            self.got.recorded[bdf] = replace(self.got.recorded[bdf], quiesced_ns=at)

        text = f"switch bus mastering off for device {bdf} of {device.guest}"
        undo = partial(self.desk.address_spaces.restart, bdf)
        self._add(work, "quiesce", Step(f"quiesce-{bdf}", text, do, undo, "switch it on"))

    def _tell(self, work: PreparedAction, told: Sequence[Guest]) -> None:
        """All save at once, and while VMs still run."""
        for guest in told:
            for step in services.saving(self.desk, work, guest):
                self._add(work, "tell", step)
        for guest in told:
            for step in services.saved(self.desk, guest):
                self._add(work, "tell", step)

    def _take(self, work: PreparedAction, adopted: Sequence[Guest]) -> None:
        """The largest first: each stands still from the end of its own on."""
        for guest in sorted(adopted, key=lambda guest: -guest.memory):
            again = partial(_once, work.then, GuestResume(guest.name))
            taking = carried.Taking(self.desk, guest, again, is_fast=self.lanes[guest.name] == fast.LANE)
            self.takings.append(taking)
            for step in taking.steps():
                self._add(work, "stream", step)

    def _still(self, work: PreparedAction, guests: Sequence[Guest]) -> None:
        for guest in guests:
            self._pause(work, guest)
        for guest in guests:
            self._save(work, guest)

    def _pause(self, work: PreparedAction, guest: Guest) -> None:
        live = self.desk.live_guest(guest.name)
        if live is None:
            raise NotFound(f"guest {guest.name} is gone", "its process ended", f"memconsole guest stop {guest.name}")
        if guest.state is GuestState.PAUSED:
            return

        def do() -> None:
            if guest.kind is GuestKind.QEMU and live.state() is GuestState.SUSPENDED:
                self.suspended.add(guest.name)
            live.pause()

        def undo() -> None:
            if self.desk.live_guest(guest.name) is live:  # else it was ended, see _save
                live.resume()

        text = f"stop the vCPUs of {guest.name}"
        self._add(work, "pause", Step(f"pause-{guest.name}", text, do, undo, "resume it"))

    def _save(self, work: PreparedAction, guest: Guest) -> None:
        """One that is suspended has to be started again from what was saved: QEMU 10 aborts when it is to go on."""
        desk, held = self.desk, state_held(guest.name)

        def do() -> None:
            live = desk.live_guest(guest.name)
            if live is None:
                raise NotFound(f"guest {guest.name} is gone", "its process ended", "try again without it")
            fd = manifest.memfd(f"memconsole-state-{guest.name}", b"")
            with contextlib.closing(os.fdopen(fd, "rb", closefd=True)):
                # Custody has it first: whoever comes after a death in here must know how this guest goes on.
                desk.custody.put(held, fd, landing.SUSPENDED if guest.name in self.suspended else b"")
                try:
                    save_restore.save(live, fd, SAVE_S)
                except BaseException:
                    desk.custody.drop(held)
                    raise
            self.got.stopped[guest.name] = SavedGuest(guest, held, bootplan.moment(), self.got.waits(guest))

        def undo() -> None:
            if guest.name in self.suspended:
                landing.end_guests(desk, [guest])
            if desk.live_guest(guest.name) is not None:
                desk.custody.drop(held)
                return
            # What it is besides its RAM is nowhere else any more: it waits for another try.
            gone = replace(guest, pid=None, start_ticks=None, state=GuestState.GONE)
            work.lasting = replace(work.lasting, guests=(*work.lasting.guests, gone))
            work.then.append(GuestResume(guest.name))

        text = f"save vCPU and device state of {guest.name}"
        self._add(work, "save", Step(f"save-{guest.name}", text, do, undo, "drop it"))

    # --- what is handed over -----------------------------------------------------------------------------------------

    def _manifest(
        self,
        work: PreparedAction,
        cargo: Sequence[SessionContents],
        going: Sequence[Guest],
        adopted: Sequence[Guest],
        road: str,
        *,
        jump: bool,
    ) -> None:
        def do() -> None:
            for taking in self.takings:
                taking.seal(self._placement(taking.said))
            if self.action.contents:
                self.got.placed = {name: self._digested(placed) for name, placed in self.got.placed.items()}
            names = [guest.name for guest in adopted]
            holds, fds = self.got.holds(cargo, going, names, road or MANIFEST_SESSION)
            plan = self.got.plan(holds, going, self.takings)
            fd = manifest.write(plan, self.got.described(plan.written))
            try:
                if jump and road:
                    leave(self.desk, road, {bootplan.MANIFEST_TOKEN: fd, **fds})
                elif jump:
                    self._preserve_manifest({bootplan.MANIFEST_TOKEN: fd, **fds})
                self.desk.custody.put(bootplan.MANIFEST, fd)
            except BaseException:
                self._take_back_manifest(road)
                raise
            finally:
                os.close(fd)
                for each in fds.values():
                    os.close(each)

        what = f"leave in {road}:" if jump and road else "preserve" if jump else "write"

        def undo() -> None:
            self._take_back_manifest(road)
            if all(self.desk.live_guest(guest.name) is not None for guest in going):
                drop(self.desk, bootplan.MANIFEST)  # else it says how those that ended are started

        self._add(work, "manifest", Step("manifest", f"{what} state, ledger and manifest", do, undo, "drop them"))

    def _take_back_manifest(self, road: str) -> None:
        if road:
            take_back(self.desk)
        drop(self.desk, session_held(MANIFEST_SESSION))

    def _preserve_manifest(self, fds: dict[int, int]) -> None:
        with self.powers.create(MANIFEST_SESSION) as session:
            for token, fd in fds.items():
                session.preserve(fd, token)
            self.desk.custody.put(session_held(MANIFEST_SESSION), session.fd)

    def _placement(self, said: carried.Carried) -> str:
        """Where all of a guest's RAM is."""
        return carried.frames_digest((each.region, self.got.placed[each.region].digests) for each in said.blocks)

    def _digested(self, placed: PreservedRegion) -> PreservedRegion:
        fds = self.desk.fds(placed.region.name)
        return replace(placed, contents=tuple(digest_fd(fd) for fd in fds))

    # --- the rehearsal's own -----------------------------------------------------------------------------------------

    def _restart(self, work: PreparedAction, going: Sequence[Guest], told: Sequence[Guest]) -> None:
        desk = self.desk
        for taking in self.takings:
            name = taking.guest.name
            self._add(work, "end", Step(f"end-{name}", f"end the QEMU of {name}; libvirt sees it", taking.end))
        names = ", ".join(guest.name for guest in going) or "no guest"

        def back() -> None:
            landing.end_guests(desk, going)  # those that the failure left alive
            self._revive()
            landed = landing.land(desk, self.got.progress)
            landing.adopt_processes(desk, landed.change.guests, windows=True)
            work.lasting = landed.change

        end = Step(
            "end", f"end the VMMs of {names}", partial(landing.end_guests, desk, going), back, "start them again"
        )
        self._add(work, "end", end)
        early = Step("early", "start them from the saved state (memconsole-resume --rehearse)", self._revive)
        self._add(work, "early", early)

        def land() -> None:
            landed = landing.land(desk, self.got.progress)
            work.change = landed.change
            back = [each.guest for each in self.takings if not each.is_destroyed]
            work.then += [GuestResume(guest.name) for guest in (*told, *back)]
            landing.adopt_processes(desk, landed.change.guests)
            work.after = partial(settle, landed)

        def settle(landed: landing.Landing) -> None:
            landing.reconcile(desk, landed)
            for each in self.takings:
                each.tell()
            work.findings = landed.findings
            clocks.begin_clocks(desk)

        self._add(work, "adopt", Step("adopt", "adopt them, and compare where every page is", land))

    def _revive(self) -> None:
        self.powers.revive(self.desk.runtime_dir, bootplan.MANIFEST)


def _can_go(met: facts.GuestFacts) -> bool:
    """Whether a guest can go along: it is a VM that runs, is paused, or is suspended."""
    able = {GuestState.RUNNING, GuestState.PAUSED, GuestState.SUSPENDED}
    return met.guest.kind in {GuestKind.CANARY, GuestKind.QEMU} and met.state in able and not met.stays


def _once(then: list[Action], action: GuestResume) -> None:
    if action not in then:
        then.append(action)
