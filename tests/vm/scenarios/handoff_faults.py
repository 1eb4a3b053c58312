"""kill -9 of the control process at fault points of a real handoff: `handoff_faults all`, or a rotating sample of N."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import lab_guest as lab

from memconsole import paths
from memconsole.actions import GuestStart, HandoffRun
from memconsole.backend import steps
from memconsole.backend.custody import KeeperCustody
from memconsole.backend.handoff import image
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import GuestState

TOOL = str(Path(sys.executable).parent / "memconsole")
GUESTS = ("c0", "c1")
PATIENCE = 60.0


def serve(fault: str = "") -> Client:
    """The control process, which ends itself at a fault point."""
    env = os.environ | ({steps.FAULT_VARIABLE: fault} if fault else {})
    done = subprocess.run(
        [TOOL, "serve", "--state-dir", "/run/state"], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(f"serve: {done.stderr}")
    return Client(paths.control_socket())


def end(client: Client) -> None:
    """Have the control process end in order; guests and memory stay."""
    client.close()
    pid = int(
        subprocess.run(["pgrep", "-f", "memconsole serve"], capture_output=True, text=True, check=True).stdout.split()[
            0
        ]
    )
    os.kill(pid, 15)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.05)


def all_count_on(client: Client) -> str:
    """Why not every guest counts on; empty if every one does."""
    deadline = time.monotonic() + PATIENCE
    first: dict[str, int] = {}
    waiting = set(GUESTS)
    while waiting and time.monotonic() < deadline:
        for guest in client.snapshot().guests:
            if guest.name in waiting and guest.progress is not None and guest.state is GuestState.RUNNING:
                if guest.progress.wrong:
                    return f"{guest.name} has wrong bytes"
                if guest.progress.beats > first.setdefault(guest.name, guest.progress.beats):
                    waiting.discard(guest.name)
        time.sleep(0.1)
    return f"{waiting} do not go on" if waiting else ""


def left() -> list[str]:
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    try:
        return [name for name in keeper.names() if name.startswith(("session:", "state:")) or name == "manifest"]
    finally:
        keeper.close()


def action() -> HandoffRun:
    share = str(lab.SHARE)
    return HandoffRun(f"{share}/bzImage", f"{share}/initrd", lab.next_command_line())


def chosen(points: tuple[str, ...]) -> list[str]:
    """All but those the jump itself leaves nobody behind at; or as many as were asked for, others every day."""
    before = [point for point in points if point != "handoff-run.jump.after"]
    if sys.argv[1] == "all":
        return before
    count, day = int(sys.argv[1]), int(time.time() // 86400)
    return [before[(day + row * len(before) // count) % len(before)] for row in range(count)]


def main() -> None:
    client = serve()
    for name in GUESTS:
        client.apply(GuestStart(name, memory=8 << 20))
    points = steps.fault_points(client.plan(action()))
    lab.say("points", len(points) >= 20, points=points)
    for point in chosen(points):
        end(client)
        client = serve(point)
        try:
            client.apply(action())
            died = "it came back"
        except MemconsoleError as error:
            died = error.code
        client.close()
        client = serve()
        why = all_count_on(client)
        fine = not why and not left() and not image.loaded()
        lab.say(
            f"killed-{point}", fine and died == "ControlDied", died=died, why=why, left=left(), loaded=image.loaded()
        )
    lab.say("end")


try:
    main()
except Exception as error:  # noqa: BLE001 - whatever it is, the host is told
    log = Path("/run/state/serve.log")
    lab.say("exception", ok=False, text=f"{error}", trace=traceback.format_exc()[-3000:], log=log.read_text()[-3000:])
