"""Regions of the devdax and the raw store: memory that says what is in it, found again by the next kernel.

devdax N [qemu]     so many kexecs; a QEMU, too
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from support import lab_guest as lab
from support import lab_host as host
from support import lab_raw
from support.guests import AgentProcess
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.stores import ranges
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import RevokeOutcome, Rung

M = 1 << 20
SIZE = 8 * M
NOTE = lab.SHARE / "note"
"""What the next kernel is to find: digests and frames, by region."""
LAST = int(sys.argv[1]) + 1


def contents(region: str) -> str:
    """A digest of all bytes of a region, as ``memconsole copy`` has them."""
    path = Path("/run/copy")
    code, text = host.said("copy", region, str(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path.unlink()
    return digest if not code else text


def make(client: Client) -> None:
    lab.say("nothing-yet", host.refused(client, do.Reserve("r", SIZE, "devdax")) == "NoArena")
    outcome = client.apply(do.ArenaCreate("raw", devdax=True))
    (device,) = ranges.devdax()
    lab.say("created", "arena raw is on /dev/dax" in outcome.text, text=outcome.text, device=device)
    code, text = host.said("arena", "list", "--json")
    lab.say("listed", not code and json.loads(text)[0]["holds"] == "arena raw", text=text)
    lab.say("again", host.refused(client, do.ArenaCreate("more", devdax=True)) == "HoldsArena")
    try:
        ranges.opened(device)
        second = "opened"
    except MemconsoleError as error:
        second = error.code
    lab.say("second", second == "InUse", second=second)
    client.apply(do.Reserve("still", SIZE, "devdax"))
    client.apply(do.GuestStart("can", memory=SIZE, store="devdax"))
    wanted = {"lazy": do.Map("still", "can", lazy=True), "odd": do.Reserve("odd", M, "devdax")}
    names = {name: host.refused(client, action) for name, action in wanted.items()}
    lab.say("refused", names == {"lazy": "NotLazy", "odd": "BadSize"}, names=names)
    runs = {name: host.frames(client, f"region:{name}") for name in ("still", "can")}
    apart = all(len(each) == 1 and 0x40000 <= each[0][0] < 0x50000 and not each[0][0] % 512 for each in runs.values())
    lab.say("frames", apart and runs["still"] != runs["can"], runs=runs)
    seen = host.beaten(client, "can")
    mapped = host.frames(client, "guest:can")
    lab.say("mapped", seen.wrong == 0 and mapped[0][0] == runs["can"][0][0], mapped=mapped[:4])


def taken_back(client: Client) -> None:
    """A region whose guest does not give it back; a guest that is a stranger does not get it beside a VM."""
    with AgentProcess(Path("/run/memconsole/agents")) as agent:
        client.apply(do.GuestAttach("proc", agent.process.pid))
        lab.say("stranger", host.refused(client, do.Map("still", "proc")) == "Shared")
        client.apply(do.GuestStop("can"))
        grant = client.apply(do.Map("still", "proc")).subject
        agent.do("wait", grant)
        agent.do("write", grant, "kept")
        agent.do("hold", grant)
        lab.say("beside", host.refused(client, do.GuestStart("more", memory=SIZE, store="devdax")) == "Shared")
        before = contents("still")
        least = ""
        try:
            client.apply(do.Revoke(grant, within=1.0, at_most=Rung.COPY))
        except MemconsoleError as error:
            least = error.code
        lab.say("not-copied", least == "StillMapped", code=least)
        report = client.apply(do.Revoke(grant, within=5.0)).revoke
        until(lambda: agent.process.poll() is not None, "it is killed")
    killed = report is not None and report.rung is Rung.KILL and report.outcome is RevokeOutcome.CUT
    lab.say("revoked", killed and contents("still") == before, report=str(report))
    client.apply(do.Release("can"))
    client.apply(do.GuestStart("can", memory=SIZE, store="devdax"))


def note(client: Client) -> None:
    names = ("still", "can", *lab_raw.NAMES)
    found = {name: (contents(name), host.frames(client, f"region:{name}")) for name in names}
    NOTE.write_text(json.dumps(found))
    client.close()
    lab.load()
    lab.jump()


def first() -> None:
    client = host.serve()
    make(client)
    taken_back(client)
    lab_raw.unnamed(client)
    beats = host.beaten(client, "can").beats
    client = host.killed(client, *lab_raw.SERVE)
    seen = host.beaten(client, "can", beats)
    lab.say("killed", seen.wrong == 0 and not host.findings(client), findings=host.findings(client), beats=seen.beats)
    code, text = host.said("arena", "check", "--json")
    lab.say("checked", code == 0, text=text)
    client.apply(do.GuestStop("can"))
    lab_raw.make(client)
    lab_raw.taken_back(client)
    if "qemu" in sys.argv:
        lab_raw.stock(client)
    way_out(client)
    note(client)


def way_out(client: Client) -> None:
    """A VM on such memory refuses a handoff by name; what it is told to do has it live elsewhere, and count on."""
    client.apply(do.GuestStart("off", memory=SIZE, store="devdax"))
    seen = host.beaten(client, "off")
    (bad,) = (each for each in host.plan(client, host.action()).conditions if each.id == "guest-stranded")
    lab.say("stranded", not bad.ok and "memconsole move off --store memfd" in bad.remedy, bad=str(bad))
    client.apply(do.Move("off", "memfd"))
    moved = host.beaten(client, "off", seen.beats)
    (good,) = (each for each in host.plan(client, host.action()).conditions if each.id == "guest-stranded")
    lab.say("way-out", not moved.wrong and good.ok, beats=moved.beats)
    client.apply(do.GuestStop("off"))
    client.apply(do.Release("off"))


def later() -> None:
    client = host.serve(*lab_raw.SERVE)
    before = json.loads(NOTE.read_text())
    found = {region.name: str(region.store) for region in client.snapshot().regions}
    wanted = {"still": "devdax", "can": "devdax"} | dict.fromkeys(lab_raw.NAMES, "raw")
    lab.say("found", found == wanted, found=found, findings=host.findings(client))
    now = {name: [contents(name), [list(row) for row in host.frames(client, f"region:{name}")]] for name in before}
    lab.say("same", now == before, wrong=[name for name in before if now.get(name) != before[name]])
    if lab.stage() < LAST:
        note(client)
    lab_raw.remove(client)
    for name in ("still", "can"):
        client.apply(do.Release(name))
    lab.say("removed", client.apply(do.ArenaRemove("raw")).text)
    _, text = host.said("arena", "list", "--json")
    lab.say("empty", json.loads(text)[0]["holds"] == "nothing", text=text)
    host.end(client)
    lab.say("end")


try:
    first() if lab.stage() == 1 else later()
except MemconsoleError as error:
    lab.say("failed", ok=False, code=error.code, what=str(error))
    raise
