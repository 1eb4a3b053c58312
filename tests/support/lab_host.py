"""A control process inside the lab, and canaries that are held to what they were: for scenarios of handoffs."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from memconsole import paths
from memconsole.actions import Action, HandoffRun
from memconsole.backend import embedded as embedding
from memconsole.backend import steps
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError, NoControl, Refused
from memconsole.model import Guest, GuestState, HandoffReport, HandoffState, Plan, Progress, Snapshot
from support import lab_guest as lab
from support.waiting import until

TOOL = str(Path(sys.executable).parent / "memconsole")
T = TypeVar("T")
STATE = "/run/state"
RECORD_S = 30
"""Seconds between recorded Snapshots: one that is taken every second takes half of an emulated processor."""
PATIENCE = 900.0
"""Seconds for what will happen: every instruction is emulated, maybe by a busy machine."""
MADV_POPULATE_WRITE = 23
SHMEM_THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def serve(*words: str, fault: str = "", tool: Sequence[str] = (TOOL,)) -> Client:
    """The control process, which ends itself at a fault point; ``words`` are more of its options."""
    done = _started(words, fault, tool)
    if done.returncode:
        raise AssertionError(f"serve: {done.returncode}: {done.stderr}")
    return connected()


def connected() -> Client:
    """A client of a control process that runs, which may be slow to greet: an operator would try once more, too."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Client(paths.control_socket())
        except NoControl:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def try_to_serve(fault: str) -> Client | None:
    """The control process, or None if it died at a fault point before it answered."""
    return None if _started((), fault, (TOOL,)).returncode else Client(paths.control_socket())


def _started(words: Sequence[str], fault: str, tool: Sequence[str]) -> subprocess.CompletedProcess[str]:
    env = os.environ | ({steps.FAULT_VARIABLE: fault} if fault else {})
    command = [*tool, "serve", "--state-dir", STATE, "--record", str(RECORD_S), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def end(client: Client) -> None:
    """Have the control process end in order; guests and memory stay."""
    _ended(client, signal.SIGTERM)


def killed(client: Client, *words: str) -> Client:
    """The control process that comes after one that was killed; ``words`` are more of its options."""
    _ended(client, signal.SIGKILL)
    return serve(*words)


def _ended(client: Client, number: signal.Signals) -> None:
    client.close()
    pid = service_pid()
    os.kill(pid, number)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.05)


def service_pid() -> int:
    """The process of the service."""
    pids = subprocess.run(["pgrep", "-f", "serve --state-dir"], capture_output=True, text=True, check=True)
    return int(pids.stdout.split()[0])


def said(*words: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    from memconsole.cli import main  # most scenarios have no command, and each import takes its time here

    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(list(words))
    return code, out.getvalue()


def refused(client: Client, action: Action) -> str:
    """By what name an action is refused."""
    return ", ".join(each.code for each in client.plan(action).refusals)


def frames(client: Client, key: str) -> list[tuple[int, int]]:
    """The first frame and the length of every run of a map (``region:NAME``, ``guest:NAME``)."""
    with client.extents(key) as found:
        return [(row.pfn, row.count) for row in found]


def killed_at(client: Client, point: str) -> tuple[Client, str]:
    """Have another control process die at a point of a handoff; the one that comes after it, and how the call ended."""
    end(client)
    client = serve(fault=point)
    try:
        client.apply(action())
        died = "it came back"
    except MemconsoleError as error:
        died = error.code
    client.close()
    return serve(), died


def all_count_on(client: Client, names: Iterable[str], least: dict[str, int] | None = None) -> str:
    """Why not every canary counts on, from ``least`` beats; empty if every one does."""
    deadline = time.monotonic() + PATIENCE
    first = dict(least or {})
    waiting = set(names)
    while waiting and time.monotonic() < deadline:
        for guest in shown(client).guests:
            if guest.name in waiting and guest.progress is not None and guest.state is GuestState.RUNNING:
                if guest.progress.wrong:
                    return f"{guest.name} has wrong bytes"
                if guest.progress.beats > first.setdefault(guest.name, guest.progress.beats):
                    waiting.discard(guest.name)
        time.sleep(0.1)
    return f"{waiting} do not go on" if waiting else ""


def beats(client: Client, names: Iterable[str]) -> dict[str, int]:
    """How often each canary has counted."""
    found = {guest.name: guest.progress for guest in shown(client).guests}
    return {name: progress.beats for name in names if (progress := found.get(name)) is not None}


def held() -> list[str]:
    """What the keeper holds."""
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    try:
        return keeper.names()
    finally:
        keeper.close()


def plan(client: Client, action: Action) -> Plan:
    """A plan; unpacking an image takes its time where a processor is emulated by a busy one, and is done once."""
    for _ in range(20):
        with contextlib.suppress(Refused, NoControl):  # its deadline, and its client's
            return client.plan(action)
    return client.plan(action)


def action() -> HandoffRun:
    """The lab's kernel once more, with the stage counted up."""
    share = str(lab.SHARE)
    return HandoffRun(f"{share}/bzImage", f"{share}/initrd", lab.next_command_line())


def patiently(asked: Callable[[], T]) -> T:
    """What a control process answers; where it is late on a machine that is busy, it is asked once more."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return asked()
        except (Refused, NoControl) as error:  # its deadline, and its client's
            if (isinstance(error, Refused) and error.code != "Deadline") or time.monotonic() > deadline:
                raise


def shown(client: Client) -> Snapshot:
    """A Snapshot, however late."""
    return patiently(client.snapshot)


def hand_off(client: Client) -> NoReturn:
    """Jump; where a guest is late to answer on a machine that is busy, nothing was done, and it is tried once more."""
    for _ in range(20):
        try:
            client.apply(action())
        except Refused as error:
            if error.code != "GuestSilent":
                raise
        else:
            break
    raise AssertionError("the handoff did not jump")


def guest(snapshot: Snapshot, name: str) -> Guest:
    """A guest of a Snapshot."""
    return next(each for each in snapshot.guests if each.name == name)


def fresh(client: Client) -> Snapshot:
    """A Snapshot that was begun after this was asked."""
    begun = time.time_ns()
    while (snapshot := shown(client)).taken_ns < begun:
        time.sleep(0.1)
    return snapshot


def heard(client: Client) -> Snapshot:
    """A Snapshot to which everybody answered, who may be late on a machine that is busy; else the last one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        snapshot = fresh(client)
        late = any(each.id.endswith(("-silent", "-unseen")) for each in snapshot.findings)
        if not late or time.monotonic() > deadline:
            return snapshot
        time.sleep(0.5)


def findings(client: Client) -> list[tuple[str, str]]:
    """What is wrong now, by id and in words."""
    return [(each.id, each.observed) for each in heard(client).findings if each.severity != "info"]


def beaten(client: Client, name: str, least: int = 0) -> Progress:
    """A canary's own word, once it counts on."""
    deadline = time.monotonic() + PATIENCE
    first = None
    while time.monotonic() < deadline:
        progress = guest(shown(client), name).progress
        if progress is not None:
            if first is not None and progress.beats > max(first, least):
                return progress
            first = progress.beats if first is None else first
        time.sleep(0.1)
    raise AssertionError(f"{name} does not count: {guest(shown(client), name)}")


def reported(client: Client) -> HandoffReport:
    """The report of a handoff that has landed."""
    report = shown(client).handoff
    assert report is not None
    assert report.state is HandoffState.DONE, report
    return report


def runs(client: Client, name: str) -> None:
    """Wait until a guest says that it runs."""
    until(lambda: guest(shown(client), name).state is GuestState.RUNNING, f"{name} runs", PATIENCE)


def early() -> tuple[str, str]:
    """Exit status of memconsole-resume in this kernel, and what it said."""
    code, log = (Path(f"/run/early.{what}").read_text().strip() for what in ("code", "log"))
    return code, log


@contextlib.contextmanager
def embedded() -> Iterator[Control]:
    """A control process within this one, which ends with it."""
    Path("/run/memconsole").mkdir(exist_ok=True)
    with contextlib.closing(embedding.embedded(Path("/run/memconsole/embedded"))) as found:
        yield found


def page_sizes() -> Iterator[str]:
    """The pages that memory can have here, one after the other; what is populated meanwhile has such."""
    for page, setting in (("4K", "never"), ("2M", "advise")):
        SHMEM_THP.write_text(setting)
        yield page


def filled(size: int) -> int:
    """A memfd with every page in place, huge ones where they can be had; the caller closes it."""
    fd = os.memfd_create("filled", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(MADV_POPULATE_WRITE)
    return fd
