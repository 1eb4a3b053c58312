"""The other side for adopted guests of libvirt: their RAM is offered where libvirt looks, and libvirt starts them.

    before libvirtd     RAM compared; the plan and the one right to restore (plans.py) written; the image, unlocked, put
                        where libvirtd finds managed saves: a domain that starts with the host goes on by itself
    once it answers     each of the others is started (``virsh start``, ``virsh restore``), found by its UUID, watched

The right to restore is given once for each image. Where it is spent and the guest does not run, it has run on that RAM
and ended: the image is worth nothing then, and nothing is started from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from memconsole.actions import GuestResume
from memconsole.backend import needs, steplog
from memconsole.backend.handoff import bootplan, carried, fast, stored, verify
from memconsole.backend.handoff.carried import Carried, Carrying
from memconsole.backend.handoff.facets import HandoffReporting
from memconsole.backend.handoff.report import Clock
from memconsole.backend.kernel import census
from memconsole.backend.ledger import boots
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.managers import libvirt_setup, plans, saveimage, virsh
from memconsole.backend.observe.mappings import region_mappings
from memconsole.backend.observe.reach import RegionReaching
from memconsole.backend.stores import files
from memconsole.backend.work import PreparedAction
from memconsole.errors import BadFile, GuestError, KernelRefused, MemconsoleError, NotFound, Refused
from memconsole.model import Guest, GuestKind, GuestState, HandoffReport

SAVES = Path("/var/lib/libvirt/qemu/save")
"""Where the system's libvirt keeps managed saves, by the name of the domain."""
RESTORE_S = 300.0
"""Seconds libvirt has to start a domain: behind a new kernel it first asks every QEMU what it can."""
_WAITS_S = (2.0, 5.0, 15.0, 60.0, 300.0)
"""How long nothing is tried again after each try that failed; the last holds for all that follow."""


class Returning(Carrying, needs.GuestStarting, RegionReaching, needs.GrantFiles, HandoffReporting, Protocol):
    """What bringing carried guests back needs."""


def _jumped(desk: Returning, said: Carried) -> bool:
    return said.boot_id != boots.boot_id(desk.root)


def _has_ended(desk: Returning, said: Carried) -> bool:
    """Whether the process that a note names was ended by us, or by a jump."""
    return bool(said.digest) and (said.ended or _jumped(desk, said))


def why_not_here(desk: Returning, said: Carried) -> str:
    """Why the RAM is not what it was: by its frames behind a jump, by what file it is on the same kernel."""
    for block in said.blocks:
        if not desk.holds_region(block.region):
            return f"custody lacks region {block.region}"
    if _jumped(desk, said):
        found = [(block.region, verify.frame_digests(desk, block.region, 1)) for block in said.blocks]
        return "" if carried.frames_digest(found) == said.digest else "its pages are not in the frames they were in"
    now = [files.segments(desk.fds(block.region))[0] for block in said.blocks]
    wanted = [(block.device, block.inode) for block in said.blocks]
    return "" if [(each.device, each.inode) for each in now] == wanted else "custody holds other files as its regions"


# --- before libvirtd ----------------------------------------------------------------------------------------------


def spend_all(desk: Returning, told: Iterable[str]) -> None:
    """Forget what guests were saved as that memconsole-resume had go on, and have libvirt know their ptys.

    Before anything else is done with what it left: their RAM is behind what was saved, whatever became of them.
    """
    for name in set(told) & set(carried.noted(desk)):
        with steplog.suppressed(f"{name} goes on by what memconsole-resume did", MemconsoleError):
            fast.show_ptys(desk, [desk.state.guests[name]] if desk.live_guest(name) is not None else [])
        carried.drop(desk, name)


def offer_all(desk: Returning, spoiled: Iterable[str] = ()) -> None:
    """Put what a jump brought where libvirt looks, before it is there; those that are ``spoiled`` wait for a person."""
    for name in carried.noted(desk):
        if name not in spoiled and desk.live_guest(name) is None:
            with steplog.suppressed(f"the RAM of {name} is offered to libvirt", MemconsoleError):
                said = carried.note(desk, name)
                if _jumped(desk, said):
                    _offer(desk, name, said)
                    _put_managed_save(desk, name, said)


def _offer(desk: Returning, guest: str, said: Carried) -> None:
    """Plan the RAM of a domain's next start, with the right to restore its image, once.

    Raises:
        GuestError: its RAM is not here, or has been in use since (``Spent``). Refused, KernelRefused, BadFile: it
        cannot be planned.
    """
    runtime = desk.runtime_dir
    if said.uuid in plans.planned(runtime):
        if plans.is_verified(said.uuid, runtime):
            return
        why = "it has run on its RAM since, and ended: what was saved does not belong to what is in it now"
        remedy = f"memconsole guest let-go {guest}; then start it anew: virsh start {said.name}"
        raise GuestError(f"guest {guest} is not restored", why, remedy, code="Spent")
    if not said.digest:
        raise GuestError(f"guest {guest} is not restored", "its image was never whole", f"virsh start {said.name}")
    why = why_not_here(desk, said)
    if why:
        remedy = f"keep the contents of its regions (memconsole copy REGION FILE), then memconsole guest let-go {guest}"
        raise GuestError(f"guest {guest} is not restored: its RAM is not what it was", why, remedy, code="RamElsewhere")
    if desk.mount is None:
        remedy = f"memconsole serve --mount; then memconsole guest resume {guest}"
        raise GuestError(f"guest {guest} is not restored", "no mount shows its RAM to QEMU", remedy, code="NoMount")
    missing = _without_hook(desk)
    if missing:
        what = f"guest {guest} is not restored: libvirt would give it other RAM"
        raise GuestError(what, "; ".join(part.why or part.title for part in missing), missing[0].remedy, code="NoHook")
    paths = {block.file: desk.mount.ram_path(guest, block.region) for block in said.blocks}
    plans.grant(said.uuid, paths, said.digest, runtime)


def _without_hook(desk: Returning) -> list[libvirt_setup.Part]:
    """What libvirt lacks to call the hook: without it, an image that was unlocked starts on any RAM."""
    try:
        parts = libvirt_setup.lacking(libvirt_setup.status(desk.root))
    except MemconsoleError as error:
        return [libvirt_setup.unknown(error)]
    return [part for part in parts if part.id == "hook" or part.id.startswith("daemon-")]


def _put_managed_save(desk: Returning, guest: str, said: Carried) -> None:
    if said.persistent:
        _unlocked(desk, guest, said, SAVES / f"{said.name}.save")


def _unlocked(desk: Returning, guest: str, said: Carried, target: Path) -> None:
    fd, _ = desk.custody.get(carried.held(guest))
    try:
        if os.fstat(fd).st_size > said.size:  # whole pages were handed over
            os.ftruncate(fd, said.size)
        saveimage.unlock(fd, target, said.elsewhere, digest=said.digest)
    finally:
        os.close(fd)


# --- once it answers ----------------------------------------------------------------------------------------------


def restart(desk: Returning, guest: Guest) -> PreparedAction:
    """``guest resume`` of one that was carried: ``offer`` its RAM, ``start`` it by libvirt."""
    work = PreparedAction(guest.name, f"guest {guest.name} runs again, started by libvirt")
    try:
        said = carried.note(desk, guest.name)
    except (NotFound, BadFile) as error:
        work.refuse(error.code, error.what, error.why, error.remedy)
        return work

    def offer() -> None:
        if said.uuid not in virsh.running():
            _offer(desk, guest.name, said)
            if desk.mount is not None:
                desk.mount.sync()

    def start() -> None:
        if said.uuid not in virsh.running():
            _start(desk, guest.name, said)
        back = _found(desk, guest, said)
        desk.adopt_guest(back)
        work.change = StateChange(guests=(back,))

    def after() -> None:
        report_back(desk, guest.name, said)
        forget(desk, guest.name, said)

    work.step("offer", f"compare the RAM of {guest.name}, and put it where libvirt looks", offer)
    work.step("start", f"have libvirt start {said.name} from the state that was saved", start)
    work.after = after
    return work


def _start(desk: Returning, guest: str, said: Carried) -> None:
    """Have libvirt start a guest from the managed save that it knows, else from an image beside the plan."""
    if virsh.is_saved(said.uuid) and _is_ours(SAVES / f"{said.name}.save", said):
        virsh.start(said.uuid, RESTORE_S)
        return
    image = carried.image_path(desk, said)
    _unlocked(desk, guest, said, image)
    virsh.restore(str(image), RESTORE_S)


def _is_ours(path: Path, said: Carried) -> bool:
    """Whether a managed save is the one that was carried."""
    try:
        with path.open("rb", buffering=0) as file:
            lock = saveimage.read(file.fileno()).lock
    except (OSError, BadFile, Refused, KernelRefused):
        return False
    return lock is not None and lock.digest == said.digest


def _found(desk: Returning, guest: Guest, said: Carried) -> Guest:
    """Who a guest is that libvirt runs again.

    Raises:
        GuestError: it does not run, or not on its RAM.
    """
    shown = next((each for each in desk.foreign_guests() if each.managed and each.managed.is_systems(said.uuid)), None)
    if shown is None:
        why = "libvirt runs it, and no process has its UUID"
        raise GuestError(f"guest {guest.name} is not seen", why, f"virsh domstate {said.name}")
    seen = census.take(desk.root, among=[shown.pid or 0], closed=desk.exempt_processes)
    regions = [desk.state.regions[block.region] for block in said.blocks]
    mapped = {over.region for over in region_mappings(seen, regions, desk.fuse_aliases) if over.pid == shown.pid}
    if not {block.region for block in said.blocks} <= mapped:
        why = f"process {shown.pid}, which libvirt started, has other memory: it was started anew"
        remedy = f"memconsole guest let-go {guest.name}: its former RAM stays in custody until it is released"
        raise GuestError(f"guest {guest.name} does not run on its RAM", why, remedy, code="StartedAnew")
    return replace(
        guest,
        pid=shown.pid,
        start_ticks=shown.start_ticks,
        state=GuestState.RUNNING,
        ended="",
        command=shown.command,
        managed=shown.managed,
    )


def forget(desk: Returning, guest: str, said: Carried) -> None:
    """Drop what a guest was restored from, once the ledger knows who it is; its next start is as libvirt makes it."""
    carried.drop(desk, guest)
    plans.remove(said.uuid, desk.runtime_dir)
    carried.image_path(desk, said).unlink(missing_ok=True)
    save = SAVES / f"{said.name}.save"
    if _is_ours(save, said):
        save.unlink(missing_ok=True)


def report_back(desk: Returning, name: str, said: Carried) -> None:
    """Have the report of the handoff say that a guest runs again, and for how long it stood still."""
    if said.at is None:
        return
    described, _ = stored.stored_manifest(desk)
    now = bootplan.moment()
    began = (described.began, described.written) if described is not None else (said.at, now)
    blackout = Clock(said.at, [began, (now, now)]).between(said.at, now) + said.stood_ns
    live = desk.live_guest(name)
    pid = live.pid if live is not None else None

    def changed(made: HandoffReport) -> HandoffReport:
        guests = tuple(
            replace(each, back=True, pid=pid, blackout_ns=blackout, by="libvirt", why="")
            if each.name == name and each.kind is GuestKind.FOREIGN
            else each
            for each in made.guests
        )
        return replace(made, guests=guests)

    stored.amend_report(desk, changed)


class Upkeep:
    """What is due for carried guests: take back what a control process that died left, start what a jump brought."""

    def __init__(self, desk: Returning, apply: Callable[[GuestResume], object]) -> None:
        self._desk = desk
        self._apply = apply
        self._failed: dict[str, tuple[int, float]] = {}

    def see_to(self) -> None:
        """Do what is due for the first guest for which something is; one that fails is tried again later.

        Raises:
            MemconsoleError: it failed.
        """
        now = time.monotonic()
        for name in carried.noted(self._desk):
            tries, since = self._failed.get(name, (0, 0.0))
            if tries and now - since < _WAITS_S[min(tries, len(_WAITS_S)) - 1]:
                continue
            try:
                self._one(name)
            except MemconsoleError:
                self._failed[name] = (tries + 1, time.monotonic())
                raise
            self._failed.pop(name, None)

    def _one(self, name: str) -> None:
        desk, said = self._desk, carried.note(self._desk, name)
        guest = desk.state.guests.get(name)
        live = desk.live_guest(name)
        if guest is None:
            forget(desk, name, said)
        elif live is not None and live.state() is not GuestState.GONE:
            if said.is_of(guest) and not _jumped(desk, said):
                carried.take_back(desk, name)
            else:
                forget(desk, name, said)
        elif _has_ended(desk, said):
            self._apply(GuestResume(name))
        else:
            forget(desk, name, said)  # its process ended by itself, or somebody ended it
