"""QEMU started by us, its RAM in a region: ``memory-backend-file`` on the region's own memfd."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memconsole.backend.guests.base import Offer, Restart
from memconsole.backend.guests.handle import GIVEN_FD, Handle, last_words, spawn
from memconsole.errors import Gone, GuestError
from memconsole.model import Access, GuestKind, GuestState, Progress
from memconsole.native import program

if TYPE_CHECKING:
    from memconsole.backend.guests.qmp import Qmp

BINARY = "qemu-system-x86_64"
ANSWERS = 5.0
"""Seconds QEMU has for a monitor command."""
KVM_FAST = 1_000_000
"""Pages a second a canary checks under a KVM that runs guest code; one that emulates it manages some ten thousand."""

_STATE = "memconsole-state"
_WAITING = ("-incoming", "defer")
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


@cache
def accelerator() -> str:
    """``kvm`` where a guest of our own ran at a processor's speed, else ``tcg``; measured once, in about 0.1 s."""
    probe = subprocess.run(
        [program("memconsole-canary"), "--probe"], capture_output=True, text=True, timeout=30, check=True
    )
    verdict, _, figure = probe.stdout.strip().partition(" ")
    return "kvm" if verdict == "kvm" and int(figure) >= KVM_FAST else "tcg"


def given_a_device(words: Sequence[str]) -> bool:
    """Whether a QEMU's command line has a VFIO device, in either form of ``-device``."""
    return any(option.lstrip("-") == "device" and "vfio-" in value for option, value in pairwise(words))


class Devices(NamedTuple):
    """The devices QEMU is given when it starts: their VFIO files, and the iommufd in which it confines them."""

    iommufd: int
    files: tuple[int, ...]


class QemuGuest:
    """A QEMU: boot RAM cannot be unplugged, so it gives it back by ending (:mod:`~memconsole.backend.revoke.aside`)."""

    kind = GuestKind.QEMU

    def __init__(self, name: str, handle: Handle, directory: Path, ram: str) -> None:
        self.name = name
        self.pid = handle.pid
        self.start_ticks = handle.start_ticks
        self.ram = ram
        self._handle = handle
        self._directory = directory
        self._monitor: Qmp | None = None

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
        if ram.offset or ram.access is not Access.RW:
            raise GuestError(f"guest {name} cannot start", "QEMU takes a whole region, read-write", "map it so")
        log = directory / "log"
        socket = directory / "qmp"
        argv = _words(name, ram.length, socket, args, devices=len(devices.files) if devices is not None else 0)
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
        return _STATES.get(self._status(), GuestState.PAUSED)

    def agent(self) -> bool:
        """Whether it would answer a request to give its RAM back: its monitor is what answers."""
        return True

    def offer(self, offer: Offer, within: float) -> bool:  # noqa: ARG002 - there is no waiting
        """True for the grant it was started with; it can take no other."""
        self._handle.check()
        return offer.grant == self.ram

    def ask_unmap(self, grant: str, within: float) -> bool:  # noqa: ARG002 - there is no asking
        """False: boot RAM cannot be unplugged from one that goes on."""
        self._handle.check()
        return False

    def await_answer(self, within: float) -> None:
        """Nothing, once its monitor answers; what a stopped process is told, it would do whenever it goes on.

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        deadline = time.monotonic() + within
        while self._handle.stopped():
            if time.monotonic() > deadline:
                raise GuestError(f"guest {self.name} does not answer", "a signal has stopped it", "kill -CONT it")
            time.sleep(0.02)
        self._execute("query-status", max(0.1, deadline - time.monotonic()))

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
            raise GuestError(f"guest {self.name} does not quit", f"it is still there after {within:g} s", "kill it")

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
        deadline = time.monotonic() + within
        os.lseek(fd, 0, os.SEEK_SET)
        if self.is_saved():  # and was left paused; QEMU saves none that was saved and has not gone on since
            self._execute("cont")
        self._execute("stop")
        for command, arguments in self._ways():
            self._execute(command, arguments=arguments)
        self._execute("getfd", arguments={"fdname": _STATE}, fd=fd)
        self._execute("migrate", arguments={"uri": f"fd:{_STATE}"})
        while (found := self._execute("query-migrate"))["status"] != "completed":
            if found["status"] in {"failed", "cancelled"} or time.monotonic() > deadline:
                why = found.get("error-desc") or f"its migration is {found['status']} after {within:g} s"
                self._execute("migrate_cancel")
                raise GuestError(f"the state of guest {self.name} cannot be saved", why, "see what devices it has")
            time.sleep(0.002)
        os.lseek(fd, 0, os.SEEK_SET)  # whoever goes on reads from where the file stands

    def restart(self, state: str, ram: str, *, paused: bool = False) -> Restart:
        """How it goes on from its ``state`` and its ``ram``, as custody calls them: as it was started, but waiting.

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        return _restart(self._words(), self._directory, self._ways(), (ram, state), paused=paused)

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
        words = _words(name, memory, directory / "qmp", args, devices=len(devices[1:]))
        return _restart(words, directory, [_SHARED, _CPR], (ram, *devices, state), paused=paused)

    def passes_through(self) -> bool:
        """Whether it was started with a device of this host (VFIO): it can be saved while its guest is suspended.

        Raises:
            Gone: it ended.
        """
        return given_a_device(self._words())

    def _status(self) -> str:
        return str(self._execute("query-status")["status"])

    def _words(self) -> list[str]:
        """What it was started with."""
        self._handle.check()
        return [word.decode() for word in Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")[:-1]]

    def shares(self) -> bool:
        """Whether it can be saved without its RAM (it knows ``x-ignore-shared``).

        Raises:
            Gone: it ended. GuestError: it does not answer.
        """
        return any(each["capability"] == "x-ignore-shared" for each in self._execute("query-migrate-capabilities"))

    def _ways(self) -> list[_Command]:
        """The commands after which a migration leaves shared RAM alone: cpr-reboot where this QEMU knows it."""
        return [_SHARED, *([_CPR] if "mode" in self._execute("query-migrate-parameters") else [])]

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

    def close(self) -> None:
        """Let go of what this object holds; the guest goes on."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self._handle.close()

    def _await_monitor(self, socket: Path, log: Path, within: float) -> None:
        deadline = time.monotonic() + within
        while not socket.exists():
            if self._handle.wait(0.02):
                raise GuestError(f"guest {self.name} did not start", last_words(log), f"look into {log}")
            if time.monotonic() > deadline:
                raise GuestError(f"guest {self.name} did not start", f"no monitor within {within:g} s", str(log))
        while True:
            try:
                self._execute("query-status", max(1.0, deadline - time.monotonic()))
            except (GuestError, Gone):
                # QEMU makes the socket before it listens, and before it has looked at all of its options.
                if self._handle.wait(0.1):
                    raise GuestError(f"guest {self.name} did not start", last_words(log), f"look into {log}") from None
                if time.monotonic() > deadline:
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
        if self._monitor is None:
            self._monitor = Qmp(self.name, self._directory / "qmp")
        return self._monitor.execute(command, arguments, within=ANSWERS if within is None else within, fd=fd)


def _words(name: str, memory: int, socket: Path, args: Sequence[str], *, devices: int = 0) -> list[str]:
    """A command line for so many bytes of RAM, the fd that every guest is given; an iommufd and devices follow it."""
    # QEMU opens the path itself: through its own copy of the fd it reaches the memfd, which has no other name.
    backend = f"memory-backend-file,id=ram,size={memory},mem-path=/proc/self/fd/{GIVEN_FD},share=on"
    return [
        BINARY,
        *("-name", name, "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35,memory-backend=ram", "-accel", accelerator()),
        *("-m", f"size={memory}B", "-object", backend),
        *("-qmp", f"unix:{socket},server=on,wait=off"),
        *(("-object", f"iommufd,id=memconsole,fd={GIVEN_FD + 1}") if devices else ()),
        *(word for number in range(devices) for word in ("-device", _device(number))),
        *args,
    ]


def _device(number: int) -> str:
    return f"vfio-pci,id=memconsole-{number},iommufd=memconsole,fd={GIVEN_FD + 2 + number}"


def _restart(
    words: Sequence[str], directory: Path, ways: Sequence[_Command], held: Sequence[str], *, paused: bool
) -> Restart:
    """One with these words that waits for its state.

    ``held``: what it is given, as custody calls it, its state last.
    """
    fds = tuple((name, number) for number, name in enumerate(held, GIVEN_FD))
    if tuple(words[-2:]) != _WAITING:
        words = [*words, *_WAITING]
    come: _Command = ("migrate-incoming", {"uri": f"fd:{fds[-1][1]}"})
    say: list[_Command] = [("qmp_capabilities", None), *ways, come]
    lines = [(_line(command, arguments), "return") for command, arguments in say]
    lines.append((_line("query-status", None), '"paused"'))
    if not paused:
        lines.append((_line("cont", None), "return"))
    return Restart(tuple(words), fds, str(directory / "qmp"), tuple(lines))


def _line(command: str, arguments: dict[str, object] | None) -> str:
    import json

    return json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
