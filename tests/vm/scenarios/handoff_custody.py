"""What the other side cannot rebuild stays in custody, is told of, and is resumed by hand or released.

1 ▸ 2   a newer memconsole hands off to this one: neither boot plan nor manifest is known
2 ▸ 3   only its manifest is newer: the guests are started all the same
3 ▸ 4   both are known, but the next kernel comes up without /dev/kvm and without QEMU on the PATH
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
from msgspec.structs import replace
from support import lab_guest as lab
from support import lab_host as host

from memconsole.actions import GuestResume, GuestStart, GuestStop, Release, Reserve
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import GuestState, Severity

NOTES = lab.SHARE / "notes.json"
M = 1 << 20
NEWER = """
import sys
from memconsole.backend.handoff import bootplan, manifest
from msgspec.structs import replace
from memconsole.cli import main
if "plan" in {what!r}:
    bootplan.VERSION += 1
write = manifest.write
manifest.write = lambda plan, whole: write(plan, replace(whole, version=manifest.VERSION + 1))
sys.exit(main())
"""
"""A memconsole to come, as far as one can be had: all that is known of it is its versions."""


def newer(what: str) -> tuple[str, ...]:
    return sys.executable, "-c", NEWER.format(what=what)


def held(*kinds: str) -> list[str]:
    return sorted(name for name in host.held() if name.startswith(kinds))


def found(client: Client) -> dict[str, list[str]]:
    """The subjects of every finding that is not only told, by its id."""
    by: dict[str, list[str]] = {}
    for each in host.heard(client).findings:
        if each.severity is not Severity.INFO:
            by.setdefault(each.id, []).append(each.subject)
    return by


def go(client: Client, *, finish: bool = False) -> None:
    beats = host.beaten(client, "c0")
    NOTES.write_text(json.dumps(beats.beats))
    client.apply(replace(host.action(), finish=finish))
    raise AssertionError("the handoff returned")


def goes_on(client: Client) -> None:
    progress = host.beaten(client, "c0", json.loads(NOTES.read_text()))
    lab.say("goes-on", progress.wrong == 0 and progress.runs_as == "kvm", progress=str(progress))
    host.runs(client, "vm")


def unheard(client: Client) -> None:
    """Nobody knows the plan: everything is in custody, and comes back by hand."""
    code, log = host.early()
    lab.say("plan-unknown", code == "4" and "version" in log, code=code, log=log)
    shown, told = client.snapshot(), found(client)
    states = {each.name: each.state for each in shown.guests}
    lab.say("kept", states == {"c0": GuestState.GONE, "vm": GuestState.GONE}, states=states)
    lab.say("kept-regions", {each.state for each in shown.regions} == {"restored"}, regions=str(shown.regions))
    wanted = {"manifest-unknown": ["manifest"], "handoff-plan-broken": ["manifest"], "handoff-guest-held": ["c0", "vm"]}
    lab.say("told", all(told.get(id) == subjects for id, subjects in wanted.items()), told=told)
    sessions = [f"incoming:memconsole:{name}" for name in ("=spare", "c0", "manifest", "vm")]
    lab.say("sessions-kept", held("incoming:") == sessions, held=held("incoming:"))
    report = shown.handoff
    lab.say("not-back", report is not None and [each.back for each in report.guests] == [False] * 2, report=str(report))
    for name in ("c0", "vm"):
        client.apply(GuestResume(name))
    goes_on(client)
    client.apply(Release("spare"))
    sessions = [f"incoming:memconsole:{name}" for name in ("c0", "vm")]
    lab.say("released", held("incoming:", "state:", "again:") == sessions, held=held(""))


def manifest_unheard(client: Client) -> None:
    """Nobody knows the manifest: the boot plan is enough to go on."""
    code, log = host.early()
    lab.say("manifest-unknown", code == "0", code=code, log=log)
    goes_on(client)
    told = found(client)
    lab.say("told-manifest", told == {"manifest-unknown": ["manifest"]}, told=told)
    lab.say("nothing-left", held("incoming:", "state:") == [], held=held(""))


def unable(client: Client) -> None:
    """There is no KVM at first, and QEMU was not found: both wait, and come back once they can."""
    code, log = host.early()
    lab.say("unable", code == "4" and "held" in log, code=code, log=log)
    told = found(client)
    lab.say("told-held", sorted(told.get("handoff-guest-held", [])) == ["c0", "vm"], told=told)
    lab.say("states-held", held("state:") == ["state:c0", "state:vm"], held=held(""))
    refused = ""
    try:
        client.apply(GuestResume("c0"))
    except MemconsoleError as error:
        refused = str(error)
    lab.say("without-kvm", bool(refused) and held("state:") == ["state:c0", "state:vm"], refused=refused)
    Path("/dev/kvm.away").rename("/dev/kvm")
    for name in ("c0", "vm"):
        client.apply(GuestResume(name))
    goes_on(client)
    lab.say("came-back", held("state:", "incoming:", "again:") == [], held=held(""))
    lab.say("no-finding-left", not found(client), told=found(client))
    for name in ("c0", "vm"):
        client.apply(GuestStop(name))
        client.apply(Release(name))
    lab.say("freed", client.snapshot().regions == ())


def main() -> None:
    match lab.stage():
        case 1:
            client = host.serve(tool=newer("plan manifest"))
            client.apply(GuestStart("c0", memory=8 * M))
            client.apply(GuestStart("vm", vmm="qemu", memory=64 * M))
            client.apply(Reserve("spare", 4 * M))
            go(client)
        case 2:
            client = host.serve()
            unheard(client)
            host.end(client)
            client = host.serve(tool=newer("manifest"))
            codes = [each.code for each in host.plan(client, host.action()).refusals]
            lab.say("refused-session-kept", codes == ["SessionKept"], codes=codes)
            go(client, finish=True)
        case 3:
            client = host.serve()
            manifest_unheard(client)
            plan = host.plan(client, host.action())
            lab.say(
                "clean", not plan.refusals, bad=msgspec.to_builtins([each for each in plan.conditions if not each.ok])
            )
            go(client)
        case _:
            unable(host.serve())
            lab.say("end")


main()
