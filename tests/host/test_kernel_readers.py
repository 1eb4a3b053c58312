"""Kernel readers on this host, held against tools and processes that know nothing of them."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from support.machines import machines
from support.open_fds import nothing_stays_open
from support.waiting import LONG_S

from memconsole.backend.diagnose.doctor import doctor
from memconsole.backend.kernel import (
    census,
    dax,
    host,
    iomem,
    iommu,
    kho,
    kvm,
    memfds,
    memory,
    pci,
    probes,
    procmaps,
)
from memconsole.backend.kernel.kvm import Machine
from memconsole.backend.kernel.record import record
from memconsole.errors import Gone, NotFound, UsageError
from memconsole.model import Vcpu

MIB = 1 << 20
SECONDS = 20
FROM_FILES = {"shmem-thp", "hugetlb", "dax", "kho", "kexec", "iommu", "debugfs"}


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def said(*words: str) -> str:
    return subprocess.run(
        [tool(words[0]), *words[1:]], capture_output=True, text=True, check=True, timeout=LONG_S
    ).stdout


@contextmanager
def memfd(name: str, size: int) -> Iterator[int]:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def vcpus_of(machine: Machine) -> tuple[Vcpu, ...]:
    assert machine.seen.vcpus is not None
    return machine.seen.vcpus


@contextmanager
def idle(*fds: int) -> Iterator[int]:
    """A process that does nothing, with these file descriptors."""
    words = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"up\n"
            yield child.pid
        finally:
            child.kill()


def test_the_host_is_the_one_uname_and_lscpu_know() -> None:
    found = host.host()
    name = os.uname()
    assert (found.name, found.kernel, found.arch) == (name.nodename, name.release, name.machine)
    assert found.cpus == len(psutil.cpu_times(percpu=True))
    assert found.page_size == mmap.PAGESIZE
    assert abs(found.uptime_s - (time.time() - psutil.boot_time())) < 60


def test_memory_agrees_with_free() -> None:
    words = said("free", "-b").split("\n")[1].split()
    found = memory.memory()
    assert found.total == int(words[1])
    assert abs(found.free - int(words[3])) < 2 << 30
    assert found.swap_total == psutil.swap_memory().total


def test_pci_agrees_with_lspci() -> None:
    blocks = said("lspci", "-D", "-vmm", "-n", "-k").strip().split("\n\n")
    devices = {function.device.bdf: function for function in pci.functions()}
    assert blocks
    if not blocks[0]:
        pytest.skip("this host has no PCI devices")
    assert len(devices) == len(blocks)
    for block in blocks:
        pairs = dict(line.split(":\t", 1) for line in block.split("\n"))
        device = devices[pairs["Slot"]].device
        assert (device.vendor, device.device) == (int(pairs["Vendor"], 16), int(pairs["Device"], 16))
        assert device.class_code >> 8 == int(pairs["Class"], 16)
        assert device.driver == pairs.get("Driver")
        assert device.group == (int(pairs["IOMMUGroup"]) if "IOMMUGroup" in pairs else None)


def test_bars_agree_with_lspci() -> None:
    text = said("lspci", "-D", "-v", "-n")
    expected = set()
    for block in text.strip().split("\n\n"):
        for kind, start, traits, size, unit in re.findall(
            r"(Memory|I/O ports) at ([0-9a-f]+)(?: \(([^)]*)\))?.*\[size=(\d+)([KMGT]?)\]", block
        ):
            scale = 1 << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]
            wide, prefetch = "64-bit" in traits, "prefetchable" in traits and "non-prefetchable" not in traits
            expected.add((block[:12], int(start, 16), int(size) * scale, kind != "Memory", wide, prefetch))
    windows = pci.windows(pci.functions(), iomem.iomem())
    assert {(w.bdf, w.start, w.size, w.io, w.wide, w.prefetchable) for w in windows} == expected


def test_processes_agree_with_psutil() -> None:
    found = census.take()
    assert os.getpid() not in found.hidden
    assert set(found.processes) >= {1, os.getpid()}
    me, other = found.processes[os.getpid()], psutil.Process()
    assert me.comm == other.name()[:15]
    assert me.threads == other.num_threads()
    assert census.uid("/", os.getpid()) == other.uids().effective
    assert list(census.command("/", os.getpid())) == other.cmdline()
    assert abs(me.rss - other.memory_info().rss) < 64 * MIB
    started = psutil.boot_time() + me.start_ticks / os.sysconf("SC_CLK_TCK")
    assert abs(started - other.create_time()) < 5
    assert len(me.fds) >= 3


def test_maps_agree_with_psutil_and_with_procmap_query() -> None:
    with idle() as pid:
        vmas = {vma.start: vma for vma in procmaps.vmas("/", pid)}
        smaps = procmaps.smaps("/", pid)
        others = psutil.Process(pid).memory_maps(grouped=False)
        assert len(others) > 20
        for other in others:
            start = int(other.addr.split("-")[0], 16)
            vma = vmas.pop(start)
            assert vma.perms == other.perms
            assert (vma.path or "[anon]") == other.path.removesuffix(" (deleted)")
            assert smaps[start]["Rss"] == other.rss
            if start < 1 << 63:  # [vsyscall] is no VMA
                assert procmaps.find(pid, start) == vma
                assert procmaps.find(pid, vma.end - 1) == vma
        assert vmas == {}
        assert procmaps.find(pid, 1) is None


def test_a_process_that_is_gone_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    for reader in (lambda: procmaps.vmas("/", child.pid), lambda: procmaps.find(child.pid, 0)):
        with pytest.raises(Gone):
            reader()
    with pytest.raises(Gone):
        census.process("/", child.pid)


def test_a_memfd_is_seen_with_its_holders_and_frames() -> None:
    with memfd("seen by tests", 8 * MIB) as fd, closing(mmap.mmap(fd, 8 * MIB)) as view:
        view[: 2 * MIB] = b"x" * (2 * MIB)
        with idle(fd) as child:
            taken = census.take()
            status = os.fstat(fd)
            held = memfds.holders(taken, {(status.st_dev, status.st_ino)})
            assert {(os.getpid(), fd), (child, fd)} <= set(held)
            assert [pid for pid, _ in held].count(child) == 1
            assert {pid for pid, _ in held} == {os.getpid(), child}  # the mapping has a descriptor of its own
            assert memfds.inode("/", taken.processes[child].place, fd) == status.st_ino
            ((pid, vma),) = taken.mappings({(status.st_dev, status.st_ino)})
            assert (pid, vma.size, vma.shared) == (os.getpid(), 8 * MIB, True)
            assert procmaps.resident("/", pid, [vma]) == [2 * MIB]


@pytest.mark.parametrize("kind", ["pipe", "socket", "file"])
def test_an_fd_that_leads_elsewhere_once_it_is_looked_at_is_no_memfd(kind: str, tmp_path: Path) -> None:
    """A pipe whose writer is gone would hold up who opens it, and a socket cannot be opened."""
    with memfd("goes away", MIB) as gone, memfd("stays", MIB) as stays:
        taken = census.take()
        objects = {(status.st_dev, status.st_ino) for status in map(os.fstat, (gone, stays))}
        if kind == "pipe":
            other, write = os.pipe()
            os.close(write)
        elif kind == "socket":
            other = socket.socket(socket.AF_UNIX).detach()
        else:
            other = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(other, gone)
        os.close(other)
        assert memfds.holders(taken, objects) == [(os.getpid(), stays)]


def test_private_memory_is_counted_as_smaps_counts_it() -> None:
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[: 4 * MIB] = b"x" * (4 * MIB)
        process = census.take().processes[os.getpid()]
        large = [vma for vma in kvm.guest_ram(process) if not vma.path]
        counted = procmaps.resident("/", os.getpid(), large)
        assert any(vma.size >= 64 * MIB and rss >= 4 * MIB for vma, rss in zip(large, counted, strict=True))


@pytest.fixture
def qemu() -> Iterator[int]:
    """A QEMU with two vCPUs and 64 MiB in a memfd, stopped before its first instruction."""
    program = tool(f"qemu-system-{os.uname().machine}")
    try:
        probes.kvm()
    except NotFound as error:
        pytest.skip(str(error))
    words = [
        *(program, "-S", "-display", "none", "-nodefaults", "-monitor", "none", "-smp", "2", "-m", "64M"),
        *("-machine", "accel=kvm,memory-backend=ram", "-name", "guest=witness,debug-threads=on"),
        *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
    ]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as child:
        try:
            yield child.pid
        finally:
            child.kill()


SOCKETS = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect(sys.argv[1])
    lines = link.makefile("rw")
    lines.readline()
    for word in ("qmp_capabilities", "query-cpus-fast"):
        lines.write(json.dumps({"execute": word}) + "\\n")
        lines.flush()
        said = json.loads(lines.readline())
print(json.dumps([each["thread-id"] for each in said["return"]]))
"""


@pytest.mark.parametrize("named", ["on", "off"])
def test_vcpu_threads_are_those_qemu_itself_names_whatever_their_apic_ids(named: str, tmp_path: Path) -> None:
    """Three cores a socket: APIC ids have a gap. Where threads have no names the kernel says who ran a vCPU."""
    program = tool("qemu-system-x86_64")
    try:
        probes.kvm()
    except NotFound as error:
        pytest.skip(str(error))
    words = [
        *(program, "-S", "-display", "none", "-nodefaults", "-smp", "6,sockets=2,cores=3", "-m", "64M"),
        *("-machine", "q35,accel=kvm", "-cpu", "qemu64,arch-capabilities=off"),
        *("-name", f"six,debug-threads={named}", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"),
    ]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL) as child:
        try:
            deadline = time.monotonic() + SECONDS
            while not (tmp_path / "qmp").exists():
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            answer = said(sys.executable, "-c", SOCKETS, str(tmp_path / "qmp"))
            (machine,) = (each for each in machines(census.take()) if each.pid == child.pid)
            found = [(vcpu.index, vcpu.tid) for vcpu in vcpus_of(machine)]
            assert [index for index, _ in found] == [0, 1, 2, 4, 5, 6]
            threads = json.loads(answer)
            if named == "on":
                assert [tid for _, tid in found] == threads
            else:
                assert all(tid in {None, threads[at]} for at, (_, tid) in enumerate(found))
        finally:
            child.kill()


def settled(pid: int) -> kvm.Machine:
    """The machine of a QEMU that has started both of its vCPUs."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found = {machine.pid: machine for machine in machines(census.take())}.get(pid)
        if found and len(vcpus_of(found)) == 2 and all(vcpu.tid for vcpu in vcpus_of(found)):
            return found
        time.sleep(0.1)
    pytest.fail("QEMU did not start its vCPUs")


def test_a_real_vm_is_found_with_its_vcpus_and_ram(qemu: int) -> None:
    found = settled(qemu)
    assert found.name == "witness"
    assert found.seen.comm.startswith("qemu-system")
    names = {int(path.parent.name): path.read_text() for path in Path(f"/proc/{qemu}/task").glob("*/comm")}
    assert [names[vcpu.tid or 0] for vcpu in vcpus_of(found)] == ["CPU 0/KVM\n", "CPU 1/KVM\n"]
    (block,) = [block for block in found.seen.ram if block.backing.startswith("/memfd:")]
    assert block.size == 64 * MIB


def test_a_recording_reads_like_the_host_it_was_taken_on(qemu: int, tmp_path: Path) -> None:
    settled(qemu)
    place = tmp_path / "recorded"
    assert record(place) > 10_000
    live, recorded = (
        {
            "boot": host.host(root).boot_id,
            "page size": host.page_size(root),
            "config": host.config(root),
            "nodes": [node.number for node in memory.nodes(root)],
            "pools": memory.pools(root),
            "iomem": iomem.iomem(root),
            "ports": iomem.ioports(root),
            "firmware": iomem.firmware(root),
            "dax": dax.dax(root),
            "survival": kho.survival(root),
            "pci": pci.functions(root),
            "units": iommu.units(root),
            "domains": iommu.domains(root),
            "doctor": {found.id: found.level for found in doctor(root) if found.id in FROM_FILES},
            "vms": [
                (machine.name, machine.command, machine.seen.vcpus, machine.vmas)
                for machine in machines(census.take(root))
                if machine.pid == qemu
            ],
            "memfds": {
                (fd, link, memfds.inode(root, process.place, fd))
                for process in [census.take(root).processes[qemu]]
                for fd, link in process.fds.items()
                if link.startswith("/memfd:")
            },
        }
        for root in (Path("/"), place)
    )
    for key, value in live.items():
        assert recorded[key] == value, key
    assert recorded["vms"]
    with pytest.raises(UsageError, match="not empty"):
        record(place)


# --- what an ordinary user is told ------------------------------------------------------------------------------

ORDINARY = """
import ctypes, json, os, msgspec
from memconsole.backend.diagnose import doctor as examine
from memconsole.backend.kernel import census, iomem, probes, tree
from memconsole.errors import Denied
import memconsole.native
examine.doctor()  # what it imports may lie where only root can read
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or our own /proc files are root's
try:
    iomem.iomem()
    hidden = False
except Denied:
    hidden = True
print(json.dumps({
    "pfns": probes.pfns_visible(),
    "iomem hidden": hidden,
    "gaps": [gap.remedy for gap in census.take().gaps()],
    "doctor": msgspec.to_builtins(examine.doctor()),
}))
"""


HIDDEN = """
import ctypes, json, os, sys
from memconsole.backend.kernel import census
from memconsole.backend.observe.survey import SurveyInput, survey
survey(SurveyInput())  # what it imports may lie where only root can read
if child := os.fork():  # whose threads would stay in the mount namespace they began in
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0 and libc.mount(None, b"/", None, 1 << 14 | 1 << 18, None) == 0
assert libc.mount(b"proc", b"/proc", b"proc", 0, f"hidepid={sys.argv[1]}".encode()) == 0, ctypes.get_errno()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
libc.prctl(4, 1, 0, 0, 0)
taken = census.take()
print(json.dumps({
    "own": os.getpid() in taken.processes and bool(taken.processes[os.getpid()].maps),
    "init": 1 in taken.processes,
    "hidden": len(taken.hidden),
    "unseen": taken.unseen,
    "gaps": [[gap.source, gap.why, gap.remedy] for gap in survey(SurveyInput()).gaps if gap.source.startswith("/proc")],
}))
"""


@pytest.mark.parametrize("hidepid", [1, 2])
def test_where_proc_hides_the_processes_of_others_ones_own_are_read_and_that_is_said(hidepid: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount and become another user")
    words = [sys.executable, "-c", HIDDEN, str(hidepid)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["own"]
    assert not found["init"]
    assert (found["hidden"] > 0) == (hidepid == 1)
    assert ("hidepid" in found["unseen"]) == (hidepid == 2)
    (gap,) = (gap for gap in found["gaps"] if gap[0] in {"/proc", "/proc/PID/{fd,maps}"})
    assert "root" in gap[2]


def test_an_ordinary_user_is_told_what_is_not_shown() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    done = subprocess.run(
        [sys.executable, "-c", ORDINARY], capture_output=True, text=True, timeout=LONG_S, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pfns"] is False
    assert found["iomem hidden"] is True
    assert len(found["gaps"]) == 1
    assert "root" in found["gaps"][0]
    verdicts = {capability["id"]: capability for capability in found["doctor"]}
    assert verdicts["root"]["level"] == "no"
    assert verdicts["pfns"]["level"] == "no"
    assert "root" in verdicts["pfns"]["remedy"]


def test_the_doctor_leaves_nothing_behind_and_knows_this_host() -> None:
    with nothing_stays_open():
        found = {capability.id: capability for capability in doctor()}
    assert found["root"].level == ("yes" if os.geteuid() == 0 else "no")
    assert (found["iommu"].level != "no") == any(Path("/sys/class/iommu").glob("*"))
    assert (found["qemu"].level == "no") == (shutil.which(f"qemu-system-{os.uname().machine}") is None)
    assert (found["debugfs"].level == "yes") == any(Path("/sys/kernel/debug").glob("*"))
    for capability in found.values():
        assert capability.level == "yes" or capability.why
