"""Regions of the dax store: made, granted, taken back, and found again by a kernel that hands nothing over.

arena N         so many kexecs
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

from support import lab_guest as lab
from support import lab_host as host

from memconsole import actions as do
from memconsole import paths
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import Outcome

M = 1 << 20
SIZE = 32 * M
NOTE = lab.SHARE / "note"
"""What the next kernel is to find: digests and frames, by region."""
LAST = int(sys.argv[1]) + 1


def contents(client: Client, region: str) -> str:
    """A digest of all bytes of a region."""
    del client
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    try:
        fd, _ = keeper.get(f"region:{region}:0")
        with os.fdopen(fd, "rb") as file:
            file.seek(0)  # where it stands is the same for all who have it
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        keeper.close()


def make(client: Client) -> None:
    code, text = host.said("arena", "list", "--json")
    (here,) = json.loads(text)
    lab.say("range", here["holds"] == "nothing" and here["words"] == "memmap=256M!1G" and not code, list=text)
    lab.say("nothing-yet", host.refused(client, do.Reserve("r", SIZE, "dax")) == "NoArena")
    outcome = client.apply(do.ArenaCreate("lab"))
    lab.say("created", "arena lab is on /dev/pmem0" in outcome.text, text=outcome.text)
    lab.say("again", host.refused(client, do.ArenaCreate("more")) == "InUse")
    client.apply(do.Reserve("still", SIZE, "dax", prefault=True))
    client.apply(do.GuestStart("can", memory=SIZE, store="dax"))
    wanted = {"lazy": do.Map("still", "can", lazy=True), "small": do.Reserve("odd", M, "dax")}
    names = {name: host.refused(client, action) for name, action in wanted.items()}
    lab.say("refused", names == {"lazy": "NotLazy", "small": "BadSize"}, names=names)
    runs = {name: host.frames(client, f"region:{name}") for name in ("still", "can")}
    inside = all(len(each) == 1 and 0x40000 <= each[0][0] < 0x50000 and not each[0][0] % 512 for each in runs.values())
    lab.say("frames", inside, runs=runs)
    seen = host.beaten(client, "can")
    pid = host.guest(client.snapshot(), "can").pid
    with client.extents("guest:can") as table:
        mapped = [(row.pfn, row.count) for row in table]
    lab.say("mapped", seen.wrong == 0 and mapped[0][0] == runs["can"][0][0], pid=pid, mapped=mapped[:4])


def taken_back(client: Client) -> Outcome:
    """A grant of the region that stands still, whose guest does not give it back by itself."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, start_new_session=True
    )
    client.apply(do.GuestAttach("proc", holder.pid))
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    fd, _ = keeper.get("region:still:0")
    keeper.close()
    os.pwrite(fd, b"kept", 5 * M)
    grant = client.apply(do.Map("still", "proc")).subject
    before = contents(client, "still")
    outcome = client.apply(do.Revoke(grant))
    grown = ""
    try:
        os.pwrite(fd, b"again", SIZE)
        grown = "written"
    except OSError as error:
        grown = str(error)
    same = contents(client, "still") == before
    lab.say(
        "revoked",
        same and os.fstat(fd).st_size == 0,
        grown=grown,
        report=str(outcome.revoke),
        runs=host.frames(client, "region:still"),
    )
    os.close(fd)
    holder.kill()
    holder.wait()
    client.apply(do.GuestStop("proc"))
    return outcome


def first() -> None:
    client = host.serve()
    make(client)
    taken_back(client)
    beats = host.beaten(client, "can").beats
    client = host.killed(client)
    seen = host.beaten(client, "can", beats)
    lab.say("killed", seen.wrong == 0 and not host.findings(client), findings=host.findings(client), beats=seen.beats)
    code, text = host.said("arena", "check", "--json")
    lab.say("checked", code == 0, text=text)
    client.apply(do.GuestStop("can"))
    note(client)


def note(client: Client) -> None:
    found = {name: (contents(client, name), host.frames(client, f"region:{name}")) for name in ("still", "can")}
    NOTE.write_text(json.dumps(found))
    client.close()
    lab.load()
    lab.jump()


def later() -> None:
    client = host.serve()
    before = json.loads(NOTE.read_text())
    found = {region.name: str(region.store) for region in client.snapshot().regions}
    lab.say("found", found == {"still": "dax", "can": "dax"}, found=found, findings=host.findings(client))
    runs = {name: [list(row) for row in host.frames(client, f"region:{name}")] for name in before}
    now = {name: [contents(client, name), runs[name]] for name in before}
    lab.say("same", now == before, wrong=[name for name in before if now.get(name) != before[name]])
    if lab.stage() < LAST:
        note(client)
    for name in before:
        client.apply(do.Release(name))
    code, text = host.said("arena", "list", "--json")
    lab.say("released", json.loads(text)[0]["regions"] == [] and not code, text=text)
    lab.say("removed", client.apply(do.ArenaRemove("lab")).text)
    _, text = host.said("arena", "list", "--json")
    lab.say("empty", json.loads(text)[0]["holds"] == "nothing", text=text)
    host.end(client)
    lab.say("end")


try:
    first() if lab.stage() == 1 else later()
except MemconsoleError as error:
    lab.say("failed", ok=False, code=error.code, what=str(error))
    raise
