"""QEMU started by us, its RAM in a region: ``memory-backend-file`` on the region's own memfd."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from memconsole import decoding
from memconsole.backend.exports.offer import Offer
from memconsole.backend.guests import commandline
from memconsole.backend.guests.base import Restart
from memconsole.backend.guests.guestagent import shown
from memconsole.backend.peers.handle import GIVEN_FD, Handle, last_words, spawn
from memconsole.backend.peers.patience import Patience
from memconsole.errors import Gone, GuestError
from memconsole.model import Access, GuestKind, GuestState, Progress, Vcpu

if TYPE_CHECKING:
    from memconsole.backend.guests.qmp import Qmp

ANSWERS = 5.0
"""Seconds QEMU has for a monitor command; one that is a part of an act is waited for with patience."""

T = TypeVar("T")
_STATE = "memconsole-state"
_Command = tuple[str, dict[str, object] | None]
_SHARED: _Command = ("migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]})
_CPR: _Command = ("migrate-set-parameters", {"mode": "cpr-reboot"})
_STATES = {
    "running": GuestState.RUNNING,
    "suspended": GuestState.SUSPENDED,
    "shutdown": GuestState.STOPPED,
    "guest-panicked": GuestState.STOPPED,
    "internal-error": GuestState.STOPPED,
    "io-error": GuestState.STOPPED,
}


class _Kvm(msgspec.Struct):
    """QEMU's KvmInfo."""

    enabled: bool


class _Cpu(msgspec.Struct):
    """QEMU's CpuInfoFast."""

    index: int = msgspec.field(name="cpu-index")
    thread: int = msgspec.field(name="thread-id")
    path: str = msgspec.field(name="qom-path", default="")


class _Status(msgspec.Struct):
    """QEMU's StatusInfo."""

    status: str


class _Migration(msgspec.Struct):
    """QEMU's MigrationInfo, which says nothing before the first one."""

    status: str = "none"
    why: str = msgspec.field(name="error-desc", default="")


class _Ability(msgspec.Struct):
    """QEMU's MigrationCapabilityStatus."""

    capability: str


class Devices(NamedTuple):
    """The devices QEMU is given when it starts: their VFIO files, and the iommufd in which it confines them."""

    iommufd: int
    files: tuple[int, ...]


class QemuGuest:
    """A QEMU: boot RAM is not unplugged but given back by ending (:mod:`~memconsole.backend.revoke.suspend_vm`)."""

    kind = GuestKind.QEMU

    def __init__(self, name: str, handle: Handle, directory: Path, ram: str) -> None:
        self.name = name
        self.pid = handle.pid
        self.start_ticks = handle.start_ticks
        self.ram = ram
        self._handle = handle
        self._directory = directory
        self._monitor: Qmp | None = None
        self._kvm: bool | None = None
        self._connecting = threading.Lock()
        self._left = False

    @classmethod
    def start(
        cls,
        name: str,
        ram: Offer,
        directory: Path,
        *,
        args: Sequence[str] = (),
        devices: Devices | None = None,
        within: float = 30.0,
    ) -> QemuGuest:
        """Start QEMU with ``ram`` as its memory from GPA 0; ``args`` are appended, so that they override.

        The QMP socket and the log are ``qmp`` and ``log`` in ``directory``.

        Raises:
            GuestError: it cannot start (its last words are in the error) or its monitor does not answer.
        """
        if ram.access is not Access.RW or (ram.offset and not stat.S_ISCHR(os.fstat(ram.fd).st_mode)):
            raise GuestError(
                f"guest {name} cannot start", "QEMU needs a whole region, read-write", f"memconsole map REGION {name}"
            )
        log = directory / "log"
        socket = directory / "qmp"
        argv = commandline.started(
            name,
            ram.length,
            socket,
            args,
            devices=len(devices.files) if devices is not None else 0,
            offset=ram.offset,
        )
        socket.unlink(missing_ok=True)
        handed = (devices.iommufd, *devices.files) if devices is not None else ()
        handle = spawn(argv, log, ram.fd, *handed)
        guest = cls(name, handle, directory, ram.grant)
        try:
            guest._await_monitor(socket, log, within)
        except BaseException:
            handle.kill()
            guest.close()
            raise
        return guest

    @classmethod
    def adopt(cls, name: str, pid: int, start_ticks: int, directory: Path, ram: str) -> QemuGuest:
        """Take a QEMU over from an earlier control process; ``ram`` is the grant that is its memory.

        Raises:
            Gone: it ended, or its PID belongs to another process now.
        """
        return cls(name, Handle(pid, start_ticks), directory, ram)

    def state(self) -> GuestState:
        """Running, suspended, paused, stopped when it cannot go on, or gone."""
        if not self._handle.alive():
            return GuestState.GONE
        return _STATES.get(self._status(ANSWERS), GuestState.PAUSED)

    def agent(self) -> bool:
        """Whether it would answer a request to give its RAM back: its monitor is what answers."""
        return True

    def offer(self, offer: Offer, within: float) -> bool:  # noqa: ARG002 - there is no waiting
        """True for the grant it was started with; it can take no other."""
        self._handle.check()
        return offer.grant == self.ram

    def request_unmap(self, grant: str, within: float) -> bool:  # noqa: ARG002 - there is no asking
        """False: boot RAM cannot be unplugged from one that goes on."""
        self._handle.check()
        return False

    def await_answer(self, within: float) -> None:
        """Nothing, once its monitor answers; what a stopped process is told, it would do whenever it goes on.

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        stopped = GuestError(f"guest {self.name} does not answer", "a signal has stopped it", "kill -CONT its process")
        deadline = time.monotonic() + within
        while self._handle.stopped():
            if time.monotonic() > deadline:
                raise stopped
            time.sleep(0.02)
        try:
            self._execute("query-status", max(0.1, deadline - time.monotonic()))
        except GuestError:
            if self._handle.stopped():  # the signal came after the look
                raise stopped from None
            raise

    def is_saved(self) -> bool:
        """Whether it stands still since it was saved.

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        return self._status() == "postmigrate"

    def quit(self, within: float) -> None:
        """QMP ``quit``, by itself.

        Raises:
            GuestError: it is still there after ``within`` seconds.
        """
        with contextlib.suppress(GuestError, Gone):  # whose end may come before its answer
            self._execute("quit", within)
        if not self._handle.wait(within):
            raise GuestError(
                f"guest {self.name} does not quit",
                f"it is still there after {within:g} s",
                "give it more time: --within SECONDS",
            )

    def pause(self) -> None:
        """Stop its vCPUs (QMP ``stop``)."""
        self._execute("stop")

    def resume(self) -> None:
        """Let it go on (QMP ``cont``); one that is suspended wakes up."""
        self._execute("system_wakeup" if self._status() == "suspended" else "cont")

    def save(self, fd: int, within: float) -> None:
        """Pause it, and have it write its devices and vCPUs into the file, from its start; RAM stays where it is.

        :meth:`resume` lets this one go on; :meth:`restart` starts the one that goes on in its place.

        Raises:
            GuestError: it refused, or did not end in time; it stands still all the same, and can be resumed.
        """
        patience = Patience(self.pid, within)
        os.lseek(fd, 0, os.SEEK_SET)
        if self.is_saved():  # and was left paused; QEMU saves none that was saved and has not gone on since
            self._execute("cont")
        self._execute("stop")
        for command, arguments in self._ways():
            self._execute(command, arguments=arguments)
        self._execute("getfd", arguments={"fdname": _STATE}, fd=fd)
        self._execute("migrate", arguments={"uri": f"fd:{_STATE}"})
        while (found := self._told("query-migrate", _Migration)).status != "completed":
            if found.status in {"failed", "cancelled"} or not patience.left():
                why = found.why or f"its migration is {found.status} after {within:g} s"
                self._execute("migrate_cancel")
                raise GuestError(
                    f"the state of guest {self.name} cannot be saved",
                    why,
                    "see its log; some devices cannot be migrated",
                )
            time.sleep(0.002)
        os.lseek(fd, 0, os.SEEK_SET)  # whoever goes on reads from where the file stands

    def restart(self, state: str, ram: str, *, paused: bool = False) -> Restart:
        """How it goes on from its ``state`` and its ``ram``, as custody calls them: as it was started, but waiting.

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        return waiting_restart(self._words(), self._directory / "qmp", self._ways(), (ram, state), paused=paused)

    @staticmethod
    def again(  # noqa: PLR0917 - what QEMU was started with is this much
        name: str,
        memory: int,
        directory: Path,
        args: Sequence[str],
        state: str,
        ram: str,
        *,
        devices: Sequence[str] = (),
        paused: bool = False,
    ) -> Restart:
        """The same of one that is gone, as :meth:`start` would begin it; it must know cpr-reboot.

        ``devices`` are an iommufd and the devices' files, as custody calls them, none of which another QEMU has had.
        """
        words = commandline.started(name, memory, directory / "qmp", args, devices=len(devices[1:]))
        return waiting_restart(words, directory / "qmp", [_SHARED, _CPR], (ram, *devices, state), paused=paused)

    def passes_through(self) -> bool:
        """Whether it was started with a device of this host (VFIO): it can be saved while its guest is suspended.

        Raises:
            Gone: it ended.
        """
        return commandline.given_a_device(self._words())

    def _status(self, within: float | None = None) -> str:
        return self._told("query-status", _Status, within).status

    def _words(self) -> list[str]:
        """What it was started with."""
        self._handle.check()
        return [decoding.text(word) for word in Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")[:-1]]

    def shares(self) -> bool:
        """Whether it can be saved without its RAM (it knows ``x-ignore-shared``).

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        known = self._told("query-migrate-capabilities", list[_Ability], ANSWERS)
        return any(each.capability == "x-ignore-shared" for each in known)

    def _ways(self) -> list[_Command]:
        """The commands after which a migration leaves shared RAM alone: cpr-reboot where this QEMU knows it."""
        return [_SHARED, *([_CPR] if "mode" in self._told("query-migrate-parameters", dict[str, Any]) else [])]

    def stop(self, within: float) -> None:
        """QMP ``quit``, and SIGKILL when it is still there after ``within`` seconds."""
        deadline = time.monotonic() + within
        if self._handle.alive():
            try:
                self._execute("quit", within)
            except (GuestError, Gone):
                self._handle.end(max(0.0, deadline - time.monotonic()))
            if not self._handle.wait(max(0.0, deadline - time.monotonic())):
                self._handle.kill()

    def kill(self) -> None:
        """SIGKILL and wait until it is gone."""
        self._handle.kill()

    def progress(self) -> Progress | None:
        """None: QEMU does not say."""
        return None

    def vcpus(self) -> tuple[Vcpu, ...] | None:
        """Those of one without KVM, by its monitor (``query-cpus-fast``); the kernel shows the others.

        Raises:
            Gone: it ended. GuestError: it does not answer, or its answer is none.
        """
        if self._kvm is None:
            self._kvm = self._told("query-kvm", _Kvm, ANSWERS).enabled
        if self._kvm:
            return None
        cpus = self._told("query-cpus-fast", list[_Cpu], ANSWERS)
        return tuple(Vcpu(each.index, each.thread) for each in sorted(cpus, key=lambda each: each.index))

    def agent_channel(self) -> Path | None:
        """The socket of its guest's agent; None where it has none.

        Raises:
            Gone: it ended.
        """
        path = commandline.agent_channel(self._words())
        if path is None:
            return None
        try:
            return Path(f"/proc/{self.pid}/cwd").readlink() / path
        except OSError:
            self._handle.check()
            return Path(path)

    def clocks(self) -> tuple[str, ...]:
        """What of a virtual machine's clocks its guest has: ``kvmclock``, ``vmclock``.

        Raises:
            Gone: it ended. GuestError: it does not answer, or its answer is none.
        """
        found = []
        has_kvm = self._told("query-kvm", _Kvm, ANSWERS).enabled
        if has_kvm and (cpus := self._told("query-cpus-fast", list[_Cpu], ANSWERS)):
            first = cpus[0].path
            with contextlib.suppress(GuestError):  # a processor without such a property has no such clock
                if self._execute("qom-get", arguments={"path": first, "property": "kvmclock"}) is True:
                    found.append("kvmclock")
        if commandline.has_vmclock(self._words()):
            found.append("vmclock")
        return tuple(found)

    def _told(self, command: str, kind: type[T], within: float | None = None) -> T:
        """What it says to a command, if that is what it should be; else a GuestError."""
        what = f"the answer of guest {self.name} to {command}"
        try:
            return decoding.convert(self._execute(command, within), kind, what=what)
        except decoding.Undecodable as error:
            raise GuestError(error.what, shown(error.why), "see its log: the process may be no QEMU") from None

    def interrupt(self) -> None:
        """Leave its monitor, which takes another connection then."""
        with self._connecting:
            self._left = True
            monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.close()

    def close(self) -> None:
        """Let go of what this object holds; the guest goes on."""
        self.interrupt()
        self._handle.close()

    def _await_monitor(self, socket: Path, log: Path, within: float) -> None:
        patience = Patience(self.pid, within)
        while not socket.exists():
            if self._handle.wait(0.02):
                raise GuestError(f"guest {self.name} did not start", last_words(log), f"see {log}")
            if not patience.left():
                raise GuestError(f"guest {self.name} did not start", f"no monitor within {within:g} s", f"see {log}")
        while True:
            try:
                self._execute("query-status", max(1.0, patience.left()))
            except (GuestError, Gone):
                # QEMU makes the socket before it listens, and before it has looked at all of its options.
                if self._handle.wait(0.1):
                    raise GuestError(f"guest {self.name} did not start", last_words(log), f"see {log}") from None
                if not patience.left():
                    raise
            else:
                return

    def _execute(
        self,
        command: str,
        within: float | None = None,
        *,
        arguments: dict[str, object] | None = None,
        fd: int | None = None,
    ) -> Any:
        from memconsole.backend.guests.qmp import Qmp

        self._handle.check()
        with self._connecting:
            if self._left:
                raise GuestError(f"guest {self.name} is not asked any more", f"{command}: memconsole released it")
            self._monitor = self._monitor or Qmp(self.name, self._directory / "qmp")
            monitor = self._monitor
        patience = Patience(self.pid, ANSWERS) if within is None else None
        return monitor.execute(command, arguments, within=within or ANSWERS, fd=fd, patience=patience)


def waiting_restart(
    words: Sequence[str],
    socket: str | Path,
    ways: Sequence[tuple[str, dict[str, object] | None]],
    held: Sequence[str],
    *,
    paused: bool = False,
) -> Restart:
    """How a QEMU is started with words that have it listen at a socket, and wait for its state.

    ``ways``: what it is told first; ``held``: what it is given, as custody calls it, its state last.
    """
    fds = tuple((name, number) for number, name in enumerate(held, GIVEN_FD))
    come: _Command = ("migrate-incoming", {"uri": f"fd:{fds[-1][1]}"})
    say: list[_Command] = [("qmp_capabilities", None), *ways, come]
    lines = [(_line(command, arguments), "return") for command, arguments in say]
    lines.append((_line("query-status", None), '"paused"'))
    if not paused:
        lines.append((_line("cont", None), "return"))
    return Restart(tuple(commandline.waiting(words)), fds, str(socket), tuple(lines))


def _line(command: str, arguments: dict[str, object] | None) -> str:
    import json

    return json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
