"""Regions of the devdax store: a raw device that says what is in it, found again by the next kernel.

devdax N        so many kexecs
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from support import lab_guest as lab
from support import lab_host as host
from support.guests import AgentProcess
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.stores import ranges
from memconsole.backend.wire.client import Client
from memconsole.cli import main
from memconsole.errors import MemconsoleError
from memconsole.model import RevokeOutcome, Rung

M = 1 << 20
SIZE = 8 * M
NOTE = lab.SHARE / "note"
"""What the next kernel is to find: digests and frames, by region."""
LAST = int(sys.argv[1]) + 1


def said(*words: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(list(words))
    return code, out.getvalue()


def contents(region: str) -> str:
    """A digest of all bytes of a region, as ``memconsole copy`` has them."""
    path = Path("/run/copy")
    code, text = said("copy", region, str(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path.unlink()
    return digest if not code else text


def frames(client: Client, table: str) -> list[tuple[int, int]]:
    """The first frame and the length of every run of a region, or of a guest as the kernel shows its mappings."""
    with client.extents(table) as found:
        return [(row.pfn, row.count) for row in found]


def refused(client: Client, action: do.Action) -> str:
    """By what name an action is refused."""
    return ", ".join(each.code for each in client.plan(action).refusals)


def kill(client: Client) -> Client:
    """The control process that comes after one that was killed."""
    client.close()
    found = subprocess.run(["pgrep", "-f", "serve --state-dir"], capture_output=True, text=True, check=True)
    pid = int(found.stdout.split()[0])
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")
    return host.serve()


def make(client: Client) -> None:
    lab.say("nothing-yet", refused(client, do.Reserve("r", SIZE, "devdax")) == "NoArena")
    outcome = client.apply(do.ArenaCreate("raw", devdax=True))
    (device,) = ranges.devdax()
    lab.say("created", "arena raw is on /dev/dax" in outcome.text, text=outcome.text, device=device)
    code, text = said("arena", "list", "--json")
    lab.say("listed", not code and json.loads(text)[-1]["holds"] == "arena raw", text=text)
    lab.say("again", refused(client, do.ArenaCreate("more", devdax=True)) == "HoldsArena")
    try:
        ranges.opened(device)
        second = "opened"
    except MemconsoleError as error:
        second = error.code
    lab.say("second", second == "InUse", second=second)
    client.apply(do.Reserve("still", SIZE, "devdax"))
    client.apply(do.GuestStart("can", memory=SIZE, store="devdax"))
    wanted = {"lazy": do.Map("still", "can", lazy=True), "odd": do.Reserve("odd", M, "devdax")}
    names = {name: refused(client, action) for name, action in wanted.items()}
    lab.say("refused", names == {"lazy": "NotLazy", "odd": "BadSize"}, names=names)
    runs = {name: frames(client, f"region:{name}") for name in ("still", "can")}
    apart = all(len(each) == 1 and 0x40000 <= each[0][0] < 0x50000 and not each[0][0] % 512 for each in runs.values())
    lab.say("frames", apart and runs["still"] != runs["can"], runs=runs)
    seen = host.beaten(client, "can")
    mapped = frames(client, "guest:can")
    lab.say("mapped", seen.wrong == 0 and mapped[0][0] == runs["can"][0][0], mapped=mapped[:4])


def taken_back(client: Client) -> None:
    """A region whose guest does not give it back; a guest that is a stranger does not get it beside a VM."""
    with AgentProcess(Path("/run/memconsole/agents")) as agent:
        client.apply(do.GuestAttach("proc", agent.process.pid))
        lab.say("stranger", refused(client, do.Map("still", "proc")) == "Shared")
        client.apply(do.GuestStop("can"))
        grant = client.apply(do.Map("still", "proc")).subject
        agent.do("wait", grant)
        agent.do("write", grant, "kept")
        agent.do("hold", grant)
        lab.say("beside", refused(client, do.GuestStart("more", memory=SIZE, store="devdax")) == "Shared")
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
    found = {name: (contents(name), frames(client, f"region:{name}")) for name in ("still", "can")}
    NOTE.write_text(json.dumps(found))
    client.close()
    lab.load()
    lab.jump()


def first() -> None:
    client = host.serve()
    make(client)
    taken_back(client)
    beats = host.beaten(client, "can").beats
    client = kill(client)
    seen = host.beaten(client, "can", beats)
    lab.say("killed", seen.wrong == 0 and not host.findings(client), findings=host.findings(client), beats=seen.beats)
    code, text = said("arena", "check", "--json")
    lab.say("checked", code == 0, text=text)
    client.apply(do.GuestStop("can"))
    note(client)


def later() -> None:
    client = host.serve()
    before = json.loads(NOTE.read_text())
    found = {region.name: str(region.store) for region in client.snapshot().regions}
    lab.say("found", found == {"still": "devdax", "can": "devdax"}, found=found, findings=host.findings(client))
    now = {name: [contents(name), [list(row) for row in frames(client, f"region:{name}")]] for name in before}
    lab.say("same", now == before, wrong=[name for name in before if now.get(name) != before[name]])
    if lab.stage() < LAST:
        note(client)
    for name in before:
        client.apply(do.Release(name))
    lab.say("removed", client.apply(do.ArenaRemove("raw")).text)
    _, text = said("arena", "list", "--json")
    lab.say("empty", json.loads(text)[-1]["holds"] == "nothing", text=text)
    host.end(client)
    lab.say("end")


try:
    first() if lab.stage() == 1 else later()
except MemconsoleError as error:
    lab.say("failed", ok=False, code=error.code, what=str(error))
    raise
