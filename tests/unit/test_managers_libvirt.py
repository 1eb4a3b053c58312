"""Domains of libvirt, from the status file that libvirtd 9.0 wrote of one (domstatus.xml; qemuCaps shortened)."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.trees import FakeProcess, Tree, maps_line

from memconsole.backend.kernel import census
from memconsole.backend.ledger.state import State
from memconsole.backend.managers import libvirt
from memconsole.backend.observe.survey import SurveyInput, foreign_guests, survey
from memconsole.decoding import Undecodable
from memconsole.guest_fields import GUESTS
from memconsole.model import Disk, Guest, GuestKind, GuestState, ManagedRam, ManagedVcpu, MemoryModule, NumaCell, Vcpu
from memconsole.redaction import Redactor
from memconsole.where import choose, parse

STATUS = (Path(__file__).parent.parent / "support" / "domstatus.xml").read_bytes()
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
PID = 17711
M = 1 << 20


def host(tmp_path: Path, *, status: bytes = STATUS, uuid: str = UUID, state: str = "S") -> Tree:
    """A host on which a QEMU without KVM runs that libvirt started."""
    tree = Tree(tmp_path)
    tree.host()
    tree.meminfo()
    tree.process(
        FakeProcess(
            PID,
            "qemu-system-x86",
            state=state,
            command=("qemu-system-x86_64", "-name", "guest=web shop,debug-threads=on", "-uuid", uuid),
            maps=maps_line(
                0x7F0000000000, 0x7F0004000000, "rw-s", path="/memfd:memory-backend-memfd (deleted)", inode=9
            ),
        )
    )
    tree.write("/run/libvirt/qemu/web shop.xml", status)
    tree.directory("/run/libvirt/qemu/dbus")
    return tree


def guests(tree: Tree) -> tuple[Guest, ...]:
    return survey(SurveyInput(), tree.root).guests


def test_a_status_file_says_what_the_domain_has() -> None:
    pid, managed = libvirt.parse(STATUS, since_ns=7)
    assert pid == PID
    assert (managed.manager, managed.name, managed.uuid, managed.id) == ("libvirt", "web shop", UUID, 1)
    assert (managed.state, managed.reason, managed.since_ns) == ("running", "booted", 7)
    assert managed.title == "Web shop (blue)"
    assert {label.name: label.text for label in managed.labels} == {
        "instance.name": "web-1",
        "instance.creationTime": "2026-10-01 10:00:00",
        "instance.flavor": "m1.small",
        "instance.flavor.memory": "128",
        "instance.owner.user": "ann",
        "instance.owner.project": "shop",
    }
    assert managed.monitor == "/var/lib/libvirt/qemu/domain-1-web shop/monitor.sock"
    assert managed.ram == ManagedRam("memfd", shared=True)
    assert managed.vcpus == (ManagedVcpu(0, 17727, "0"), ManagedVcpu(1, 17728, ""))
    assert managed.cells == (NumaCell(0, 64 * M, "0"), NumaCell(1, 64 * M, "1"))
    assert managed.modules == (MemoryModule("dimm", 64 * M, 0, 1 << 32),)
    assert managed.disks == (Disk("vda", "/var/lib/libvirt/images/disk.img"),)
    assert managed.host_devices == ("0000:41:00.1",)
    assert managed.taps == ("vnet0",)


def test_a_guest_is_called_as_its_domain_and_has_the_vcpus_that_libvirt_knows(tmp_path: Path) -> None:
    (guest,) = guests(host(tmp_path))
    assert (guest.name, guest.kind, guest.state, guest.pid) == ("web shop", GuestKind.FOREIGN, GuestState.RUNNING, PID)
    assert guest.seen is not None
    assert guest.seen.vcpus == (Vcpu(0, 17727), Vcpu(1, 17728))
    assert guest.managed is not None
    assert (guest.managed.persistent, guest.managed.autostart) == (False, False)


def test_a_domain_that_is_defined_and_starts_with_the_host_is_said_to(tmp_path: Path) -> None:
    tree = host(tmp_path)
    assert guests(tree)[0].managed is not None
    tree.write("/etc/libvirt/qemu/web shop.xml", "<domain/>")
    tree.link("/etc/libvirt/qemu/autostart/web shop.xml", "/etc/libvirt/qemu/web shop.xml")
    managed = guests(tree)[0].managed
    assert managed is not None
    assert (managed.persistent, managed.autostart) == (True, True)


@pytest.mark.parametrize(
    ("said", "state"),
    [("running", GuestState.RUNNING), ("paused", GuestState.PAUSED), ("pmsuspended", GuestState.SUSPENDED)],
)
def test_the_state_is_the_one_that_libvirt_wrote_last(tmp_path: Path, said: str, state: GuestState) -> None:
    tree = host(tmp_path)
    assert guests(tree)[0].state is GuestState.RUNNING
    tree.write("/run/libvirt/qemu/web shop.xml.new", STATUS.replace(b"state='running'", f"state='{said}'".encode()))
    (tmp_path / "run/libvirt/qemu/web shop.xml.new").rename(tmp_path / "run/libvirt/qemu/web shop.xml")
    assert guests(tree)[0].state is state


def test_a_process_that_a_signal_stopped_is_paused_whatever_libvirt_wrote(tmp_path: Path) -> None:
    assert guests(host(tmp_path, state="T"))[0].state is GuestState.PAUSED


def test_another_process_that_has_the_pid_by_now_is_not_the_domain(tmp_path: Path) -> None:
    (guest,) = guests(host(tmp_path, uuid="00000000-0000-0000-0000-000000000000"))
    assert (guest.name, guest.managed) == (f"qemu-{PID}", None)


def test_a_name_that_is_taken_is_not_given_twice(tmp_path: Path) -> None:
    tree = host(tmp_path)
    named = Guest("web shop", GuestKind.PROCESS, GuestState.RUNNING, 1)
    (guest,) = foreign_guests(census.take(tree.root), State(guests={"web shop": named}))
    assert guest.name == f"qemu-{PID}"
    assert guest.managed is not None
    assert guest.managed.name == "web shop"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda status: status[: len(status) // 2],
        lambda status: status.replace(b"pid='17711'", b"pid='x'"),
        lambda status: status.replace(b"<uuid>", b"<uid>").replace(b"</uuid>", b"</uid>"),
        lambda status: status.replace(b"unit='KiB'", b"unit='furlong'"),
        lambda _: b"<!DOCTYPE domstatus [<!ENTITY a 'b'>]><domstatus>&a;</domstatus>",
    ],
    ids=["cut", "pid", "uuid", "unit", "doctype"],
)
def test_a_file_that_cannot_be_read_is_a_gap_and_loses_no_other(
    tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    tree = host(tmp_path)
    tree.write("/run/libvirt/qemu/bad.xml", spoil(STATUS))
    found = survey(SurveyInput(), tree.root)
    assert [guest.name for guest in found.guests] == ["web shop"]
    assert [gap.source for gap in found.gaps if "libvirt" in gap.source] == ["/run/libvirt/qemu/bad.xml"]


def test_a_host_without_libvirt_has_no_gap_for_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.host()
    tree.meminfo()
    assert not [gap for gap in survey(SurveyInput(), tree.root).gaps if "libvirt" in gap.source]


def test_whatever_the_bytes_are_what_comes_out_is_a_domain_or_a_named_error() -> None:
    refused = 0
    for turn in range(400):
        random.seed(turn)
        raw = bytearray(STATUS)
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(raw))
            raw[at : at + random.randint(0, 40)] = bytes(
                random.choices(b"<>/='\"0x9a &;\xff\0", k=random.randint(0, 9))
            )
        try:
            libvirt.parse(bytes(raw))
        except Undecodable:
            refused += 1
    assert refused, "nothing that was tried is refused"


def test_guests_are_found_by_their_manager_and_what_it_says(tmp_path: Path) -> None:
    found = guests(host(tmp_path))
    for text in ("manager:libvirt", "title:*blue*", f"uuid:{UUID}", "labels:*project=shop*", "ram_kind:memfd*"):
        assert choose(parse(text, GUESTS.fields), GUESTS.fields, found), text
    assert not choose(parse("manager:none", GUESTS.fields), GUESTS.fields, found)


def test_what_would_lose_its_ram_is_told_in_the_words_of_its_manager(tmp_path: Path) -> None:
    tree = host(tmp_path)
    tree.write("/dev/liveupdate", "")
    (finding,) = [each for each in survey(SurveyInput(), tree.root).findings if each.id == "ram-not-preserved"]
    assert finding.subject == "web shop"
    assert re.search(r"virsh managedsave 'web shop'", finding.remedy)


def test_a_name_with_a_quote_is_one_word_of_the_command_that_is_told(tmp_path: Path) -> None:
    tree = host(tmp_path, status=STATUS.replace(b"<name>web shop<", b"<name>web's; reboot<"))
    tree.write("/dev/liveupdate", "")
    (finding,) = [each for each in survey(SurveyInput(), tree.root).findings if each.id == "ram-not-preserved"]
    assert shlex.split(finding.remedy.partition(" before ")[0]) == ["virsh", "managedsave", "web's; reboot"]


def test_no_name_of_it_is_left_in_a_redacted_snapshot(tmp_path: Path) -> None:
    tree = host(tmp_path)
    tree.write("/dev/liveupdate", "")
    told = msgspec.json.encode(Redactor().snapshot(survey(SurveyInput(), tree.root))).decode()
    for name in ("web", "shop", "blue", "ann", UUID, "vnet0", "disk.img"):
        assert name not in told, name
    assert "0000:41:00.1" in told


def test_helpers_and_jobs_of_a_domain_are_told() -> None:
    devices = (
        b"<filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/><target dir='share'/></filesystem>"
        b"<interface type='vhostuser'><mac address='52:54:00:00:00:01'/></interface>"
        b"<tpm model='tpm-crb'><backend type='emulator'/></tpm></devices>"
    )
    before, _, after = STATUS.rpartition(b"</devices>")
    raw = before + devices + after
    assert libvirt.parse(raw).managed.helped == (
        "virtiofs share",
        "vhost-user interface 52:54:00:00:00:01",
        "TPM (swtpm)",
    )
    assert (libvirt.parse(STATUS).managed.job, libvirt.parse(STATUS).managed.block_jobs) == ("", ())
    jobs = (
        b"<job type='none' async='migration out' phase='perform2'/>"
        b"<blockjobs active='yes'><blockjob name='vda' type='copy' state='running'/></blockjobs><domain "
    )
    managed = libvirt.parse(re.sub(rb"<(job|blockjobs) [^>]*/>", b"", STATUS).replace(b"<domain ", jobs, 1)).managed
    assert (managed.job, managed.block_jobs) == ("migration out", ("copy of vda",))
