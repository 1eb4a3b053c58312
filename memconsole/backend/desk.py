"""What verbs work with: holdings (custody, the regions' fds, what the ledger means), live guests, the agents socket.

One thread at a time changes a Desk (the control process's lock of actions); any number look at it meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from memconsole.backend.exports.mapped import BlockedMapping, FuseAlias
from memconsole.backend.holdings import Holdings
from memconsole.backend.kernel import census, pci, tree
from memconsole.backend.observe import survey
from memconsole.backend.observe.survey import GuestReply, Readers
from memconsole.backend.peers.asked import Polled, Poller
from memconsole.backend.peers.patience import MOST, Patience
from memconsole.errors import Denied, GuestError, MemconsoleError, NotFound, UsageError
from memconsole.model import (
    Access,
    Faults,
    Finding,
    Grant,
    Guest,
    GuestKind,
    GuestState,
    HandoffReport,
    Region,
    Unread,
    Vcpu,
    Window,
)

# A survey needs none of these: they are imported by those who act.
if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody
    from memconsole.backend.custody.manager import KexecGuard
    from memconsole.backend.dma.address_spaces import AddressSpaces
    from memconsole.backend.exports.agents import Uffd
    from memconsole.backend.exports.fd import Hub, OnChange
    from memconsole.backend.exports.mount import GuestMount
    from memconsole.backend.exports.offer import Offer
    from memconsole.backend.exports.userfault import UserfaultBroker
    from memconsole.backend.guests.base import GuestDriver as LiveGuest
    from memconsole.backend.ledger.state import State, WindowGrant
    from memconsole.backend.managers.guest_memory import Block
    from memconsole.backend.observe.reach import RegionReach
    from memconsole.backend.stores.adopted import RamFile

RECONNECT_S = 1.0
"""Seconds an agent has to find a new control process (it tries every 100 to 200 ms)."""


class _LiveGuest(NamedTuple):
    """A live guest, and what asks it for its state."""

    live: LiveGuest
    asked: Poller[GuestReply]


class Desk(Holdings):
    """The things of one control process; ``root`` is where its host's tree stands."""

    def __init__(
        self,
        runtime_dir: Path,
        custody: Custody,
        state: Callable[[], State],
        on_guest: OnChange,
        root: Path = Path("/"),
        *,
        state_dir: Path | None = None,
    ) -> None:
        super().__init__(runtime_dir, custody, state, root, state_dir=state_dir)
        self._on_guest = on_guest
        self.mount: GuestMount | None = None
        self.handoff: HandoffReport | None = None
        self.guard: KexecGuard | None = None
        self.standing: Callable[[], Sequence[Finding]] = tuple
        self._uffds: UserfaultBroker | None = None
        self._rwp: bool | None = None
        self._spaces: AddressSpaces | None = None
        self._hub: Hub | None = None
        self._guests: dict[str, _LiveGuest] = {}

    @property
    def exempt_processes(self) -> frozenset[int]:
        """Who holds regions for us: this process, the mount's server, who has custody (PID 1 where it does not say)."""
        manager = 1 if self.custody.survives else os.getpid()
        server = self.mount.pid if self.mount is not None else None
        return frozenset({os.getpid(), getattr(self.custody, "pid", manager)} | ({server} if server else set()))

    @property
    def fuse_aliases(self) -> tuple[FuseAlias, ...]:
        """The files on the mount through which regions may be mapped."""
        return self.mount.fuse_aliases if self.mount is not None else ()

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
    def userfaults(self) -> UserfaultBroker:
        """What guests handed over to have their faults served, or to be barred."""
        from memconsole.backend.exports.userfault import UserfaultBroker

        self._uffds = self._uffds or UserfaultBroker(self)
        return self._uffds

    @property
    def blocked_mappings(self) -> tuple[BlockedMapping, ...]:
        """The mappings of guests that lead nowhere any more."""
        return self._uffds.blocked_mappings if self._uffds is not None else ()

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
                self.userfaults.take_uffd(meant, page, handed.process, handed.fd, handed.modes, handed.address)

    # --- regions --------------------------------------------------------------------------------------------------

    def region_reach(
        self, region: Region, segment: int | None = None, among: Collection[int] | None = None
    ) -> RegionReach:
        """Who reaches a region, or one segment of it, by kernel truth; ``among``: only these are looked at."""
        from memconsole.backend.observe.reach import find

        with self.borrowed_fds(region.name) if self.holds_region(region.name) else contextlib.nullcontext(()) as fds:
            return find(
                region,
                fds,
                segment,
                exempt=self.exempt_processes,
                faces=self.fuse_aliases,
                shields=self.blocked_mappings,
                among=among,
                counted=self.store_of(region.name).COUNTED,
                others=self.state.regions.values(),
            )

    def keepers(self, among: Collection[int] | None = None) -> tuple[int, ...]:
        """The processes that may keep a region's descriptor out of sight; ``among``: only these are looked at."""
        from memconsole.backend.observe import reach

        return reach.possible_keepers(self.exempt_processes, self.fuse_aliases, among)

    # --- devices --------------------------------------------------------------------------------------------------

    @property
    def address_spaces(self) -> AddressSpaces:
        """The address spaces in which devices reach what their guests were granted."""
        from memconsole.backend.dma.address_spaces import AddressSpaces

        self._spaces = self._spaces or AddressSpaces(self)
        return self._spaces

    @property
    def hands_devices(self) -> bool:
        """Whether a VMM has a device of ours."""
        return self._spaces is not None and bool(self._spaces.vmm_filled)

    # --- windows --------------------------------------------------------------------------------------------------

    def windows(self, gaps: list[Unread]) -> tuple[Window, ...]:
        """The MMIO windows of this host, with who has them; what could not be read is added to ``gaps``."""
        read = Readers()
        read.gaps = gaps
        known = read("/sys/bus/pci/devices", lambda: pci.functions(self.root, gaps), (), absent=True)
        return survey.granted_windows(self.state, census.take(self.root, closed=self.exempt_processes), read, known)

    def reaches_window(self, guest: Guest, window: Window) -> bool:
        """Whether a guest's process maps a window, or holds a file through which it can be mapped, or the device's.

        The device's file is not counted while the guest has another window of it, which it may be open for.

        Raises:
            Denied, KernelRefused, BadFile: the process cannot be looked at.
        """
        seen = census.take(self.root, closed=self.exempt_processes)
        process = seen.processes.get(guest.pid or 0)
        if process is None or process.id != guest.process:
            return False
        if process.pid in seen.hidden:
            raise Denied(
                f"process {process.pid} cannot be inspected", "only root may read its files and maps", "run as root"
            )
        seen = msgspec.structs.replace(seen, processes={process.pid: process})
        try:
            holders = pci.holders(seen, (pci.function(self.root, window.bdf),))
        except NotFound:  # it was unplugged, and with it every mapping of it
            holders = {}
        if window.id in holders or pci.may_map(seen, process, window):
            return True
        others = [
            grant
            for grant in self.state.windows.values()
            if grant.guest == guest.name and grant.window != window.id and grant.window.startswith(f"{window.bdf}:")
        ]
        return not others and window.bdf in pci.openers(seen)

    # --- guests ---------------------------------------------------------------------------------------------------

    def directory(self, guest: str) -> Path:
        """Where a guest's sockets and log lie."""
        return self.runtime_dir / "vmm" / guest

    def live_guest(self, guest: str) -> LiveGuest | None:
        """A guest as something that answers; None when its process is gone."""
        held = self._guests.get(guest)
        return held.live if held else None

    def start_guest(self, guest: Guest, grant: Grant, args: tuple[str, ...]) -> LiveGuest:
        """Start a VM with ``args`` and wait until it is up; ``grant`` is its RAM, which a canary is offered later.

        Raises:
            GuestError: it does not come up; nothing of it is left.
        """
        from memconsole.backend.guests.canary import CanaryGuest
        from memconsole.backend.guests.qemu import Devices, QemuGuest

        directory = self.directory(guest.name)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        live: LiveGuest
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as stack:
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            if guest.kind is GuestKind.CANARY:
                live = CanaryGuest.start(guest.name, self.hub, directory, args=args)
            else:
                ram = stack.enter_context(self.grant_offer(grant))
                handed = self.address_spaces.handed_devices(guest.name) if grant.dma is not None else None
                devices = Devices(*stack.enter_context(handed)) if handed is not None else None
                live = QemuGuest.start(guest.name, ram, directory, args=args, devices=devices)
            undo.callback(live.kill)
            self._add_guest(live)
            undo.pop_all()
        return live

    def attach_guest(self, name: str, pid: int) -> LiveGuest:
        """Take hold of a process as a guest.

        Raises:
            Gone: there is no such process. Refused: it is a guest already.
        """
        from memconsole.backend.guests.process import ProcessGuest

        return self._add_guest(ProcessGuest.attach(name, pid, self.hub))

    def _add_guest(self, live: LiveGuest) -> LiveGuest:
        if live.kind in {GuestKind.CANARY, GuestKind.QEMU}:
            self.custody.bind(live.pid)
        self._guests[live.name] = _LiveGuest(live, Poller(f"guest-{live.name}", partial(self._guest_reply, live)))
        return live

    def remove_guest(self, guest: str) -> None:
        """Let go of a guest, whose process may go on."""
        held = self._guests.pop(guest, None)
        if held is not None:
            held.live.interrupt()
            held.asked.end(held.live.close)

    def connected(self, guest: str, *, patient: bool = True) -> bool:
        """Whether a guest's agent is connected; one that has lost us is given the time to find us again.

        ``patient``: that time does not run while its process is busy or waits for a processor.
        """
        live = self.live_guest(guest)
        if live is None or live.kind in {GuestKind.QEMU, GuestKind.FOREIGN}:
            return False
        if live.agent():
            return True
        patience = Patience(live.pid, RECONNECT_S, most=MOST if patient else 1)
        return patience.lasts(partial(self.hub.connected, guest))

    def mapped_grants(self, guest: str) -> frozenset[str]:
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

    def foreign_guests(self) -> tuple[Guest, ...]:
        """The VMs that run here without us."""
        return survey.foreign_guests(census.take(self.root, closed=self.exempt_processes), self.state)

    def adopt_guest(self, guest: Guest, *, windows: bool = True) -> LiveGuest:
        """Take hold of a guest's process again, with the grants it has; ``windows``: those of devices too.

        Raises:
            Gone: it ended, or its PID belongs to another process.
        """
        from memconsole.backend.guests.adopted import AdoptedGuest
        from memconsole.backend.guests.canary import CanaryGuest
        from memconsole.backend.guests.process import ProcessGuest
        from memconsole.backend.guests.qemu import QemuGuest

        if guest.pid is None or guest.start_ticks is None:
            raise UsageError(
                f"guest {guest.name} has no process", "it has ended", f"memconsole guest resume {guest.name}"
            )
        grants = self.state.grants_of(guest=guest.name)
        live: LiveGuest
        if guest.adopted:
            live = AdoptedGuest.adopt(guest.name, guest.pid, guest.start_ticks)
        elif guest.kind is GuestKind.QEMU:
            ram = grants[0].id if grants else ""
            live = QemuGuest.adopt(guest.name, guest.pid, guest.start_ticks, self.directory(guest.name), ram)
        else:
            kind = CanaryGuest if guest.kind is GuestKind.CANARY else ProcessGuest
            with contextlib.ExitStack() as stack:
                offers = [
                    stack.enter_context(self.grant_offer(grant)) for grant in grants if self.holds_region(grant.region)
                ]
                for window in self.state.windows.values():
                    if windows and window.guest == guest.name:
                        with contextlib.suppress(MemconsoleError):  # its device is gone, which the survey says
                            offers.append(stack.enter_context(self.window_offer(window)))
                live = kind.adopt(guest.name, guest.pid, guest.start_ticks, self.hub, offers)
        return self._add_guest(live)

    # --- the RAM of VMs that others run ---------------------------------------------------------------------------

    def ram_files(self, guest: Guest) -> tuple[RamFile, ...]:
        """The files that a VM's process maps shared, in the shape of RAM.

        Raises:
            Gone, Denied, KernelRefused, BadFile: it is not shown.
        """
        from memconsole.backend.stores import adopted

        return adopted.files_of(self.root, guest)

    def monitor_process(self, qmp: str) -> int:
        """The PID of who listens at a QMP socket.

        Raises:
            NotFound, Denied, KernelRefused: nobody does, or it cannot be told.
        """
        from memconsole.backend.guests import monitor

        return monitor.process(qmp)

    def ask_ram(self, guest: Guest, qmp: str) -> tuple[Block, ...]:
        """What a VM's QEMU says of its RAM blocks, through its manager or by its QMP socket.

        Raises:
            GuestError, BadFile: it says nothing, or something that is not known here.
        """
        from memconsole.backend.guests import monitor

        return monitor.blocks(guest, qmp)

    def open_ram(self, guest: Guest, file: RamFile) -> int:
        """A descriptor of a file that a VM's process has open.

        Raises:
            Gone, GuestError, Denied, KernelRefused: it ended, or has it open no more.
        """
        from memconsole.backend.stores import adopted

        return adopted.opened(self.root, guest.pid or 0, file)

    @contextlib.contextmanager
    def grant_offer(self, grant: Grant) -> Iterator[Offer]:
        """A grant as its guest receives it; the fd in it is closed when it was handed over.

        Raises:
            NotFound: the region's memory is lost.
        """
        from memconsole.backend.exports.offer import Offer
        from memconsole.backend.stores import files

        fds, store = self.fds(grant.region), self.store_of(grant.region)
        index, offset = divmod(grant.offset, files.SEGMENT)
        offset += store.segments([fds[index]])[0].start
        fd = store.segment_fd(fds[index], grant.access)
        try:
            modes = self._uffd_modes(grant) if store.FAULTS else 0
            yield Offer(grant.id, fd, offset, grant.length, grant.access, grant.gpa, modes)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def window_offer(self, grant: WindowGrant) -> Iterator[Offer]:
        """A window as its guest receives it, closed when it was handed over: a part of the device's VFIO file, where it
        is attached for this guest (a kernel with IO_STRICT_DEVMEM maps it no other way then), else its file in sysfs.

        Raises:
            NotFound, Denied, KernelRefused: the device is gone, or its file cannot be opened.
        """
        from memconsole.backend.exports.offer import Offer

        bdf, _, bar = grant.window.rpartition(":")
        with self.address_spaces.window_region(grant.guest, bdf, int(bar)) as found:
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

    def _uffd_modes(self, grant: Grant) -> int:
        from memconsole.backend.exports import userfault

        if self._rwp is None:
            self._rwp = userfault.rwp()
        return (userfault.WANTS_FAULTS if grant.lazy else 0) | (userfault.WANTS_SHIELD if self._rwp else 0)

    def guest_replies(self, deadline: float) -> dict[str, GuestReply]:
        """What every live guest says of itself; all are asked at once, until ``deadline`` (monotonic)."""
        begun = [(name, held.asked, held.asked.begin()) for name, held in list(self._guests.items())]
        return {name: _shown_reply(asked.poll(number, deadline)) for name, asked, number in begun}

    def state_of(self, live: LiveGuest) -> GuestState:
        """A guest's state, as it says; an agent that lost this process is given the time to find it again.

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        try:
            return live.state()
        except GuestError:
            if live.agent() or not self.connected(live.name):
                raise
            return live.state()

    def _guest_reply(self, live: LiveGuest) -> GuestReply:
        state = self.state_of(live)
        if state is GuestState.GONE:
            return GuestReply(state)
        return GuestReply(state, live.agent(), live.progress(), _vcpus(live))

    def close(self) -> None:
        """Let go of everything; guests go on, and custody keeps what it holds."""
        for name in list(self._guests):
            self.remove_guest(name)
        if self._hub is not None:
            self._hub.close()
            self._hub = None
        if self._uffds is not None:
            self._uffds.close()
        if self.mount is not None:
            self.mount.close()
        super().close()


def _shown_reply(heard: Polled[GuestReply]) -> GuestReply:
    """What a guest is shown as: what it says now; or silent, with what it said last."""
    if heard.answer is not None and not heard.why:
        return heard.answer
    last = heard.answer or GuestReply(GuestState.SILENT)
    return last._replace(state=GuestState.SILENT, agent=False, answered_ns=heard.at_ns, why=heard.why)


def _vcpus(live: LiveGuest) -> tuple[Vcpu, ...] | None:
    with contextlib.suppress(MemconsoleError):  # then they are not known, and the rest of its answer counts
        return live.vcpus()
    return None
