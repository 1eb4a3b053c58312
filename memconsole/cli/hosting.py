"""Commands that host something: the console in its forms, and the doctor."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from memconsole import macro_run, macros
from memconsole.cli import connect, output
from memconsole.cli.connect import asked_socket, embedded, socket_of
from memconsole.errors import BadFile, ExitCode, KernelRefused, MemconsoleError, NoControl, UsageError
from memconsole.macro_run import Ran
from memconsole.macros import Macro
from memconsole.model import Capability, GuestKind
from memconsole.source import ReadOnly, Source
from memconsole.units import format_size

if TYPE_CHECKING:
    from memconsole.backend.control import Control
    from memconsole.backend.wire.sockets import Lock
    from memconsole.views.places import Place

STARTING_S = 10.0
"""How long a console waits for another one that is about to answer."""

RECORD_S = 1.0
"""How often an embedded control process records."""


@contextlib.contextmanager
def _cleaned_up() -> Iterator[contextlib.ExitStack]:
    """A stack that is unwound whatever ends this process but SIGKILL; a second signal does not interrupt it.

    A terminal that is closed sends SIGHUP, often twice (from the kernel and from the shell), and embedded guests must
    not be left behind by it.
    """
    ending = False

    def end(number: int, _: object) -> None:
        nonlocal ending
        if not ending:
            ending = True
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.ExitStack() as stack:
            try:
                yield stack
            finally:
                ending = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def console(options: argparse.Namespace) -> int:
    """The console: on the control process where it answers, else on one in this process that answers others too."""
    return _console(options)


def _console(options: argparse.Namespace, record_to: Path | None = None) -> int:
    _on_a_terminal()
    with _cleaned_up() as stack:
        if connect.are_many(options):
            return _many(options, stack)
        if connect.asked_host(options):
            found = stack.enter_context(contextlib.closing(connect.client(options)))
            return _run(found, options, record_to=record_to)
        client, right = (None, None) if options.embedded else _reach(asked_socket(options), stack)
        if client is not None:
            return _run(client, options, record_to=record_to)
        control = _embedded(options, stack, right)
        return _run(control, options, record_to=record_to, on_quit=lambda: _lost_with(control))


def _many(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """The console of many hosts, and that of one as long as one is looked at."""
    from memconsole.views.opening import run_many

    fleet = stack.enter_context(contextlib.closing(connect.fleet_of(options)))
    fleet.start()

    def open_one(host: str, place: Place) -> int:
        return _run(fleet.opened(host), connect.alone(options, host), begin_at=place)

    return run_many(fleet, open_one, interval=options.interval)


def _lost_with(control: Control) -> str:
    """What ends with an embedded control process, in a sentence; empty when nothing does."""
    snapshot = control.snapshot()
    guests = [guest.name for guest in snapshot.guests if guest.kind in {GuestKind.CANARY, GuestKind.QEMU}]
    regions = [region.name for region in snapshot.regions]
    if not guests and not regions:
        return ""
    kept = f"{len(guests)} guests and {len(regions)} regions live in this process and end with it"
    return f"{kept}: {', '.join([*guests, *(name for name in regions if name not in guests)][:8])}"


def _reach(path: Path, stack: contextlib.ExitStack) -> tuple[Source | None, Lock | None]:
    """The control process at a socket; or, where there is none, the right to be it; or neither.

    Of several consoles that start at once one gets the right; the others wait until it answers.
    """
    from memconsole.backend.wire.client import Client

    deadline = time.monotonic() + STARTING_S
    while True:
        with contextlib.suppress(NoControl):
            return stack.enter_context(contextlib.closing(Client(path))), None
        try:
            return None, _right(path)
        except (MemconsoleError, OSError) as error:
            if getattr(error, "code", "") != "AlreadyServing" or time.monotonic() > deadline:
                return None, None
        time.sleep(0.05)


def _right(path: Path) -> Lock:
    from memconsole import paths
    from memconsole.backend.wire import sockets

    paths.make_directory(path.parent, 0o755)
    return sockets.Lock(path.parent / "serve.lock")


def _embedded(options: argparse.Namespace, stack: contextlib.ExitStack, right: Lock | None = None) -> Control:
    """A control process in this one, which also answers on the socket so that commands can reach it."""
    path = socket_of(options)
    if right is not None:
        stack.callback(right.close)
    found = stack.enter_context(contextlib.closing(embedded(record_s=RECORD_S)))
    from memconsole.backend.wire.serving import serve_in_thread

    try:
        if right is None:
            stack.callback(_right(path).close)
        stack.enter_context(contextlib.closing(serve_in_thread(found, path)))
    except (MemconsoleError, OSError) as error:
        output.note(f"memconsole: commands cannot reach this console: {error}")
    return found


def _on_a_terminal() -> None:
    """Nothing, where the console can be: asked before anything is begun.

    Raises:
        UsageError: it cannot.
    """
    for name in ("stdin", "stdout", "stderr"):  # it draws on the last
        if not getattr(sys, name).isatty():
            remedy = "memconsole snapshot shows the same without one"
            raise UsageError("the console needs a terminal", f"{name} is not one", remedy)


def _run(
    found: Source,
    options: argparse.Namespace,
    *,
    record_to: Path | None = None,
    on_quit: Callable[[], str] | None = None,
    begin_at: Place | None = None,
) -> int:
    from memconsole.cli.inside import Inside
    from memconsole.views.opening import run

    shown = ReadOnly(found, "--read-only was given") if options.read_only else found
    command = partial(_command, options)
    return run(
        shown,
        interval=options.interval,
        record_to=record_to,
        command=command,
        on_quit_warning=on_quit,
        command_line=Inside(connect.given_words(options)),
        begin_at=begin_at,
    )


def _command(options: argparse.Namespace, words: Sequence[str]) -> Ran:
    """What a command says that a macro of the console runs: in a process of its own, of the same control process."""
    given = [*connect.given_words(options), *(["--read-only"] if options.read_only else [])]
    asked = [sys.executable, "-m", "memconsole", *given, *words]
    ended = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return Ran(ended.returncode, ended.stdout + ended.stderr)


def open_file(options: argparse.Namespace) -> int:
    """The console on a recorded snapshot."""
    from memconsole.recording import Recording

    _on_a_terminal()
    with contextlib.closing(Recording(options.file)) as found:
        return _run(found, options)


DEMO = """
title = "Demo guests"

[[step]]
do = "guest-start"
name = "canary-a"
memory = "64M"

[[step]]
do = "guest-start"
name = "canary-b"
memory = "32M"

[[step]]
do = "guest-start"
name = "vm-1"
vmm = "qemu"
memory = "128M"
on_failure = "continue"

[[step]]
do = "reserve"
name = "spare"
size = "256M"
prefault = true
"""


def demo(options: argparse.Namespace) -> int:
    """The console on an embedded control process with live guests: canaries, QEMU where it is installed, a region."""
    _on_a_terminal()
    macro: Macro = macros.loads(DEMO, "demo")
    with _cleaned_up() as stack:
        found = _embedded(options, stack)
        results = []
        for result in macro_run.run(macro, found, {}):
            output.note(result.error or (result.outcome.text if result.outcome else result.text))
            results.append(result)
        if all(result.error or result.skipped for result in results):
            macro_run.verdict(macro, results)
        return _run(found, options, on_quit=lambda: _lost_with(found))


def macro_record(options: argparse.Namespace) -> int:
    """The console with recording on; what was done is in the file when it ends."""
    path = Path(options.file)
    if path.exists():
        raise BadFile(f"{path} exists already", "recording does not overwrite a file", "give another name")
    if not path.parent.is_dir():
        raise BadFile(f"{path} cannot be written", f"there is no directory {path.parent}", f"mkdir -p {path.parent}")
    return _console(options, record_to=path)


MARKS = {"yes": "+", "partly": "~", "no": "-"}


def doctor(options: argparse.Namespace) -> int:
    """What a host can do, what is missing, why, and what to do about it; or what is read of this one, to send away."""
    if options.record:
        connect.here_only(options, "--record reads the files of the host it runs on", "run it there, over ssh")
        return _record(Path(options.record))
    if connect.asked_host(options) and not options.origin:
        with contextlib.closing(connect.client(options)) as found:
            return _told(found.doctor(), options)
    from memconsole.backend.diagnose.doctor import doctor as examine

    if options.origin and not Path(options.origin, "proc").is_dir():
        why = "there is no proc in it"
        raise UsageError(f"{options.origin} is no recorded host", why, "memconsole doctor --record DIR makes one")
    return _told(examine(options.origin or "/"), options)


def _told(capabilities: Sequence[Capability], options: argparse.Namespace) -> int:
    if options.json:
        output.json(capabilities)
        return ExitCode.DONE
    for capability in capabilities:
        output.text(f"{MARKS[capability.level]} {capability.title}: {capability.level}")
        if capability.why:
            output.text(f"    {capability.why}")
        if capability.remedy:
            output.text(f"    remedy: {capability.remedy}")
    return ExitCode.DONE


def _record(directory: Path) -> int:
    from memconsole.backend.kernel.record import record

    try:
        written = record(directory)
    except OSError as error:
        raise KernelRefused(str(directory), error.errno or 0, remedy="name another directory, or make room") from None
    output.text(f"{format_size(written)} of this host are in {directory}")
    output.note(
        "it holds the command line, memory map and open files' names of every process, the kernel's command line, and"
        " names and addresses of devices: read it before you send it on. It holds no memory and no environment"
    )
    return ExitCode.DONE
