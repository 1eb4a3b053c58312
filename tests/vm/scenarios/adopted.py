"""Adopted guests of libvirt through a real kexec: state taken while they run, libvirt starts each again on its RAM.

web    RAM in a memfd; it starts with the host, and goes on before libvirtd is there: the fast lane
files  RAM in a file of a tmpfs, vCPUs that may come: it is started again by the control process, through libvirtd

Their guests check their memory, round after round. What a host has on its disk (definitions) is kept on the share.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from support import lab_guest as lab
from support import lab_host as host
from support.firmware import STATUS, counting
from support.waiting import until

from memconsole.actions import GuestAdopt
from memconsole.backend.handoff import carried, fast
from memconsole.backend.managers import saveimage
from memconsole.backend.wire.client import Client
from memconsole.model import HandoffState

RAM_SIZE = 32 << 20
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='b'>{size}</memory>
  <memoryBacking><source type='{source}'/><access mode='shared'/></memoryBacking>
  {vcpu}
  <os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='rom'>{firmware}</loader></os>
  <features><acpi/></features>
</domain>
"""
SOURCES = {"web": "memfd", "files": "file"}
VCPUS = {"web": "<vcpu>1</vcpu>", "files": "<vcpu current='1'>2</vcpu>"}
ETC, RAM, GUEST = Path("/etc/libvirt"), Path("/run/mcram"), Path("/run/guest")
QEMU_CONF = """
cgroup_controllers = [ ]
security_driver = "none"
stdio_handler = "file"
seccomp_sandbox = 0
memory_backing_dir = "/run/mcram"
"""
NOTES = lab.SHARE / "notes.json"


def run(*words: str | Path) -> str:
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    if made.returncode:
        raise AssertionError(f"{words}: {made.returncode}: {made.stdout}{made.stderr}")
    return made.stdout


def virsh(*words: str | Path) -> str:
    return run("virsh", "-q", "-c", "qemu:///system", *words)


def configured() -> None:
    """libvirt as this lab can run it: its QEMU alone, so that it asks no other what it can."""
    (ETC / "qemu.conf").write_text(QEMU_CONF)
    (ETC / "libvirtd.conf").write_text(
        f'auth_unix_ro = "none"\nauth_unix_rw = "none"\nlog_outputs = "2:file:/run/libvirtd-{lab.stage()}.log"\n'
    )
    for path in (ETC / "qemu/networks/autostart").glob("*"):
        path.unlink()
    for name in ("i386", "amd64", "x86_64-microvm"):
        Path(f"/usr/bin/qemu-system-{name}").unlink(missing_ok=True)
    if Path("/dev/kvm").exists():
        Path("/dev/kvm").chmod(0o666)
    RAM.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755", "ram", RAM)
    if not GUEST.exists():  # the next kernel has it before memconsole-resume starts QEMU, as a host has on its disk
        GUEST.mkdir()
        counting(GUEST)
        shutil.copyfile(GUEST / "firmware.bin", lab.SHARE / "firmware.bin")
    learned = lab.SHARE / "learned"
    learned.mkdir(exist_ok=True)
    Path("/var/cache/libvirt").mkdir(parents=True, exist_ok=True)
    run("mount", "--bind", learned, "/var/cache/libvirt")
    Path("/var/lib/libvirt/qemu/save").mkdir(parents=True, exist_ok=True)
    Path("/etc/systemd/system").mkdir(parents=True, exist_ok=True)
    run(
        sys.executable,
        "-c",
        "import sys; from memconsole.cli import main; sys.exit(main())",
        "libvirt",
        "setup",
        "--yes",
    )


def daemon() -> None:
    with Path(f"/run/libvirtd-{lab.stage()}.out").open("wb") as out:
        words = ["/usr/sbin/libvirtd"]
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    asked = ["virsh", "-q", "-c", "qemu:///system", "list"]
    until(
        lambda: subprocess.run(asked, check=False, capture_output=True).returncode == 0,
        "libvirtd answers",
        host.PATIENCE,
    )


def told(client: Client, name: str) -> tuple[int, int]:
    (fd,) = host.patiently(lambda: client.open_region(f"{name}.pc.ram"))
    rounds, wrong = struct.unpack("<II", os.pread(fd, 8, STATUS))
    os.close(fd)
    return rounds, wrong


def before() -> None:
    configured()
    daemon()
    for name, source in SOURCES.items():
        path = Path(f"/run/{name}.xml")
        path.write_text(
            DOMAIN.format(name=name, size=RAM_SIZE, source=source, vcpu=VCPUS[name], firmware=GUEST / "firmware.bin")
        )
        virsh("define", path)
        virsh("start", name)
    virsh("autostart", "web")
    client = host.serve("--mount")
    client.apply(GuestAdopt(all=True))
    for name in SOURCES:
        until(lambda name=name: told(client, name)[0] > 1, f"rounds of {name}", host.PATIENCE)  # type: ignore[misc]
    plan = host.plan(client, host.action())
    bad = {each.id: each.observed for each in plan.conditions if not each.ok}
    lab.say("check", not plan.refusals, bad=bad)
    lanes = dict(each.split(": ", 1) for each in plan.note.split("; ") if ": " in each)
    lab.say("lanes", lanes["web"] == fast.LANE.split("; ")[0] and lanes["files"].startswith(carried.LANE), lanes=lanes)
    shutil.copytree(ETC / "qemu", lab.SHARE / "defined", symlinks=True)
    NOTES.write_text(json.dumps({name: told(client, name)[0] for name in SOURCES}))
    lab.say("ready", rounds=NOTES.read_text())
    client.apply(host.action())


def after() -> None:
    early = Path("/run/early.log").read_text()
    lab.say("early", Path("/run/early.code").read_text().strip() == "0", text=early)
    shutil.copytree(lab.SHARE / "defined", ETC / "qemu", symlinks=True, dirs_exist_ok=True)
    configured()
    client = host.serve("--mount")
    images = sorted(path.name for path in Path("/var/lib/libvirt/qemu/save").iterdir())
    lab.say("offered", images == ["files.save"], images=images, findings=host.findings(client))
    noted = json.loads(NOTES.read_text())
    still = {name: told(client, name) for name in SOURCES}
    until(lambda: told(client, "web")[0] > still["web"][0] + 1, "rounds of web before libvirtd", host.PATIENCE)
    pid = Path("/run/libvirt/qemu/web.pid").read_text()
    lab.say("still", all(still[name][0] >= noted[name] and not still[name][1] for name in SOURCES), still=still)
    daemon()

    def back() -> bool:
        made = host.shown(client).handoff
        return made is not None and made.state is HandoffState.DONE and all(each.back for each in made.guests)

    until(back, "libvirt has started both", host.PATIENCE)
    for name in SOURCES:
        goes_on = lambda name=name: told(client, name)[0] > still[name][0] + 1  # noqa: E731
        until(goes_on, f"rounds of {name}", host.PATIENCE)
    now = {name: told(client, name) for name in SOURCES}
    lab.say("goes-on", not any(wrong for _, wrong in now.values()), now=now)
    report = host.shown(client).handoff
    assert report is not None
    lab.say(
        "report",
        all(each.same for each in report.regions) and all(each.blackout_ns and each.lane for each in report.guests),
        guests=report.guests,
        regions=report.regions,
    )
    states = {name: virsh("domstate", name).strip() for name in SOURCES}
    left = virsh("list", "--all", "--with-managed-save", "--name").split()
    lab.say("libvirt", set(states.values()) == {"running"} and not left, states=states, left=left)
    same = pid == Path("/run/libvirt/qemu/web.pid").read_text()
    lab.say("once", same and len(run("pidof", "qemu-system-x86_64").split()) == len(SOURCES), pid=pid)
    virsh("save", "web", "/run/web.image")
    with Path("/run/web.image").open("rb", buffering=0) as file:
        image = saveimage.examine(file.fileno())
    virsh("restore", "/run/web.image")
    kept = {each.name: each.kept for each in image.stream.blocks} if image.stream is not None else {}
    lab.say("saved-again", image.image.lock is None and kept["pc.ram"] >= RAM_SIZE // 4096, kept=kept)
    lab.say("end", findings=host.findings(client))


before() if lab.stage() == 1 else after()
