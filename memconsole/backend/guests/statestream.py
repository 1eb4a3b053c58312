"""The state of a QEMU's devices and vCPUs taken while its guest runs, without its RAM: a live migration to a file.

QEMU sends all of RAM, round after round, until little is left; then its guest stands still, and the devices follow.
Here what it sends goes through the filter (:mod:`memconsole.backend.managers.migration`): pages of RAM that is held
elsewhere are thrown away as they come, or put where they belong. So any QEMU will do, whoever started it, with RAM of
any kind; the guest stands still from the last round on.

Everything that is changed in QEMU on the way is in a :class:`Before`, and :func:`take_back` makes it so again, from
wherever it was left: by this process, or by the one that comes after a ``kill -9`` and has the value from the ledger.
A QEMU that was taken back runs, and its next save is whole.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

from memconsole import decoding, unforeseen
from memconsole.backend.managers.migration import CUT, Elsewhere, Filtered, filtered
from memconsole.backend.managers.virsh import Monitor
from memconsole.backend.peers.patience import Patience
from memconsole.backend.steps import Step
from memconsole.errors import GuestError, MemconsoleError, Refused
from memconsole.model.base import Value

NAME = "memconsole-state"
"""What QEMU calls the pipe it writes to."""
_SHARED = "x-ignore-shared"
_UNKNOWN = frozenset(
    {
        "background-snapshot",
        "dirty-bitmaps",
        "mapped-ram",
        "multifd",
        "pause-before-switchover",
        "postcopy-ram",
        "release-ram",
        "x-colo",
        "xbzrle",
        "zero-copy-send",
    }
)
"""Capabilities with which QEMU writes what the filter refuses, waits for a word, or gives RAM up that it has sent."""
_GUARDED = "switchover-ack"
_NEEDED = "return-path"
"""What it needs. A libvirt that does not know the other one switches this one off before it saves or migrates a domain,
and QEMU refuses that while the other is on: so no operator's ``virsh save`` can be one without RAM. QEMU 8.1 has both;
a libvirt that knows both switches both off, and then all of RAM is sent, and thrown away by the filter."""
_ANSWERS = struct.pack(">HH", 7, 0) + struct.pack(">HHI", 1, 4, 0)
"""What QEMU waits for on the way back (MIG_RP_MSG_SWITCHOVER_ACK, SHUT): it may switch over, and all is well."""
_FASTEST = 1 << 40
"""Bytes a second, as a limit: none."""
_PIPE = 1 << 20
_UNDER_WAY = frozenset({"setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug", "postcopy-active"})
_RUNS = frozenset({"running", "suspended"})
_STANDS = frozenset({"paused", "prelaunch"})
"""Paused, or not started yet (``virsh start --paused``): both are taken, and stand still afterwards."""
_LOOK_S = 0.05


class Before(Value, frozen=True):
    """What a QEMU was before its state was taken: whether its guest ran, and the settings that are changed for it."""

    running: bool
    capabilities: dict[str, bool]
    bandwidth: int

    @property
    def leaves_out(self) -> bool:
        """Whether QEMU leaves RAM out by itself, which no other client of it can have it do meanwhile."""
        return _GUARDED in self.capabilities


class Taken(Value, frozen=True):
    """The state of a guest, taken: what the stream was, bytes written, and how long QEMU says that the guest stood."""

    stream: Filtered
    rounds: int
    downtime_ms: int


class _Status(Value, frozen=True):
    status: str


class _Ram(Value, frozen=True, rename="kebab"):
    dirty_sync_count: int = 0


class _Migration(Value, frozen=True, rename="kebab"):
    """QEMU's MigrationInfo, which says nothing before the first one."""

    status: str = "none"
    error_desc: str = ""
    downtime: int = 0
    ram: _Ram = _Ram()


class _Capability(Value, frozen=True):
    capability: str
    state: bool


class _Parameters(Value, frozen=True, rename="kebab"):
    max_bandwidth: int


def look(monitor: Monitor, guest: str, *, left_out: bool = False) -> Before:
    """What must be as it is now when the state is taken back; ``left_out``: RAM that is shared need not be sent.

    Raises:
        Refused: a migration or save is under way (``JobUnderWay``), or its guest cannot go on (``NotRunning``).
        GuestError: it does not answer, or answers what is not known here.
    """
    what = f"the state of guest {guest} cannot be taken"
    migration = _told(monitor, "query-migrate", _Migration)
    if migration.status in _UNDER_WAY:
        why = f"a migration or a save of it is {migration.status}"
        raise Refused(what, why, "wait until it has ended, or cancel it", code="JobUnderWay")
    status = _told(monitor, "query-status", _Status).status
    if status not in _RUNS | _STANDS:
        raise Refused(what, f"QEMU says {status}", "resume it first, or shut it down", code="NotRunning")
    known = {each.capability: each.state for each in _told(monitor, "query-migrate-capabilities", list[_Capability])}
    left_out = left_out and known.get(_GUARDED) is False and _NEEDED in known
    wanted = dict.fromkeys(_UNKNOWN, False) | dict.fromkeys((_SHARED, _GUARDED, _NEEDED), left_out)
    changed = {name: known[name] for name in sorted(known) if wanted.get(name, known[name]) != known[name]}
    return Before(status in _RUNS, changed, _told(monitor, "query-migrate-parameters", _Parameters).max_bandwidth)


def take_back(monitor: Monitor, before: Before, *, within: float = 30.0) -> None:
    """Make a QEMU what it was, wherever its state's taking was left: cancelled, settings as before, its guest runs.

    It may be called more than once. A guest that ran and was paused by somebody since is not told apart: it runs.

    Raises:
        GuestError: it does not answer, or something of it stayed; what else could be taken back is.
    """
    left = []
    for back in (_cancelled, _set_back, _gone_on):
        try:
            back(monitor, before, within)
        except GuestError as error:
            left.append(error)
    if left:
        why = "; ".join(str(error) for error in left)
        raise GuestError("what was done to a guest's QEMU could not be taken back", why, "resume it by its manager")


def _cancelled(monitor: Monitor, _before: Before, within: float) -> None:
    deadline = time.monotonic() + within
    while (status := _told(monitor, "query-migrate", _Migration).status) in _UNDER_WAY:
        if status != "cancelling":
            monitor("migrate_cancel", {})
        if time.monotonic() > deadline:
            raise GuestError("the migration does not end", f"it is {status} after {within:g} s", "migrate_cancel")
        time.sleep(_LOOK_S)


def _set_back(monitor: Monitor, before: Before, _within: float) -> None:
    _set(monitor, before.capabilities)
    monitor("migrate-set-parameters", {"max-bandwidth": before.bandwidth})


def _gone_on(monitor: Monitor, before: Before, _within: float) -> None:
    if before.running and _told(monitor, "query-status", _Status).status not in _RUNS:
        monitor("cont", {})


def _set(monitor: Monitor, capabilities: Mapping[str, bool]) -> None:
    if capabilities:
        each = [{"capability": name, "state": state} for name, state in capabilities.items()]
        monitor("migrate-set-capabilities", {"capabilities": each})


def _told(monitor: Monitor, command: str, kind: Any) -> Any:
    answer = monitor(command, {})
    try:
        return decoding.convert(answer, kind, what=f"QEMU's answer to {command}")
    except decoding.Undecodable as error:
        raise GuestError(f"QEMU's answer to {command} is none", error.why, "report it, with its version") from None


class StateStream:
    """The state of one guest on its way into a file, which it is written to from where the file stands.

    ``elsewhere`` is the RAM that the stream need not bring, ``lock`` whether no QEMU is to take it before it was
    unlocked; ``guarded``: no other client of the QEMU can switch off what keeps a stream without RAM its own. QEMU has
    ``within`` seconds to end (it is not held against it when the host gives it no processor); a guest that dirties its
    RAM faster than QEMU reads it is stopped after ``converge`` of them.
    """

    def __init__(
        self,
        guest: str,
        pid: int,
        monitor: Monitor,
        target: int,
        elsewhere: Sequence[Elsewhere],
        *,
        lock: bool = True,
        guarded: bool = False,
        within: float = 300.0,
        converge: float = 30.0,
    ) -> None:
        self._guarded = guarded
        self._guest = guest
        self._pid = pid
        self._monitor = monitor
        self._target = target
        self._elsewhere = tuple(elsewhere)
        self._lock = lock
        self._within, self._converge = within, converge
        self._start = os.lseek(target, 0, os.SEEK_CUR)
        self._before: Before | None = None
        self.taken: Taken | None = None

    @property
    def before(self) -> Before:
        """What the QEMU was, once the first step has looked; to be recorded before the second one."""
        if self._before is None:
            raise GuestError(f"guest {self._guest} was not looked at", "its steps have not begun", "run them in order")
        return self._before

    def steps(self) -> tuple[Step, ...]:
        """Look, set, stream: afterwards the guest stands still, and its state is in the file."""
        name = self._guest
        return (
            Step("look", f"see what the QEMU of {name} is set to", self._look),
            Step(
                "set",
                f"have the QEMU of {name} send its state as fast as it can, without shared RAM where it knows how",
                self._set,
                self._set_back,
                f"set the QEMU of {name} as it was",
            ),
            Step(
                "stream",
                f"take the state of {name} while it runs; it stands still at the end",
                self._stream,
                self._go_on,
                f"let {name} go on, and empty the file",
            ),
        )

    def _look(self) -> None:
        left_out = self._guarded and all(each.fd < 0 for each in self._elsewhere)
        self._before = look(self._monitor, self._guest, left_out=left_out)

    def _set(self) -> None:
        with _undone_by(self._set_back):
            _set(self._monitor, {name: not state for name, state in self.before.capabilities.items()})
            self._monitor("migrate-set-parameters", {"max-bandwidth": _FASTEST})

    def _set_back(self) -> None:
        _set_back(self._monitor, self.before, self._within)

    def _go_on(self) -> None:
        _cancelled(self._monitor, self.before, self._within)
        _gone_on(self._monitor, self.before, self._within)
        os.ftruncate(self._target, self._start)
        os.lseek(self._target, self._start, os.SEEK_SET)
        self.taken = None

    def _stream(self) -> None:
        with (
            _undone_by(self._go_on),
            _Reader(self._target, self._elsewhere, lock=self._lock, answers=self.before.leaves_out) as reader,
        ):
            reader.hand(self._monitor)
            with _undone_by(self._forget_pipe):
                self._monitor("migrate", {"uri": f"fd:{NAME}"})
            self._await(reader)
            self.taken = self._ended(reader)

    def _forget_pipe(self) -> None:
        self._monitor("closefd", {"fdname": NAME})

    def _await(self, reader: _Reader) -> None:
        """Until QEMU has closed the pipe; the guest is stopped where it would never."""
        patience = Patience(self._pid, self._within)
        stopping = Patience(self._pid, min(self._converge, self._within))
        stopped = not self.before.running
        while not reader.ends(min(0.5, max(_LOOK_S, patience.left()))):
            if not patience.left():
                why = f"its state has not come within {self._within:g} s"
                raise GuestError(f"the state of guest {self._guest} was not taken", why, "try again when it does less")
            if not stopped and not stopping.left():
                self._monitor("stop", {})
                stopped = True

    def _ended(self, reader: _Reader) -> Taken:
        """What QEMU says of a stream that has ended, which comes first where the filter says that it was cut off."""
        deadline = time.monotonic() + self._within
        while (found := _told(self._monitor, "query-migrate", _Migration)).status in _UNDER_WAY:
            if reader.failed or time.monotonic() > deadline:
                break
            time.sleep(_LOOK_S)
        if found.status == "failed" and found.error_desc and not reader.ours:
            remedy = "see its log; some devices cannot be migrated"
            raise GuestError(f"the state of guest {self._guest} was not taken", found.error_desc, remedy)
        stream = reader.result()
        if found.status != "completed":
            why = f"QEMU says that its migration is {found.status}"
            raise GuestError(f"the state of guest {self._guest} was not taken", why, "try again")
        return Taken(stream, found.ram.dirty_sync_count, found.downtime)


@contextmanager
def _undone_by(back: Callable[[], None]) -> Iterator[None]:
    """What fails here is taken back; where that fails too, the error says so."""
    try:
        yield
    except BaseException as error:
        try:
            back()
        except (MemconsoleError, OSError) as left:
            if isinstance(error, MemconsoleError):
                error.why = "; ".join(filter(None, [error.why, f"and not undone: {left}"]))
            else:
                error.add_note(f"and not undone: {left}")
        raise


def _piped() -> tuple[int, int]:
    """A pipe: where it is read, and written."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with suppress(PermissionError):  # more than the host lets a user have in pipes
        fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE)
    return reading, writing


def _answered() -> tuple[int, int]:
    """The same as a socket; who writes finds all that will be answered there."""
    reading, writing = socket.socketpair()
    reading.send(_ANSWERS)
    return reading.detach(), writing.detach()


class _Reader:
    """The filter at our end of a pipe, or of a socket on which QEMU finds its answers, in a thread of its own."""

    def __init__(self, target: int, elsewhere: Sequence[Elsewhere], *, lock: bool, answers: bool) -> None:
        self._reading, self._writing = _answered() if answers else _piped()
        self._stopped, self._stopping = os.pipe2(os.O_CLOEXEC)
        self._found: Filtered | None = None
        self._error: MemconsoleError | None = None

        def read() -> None:
            try:
                self._found = filtered(self._reading, target, elsewhere, lock=lock, stopper=self._stopped)
            except MemconsoleError as error:
                self._error = error
            finally:
                os.close(self._reading)  # whoever still writes is told (EPIPE)

        self._thread = unforeseen.thread("memconsole-state", read)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for fd in (self._stopped, self._stopping):
            os.close(fd)

    def hand(self, monitor: Monitor) -> None:
        """Give QEMU the end that it writes to."""
        try:
            monitor("getfd", {"fdname": NAME}, self._writing)
        finally:
            self._close()

    def _close(self) -> None:
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    def ends(self, within: float) -> bool:
        """Whether the stream has come to its end, or to one."""
        self._thread.join(within)
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it came to an end that is none."""
        return self._error is not None

    @property
    def ours(self) -> bool:
        """Whether it was ended from this side (refused, spoiled, no room): QEMU sees only that reading stopped."""
        return self._error is not None and self._error.code != CUT

    def result(self) -> Filtered:
        """What it was."""
        if self._found is None:
            raise self._error or GuestError("the state of a guest was not taken", "its stream was not read to its end")
        return self._found

    def stop(self) -> None:
        """End it, if it has not ended."""
        self._close()
        if self._thread.is_alive():
            os.write(self._stopping, b"x")
            self._thread.join()
