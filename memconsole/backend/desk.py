"""What verbs work with: custody, the regions' fds, live guests, the agents socket, and what the ledger means.

One thread at a time changes a Desk (the control process's lock of actions); any number look at it meanwhile, so what
lookers use (fds, guests) is only taken away under ``_looking``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from memconsole.backend import survey
from memconsole.backend.kernel import census, pci, tree
from memconsole.backend.survey import Answer, Backing, Face, Readers, Shield
from memconsole.errors import GuestError, MemconsoleError, NotFound, UsageError
from memconsole.model import Access, Faults, Grant, Guest, GuestKind, GuestState, HandoffReport, Region, Window
from memconsole.units import PAGE

# A survey needs none of these: they are imported by those who act.
if TYPE_CHECKING:
    from memconsole.backend.custody import Custody
    from memconsole.backend.dma.spaces import Spaces
    from memconsole.backend.exports.fd import Hub, Uffd
    from memconsole.backend.guests.base import Guest as LiveGuest
    from memconsole.backend.guests.base import Offer
    from memconsole.backend.lazy import Uffds
    from memconsole.backend.mounting import Mounting
    from memconsole.backend.reach import Reach
    from memconsole.backend.state import Record, State, WindowGrant

STOP_S = 5.0
"""Seconds a guest has to end in order."""


RECONNECT_S = 1.0
"""Seconds an agent has to find a new control process (it tries every 100 to 200 ms)."""


MOUNT = "mount"
"""What the table of files on the mount is called in custody."""


def custody_name(region: str, segment: int) -> str:
    """What a region's segment is called in custody."""
    return f"region:{region}:{segment}"


class _Held(msgspec.Struct):
    """A live guest; ``asking`` is held while it is asked or let go, so that nobody asks one that was let go."""

    live: LiveGuest
    asking: threading.Lock = msgspec.field(default_factory=threading.Lock)
    open: bool = True


class Desk:
    """The things of one control process; ``root`` is where its host's tree stands."""

    def __init__(  # noqa: PLR0917 - one caller, which knows them all
        self,
        runtime_dir: Path,
        custody: Custody,
        state: Callable[[], State],
        on_guest: Callable[[str], None],
        record: Callable[[Record], int],
        root: Path = Path("/"),
    ) -> None:
        self.root = root
        self.runtime_dir = runtime_dir
        self.custody = custody
        self._state = state
        self._on_guest = on_guest
        self.record = record
        self.mount: Mounting | None = None
        self.handoff: HandoffReport | None = None
        self._uffds: Uffds | None = None
        self._rwp: bool | None = None
        self._spaces: Spaces | None = None
        self._hub: Hub | None = None
        self._looking = threading.RLock()
        self._fds: dict[str, tuple[int, ...]] = {}
        self._guests: dict[str, _Held] = {}

    @property
    def state(self) -> State:
        """What the ledger means now."""
        return self._state()

    @property
    def exempt(self) -> frozenset[int]:
        """Who holds regions for us: this process, the mount's server, who has custody (PID 1 where it does not say)."""
        manager = 1 if self.custody.survives else os.getpid()
        server = self.mount.pid if self.mount is not None else None
        return frozenset({os.getpid(), getattr(self.custody, "pid", manager)} | ({server} if server else set()))

    @property
    def faces(self) -> tuple[Face, ...]:
        """The files on the mount through which regions may be mapped."""
        return self.mount.faces if self.mount is not None else ()

    @property
    def hub(self) -> Hub:
        """The agents socket, opened with the first guest.

        Raises:
            KernelRefused: it cannot be made.
        """
        from memconsole.backend.exports.fd import Hub

        if self._hub is None:
            self.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._hub = Hub(self.runtime_dir / "agents", on_change=self._on_guest, on_uffd=self._take_uffd)
        return self._hub

    @property
    def uffds(self) -> Uffds:
        """What guests handed over to have their faults served, or to be barred."""
        from memconsole.backend.lazy import Uffds

        self._uffds = self._uffds or Uffds(self)
        return self._uffds

    @property
    def shields(self) -> tuple[Shield, ...]:
        """The mappings of guests that lead nowhere any more."""
        return self._uffds.shields if self._uffds is not None else ()

    @property
    def faults(self) -> Mapping[str, Faults]:
        """What was served for each lazy grant."""
        return self._uffds.faults() if self._uffds is not None else {}

    def _take_uffd(self, handed: Uffd) -> None:
        """A guest handed an uffd over; without us it goes on as if it had not."""
        state = self.state
        aims = [intent.aims for intent in state.unfinished.values()]
        grants = {each.id: each for change in aims for each in change.grants} | state.grants
        regions = {each.name: each for change in aims for each in change.regions} | state.regions
        meant = grants.get(handed.grant)
        if meant is not None and meant.guest == handed.guest:
            with contextlib.suppress(MemconsoleError):
                page = regions[meant.region].page_size
                self.uffds.take(meant, page, handed.process, handed.fd, handed.modes, handed.address)

    # --- regions --------------------------------------------------------------------------------------------------

    def fds(self, region: str) -> tuple[int, ...]:
        """The segments' fds of a region.

        Raises:
            NotFound: nobody holds its memory any more.
        """
        fds = self._fds.get(region)
        if fds is None:
            raise NotFound(f"the memory of region {region} is lost", "nobody holds it", f"release {region}")
        return fds

    @contextlib.contextmanager
    def borrowed(self, region: str) -> Iterator[tuple[int, ...]]:
        """Copies of a region's fds, for long looks that must not hold up anybody.

        Raises:
            NotFound: nobody holds its memory any more.
        """
        with contextlib.ExitStack() as stack:
            with self._looking:
                copies = tuple(os.dup(fd) for fd in self.fds(region))
            for fd in copies:
                stack.callback(os.close, fd)
            yield copies

    def hold(self, region: str, fds: tuple[int, ...]) -> None:
        """Keep a region's fds."""
        with self._looking:
            self._fds[region] = fds

    def exchange(self, region: str, segment: int, fd: int) -> None:
        """Keep a duplicate of ``fd`` as a segment of a region, in the place of the fd held."""
        copy = os.dup(fd)
        with self._looking:
            fds = list(self._fds[region])
            os.close(fds[segment])
            fds[segment] = copy
            self._fds[region] = tuple(fds)

    def let_go(self, region: str) -> None:
        """Close a region's fds; custody is another matter."""
        with self._looking:
            for fd in self._fds.pop(region, ()):
                os.close(fd)

    def has(self, region: str) -> bool:
        """Whether a region's memory is held."""
        return region in self._fds

    def free(self, region: str) -> None:
        """Take a region's frames from everybody and close its fds; one whose memory is lost has nothing to free.

        Raises:
            KernelRefused: it is preserved for a kexec.
        """
        from memconsole.backend.stores import memfd

        with self._looking:
            if region in self._fds:
                memfd.free(self._fds[region])
                del self._fds[region]

    def backings(self) -> dict[str, tuple[Backing, ...]]:
        """Every region's segments as their fds show them."""
        if not self._fds:
            return {}
        from memconsole.backend.stores import memfd

        found = {}
        with self._looking:
            for name, fds in self._fds.items():
                stats = [os.fstat(fd) for fd in fds]
                found[name] = tuple(
                    Backing(
                        stat.st_dev, stat.st_ino, stat.st_size, stat.st_blocks * 512, memfd.seals(fd), memfd.came(fd)
                    )
                    for fd, stat in zip(fds, stats, strict=True)
                )
        return found

    def promised(self) -> int:
        """Bytes of reserved base pages that have no frame yet: memory that is spoken for."""
        with self._looking:
            resident = {name: sum(os.fstat(fd).st_blocks * 512 for fd in fds) for name, fds in self._fds.items()}
        return sum(
            max(0, region.size - resident.get(region.name, 0))
            for region in self.state.regions.values()
            if region.page_size == PAGE
        )

    def reach(self, region: Region, segment: int | None = None) -> Reach:
        """Who reaches a region, or one segment of it, by kernel truth."""
        from memconsole.backend.reach import find

        with self.borrowed(region.name) if self.has(region.name) else contextlib.nullcontext(()) as fds:
            return find(region, fds, segment, exempt=self.exempt, faces=self.faces, shields=self.shields)

    # --- devices --------------------------------------------------------------------------------------------------

    @property
    def spaces(self) -> Spaces:
        """The address spaces in which devices reach what their guests were granted."""
        from memconsole.backend.dma.spaces import Spaces

        self._spaces = self._spaces or Spaces(self)
        return self._spaces

    @property
    def hands_devices(self) -> bool:
        """Whether a VMM has a device of ours."""
        return self._spaces is not None and bool(self._spaces.filled)

    # --- windows --------------------------------------------------------------------------------------------------

    def windows(self) -> tuple[Window, ...]:
        """The MMIO windows of this host, with who has them."""
        return survey.windows(self.state, census.take(self.root, closed=self.exempt), Readers())

    def reaches_window(self, guest: Guest, window: Window) -> bool:
        """Whether a guest's process maps a window, or holds its resource file, or the device's.

        The device's file is not counted while the guest has another window of it, which it may be open for.
        """
        seen = census.take(self.root, closed=self.exempt)
        process = seen.processes.get(guest.pid or 0)
        if process is None or process.start_ticks != guest.start_ticks:
            return False
        holders = pci.holders(seen, pci.functions(self.root))
        name = f"{window.bdf}/resource{window.bar}"
        if process.pid in holders.get(window.id, ()) or any(link.endswith(name) for link in process.fds.values()):
            return True
        others = [
            grant
            for grant in self.state.windows.values()
            if grant.guest == guest.name and grant.window != window.id and grant.window.startswith(f"{window.bdf}:")
        ]
        return not others and process.pid in pci.openers(seen).get(window.bdf, ())

    # --- guests ---------------------------------------------------------------------------------------------------

    def directory(self, guest: str) -> Path:
        """Where a guest's sockets and log lie."""
        return self.runtime_dir / "vmm" / guest

    def live(self, guest: str) -> LiveGuest | None:
        """A guest as something that answers; None when its process is gone."""
        held = self._guests.get(guest)
        return held.live if held else None

    def meet(self, live: LiveGuest) -> None:
        """Keep a live guest."""
        self._guests[live.name] = _Held(live)

    def part(self, guest: str) -> None:
        """Let go of a guest, whose process may go on."""
        held = self._guests.pop(guest, None)
        if held is not None:
            with held.asking:
                held.open = False
                held.live.close()

    def connected(self, guest: str) -> bool:
        """Whether a guest's agent is connected; one that has lost us is given the time to find us again."""
        live = self.live(guest)
        if live is None or live.kind is GuestKind.QEMU:
            return False
        return live.agent() or self.hub.connected(guest, RECONNECT_S)

    def mapped(self, guest: str) -> frozenset[str]:
        """The grants a guest's agent said it has mapped."""
        with contextlib.suppress(NotFound):
            if self._hub is not None:
                return self._hub.mapped(guest)
        return frozenset()

    def withdraw(self, grant: Grant | WindowGrant) -> None:
        """Offer a grant no more to a guest's agent, should it connect again."""
        if self._hub is not None:
            with contextlib.suppress(NotFound):
                self._hub.withdraw(grant.guest, grant.id)

    def foreign(self) -> tuple[Guest, ...]:
        """The VMs that run here without us."""
        return survey.foreign(census.take(self.root, closed=self.exempt), self.state)

    def adopt_guest(self, guest: Guest, *, windows: bool = True) -> LiveGuest:
        """Take hold of a guest's process again, with the grants it has; ``windows``: those of devices too.

        Raises:
            Gone: it ended, or its PID belongs to another process.
        """
        from memconsole.backend.guests.canary import CanaryGuest
        from memconsole.backend.guests.process import ProcessGuest
        from memconsole.backend.guests.qemu import QemuGuest

        if guest.pid is None or guest.start_ticks is None:
            raise UsageError(f"guest {guest.name} has no process", "", "")
        grants = self.state.grants_of(guest=guest.name)
        live: LiveGuest
        if guest.kind is GuestKind.QEMU:
            ram = grants[0].id if grants else ""
            live = QemuGuest.adopt(guest.name, guest.pid, guest.start_ticks, self.directory(guest.name), ram)
        else:
            kind = CanaryGuest if guest.kind is GuestKind.CANARY else ProcessGuest
            with contextlib.ExitStack() as stack:
                offers = [stack.enter_context(self.offered(grant)) for grant in grants if grant.region in self._fds]
                for window in self.state.windows.values():
                    if windows and window.guest == guest.name:
                        with contextlib.suppress(MemconsoleError):  # its device is gone, which the survey says
                            offers.append(stack.enter_context(self.shown(window)))
                live = kind.adopt(guest.name, guest.pid, guest.start_ticks, self.hub, offers)
        self.meet(live)
        return live

    @contextlib.contextmanager
    def offered(self, grant: Grant) -> Iterator[Offer]:
        """A grant as its guest receives it; the fd in it is closed when it was handed over.

        Raises:
            NotFound: the region's memory is lost.
        """
        from memconsole.backend.guests.base import Offer
        from memconsole.backend.stores import memfd

        fds = self.fds(grant.region)
        index, offset = divmod(grant.offset, memfd.SEGMENT)
        fd = memfd.give(fds[index], grant.access)
        try:
            yield Offer(grant.id, fd, offset, grant.length, grant.access, grant.gpa, self._wants(grant))
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def shown(self, grant: WindowGrant) -> Iterator[Offer]:
        """A window as its guest receives it, closed when it was handed over: a part of the device's VFIO file, where it
        is attached for this guest (a kernel with IO_STRICT_DEVMEM maps it no other way then), else its file in sysfs.

        Raises:
            NotFound, Denied, KernelRefused: the device is gone, or its file cannot be opened.
        """
        from memconsole.backend.guests.base import Offer

        bdf, _, bar = grant.window.rpartition(":")
        with self.spaces.bar(grant.guest, bdf, int(bar)) as found:
            if found is not None:
                device, region = found
                yield Offer(grant.id, device, region.offset, region.size, Access.RW, None, window=True)
                return
        path = f"/sys/bus/pci/devices/{bdf}/resource{bar}"
        try:
            fd = os.open(tree.below(self.root, path), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise tree.failure(path, error) from error
        try:
            yield Offer(grant.id, fd, 0, os.fstat(fd).st_size, Access.RW, None, window=True)
        finally:
            os.close(fd)

    def _wants(self, grant: Grant) -> int:
        from memconsole.backend import lazy

        if self._rwp is None:
            self._rwp = lazy.rwp()
        return (lazy.WANTS_FAULTS if grant.lazy else 0) | (lazy.WANTS_SHIELD if self._rwp else 0)

    def answers(self) -> dict[str, Answer]:
        """What every live guest says of itself; one that does not answer in time is left out."""
        found = {}
        for name, held in list(self._guests.items()):
            with held.asking, contextlib.suppress(MemconsoleError):
                if held.open:
                    found[name] = _answer(held.live)
        return found

    def close(self) -> None:
        """Let go of everything; guests go on, and custody keeps what it holds."""
        for name in list(self._guests):
            self.part(name)
        if self._hub is not None:
            self._hub.close()
            self._hub = None
        if self._uffds is not None:
            self._uffds.close()
        if self.mount is not None:
            self.mount.close()
        for name in list(self._fds):
            self.let_go(name)


def _answer(live: LiveGuest) -> Answer:
    state = live.state()
    if state is GuestState.GONE:
        return Answer(state)
    try:
        return Answer(state, live.agent(), live.progress())
    except GuestError:
        return Answer(state, agent=False)
