"""A handoff of a host whose databases are services: each saves, ends, and is warm in the next kernel by itself.

mc    memcached -e, told by SIGUSR1; the next kernel's clock is an hour behind at first, and it waits for that
lm    LMDB, and sq SQLite: processes of Python with their file on the mount, which end by SIGTERM
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from support import databases
from support import lab_guest as lab
from support import lab_host as host
from support.waiting import accepts, until

from memconsole.actions import GuestResume, GuestService, Map, Reserve
from memconsole.backend.wire.client import Client
from memconsole.model import GuestState, HandoffState

M = 1 << 20
MOUNT = Path("/run/memory")
HOME, LOCKS = lab.SHARE / "home", Path("/run/lm")
SOCKET = "/run/mc.sock"
NOTES = lab.SHARE / "notes.json"
ITEMS, ROWS, SIZE = (int(word) for word in sys.argv[1:4])
HOUR = 3600
AT_ONCE = 500


def database(client: Client, name: str, kind: str, where: Path) -> None:
    out = Path(f"/run/{name}.out")
    command = shlex.join(databases.words(kind, where, SIZE, ROWS, out))
    client.apply(GuestService(name, exec=command, ready=f"test -e {out}", within=host.PATIENCE))
    client.apply(Map(name, name))
    client.apply(GuestResume(name))


def linked() -> None:
    """LMDB has its lock in a directory of its own, which need not outlive the kernel; 9p maps no file shared."""
    LOCKS.mkdir()
    (LOCKS / "data.mdb").symlink_to(MOUNT / "guests/lm/ram/lm")


def told(name: str) -> list[float]:
    return databases.told(Path(f"/run/{name}.out"))


def say(text: str, end: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(host.PATIENCE)
        connection.connect(SOCKET)
        connection.sendall(text.encode())
        heard = bytearray()
        while not heard.endswith(end.encode()):
            heard += connection.recv(1 << 20)
        return heard.decode()


def before() -> None:
    client = host.serve("--mount", str(MOUNT))
    for region in ("mc", "lm", "sq"):
        client.apply(Reserve(region, SIZE))
    for region, kind in (("lm", "lmdb"), ("sq", "sqlite")):
        with (MOUNT / "regions" / region).open("r+b") as into:
            into.write(databases.seed(kind, SIZE))
    HOME.mkdir()
    (HOME / "mc").symlink_to(MOUNT / "guests/mc/ram/mc")
    linked()
    command = f"memcached -u root -s {SOCKET} -m {SIZE // M} -t 1 -v -e {HOME}/mc"
    ready = f"test -S {SOCKET}"
    client.apply(GuestService("mc", exec=command, save_signal="SIGUSR1", ready=ready, within=host.PATIENCE))
    client.apply(Map("mc", "mc"))
    client.apply(GuestResume("mc"))
    until(lambda: accepts(Path(SOCKET)), "memcached listens", host.PATIENCE)
    began = time.monotonic()
    say("".join(f"set k{n} 0 0 96 noreply\r\n{f'{n:08d}' * 12}\r\n" for n in range(ITEMS)) + "version\r\n", "\r\n")
    took = {"mc": time.monotonic() - began}
    database(client, "lm", "lmdb", LOCKS)
    database(client, "sq", "sqlite", MOUNT / "guests/sq/ram/sq")
    took |= {name: told(name)[2] for name in ("lm", "sq")}
    lab.say("filled", told("lm")[:2] == told("sq")[:2] == [0, ROWS], took=took)
    plan = host.plan(client, host.action())
    bad = {each.id: each.observed for each in plan.conditions if not each.ok}
    lab.say("check", not plan.refusals and not {"guest-process", "guest-cold"} & set(bad), bad=bad)
    NOTES.write_text(json.dumps(took))
    client.apply(host.action())
    raise AssertionError("the handoff returned")


def runs(client: Client, name: str) -> bool:
    return host.guest(client.snapshot(), name).state is GuestState.RUNNING


def after() -> None:
    code, log = host.early()
    lab.say("early", code == "0", code=code, log=log)
    linked()
    now = time.time()
    time.clock_settime(time.CLOCK_REALTIME, now - HOUR)
    client = host.serve("--mount", str(MOUNT))
    for name in ("lm", "sq"):
        until(Path(f"/run/{name}.out").exists, f"{name} answers", host.PATIENCE)
    held = not runs(client, "mc") and not Path(SOCKET).exists()
    time.clock_settime(time.CLOCK_REALTIME, time.time() + HOUR)
    lab.say("held", held)
    until(lambda: bool(answers()), "memcached is started, and answers", host.PATIENCE)
    warm = {"mc": age(client, "mc"), "lm": told("lm")[2], "sq": told("sq")[2]}
    wrong = sum(missing(start) for start in range(0, ITEMS, max(AT_ONCE, ITEMS // 20)))
    lab.say("memcached", not wrong, wrong=wrong, log=logged("mc"))
    lab.say("databases", told("lm")[:2] == told("sq")[:2] == [ROWS, ROWS], lm=told("lm"), sq=told("sq"))
    until(lambda: all(each.back for each in reported(client)), "all are back in the report", host.PATIENCE)
    lab.say("report", [each.name for each in reported(client)] == ["mc", "lm", "sq"], guests=str(reported(client)))
    cold: dict[str, Any] = json.loads(NOTES.read_text())
    lab.say("figures", cold=cold, warm=warm)
    found = host.findings(client)
    lab.say("findings", not found, findings=found)
    lab.say("end")


def missing(start: int) -> int:
    """How many of the items from ``start`` on memcached does not have; so few that their answers fit into a socket."""
    asked = range(start, min(ITEMS, start + AT_ONCE))
    heard = say("".join(f"get k{n}\r\n" for n in asked) + "mn\r\n", "MN\r\n")
    return sum(f"VALUE k{n} 0 96\r\n{f'{n:08d}' * 12}\r\n" not in heard for n in asked)


def age(client: Client, name: str) -> float:
    """For how many seconds its process has run."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - (host.guest(client.snapshot(), name).start_ticks or 0) / os.sysconf("SC_CLK_TCK")


def answers() -> str:
    try:
        return say("version\r\n", "\r\n")
    except OSError:
        return ""


def logged(name: str) -> str:
    return Path(f"/run/memconsole/vmm/{name}/log").read_text(errors="replace")[-400:]


def reported(client: Client) -> Any:
    report = client.snapshot().handoff
    assert report is not None
    assert report.state is HandoffState.DONE
    return report.guests


(before if lab.stage() == 1 else after)()
