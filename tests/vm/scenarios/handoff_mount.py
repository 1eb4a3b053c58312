"""A handoff of a host whose memory is also files: after it the same files, owners, modes and frames at the same paths.

c0, vm      a canary with a lazy grant beside its RAM, and a QEMU: their RAM by fd, and as files
db          a process of another user, whose memory is a file
spare       a region that is a file of that user, with no guest but the user
hand        a stock QEMU on a file, of which memconsole knows only the grant: its operator saves it over QMP before the
            jump, and starts it again with -incoming after it
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
from support import lab_guest as lab
from support import lab_host as host
from support.guests import own_frames
from support.waiting import accepts, until

from memconsole.actions import GuestAttach, GuestStart, Map, Reserve
from memconsole.backend.guests import commandline
from memconsole.backend.wire.client import Client
from memconsole.extents import ExtentTable
from memconsole.model import GuestState, Severity

M = 1 << 20
PAGE = 4096
NOBODY, STRANGER = 65534, 65533
MOUNT = Path("/run/memory")
NOTES = lab.SHARE / "notes.json"
SAVED = lab.SHARE / "hand.state"
MONITOR = "/run/hand.qmp"
RAM = 32 * M
COUNTER = 0x8000
"""Where the boot sector below counts, without a rest: only while nothing else wants the processor."""
BOOT_SECTOR = bytes.fromhex("fa 31c0 8ed8 66ff060080 ebf9").ljust(510, b"\0") + b"\x55\xaa"
USES = "import os,sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); print(1,flush=True); input()"
FILES = (
    "guests/c0/ram/c0",
    "guests/vm/ram/vm",
    "guests/db/ram/pool",
    "guests/hand/ram/handram",
    "regions/spare",
    "files/db/spare",
)


def placed(path: Path) -> list[int]:
    """The PFN of every page of a file, through a mapping of our own."""
    fd = os.open(path, os.O_RDWR)
    try:
        return own_frames(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def kept(table: ExtentTable) -> list[int]:
    """The same by the control process's own reading."""
    found = []
    for row in table:
        found += [row.pfn + page for page in range(row.count)]
    return found


def listed() -> dict[str, list[int]]:
    """Owner, group, mode and size of everything that is to be the same afterwards."""
    paths = [*FILES, *sorted({str(Path(path).parent) for path in FILES}), "guests/db", "guests/hand"]
    stats = {path: (MOUNT / path).stat() for path in paths}
    return {path: [stat.st_uid, stat.st_gid, stat.st_mode, stat.st_size] for path, stat in stats.items()}


def digest(path: str) -> str:
    with (MOUNT / path).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        return hashlib.sha256(content).hexdigest()


def count() -> int:
    with (MOUNT / "guests/hand/ram/handram").open("rb") as file, mmap.mmap(file.fileno(), PAGE * 16, prot=1) as content:
        return int.from_bytes(content[COUNTER : COUNTER + 4], "little")


def as_user(uid: int, path: Path, text: str) -> str:
    """What a process of some user reads at the start of a file, after it wrote there; or why it cannot."""
    code = (
        "import mmap,sys\n"
        "try: f=open(sys.argv[1],'r+b')\n"
        "except OSError as e: print(e.strerror); sys.exit()\n"
        "m=mmap.mmap(f.fileno(),0); t=sys.argv[2].encode()\n"
        "if t: m[:len(t)]=t\n"
        "print(bytes(m[:6]).decode())"
    )
    words = [
        "setpriv",
        f"--reuid={uid}",
        f"--regid={uid}",
        "--clear-groups",
        sys.executable,
        "-c",
        code,
        str(path),
        text,
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip()


def attached(client: Client, name: str, words: list[str], region: str = "") -> subprocess.Popen[str]:
    """A shell that is attached, gets a region, and becomes something else; as docs/service.md has it."""
    shell = ["sh", "-c", 'read go; exec "$@"', "sh", *words]
    process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    client.apply(GuestAttach(name, process.pid))
    if region:
        client.apply(Map(region, name, gpa=0))
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process


def machine(accelerator: str, *more: str) -> list[str]:
    """The operator's own command line: stock QEMU on the path; what one accelerator saved, another does not load."""
    path = MOUNT / "guests/hand/ram/handram"
    words = ["nice", "-n", "19", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-accel", accelerator]
    words += ["-machine", "q35,memory-backend=ram", "-m", f"size={RAM}B", "-qmp", f"unix:{MONITOR},server=on,wait=off"]
    words += ["-object", f"memory-backend-file,id=ram,size={RAM},mem-path={path},share=on,align=2M"]
    return [*words, "-drive", f"file={lab.SHARE}/disk,format=raw,if=ide,readonly=off", "-boot", "c", *more]


def monitor(*commands: tuple[str, dict[str, Any]]) -> Any:
    """Say these to the QEMU that was started by hand; the last answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(host.PATIENCE)
        connection.connect(MONITOR)
        with connection.makefile("rw") as lines:
            lines.readline()
            for name, arguments in (("qmp_capabilities", {}), *commands):
                lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
                lines.flush()
                while "event" in (reply := json.loads(lines.readline())):
                    pass
                if "error" in reply:
                    raise AssertionError(f"{name}: {reply['error']}")
    return reply["return"]


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}),
    ("migrate-set-parameters", {"mode": "cpr-reboot"}),
]


def saved() -> bool:
    """Whether it has written down what it is besides its RAM."""
    status = monitor(("query-migrate", {}))["status"]
    assert status != "failed", status
    return bool(status == "completed")


def before() -> None:
    client = host.serve("--mount", str(MOUNT))
    client.apply(GuestStart("c0", memory=16 * M))
    client.apply(Reserve("more", 8 * M))
    lazy = client.apply(Map("more", "c0", gpa=1 << 30, lazy=True)).subject
    client.apply(GuestStart("vm", vmm="qemu", memory=64 * M))
    client.apply(Reserve("spare", 4 * M, path="db/spare", owner=str(NOBODY), mode="0640", quota=8 * M))
    client.apply(Reserve("pool", 4 * M))
    with (lab.SHARE / "disk").open("wb") as disk:
        disk.write(BOOT_SECTOR.ljust(M, b"\0"))
    client.apply(Reserve("handram", RAM))
    user = attached(client, "db", [sys.executable, "-c", USES], "pool")
    assert user.stdout is not None
    assert user.stdout.readline() == "1\n"
    accelerator = commandline.accelerator()
    attached(client, "hand", machine(accelerator), "handram")
    until(lambda: count() > 1000, "the guest that was started by hand counts", host.PATIENCE)
    client.snapshot()  # it finds that db's process is of another user
    wrote = as_user(NOBODY, MOUNT / "guests/db/ram/pool", "carry!")
    mine = as_user(NOBODY, MOUNT / "files/db/spare", "mine!!")
    lab.say("users-file", mine == "mine!!", wrote=mine)
    lab.say("files", wrote == "carry!" and (MOUNT / "guests/db/ram/pool").stat().st_uid == NOBODY, wrote=wrote)
    monitor(*WAYS, ("migrate", {"uri": f"file:{SAVED}"}))
    until(saved, "its state is saved by hand", host.PATIENCE)
    beats = host.beaten(client, "c0")
    plan = host.plan(client, host.action())
    bad = {each.id: each.observed for each in plan.conditions if not each.ok}
    wanted = {"lazy-granted", "guest-process", "guest-foreign", "guest-clock-behind", "base-pages"}
    lab.say("check", not plan.refusals and wanted >= set(bad) >= {"lazy-granted", "guest-process"}, bad=bad)
    lab.say("lazy", f"{lazy} of c0" in bad.get("lazy-granted", ""), faults=str(client.snapshot().grants))
    notes = {
        "accelerator": accelerator,
        "beats": beats.beats,
        "lazy": lazy,
        "tree": listed(),
        "count": count(),
        "pool": digest("guests/db/ram/pool"),
        "handram": digest("guests/hand/ram/handram"),
        "size": SAVED.stat().st_size,
    }
    NOTES.write_text(json.dumps(notes))
    client.apply(host.action())
    raise AssertionError("the handoff returned")


def after() -> None:
    code, log = host.early()
    lab.say("early", code == "0", code=code, log=log)
    client = host.serve()
    gone = [each.remedy for each in client.snapshot().findings if each.id == "mount-not-back"]
    lab.say("not-back", gone == [f"memconsole serve --mount {MOUNT}"], gone=gone)
    host.end(client)
    client = host.serve("--mount", str(MOUNT))
    notes = json.loads(NOTES.read_text())
    report = client.snapshot().handoff
    assert report is not None
    lab.say("same", len(report.regions) == 6 and all(each.same for each in report.regions), regions=str(report.regions))
    tree = listed()
    lab.say("tree", tree == notes["tree"], now=tree, was=notes["tree"])
    frames = {path: placed(MOUNT / path) for path in FILES}
    for path, found in frames.items():
        with client.extents(f"region:{Path(path).name}") as table:
            lab.say(f"frames-{Path(path).name}", found == kept(table) and 0 not in found, pages=len(found))
    contents = {name: digest(path) == notes[name] for name, path in (("pool", FILES[2]), ("handram", FILES[3]))}
    lab.say("contents", all(contents.values()), contents=contents)
    canary(client, notes)
    process(client)
    by_hand(client, notes, frames["guests/hand/ram/handram"])
    bad = [each for each in host.heard(client).findings if each.severity is not Severity.INFO]
    lab.say("findings", not bad, findings=msgspec.to_builtins(bad))
    lab.say("end")


def canary(client: Client, notes: dict[str, Any]) -> None:
    """It goes on; its lazy grant is one like any other now, and every byte of it is right."""
    progress = host.beaten(client, "c0", notes["beats"])
    shown = client.snapshot()
    grant = next(each for each in shown.grants if each.id == notes["lazy"])
    told = shown.handoff is not None and any(notes["lazy"] in note for note in shown.handoff.notes)
    lab.say("canary", progress.wrong == 0, progress=str(progress))
    lab.say("lazy-ended", not grant.lazy and grant.faults is None and told, grant=str(grant), report=str(shown.handoff))
    host.runs(client, "vm")


def process(client: Client) -> None:
    """Its owner reaches its bytes by the same path, nobody else does; another process takes its place."""
    path = MOUNT / "guests/db/ram/pool"
    owner, other = as_user(NOBODY, path, ""), as_user(STRANGER, path, "")
    mine, others = (as_user(uid, MOUNT / "files/db/spare", "") for uid in (NOBODY, STRANGER))
    lab.say("users-file-back", (mine, others) == ("mine!!", "Permission denied"), owner=mine, other=others)
    lab.say("owner", owner == "carry!" and other == "Permission denied", owner=owner, other=other)
    user = attached(client, "db", [sys.executable, "-c", USES])
    assert user.stdout is not None
    assert user.stdout.readline() == "1\n"
    found = host.guest(host.fresh(client), "db")
    lab.say("attached-again", found.pid == user.pid and found.grants != (), found=str(found))
    until(lambda: bool(host.fresh(client)) and path.stat().st_uid == NOBODY, "the file is its process's", host.PATIENCE)


def by_hand(client: Client, notes: dict[str, Any], frames: list[int]) -> None:
    """The operator starts QEMU again on the same path, from what it saved: it counts on from where it stood."""
    lab.say("hand-gone", host.guest(client.snapshot(), "hand").state is GuestState.GONE)
    stood = count()
    attached(client, "hand", machine(notes["accelerator"], "-S", "-incoming", "defer"))
    until(lambda: accepts(Path(MONITOR)), "its monitor", host.PATIENCE)
    monitor(*WAYS, ("migrate-incoming", {"uri": f"file:{SAVED}"}))
    until(
        lambda: monitor(("query-status", {}))["status"] in {"paused", "postmigrate"},
        "its state is loaded",
        host.PATIENCE,
    )
    still = count()
    monitor(("cont", {}))
    until(lambda: count() > stood + 1000, "it counts on", host.PATIENCE)
    fine = stood == still == notes["count"] and placed(MOUNT / "guests/hand/ram/handram") == frames
    lab.say("by-hand", fine, was=notes["count"], stood=stood, still=still, now=count())
    found = host.guest(client.snapshot(), "hand")
    lab.say("hand-back", found.state is GuestState.RUNNING and found.grants != (), hand=str(found))


(before if lab.stage() == 1 else after)()
