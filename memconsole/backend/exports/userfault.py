"""The userfaultfds that guests handed over: page faults served for lazy grants, and a bar for those that are revoked.

    guest registers its mapping ─→ uffd over the agents socket ─→ here ─→ custody ``uffd:GRANT``
    lazy grant      a native thread serves its faults (native/fault.c); its counters lie in custody ``board:GRANT``
    revoked grant   its mapping stays, shielded: every access is a fault that nobody answers

While nobody serves, a guest that touches what it lacks waits, and goes on with the next control process: custody holds
the uffd. When nobody holds it any more the kernel serves the guest itself, and a shield is gone: so it is dropped only
once the process it bars has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from memconsole.backend import steps
from memconsole.backend.custody import payloads
from memconsole.backend.exports.mapped import BlockedMapping
from memconsole.backend.kernel.memory import shmem_thp
from memconsole.backend.stores import files
from memconsole.errors import BadFile, KernelRefused, MemconsoleError, NotFound
from memconsole.model import Faults, Finding, Grant, ProcessId, Value
from memconsole.units import PAGE

if TYPE_CHECKING:
    from memconsole.backend.holdings import Holdings

MISSING, MINOR, RWP = 1, 4, 8
"""How a mapping is registered (UFFDIO_REGISTER_MODE_*); RWP takes read and write access away."""
WANTS_FAULTS, WANTS_SHIELD = 1, 2
"""What a grant wants of its guest (``wants`` in native/agent.h)."""
SMALL_BATCH, LARGE_BATCH = 64 << 10, 2 << 20

_UFFDIO_REGISTER, _UFFDIO_RWPROTECT, _UFFDIO_API = 0xC020AA00, 0xC018AA09, 0xC018AA3F
_UFFD_API, _FEATURE_RWP = 0xAA, 1 << 17


class KeptUffd(Value, frozen=True):
    """An uffd as custody keeps it: whose it is, where its mapping lies, and what it is for; bytes."""

    grant: str
    region: str
    pid: int
    start_ticks: int
    address: int
    length: int
    offset: int
    page: int
    modes: int
    lazy: bool
    shielding: bool = False

    @property
    def process(self) -> ProcessId:
        """Whose it is."""
        return ProcessId(self.pid, self.start_ticks)


class FaultService:
    """Faults of one grant, served by a thread of the native core."""

    def __init__(self, handed: KeptUffd, uffd: int, file: int, board: int, batch: int) -> None:
        """Serve; the fds stay the caller's. ``offset`` of ``handed`` is in ``file``.

        Raises:
            KernelRefused: no thread, or no memory.
        """
        from memconsole import native

        self._native = native
        want = native.ffi.new(
            "struct mc_board *",
            {
                "start": handed.address,
                "length": handed.length,
                "offset": handed.offset,
                "page": handed.page,
                "batch": max(batch, handed.page),
            },
        )
        out = native.ffi.new("struct mc_faults **")
        what = f"the faults of {handed.grant} cannot be served"
        native.call(what, native.lib.mc_faults_start, out, uffd, file, board, want)
        self._faults: Any = out[0]

    def read(self) -> Faults:
        """What was served up to now."""
        board = self._native.ffi.new("struct mc_board *")
        rate = self._native.ffi.new("uint64_t *")
        self._native.lib.mc_faults_read(self._faults, board, rate)
        return Faults(
            served=True,
            minor=board.minor,
            missing=board.missing,
            present=board.pages * board.page,
            rate=rate[0],
            refused=board.refused,
            busy_ns=board.busy_ns,
            longest_ns=board.longest_ns,
            batch=board.batch,
        )

    def close(self) -> None:
        """Stop serving."""
        self._native.lib.mc_faults_stop(self._faults)


class UserfaultBroker:
    """What one control process does with the uffds it was handed; every method may be called from any thread."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._lock = threading.RLock()
        self._reading = threading.Lock()  # of the services: who looks at them waits for nobody who asks custody
        self._handed: dict[str, KeptUffd] = {}
        self._services: dict[str, FaultService] = {}

    def take_uffd(  # noqa: PLR0917 - what a guest says of a mapping is this much
        self, grant: Grant, page: int, process: ProcessId, uffd: int, modes: int, address: int
    ) -> None:
        """Take an uffd over from a ``process`` that mapped a grant at ``address``; the fd stays its.

        Raises:
            KernelRefused, Refused, Gone: its faults cannot be served, or nobody can hold it.
        """
        handed = KeptUffd(
            grant.id,
            grant.region,
            *process,
            address,
            grant.length,
            grant.offset % files.SEGMENT,
            page,
            modes,
            grant.lazy,
        )
        with self._lock:
            self.drop_uffd(grant.id)
            payloads.put(self._holdings.custody, _uffd(grant.id), uffd, handed)
            self._handed[grant.id] = handed
            if grant.lazy:
                self._serve(handed, uffd)

    def adopt(self) -> list[Finding]:
        """Take over the uffds in custody: serve those of lazy grants again; those that cannot be read are findings."""
        found = []
        for name in self._holdings.custody.names():
            kind, _, _ = name.partition(":")
            if kind != "uffd":
                continue
            uffd, payload = self._holdings.custody.get(name)
            try:
                handed = payloads.read(name, payload, KeptUffd)
                with self._lock:
                    self._handed[handed.grant] = handed
                    if handed.lazy and not handed.shielding and self._holdings.holds_region(handed.region):
                        self._serve(handed, uffd)
            except BadFile as error:
                found.append(payloads.unknown(name, error))
            finally:
                os.close(uffd)
        return found

    def faults(self) -> Mapping[str, Faults]:
        """What was served for each lazy grant."""
        with self._reading:
            return {
                grant: self._services[grant].read() if grant in self._services else Faults(served=False)
                for grant, handed in list(self._handed.items())
                if handed.lazy
            }

    @property
    def blocked_mappings(self) -> tuple[BlockedMapping, ...]:
        """The mappings that are barred."""
        return tuple(
            BlockedMapping(handed.process, handed.address, handed.address + handed.length)
            for handed in list(self._handed.values())
            if handed.shielding
        )

    def has_uffd(self, grant: str) -> bool:
        """Whether an uffd was handed over for a grant."""
        return grant in self._handed

    def block_access(self, grant: str) -> str:
        """Take all access to a grant's mapping away, for good; why that cannot be done, or an empty string.

        Raises:
            KernelRefused, Gone: the kernel will not, or nobody can hold the uffd.
        """
        with self._lock:
            handed = self._handed.get(grant)
            if handed is None:
                return "its guest handed no userfaultfd over"
            if not handed.modes & RWP:
                return "this kernel cannot take read access away (no UFFD_FEATURE_RWP)"
            uffd, _ = self._holdings.custody.get(_uffd(grant))
            try:
                self._stop(grant)
                # What is not in place yet is barred by faults that nobody answers.
                _protect(uffd, handed)
                steps.point("revoke.protect.barred")
                handed = replace(handed, shielding=True)
                payloads.put(self._holdings.custody, _uffd(grant), uffd, handed)
                self._handed[grant] = handed
            finally:
                os.close(uffd)
        return ""

    def drop_uffd(self, grant: str) -> None:
        """Let go of a grant's uffd, if there is one: its process goes on as if it had never handed it over."""
        with self._lock:
            self._stop(grant)
            if self._handed.pop(grant, None) is not None:
                for name in (_uffd(grant), _board(grant)):
                    with contextlib.suppress(NotFound):
                        self._holdings.custody.drop(name)

    def forget_ended(self) -> None:
        """Let go of the uffds of grants that are no more; of those that bar somebody, when that process has ended."""
        for grant, handed in list(self._handed.items()):
            if handed.shielding:
                if _ended(handed):
                    self.drop_uffd(grant)
            elif grant not in self._holdings.state.grants:
                self.drop_uffd(grant)

    def close(self) -> None:
        """Stop serving; guests wait where they touch what they lack, for as long as custody holds their uffds."""
        with self._lock:
            for grant in list(self._services):
                self._stop(grant)

    def _serve(self, handed: KeptUffd, uffd: int) -> None:
        grant = self._holdings.state.grants.get(handed.grant)
        offset = grant.offset if grant is not None else handed.offset
        try:
            board, _ = self._holdings.custody.get(_board(handed.grant))
        except NotFound:
            board = os.memfd_create(f"memconsole:{_board(handed.grant)}", os.MFD_CLOEXEC)
            self._holdings.custody.put(_board(handed.grant), board)
        try:
            file = self._holdings.fds(handed.region)[offset // files.SEGMENT]
            service = FaultService(handed, uffd, file, board, _batch(handed.page))
            with self._reading:
                self._services[handed.grant] = service
        finally:
            os.close(board)

    def _stop(self, grant: str) -> None:
        with self._reading:
            service = self._services.pop(grant, None)
            if service is not None:
                service.close()


def rwp() -> bool:
    """Whether this kernel can take read and write access away through an uffd (UFFD_FEATURE_RWP, Linux 7.3)."""
    from memconsole.agent import userfaultfd

    try:
        uffd, _ = userfaultfd()
    except OSError:
        return False
    try:
        return bool(
            struct.unpack("QQQ", fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, 0, 0)))[1] & _FEATURE_RWP
        )
    except OSError:
        return False
    finally:
        os.close(uffd)


def _protect(uffd: int, handed: KeptUffd) -> None:
    try:
        modes = MISSING | MINOR | RWP
        fcntl.ioctl(uffd, _UFFDIO_REGISTER, struct.pack("QQQQ", handed.address, handed.length, modes, 0))
        fcntl.ioctl(uffd, _UFFDIO_RWPROTECT, struct.pack("QQQ", handed.address, handed.length, 1))
    except OSError as error:
        raise KernelRefused("UFFDIO_RWPROTECT", error.errno or 0, what=f"{handed.grant} cannot be protected") from None


def _ended(handed: KeptUffd) -> bool:
    from memconsole.backend.peers.handle import stat

    try:
        return stat(handed.pid)[1] != handed.start_ticks
    except MemconsoleError:
        return True


def _batch(page: int) -> int:
    huge = page > PAGE or shmem_thp() in {"always", "within_size", "advise", "force"}
    return LARGE_BATCH if huge else SMALL_BATCH


def _uffd(grant: str) -> str:
    return f"uffd:{grant}"


def _board(grant: str) -> str:
    return f"board:{grant}"
