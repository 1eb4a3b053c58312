"""``memconsole serve``: the control process.

    lock the state ─ what was handed over ─ take custody ─ Control (adopts what ledger and custody hold) ─ serve ─
    READY=1 ─ wait ─ stop

It may die at any of these, and be killed at any later moment: guests run on, memory and ledger are in custody, and the
next one adopts them. A stop in order (SIGTERM, SIGINT, SIGHUP) leaves them too; only what serves them ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from memconsole import escaping, paths, unforeseen
from memconsole.backend import logfile
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import MEMORY, Custody, KeeperCustody
from memconsole.backend.custody.respawn import RespawningKeeper
from memconsole.backend.custody.systemd import ENTRY, SystemdCustody, inherited
from memconsole.backend.exports import mountpoint
from memconsole.backend.handoff import luo
from memconsole.backend.history.recorder import HistoryRecorder
from memconsole.backend.kernel import pmem
from memconsole.backend.peers import notify
from memconsole.backend.wire import metrics, sockets
from memconsole.backend.wire.families import PARTS
from memconsole.backend.wire.roles import Roles
from memconsole.backend.wire.serving import RunningService, serve_in_thread
from memconsole.errors import ExitCode, Gone, KernelRefused, MemconsoleError
from memconsole.native import program

log = logging.getLogger("memconsole.serve")

SWITCH_S = 0.001
"""How long one thread may hold the interpreter while another waits to answer: a fifth of Python's default."""

METRICS_S = 15.0
_NOTHING = 6
"""What memconsole-resume ends with when nothing was left to take over."""


@dataclass(frozen=True)
class ServeSettings:
    """What ``memconsole serve`` was asked for; ``record_s`` 0: no history; groups None: the default ones; no mount.

    ``raw``: where the ranges begin that the raw store may use.
    """

    socket: Path
    state_dir: Path
    foreground: bool = False
    custody: Literal["auto", "keeper", "systemd"] = "auto"
    operators: str | None = None
    viewers: str | None = None
    record_s: float = 1.0
    metrics_textfile: Path | None = None
    mountpoint: Path | None = None
    raw: tuple[int, ...] = ()


def serve(settings: ServeSettings) -> int:
    """Run the control process until it is asked to stop; without ``foreground`` in the background, once it is ready.

    Raises:
        Refused: another serves this state or socket (``AlreadyServing``, ``SocketInUse``), or a mount would hide its
            files (``MountHidesRuntime``).
        UsageError: a group does not exist.
        MemconsoleError: custody or ledger cannot be read.
    """
    if settings.foreground or notify.address():
        return _serve(settings, lambda: None)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.setsid()
        return _serve(settings, partial(_detach, settings.state_dir / "serve.log", writing))
    os.close(writing)
    with os.fdopen(reading, "rb") as ready:
        if ready.read(1):
            return ExitCode.DONE
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _detach(log_file: Path, ready: int) -> None:
    """Let go of the terminal, log to a file, and tell the waiting parent."""
    log_fd = logfile.opened(log_file)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd, source in ((0, null), (1, null), (2, log_fd)):
        os.dup2(source, fd)
    os.close(null)
    os.close(log_fd)
    _log_to(logfile.RotatingStderr(log_file))
    os.write(ready, b"R")
    os.close(ready)


def _serve(settings: ServeSettings, ready: Callable[[], None]) -> int:
    _log_to(logfile.Stderr())
    sys.setswitchinterval(SWITCH_S)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    passed = inherited()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_stop_signals())
        serving = _start(settings, passed, stack)
        ready()
        _notify("READY=1")
        log.info("serving on %s", settings.socket)
        try:
            _wait(serving, stop)
        finally:
            with contextlib.suppress(OSError):  # at a shutdown the manager may have ended first
                _notify("STOPPING=1")
            log.info("stopping; guests and memory stay")
    return ExitCode.DONE


def _start(settings: ServeSettings, passed: list[tuple[str, int]], stack: contextlib.ExitStack) -> RunningService:
    """Everything between the lock and the first call; what was begun is ended by ``stack``, in reverse."""
    runtime = settings.socket.parent
    roles = Roles(settings.operators, settings.viewers)
    if settings.mountpoint is not None:
        mountpoint.refuse_mountpoint(settings.mountpoint, runtime=runtime, state_dir=settings.state_dir)
    paths.make_directory(runtime, 0o755)
    paths.make_directory(settings.state_dir, 0o700)
    for directory in {runtime, settings.state_dir}:
        stack.callback(sockets.Lock(directory / "serve.lock").close)
    listening = {name: socket.socket(fileno=fd) for name, fd in passed if name in {"control", "metrics"}}
    past = HistoryRecorder(settings.state_dir / "history", settings.record_s)
    stack.callback(past.close)
    for finding in past.findings():
        log.warning("%s: %s", finding.subject, finding.observed)
    _resume(runtime)
    control = _control(settings, past, [(name, fd) for name, fd in passed if name not in listening], stack)
    metrics_socket = listening.get("metrics")
    if metrics_socket is None:
        metrics_socket = sockets.bind(runtime / "metrics")
        stack.callback((runtime / "metrics").unlink, missing_ok=True)
    serving = serve_in_thread(control, settings.socket, sock=listening.get("control"), roles=roles)
    stack.callback(serving.close)
    serving.listen(metrics_socket, metrics.Endpoint(serving.service))
    if settings.metrics_textfile is not None:
        serving.service.each(METRICS_S, partial(metrics.write_textfile, settings.metrics_textfile), PARTS)
    return serving


def _resume(runtime: Path) -> None:
    """Have memconsole-resume end what it has not: who should have started it first may be missing, or it was killed.

    Raises:
        MemconsoleError: it was killed again; what it has not retrieved waits for the next start.
    """
    if runtime.absolute() != paths.HOST or os.geteuid():
        return
    if not Path(luo.DEVICE).exists() and not pmem.devices(gaps=[]):  # an arena may have what was handed over
        return
    words = [program("memconsole-resume"), "--runtime", str(runtime.absolute())]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = done.stderr.strip()
    if done.returncode < 0:
        why = f"it was killed by signal {-done.returncode}; {said}".rstrip("; ")
        raise MemconsoleError(
            "memconsole-resume did not end", why, "start memconsole-resume again: it continues where it was"
        )
    if done.returncode != _NOTHING:
        level = logging.INFO if done.returncode == ExitCode.DONE else logging.ERROR
        log.log(level, "memconsole-resume was needed: %s", said or "all guests run")


def _control(
    settings: ServeSettings, past: HistoryRecorder, stored: list[tuple[str, int]], stack: contextlib.ExitStack
) -> Control:
    custody = _custody(settings, stored)
    try:
        control = Control(
            settings.socket.parent,
            custody,
            state_dir=settings.state_dir,
            past=past,
            mountpoint=_mountpoint(settings.mountpoint),
            raw=settings.raw,
        )
    except BaseException:
        custody.close()
        raise
    stack.callback(control.close)
    log.info("memory is in custody of %s", custody.label)
    return control


def _mountpoint(asked: Path | None) -> Path | None:
    """The directory to mount at, made if it is missing; what a dead server left there is not looked at.

    Raises:
        KernelRefused: it cannot be made.
    """
    if asked is not None:
        try:
            asked.mkdir(mode=0o755)
        except FileExistsError:
            pass
        except OSError as error:
            remedy = "make a directory that guests may walk to"
            raise KernelRefused(f"mkdir {asked}", error.errno or 0, remedy=remedy) from None
    return asked


def _custody(settings: ServeSettings, stored: list[tuple[str, int]]) -> Custody:
    """The one that was asked for; else a keeper that holds something, the service manager's fd store, or a keeper."""
    runtime = settings.socket.parent
    offered = settings.custody == "auto" and "FDSTORE" in os.environ
    if settings.custody == "systemd" or (offered and not _kept(runtime)):
        store = SystemdCustody(stored)
        if store.lost:
            memory = any(name.startswith((*MEMORY, ENTRY)) for name in store.lost)
            level = logging.ERROR if memory else logging.INFO
            log.log(level, "%s lost: %s", store.label, ", ".join(store.lost))
        return store
    return RespawningKeeper(runtime)


def _kept(runtime: Path) -> bool:
    """Whether a keeper of a service that ran without a service manager holds memory here."""
    with contextlib.suppress(Gone), contextlib.closing(KeeperCustody(runtime / "keeper")) as keeper:
        return bool(keeper.names())
    return False


# --- the service manager's side -----------------------------------------------------------------------------------


def _notify(text: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    if where := notify.address():
        notify.send(where, text)


def _wait(serving: RunningService, stop: int) -> None:
    """Until ``stop`` is readable; meanwhile keep the service manager's watchdog content while the loop answers.

    Raises:
        MemconsoleError: the loop ended by itself.
    """
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    answered = threading.Event()
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    while not poll.poll((watchdog / 3 or 5.0) * 1000):
        if not serving.alive:
            raise MemconsoleError(
                "the service's loop ended", "an error stopped it", "see the log above; start it again"
            )
        if answered.is_set() and watchdog:
            _notify("WATCHDOG=1")
        answered.clear()
        serving.loop.call(answered.set)


@contextlib.contextmanager
def _stop_signals() -> Iterator[int]:
    """An eventfd that is readable once a signal asked this process to stop.

    Handlers, not a blocked mask: a mask would be inherited by guests, which then could not be asked to end.
    """
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: os.eventfd_write(fd, 1)) for number in numbers]
    try:
        yield fd
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        os.close(fd)


class _Priority(escaping.Formatter):
    """Lines with the priority journald reads (sd-daemon(3)) where stderr is the journal, else with time and level."""

    LEVELS = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

    def format(self, record: logging.LogRecord) -> str:
        """One record; each of its lines is one in the journal."""
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
            return f"{at} memconsole: {record.levelname.lower()}: {text}"
        level = next(number for least, number in self.LEVELS if record.levelno >= least)
        return "\n".join(f"<{level}>{line}" for line in text.splitlines())


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(_Priority("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[logfile.Detached(handler)], force=True)
    unforeseen.watch()
