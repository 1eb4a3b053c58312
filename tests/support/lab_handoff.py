"""What the scenarios of handoffs share inside the lab: the control process, who counts on, and the jump."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import lab_guest as lab

from memconsole import paths
from memconsole.actions import HandoffRun
from memconsole.backend.wire.client import Client
from memconsole.model import Guest, GuestState, Progress, Snapshot

STATE = "/run/state"
PATIENCE = 120.0
TOOL = str(Path(sys.executable).parent / "memconsole")


def serve(*words: str, tool: tuple[str, ...] = (TOOL,)) -> Client:
    """The control process, in the background, and a connection to it."""
    command = [*tool, "serve", "--state-dir", STATE, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"serve: {done.stderr}")
    return Client(paths.control_socket())


def end(client: Client) -> None:
    """Have the control process end in order; guests and memory stay."""
    client.close()
    listed = subprocess.run(["pgrep", "-f", "serve --state-dir"], capture_output=True, text=True, check=True).stdout
    for pid in map(int, listed.split()):
        os.kill(pid, 15)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)


def guest(shown: Snapshot, name: str) -> Guest:
    """A guest of a Snapshot."""
    return next(each for each in shown.guests if each.name == name)


def beaten(client: Client, name: str, least: int = 0) -> Progress:
    """A canary's own word, once it counts on."""
    deadline = time.monotonic() + PATIENCE
    first = None
    while time.monotonic() < deadline:
        progress = guest(client.snapshot(), name).progress
        if progress is not None:
            if first is not None and progress.beats > max(first, least):
                return progress
            first = progress.beats if first is None else first
        time.sleep(0.1)
    raise AssertionError(f"{name} does not count: {guest(client.snapshot(), name)}")


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that will happen."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain: {what}")
        time.sleep(0.1)


def runs(client: Client, name: str) -> None:
    """Wait until a guest says that it runs."""
    until(lambda: guest(client.snapshot(), name).state is GuestState.RUNNING, f"{name} runs")


def action() -> HandoffRun:
    """Into the next stage, with the lab's own kernel and initrd."""
    share = str(lab.SHARE)
    return HandoffRun(f"{share}/bzImage", f"{share}/initrd", lab.next_command_line())


def early() -> tuple[str, str]:
    """Exit status of memconsole-resume in this kernel, and what it said."""
    code, log = (Path(f"/run/early.{what}").read_text().strip() for what in ("code", "log"))
    return code, log


def told(main: Callable[[], None]) -> None:
    """Run a scenario; whatever ends it, the host is told."""
    try:
        main()
    except Exception as error:  # noqa: BLE001 - whatever it is, the host is told
        logs = {path.name: path.read_text()[-3000:] for path in Path(STATE).glob("*.log")}
        lab.say("exception", ok=False, text=f"{error}", trace=traceback.format_exc()[-3000:], logs=logs)
