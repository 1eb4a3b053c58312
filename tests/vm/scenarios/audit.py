"""Every way in which a host is not as it should be, brought about, found by ``memconsole audit``, and undone.

audit               what strangers, guests and devices do; before, in between and afterwards there is no finding
audit interrupts    on a host whose IOMMU remaps no interrupts
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support import lab_guest as lab
from support.edu import BDF as EDU
from support.edu import PAGE, SIZE, started
from support.guests import AgentProcess
from support.lab_host import fresh
from support.services import Service, services

from memconsole import actions as do
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.dma import iommufd, vfio
from memconsole.backend.handoff.luo import LuoSession
from memconsole.backend.observe import pfn_tables
from memconsole.backend.wire.client import Client
from memconsole.cli import main
from memconsole.errors import MemconsoleError
from memconsole.model import Access

SRC, TEXT, STRAY = 0x100000, 0x8000000, 0x20000000
TWIN, RNG = "0000:02:01.0", "0000:00:08.0"
"""An edu behind a bridge together with another device, and a device that a driver of the host has."""
BAR = f"{RNG}:4"
PUNCH = 3
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE"""
HOLDS = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 4096, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
"""
Found = list[tuple[str, str]]
"""Findings by id and subject."""
Act = contextlib.AbstractContextManager[Found]
"""Brings something about, says what is to be found then, and undoes it."""


class Host:
    """A service; two processes with an agent, one of which has the device; custody."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.client: Client = started(service)
        self.driver, self.plain = (AgentProcess(service.runtime / "agents") for _ in range(2))
        service.guests |= {self.driver.pid, self.plain.pid}
        self.client.apply(do.GuestAttach("driver", self.driver.pid))
        self.client.apply(do.GuestAttach("plain", self.plain.pid))
        for region in ("src", "text", "web", "pair"):
            self.client.apply(do.Reserve(region, SIZE))
        self.keeper = KeeperCustody(service.runtime / "keeper")

    def give(self) -> None:
        """The device reaches one region to read and to write, and another one to read."""
        self.src = self.map(do.Map("src", "driver", gpa=SRC, dma=EDU))
        self.text = self.map(do.Map("text", "driver", gpa=TEXT, access=Access.RO, dma=EDU))

    def map(self, action: do.Map) -> str:
        """A grant that its guest maps."""
        process = {"driver": self.driver, "plain": self.plain}[action.guest]
        grant = self.client.apply(action).subject
        assert process.do(f"wait {grant}") == grant
        return grant

    def audit(self) -> tuple[int, Found]:
        """Exit code and findings of the command, on the host as it is now.

        All of it but its start, which takes half a minute where every instruction of it is emulated on a busy machine.
        """
        fresh(self.client)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = main(["--socket", str(self.service.path), "audit", "--json"])
        return code, listed(said.getvalue())

    def audit_anew(self) -> tuple[int, Found]:
        """The same by a process of its own, as from a shell."""
        fresh(self.client)
        done = subprocess.run(self.service.command("audit", "--json"), capture_output=True, text=True, check=False)
        return done.returncode, listed(done.stdout)

    @contextlib.contextmanager
    def space(self) -> Iterator[tuple[int, int]]:
        """The address space of the guest with the device: its iommufd and its id."""
        fd, payload = self.keeper.get("iommu:driver")
        try:
            yield fd, json.loads(payload)["space"]
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def memory(self, region: str) -> Iterator[int]:
        """A region's file, from custody."""
        fd, _ = self.keeper.get(f"region:{region}:0")
        try:
            yield fd
        finally:
            os.close(fd)

    def map_device(self, file: int, length: int, iova: int, *, writable: bool = True) -> None:
        """Let the device reach memory behind the control process's back."""
        with self.space() as (fd, space):
            iommufd.map_file(fd, space, iommufd.Mapping(file, 0, length, iova, writable))

    def unmap_device(self, iova: int, length: int) -> None:
        with self.space() as (fd, space):
            assert iommufd.unmap(fd, space, iova, length) == length


def listed(text: str) -> Found:
    """What the command said."""
    findings = json.loads(text)
    assert all(each["observed"] and each["evidence"] and each["remedy"] for each in findings), findings
    return sorted((each["id"], each["subject"]) for each in findings)


def punch(file: int, first: int, pages: int) -> None:
    """Empty pages of a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(file, PUNCH, ctypes.c_long(first * PAGE), ctypes.c_long(pages * PAGE)) == 0


@contextlib.contextmanager
def plain_file(length: int) -> Iterator[int]:
    """Memory that is nobody's region."""
    fd = os.memfd_create("stray")
    os.ftruncate(fd, length)
    try:
        yield fd
    finally:
        os.close(fd)


# --- a device


@contextlib.contextmanager
def reaches_what_is_no_region(host: Host) -> Iterator[Found]:
    with plain_file(PAGE) as stray:
        host.map_device(stray, PAGE, STRAY)
        yield [("dma-outside", EDU), ("dma-unknown", EDU)]
        host.unmap_device(STRAY, PAGE)


@contextlib.contextmanager
def reaches_another_guest(host: Host) -> Iterator[Found]:
    grant = host.map(do.Map("web", "plain"))
    with host.memory("web") as memory:
        host.map_device(memory, SIZE, STRAY)
        yield [("dma-unknown", EDU), ("frame-shared", EDU)]
        host.unmap_device(STRAY, SIZE)
    host.client.apply(do.Revoke(grant))


@contextlib.contextmanager
def lacks_a_grant(host: Host) -> Iterator[Found]:
    host.unmap_device(SRC, SIZE)
    yield [("dma-missing", host.src)]
    with host.memory("src") as memory:
        host.map_device(memory, SIZE, SRC)


@contextlib.contextmanager
def may_write_what_is_to_be_read(host: Host) -> Iterator[Found]:
    with host.memory("text") as memory:
        host.unmap_device(TEXT, SIZE)
        host.map_device(memory, SIZE, TEXT)
        yield [("dma-writable", host.text)]
        host.unmap_device(TEXT, SIZE)
        host.map_device(memory, SIZE, TEXT, writable=False)


@contextlib.contextmanager
def finds_other_frames(host: Host) -> Iterator[Found]:
    with host.memory("src") as memory:
        punch(memory, 4, 2)
        yield [("dma-elsewhere", host.src)]
        host.unmap_device(SRC, SIZE)
        host.map_device(memory, SIZE, SRC)


@contextlib.contextmanager
def is_not_alone_in_its_group(host: Host) -> Iterator[Found]:
    grant = host.map(do.Map("pair", "plain", gpa=SRC, dma=TWIN))
    yield [("device-shared", TWIN)]
    host.client.apply(do.Revoke(grant))


@contextlib.contextmanager
def is_a_stranger_s(host: Host) -> Iterator[Found]:
    """By VFIO, as any VMM has it; the finding before left the device with vfio-pci."""
    assert vfio.driver("/", TWIN) == vfio.DRIVER, host
    fd, device = iommufd.create(), vfio.open_device("/", TWIN)
    space = iommufd.make_space(fd)
    iommufd.bind(device, TWIN, fd)
    iommufd.attach(device, space)
    with plain_file(PAGE) as stray:
        iommufd.map_file(fd, space, iommufd.Mapping(stray, 0, PAGE, STRAY, True))
        yield [("dma-outside", TWIN)]
    os.close(device)
    os.close(fd)


@contextlib.contextmanager
def is_held_by_nobody(host: Host) -> Iterator[Found]:
    """The keeper lost it, and the control process is another."""
    host.client.close()
    host.service.end(9)
    host.keeper.drop(f"vfio:{EDU}")
    host.client = started(host.service)
    yield [("dma-lost", EDU)]
    for grant in (host.src, host.text):
        host.client.apply(do.Revoke(grant))
    host.give()


# --- memory


@contextlib.contextmanager
def a_guest_drops_its_mapping(host: Host) -> Iterator[Found]:
    grant = host.map(do.Map("web", "plain"))
    assert host.plain.do(f"drop {grant}") == "done"
    yield [("grant-unmapped", grant)]
    host.client.apply(do.Revoke(grant))


@contextlib.contextmanager
def a_stranger_maps_a_region(host: Host) -> Iterator[Found]:
    (fd,) = host.client.open_region("web")
    words = [sys.executable, "-c", HOLDS, str(fd)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd]) as stranger:
        os.close(fd)
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "mapped\n"
        yield [("mapping-unknown", "web")]
        stranger.communicate()


@contextlib.contextmanager
def frames_change(host: Host) -> Iterator[Found]:
    """Pages are emptied and filled anew, once others have their frames; each side of it the PFN map is asked for."""
    host.client.apply(do.Reserve("moved", SIZE, prefault=True))
    host.client.extents("region:moved").close()
    with host.memory("moved") as memory, plain_file(SIZE) as other:
        punch(memory, 0, 3)
        os.write(other, bytes(SIZE))
        os.pwrite(memory, bytes(3 * PAGE), 0)
        time.sleep(pfn_tables.FRESH_S)
        host.client.extents("region:moved").close()
    yield [("region-moved", "moved")]
    host.client.apply(do.Release("moved"))


@contextlib.contextmanager
def pages_are_of_the_pool(host: Host) -> Iterator[Found]:
    pool = Path("/proc/sys/vm/nr_hugepages")
    pool.write_text("1")
    host.client.apply(do.Reserve("huge", 2 << 20, page_size=2 << 20))
    yield [("region-not-preserved", "huge")]
    host.client.apply(do.Release("huge"))
    pool.write_text("0")


@contextlib.contextmanager
def a_vm_is_not_ours(host: Host) -> Iterator[Found]:
    machine = ("-machine", "pc,accel=kvm", "-m", "64M", "-S", "-nodefaults", "-display", "none")
    with subprocess.Popen(["qemu-system-x86_64", *machine], stdin=subprocess.DEVNULL) as vm:
        name = f"qemu-{vm.pid}"
        while not any(guest.name == name and guest.memory for guest in fresh(host.client).guests):
            assert vm.poll() is None
        yield [("ram-not-preserved", name)]
        vm.kill()


@contextlib.contextmanager
def a_session_is_not_ours(host: Host) -> Iterator[Found]:
    with LuoSession.create("stranger") as session, plain_file(PAGE) as file:
        session.preserve(file, 1)
        yield [("session-outside-custody", "stranger")]
    assert not fresh(host.client).survival.sessions


# --- registers


@contextlib.contextmanager
def a_driver_takes_a_granted_window(host: Host) -> Iterator[Found]:
    driver = Path("/sys/bus/pci/drivers/virtio-pci")
    (driver / "unbind").write_text(RNG)
    host.client.apply(do.WindowMap(BAR, "plain"))
    (driver / "bind").write_text(RNG)
    yield [("window-claimed", BAR)]
    (driver / "unbind").write_text(RNG)
    host.client.apply(do.WindowRevoke(BAR))


ACTS: tuple[Callable[[Host], Act], ...] = (
    reaches_what_is_no_region,
    reaches_another_guest,
    lacks_a_grant,
    may_write_what_is_to_be_read,
    finds_other_frames,
    is_not_alone_in_its_group,
    is_a_stranger_s,
    is_held_by_nobody,
    a_guest_drops_its_mapping,
    a_stranger_maps_a_region,
    frames_change,
    pages_are_of_the_pool,
    a_vm_is_not_ours,
    a_session_is_not_ours,
    a_driver_takes_a_granted_window,
)


def clean(host: Host, when: str) -> None:
    code, found = host.audit_anew()
    lab.say(f"clean-{when}", code == 0 and found == [], code=code, found=found)


def settled(host: Host, when: str) -> None:
    """The same without another process."""
    code, found = host.audit()
    lab.say(f"clean-{when}", code == 0 and found == [], code=code, found=found)


def all_of_them(host: Host) -> None:
    clean(host, "before")
    host.give()
    settled(host, "with-a-device")
    for act in ACTS:
        name = getattr(act, "__name__", "")
        with act(host) as want:
            code, found = host.audit()
            lab.say(name, code == 4 and found == want, code=code, found=found, want=want)
        settled(host, f"after-{name}")
    clean(host, "at-last")


def interrupts(host: Host) -> None:
    """iommufd takes no such device, unless the operator says that it may."""
    clean(host, "before")
    try:
        host.give()
        lab.say("refused", False)
    except MemconsoleError as error:
        lab.say("refused", error.code == "NotIsolated", error=str(error))
    settled(host, "refused")
    Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts").write_text("1")
    host.give()
    code, found = host.audit_anew()
    lab.say("interrupts", code == 4 and found == [("device-interrupts", EDU)], code=code, found=found)
    for grant in (host.src, host.text):
        host.client.apply(do.Revoke(grant))
    settled(host, "after-interrupts")


with services() as service:
    host = Host(service)
    (interrupts if "interrupts" in sys.argv[1:] else all_of_them)(host)
    host.keeper.close()
    host.client.close()
lab.say("end")
