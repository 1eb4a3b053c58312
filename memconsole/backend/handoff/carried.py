"""Adopted guests of libvirt on their way through a handoff: their state without RAM, in libvirt's own save image.

    unname-GUEST    the file of its RAM loses its name (QEMU and custody have it open): live update takes none that has
    look-GUEST      the image is begun; custody has it, and a note of what the QEMU was, before anything is changed
    set-GUEST       the QEMU sends its state as fast as it can, and does not empty its RAM when it ends
    stream-GUEST    its state is taken while it runs; then it stands still, and its process is stopped (SIGSTOP), so
                    that nobody's ``virsh resume`` lets it run on behind the state that was taken

The image is whole only once it is locked to where the RAM is (:func:`seal`), just before the manifest is written; a
jump carries it and the note (``carried:GUEST``). Who finds a note and the process that it names makes all of it undone
(:func:`take_back`); :mod:`.carried_back` has the other side.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from msgspec.structs import replace

from memconsole import decoding
from memconsole.backend import needs
from memconsole.backend.custody import payloads
from memconsole.backend.guests import ramblocks, statestream
from memconsole.backend.guests.ramblocks import StreamBlock
from memconsole.backend.guests.statestream import Before, StateStream
from memconsole.backend.handoff import bootplan, fast, manifest, stored
from memconsole.backend.handoff.bootplan import ClockReading
from memconsole.backend.handoff.facets import HandoffReporting
from memconsole.backend.kernel import tree
from memconsole.backend.ledger import boots
from memconsole.backend.managers import domainxml, libvirt, libvirt_host, plans, saveimage, virsh
from memconsole.backend.managers.libvirt_setup import Part
from memconsole.backend.managers.migration import Elsewhere, filtered
from memconsole.backend.managers.saveimage import Image
from memconsole.backend.managers.virsh import Monitor
from memconsole.backend.peers.handle import Handle
from memconsole.backend.steps import Step
from memconsole.errors import Gone, GuestError, NotFound
from memconsole.model import Guest, GuestResult, Value

CARRIED = "carried:"
"""Before a guest's name: the note of an adopted guest whose state is being taken, or was; its file is the image."""
WAITS = "libvirt has not started it again yet"
DESTROYED = "an operator has ended it meanwhile (virsh destroy), and so it stays"
LANE = "restored by libvirt"
"""Which way an adopted guest goes that does not take the fast lane (:mod:`.fast`)."""
REHEARSED = "in a rehearsal libvirt is there already"
_NO_DIGEST = "0" * 64
_END_S = 60.0
_LOOK_S = 0.002


class CarriedBlock(StreamBlock, frozen=True):
    """A block of RAM, and the file it is in this boot."""

    device: int = 0
    inode: int = 0


class Carried(Value, frozen=True):
    """The note: the domain, the process it was in and in which boot, its blocks, and what its QEMU was ``before``.

    ``emptied``: blocks that QEMU would have emptied (``discard-data``). ``at``: since when it stands still, for
    ``stood_ns`` longer by QEMU's own count. ``digest``: what the image is locked to, once it is whole, and ``size``
    its bytes. ``ended``: the process was ended by a rehearsal, which starts it again.
    """

    uuid: str
    name: str
    pid: int
    start_ticks: int
    boot_id: str
    persistent: bool
    blocks: tuple[CarriedBlock, ...]
    before: Before
    emptied: tuple[str, ...] = ()
    at: ClockReading | None = None
    stood_ns: int = 0
    digest: str = ""
    size: int = 0
    ended: bool = False

    @property
    def elsewhere(self) -> tuple[Elsewhere, ...]:
        """Its RAM, as a stream need not bring it."""
        return tuple(block.elsewhere() for block in self.blocks)

    def is_of(self, guest: Guest) -> bool:
        """Whether the process it names is the guest's of now."""
        return (guest.pid, guest.start_ticks) == (self.pid, self.start_ticks)


class Regions(needs.LedgerState, needs.HostTree, Protocol):
    """What a guest's blocks of RAM are told by."""


class Carrying(
    needs.OwnRegionFds, needs.RegionFrames, needs.LiveGuests, needs.RuntimeFiles, HandoffReporting, Protocol
):
    """What taking the state of adopted guests needs."""


def held(guest: str) -> str:
    """What the note of a guest is called in custody."""
    return f"{CARRIED}{guest}"


def noted(desk: needs.InCustody) -> list[str]:
    """The guests that custody has a note of."""
    return [name.removeprefix(CARRIED) for name in desk.custody.names() if name.startswith(CARRIED)]


def note(desk: needs.InCustody, guest: str) -> Carried:
    """The note of a guest.

    Raises:
        NotFound: there is none. BadFile: nobody can read it.
    """
    return payloads.held(desk.custody, held(guest), Carried)


def drop(desk: needs.InCustody, guest: str) -> None:
    """Forget a guest's note, and its image; its state first, which alone is worth nothing."""
    for name in (fast.held(guest), held(guest)):
        with contextlib.suppress(NotFound):
            desk.custody.drop(name)


def is_waiting(desk: Carrying, guest: str) -> bool:
    """Whether a guest was carried, and does not run again."""
    return desk.live_guest(guest) is None and held(guest) in desk.custody.names()


def lane(slow: Iterable[str]) -> str:
    """Which way a guest goes, and why: what keeps it from the fast lane."""
    return f"{LANE}: {'; '.join(slow)}" if slow else fast.LANE


def slow(desk: Regions, guest: Guest, lacks: Iterable[Part]) -> tuple[str, ...]:
    """What keeps a guest that is carried from the fast lane, in words; ``lacks``: what libvirt's setup lacks."""
    domains = libvirt.domains(desk.root)
    now = libvirt.of_process(domains, guest.pid or 0, guest.command)
    if now is None:
        return ("libvirt has no word of its process",)
    return fast.why_not(desk.root, replace(guest, managed=now), [each.name for each in blocks_of(desk, guest)], lacks)


def results(guests: Iterable[Guest], lanes: Mapping[str, str]) -> tuple[GuestResult, ...]:
    """The adopted guests of a handoff, as its report begins with them; ``lanes``: which way each goes."""
    return tuple(GuestResult(each.name, each.kind, each.memory, why=WAITS, lane=lanes[each.name]) for each in guests)


def blocks_of(desk: Regions, guest: Guest, streamed: Collection[str] = ()) -> tuple[CarriedBlock, ...]:
    """The blocks of a guest's RAM, by region, with what the stream calls each, of the names that there are.

    Raises:
        GuestError: the stream has none of a name.
    """
    regions = sorted({grant.region for grant in desk.state.grants_of(guest=guest.name)})
    found = []
    for name in regions:
        region = desk.state.regions[name]
        block = region.block or name.removeprefix(f"{guest.name}.")  # one adopted before blocks were noted
        if block != name:
            stream = ramblocks.stream_name(guest.name, block, streamed) if streamed else ""
            file = region.segments[0]
            found.append(CarriedBlock(block, name, region.size, stream, file.device, file.inode))
    return tuple(found)


def frames_digest(digests: Iterable[tuple[str, Iterable[str]]]) -> str:
    """What an image is locked to: where every region of a guest's RAM is."""
    text = "".join(f"{region} {' '.join(each)}\n" for region, each in digests)
    return hashlib.sha256(text.encode()).hexdigest()


# --- its steps --------------------------------------------------------------------------------------------------


def unnaming(desk: Carrying, files: needs.ForeignMemory, guest: Guest) -> Iterator[Step]:
    """The step that takes the names of the files of a guest's RAM away, if they have any."""
    from memconsole.backend.stores import adopted

    named = [block for block in blocks_of(desk, guest) if any(map(adopted.has_name, desk.fds(block.region)))]
    if not named:
        return

    def do() -> None:
        paths = {file.identity: file.path for file in files.ram_files(guest)}
        for block in named:
            path = tree.below(desk.root, f"/proc/{guest.pid}/root{paths.get((block.device, block.inode), '/')}")
            try:
                found = os.stat(path)  # noqa: PTH116 - a link of /proc
                if (found.st_dev, found.st_ino) == (block.device, block.inode):
                    os.unlink(path)  # noqa: PTH108 - likewise
            except OSError as error:
                raise tree.failure(path, error) from error

    yield Step(
        f"unname-{guest.name}",
        f"take away the name of the file that is the RAM of {guest.name}: its QEMU and custody have it open",
        do,
        lambda: None,
        "nothing: libvirt does not miss the name",
    )


class Taking:
    """The state of one guest on its way into its image."""

    def __init__(self, desk: Carrying, guest: Guest, again: Callable[[], None], *, is_fast: bool = False) -> None:
        """``again``: what starts it again afterwards, if it has been ended; ``is_fast``: its lane is the fast one."""
        self._desk = desk
        self.guest = guest
        self._again = again
        self._is_fast = is_fast
        self._origin: fast.Origin | None = None
        self.is_destroyed = False
        self._xml = b""
        self._image = Image(running=True, xml=b"")
        self._fd = -1
        self._note: Carried | None = None
        self._steps: dict[str, Step] = {}
        self._stream: StateStream | None = None

    def steps(self) -> Iterator[Step]:
        """Look, set, stream: afterwards the guest stands still, and only memconsole lets it run."""
        name = self.guest.name
        yield Step(f"look-{name}", f"begin a save image of {name} in custody", self._look, self._forget, "drop it")
        yield Step(
            f"set-{name}", f"have the QEMU of {name} send its state at once", self._set, self._set_back, "as it was"
        )
        yield Step(
            f"stream-{name}",
            f"take the state of {name} without its RAM while it runs; then it stands still",
            self._take,
            self._go_on,
            "let it go on",
        )

    @property
    def said(self) -> Carried:
        """The note, once it was looked at."""
        if self._note is None:
            raise GuestError(f"guest {self.guest.name} was not looked at", "its steps have not begun", "try again")
        return self._note

    def _look(self) -> None:
        guest, managed = self.guest, self.guest.managed
        if managed is None:
            raise GuestError(f"guest {guest.name} cannot be carried", "no manager starts it again", "shut it down")
        plans.remove(managed.uuid, self._desk.runtime_dir)
        monitor = virsh.monitor(managed.uuid)
        self._xml = virsh.description(managed.uuid)
        self._fd = manifest.memfd(f"memconsole-carried-{guest.name}", b"")
        try:
            os.ftruncate(self._fd, 0)
            locked = domainxml.locked(domainxml.on_files(self._xml), domainxml.Lock(guest.name, _NO_DIGEST))
            self._image = Image(running=True, xml=locked)
            saveimage.begin(self._fd, self._image)
            self._origin = fast.origin(self._desk.root, guest) if self._is_fast else None
            blocks = blocks_of(self._desk, guest, ramblocks.stream_names(monitor))
            elsewhere = tuple(block.elsewhere() for block in blocks)
            guarded = libvirt_host.knows_no_acks(self._desk.root)
            self._stream = StateStream(guest.name, guest.pid or 0, monitor, self._fd, elsewhere, guarded=guarded)
            self._steps = {step.id: step for step in self._stream.steps()}
            self._steps["look"].do()
            before = self._stream.before
            self._image = self._image._replace(running=before.running)
            self._note = Carried(
                managed.uuid,
                managed.name,
                guest.pid or 0,
                guest.start_ticks or 0,
                boots.boot_id(self._desk.root),
                managed.persistent,
                blocks,
                before,
                tuple(block.name for block in blocks if _empties(monitor, block.name)),
            )
            self._keep()
        except BaseException:
            self._forget()
            raise

    def _keep(self, **changes: object) -> None:
        self._note = replace(self.said, **changes)
        payloads.put(self._desk.custody, held(self.guest.name), self._fd, self._note)

    def _forget(self) -> None:
        if self._note is None or not self._note.ended:  # else what it is besides its RAM is nowhere else any more
            drop(self._desk, self.guest.name)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _set(self) -> None:
        _set_emptied(virsh.monitor(self.said.uuid), self.said, on=False)
        self._steps["set"].do()

    def _set_back(self) -> None:
        if self.said.ended or self._has_gone():
            return
        with contextlib.ExitStack() as both:
            both.callback(_set_emptied, virsh.monitor(self.said.uuid), self.said, on=True)
            both.callback(_undone(self._steps["set"]))

    def _has_gone(self) -> bool:
        """Whether somebody else has ended it, so that nothing of it can be as before."""
        try:
            with Handle(self.said.pid, self.said.start_ticks) as process:
                process.check()
        except Gone:
            return True
        return False

    def _take(self) -> None:
        try:
            self._steps["stream"].do()
        except GuestError as error:
            if self._has_gone():
                why = "a command of libvirt has ended, saved or migrated it (virsh domstate --reason)"
                raise GuestError(f"guest {self.guest.name} has ended meanwhile", why, "try again without it") from error
            raise
        taken = self._stream.taken if self._stream is not None else None
        self._keep(at=bootplan.moment(), stood_ns=(taken.downtime_ms if taken is not None else 0) * 1_000_000)
        try:
            # Asked behind QEMU's last word, for which libvirt waits until nothing else is done to the domain.
            _check_same(self.guest.name, self._xml, virsh.description(self.said.uuid))
            _stop(self.said)
            _check_still(self.guest.name, virsh.state(self.said.uuid))
        except BaseException:
            self._go_on()
            raise

    def _go_on(self) -> None:
        if self.said.ended:
            self._again()
            return
        if self._has_gone():
            return
        _signalled(self.said, signal.SIGCONT)
        _undone(self._steps["stream"])()

    def seal(self, digest: str) -> None:
        """Lock the image to where its RAM is; from now on it is one.

        Raises:
            KernelRefused: it cannot be written.
        """
        xml = domainxml.locked(self._image.xml, domainxml.Lock(self.guest.name, digest))
        saveimage.begin(self._fd, self._image._replace(xml=xml))
        saveimage.finish(self._fd)
        self._keep(digest=digest, size=os.fstat(self._fd).st_size)
        if self._origin is not None:
            self._unlocked()

    def _unlocked(self) -> None:
        """Put its state as its QEMU takes it into custody, from where only memconsole-resume starts it."""
        fd = manifest.memfd(f"memconsole-fast-{self.guest.name}", b"")
        try:
            os.ftruncate(fd, 0)
            saveimage.read(self._fd)
            filtered(self._fd, fd, self.said.elsewhere)
            self._desk.custody.put(fast.held(self.guest.name), fd)
        finally:
            os.close(fd)

    def planned(self) -> fast.Planned | None:
        """How memconsole-resume starts it, once it was sealed; None where libvirt does."""
        if self._origin is None:
            return None
        blocks = [(block.name, block.region) for block in self.said.blocks]
        return fast.planned(self.guest.name, self.said.name, blocks, self._origin)

    def end(self, within: float = _END_S) -> None:
        """Kill its process, for a rehearsal; libvirt has seen it when this ends.

        One that somebody destroys meanwhile stays so (``is_destroyed``).

        Raises:
            GuestError: it does not end in time.
        """
        self._keep(ended=True)
        self._close()  # custody has it
        with contextlib.suppress(Gone), Handle(self.said.pid, self.said.start_ticks) as process:
            process.kill()
        self._desk.remove_guest(self.guest.name)
        if not virsh.is_off(self.said.uuid, within):
            what = f"libvirt does not see that guest {self.guest.name} has ended"
            raise GuestError(what, f"it says that it runs, {within:g} s later", "systemctl restart libvirtd")
        if self.said.persistent and virsh.was_destroyed(self.said.uuid):
            self.is_destroyed = True
            drop(self._desk, self.guest.name)

    def tell(self) -> None:
        """Have the report of the handoff say that it was destroyed, if it was."""
        if self.is_destroyed:
            stored.amend_report(
                self._desk,
                lambda made: replace(
                    made,
                    guests=tuple(
                        replace(each, why=DESTROYED) if each.name == self.guest.name else each for each in made.guests
                    ),
                ),
            )


def _check_same(guest: str, before: bytes, now: bytes) -> None:
    """An image with another XML than its state was taken with could not be loaded, or would be of other disks."""
    if domainxml.lasting(now) != domainxml.lasting(before):
        why = "its XML is another than before its state was taken: a device, a disk or a snapshot came or went"
        raise GuestError(f"guest {guest} was changed meanwhile", why, "try again", code="Changed")


def _check_still(guest: str, state: str) -> None:
    if state != "paused":
        why = f"libvirt says that it is {state}: a command of libvirt has resumed it"
        raise GuestError(f"guest {guest} does not stand still", why, "try again")


def _undone(step: Step) -> Callable[[], None]:
    return step.undo or (lambda: None)


def _empties(monitor: Monitor, block: str) -> bool:
    """Whether QEMU empties a block when it ends in order."""
    try:
        said = monitor("qom-get", {"path": f"/objects/{block}", "property": "discard-data"})
    except GuestError:
        return False  # it is not a file that it could empty
    return decoding.convert(said, bool, what="QEMU's answer to qom-get")


def _set_emptied(monitor: Monitor, said: Carried, *, on: bool) -> None:
    for block in said.emptied:
        monitor("qom-set", {"path": f"/objects/{block}", "property": "discard-data", "value": on})


def _signalled(said: Carried, number: signal.Signals) -> None:
    with Handle(said.pid, said.start_ticks) as process:
        process.signal(number)


def _stop(said: Carried) -> None:
    """Stop its process, and be behind it: what a command has resumed by then, libvirt knows."""
    with Handle(said.pid, said.start_ticks) as process:
        process.signal(signal.SIGSTOP)
        deadline = time.monotonic() + _END_S
        while not process.stopped():
            if time.monotonic() > deadline:
                why = f"process {said.pid} runs on {_END_S:g} s after a SIGSTOP"
                raise GuestError(f"guest {said.name} does not stand still", why, "see /proc/PID/stack")
            time.sleep(_LOOK_S)


def take_back(desk: needs.InCustody, guest: str) -> None:
    """Make what was done to a guest undone, wherever it was left: it runs as before, and its next save is whole.

    Raises:
        GuestError: libvirt or its QEMU does not answer; the note stays, for another try.
    """
    said = note(desk, guest)
    try:
        _signalled(said, signal.SIGCONT)
    except Gone:
        drop(desk, guest)
        return
    monitor = virsh.monitor(said.uuid)
    statestream.take_back(monitor, said.before)
    _set_emptied(monitor, said, on=True)
    drop(desk, guest)


def image_path(desk: needs.RuntimeFiles, said: Carried) -> Path:
    """Where an image lies that libvirt is told to restore."""
    return plans.directory(desk.runtime_dir) / f"{said.uuid}.image"
