"""VMAs, processes, VMs and memfds, read from trees of hosts that are not here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.trees import FakeProcess, Tree, maps_line

from memconsole.backend.kernel import census, kvm, memfds, procmaps
from memconsole.errors import BadFile
from memconsole.model import Vcpu

GIB, MIB = 1 << 30, 1 << 20
RAM = 0x7F0000000000


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    found = Tree(tmp_path)
    found.host()
    return found


@pytest.mark.parametrize(
    ("path", "shown", "deleted"),
    [
        ("", "", False),
        ("/usr/lib/libc.so.6", "/usr/lib/libc.so.6", False),
        ("/tmp/two  blanks and end ", "/tmp/two  blanks and end ", False),
        ("/memfd:ram (deleted)", "/memfd:ram", True),
        ("/ (deleted)", "/", True),
        ("anon_inode:[vfio-device]", "anon_inode:[vfio-device]", False),
        ("[anon: glibc malloc]", "[anon: glibc malloc]", False),
        ("/run/memconsole/fs/guests/a/ram/r", "/run/memconsole/fs/guests/a/ram/r", False),
        ("/tmp/a\nb", "/tmp/a\\012b", False),
    ],
)
def test_every_form_of_a_path(path: str, shown: str, deleted: bool) -> None:
    text = maps_line(0x1000, 0x3000, "rw-s", 0x2000, (0xFE, 0x1B), 4242, path)
    (vma,) = procmaps.parse(text.encode())
    assert (vma.path, vma.deleted) == (shown, deleted)
    assert (vma.start, vma.end, vma.size, vma.offset, vma.inode) == (0x1000, 0x3000, 0x2000, 0x2000, 4242)
    assert vma.device == os.makedev(0xFE, 0x1B)
    assert (vma.shared, vma.writable) == (True, True)


def test_a_path_that_is_no_utf8_can_still_be_written_as_json() -> None:
    import msgspec

    line = maps_line(0x1000, 0x3000, "r--p", path="/tmp/X").encode().replace(b"X", b"\xff\xfe")
    (vma,) = procmaps.parse(line)
    assert msgspec.json.encode(vma.path) == b'"/tmp/\\\\xff\\\\xfe"'


def test_addresses_of_all_widths_and_needles() -> None:
    text = (maps_line(0x1000, 0x2000, "r--p") + maps_line((1 << 56) - 4096, 1 << 56, "rw-p", path="[stack]")).encode()
    assert [vma.end for vma in procmaps.parse(text)] == [0x2000, 1 << 56]
    assert [vma.path for vma in procmaps.parse(text, b"[stack]", b"[heap]")] == ["[stack]"]


@pytest.mark.parametrize("line", [b"nonsense\n", b"1000 rw-p 0 0:0 0\n", b"1000-2000 rw-p 0 00 0\n", b"\n"])
def test_a_line_that_is_no_mapping_is_named(line: bytes) -> None:
    with pytest.raises(BadFile, match="/proc/PID/maps"):
        procmaps.parse(line)


def qemu(pid: int = 4000) -> FakeProcess:
    ram = maps_line(RAM, RAM + GIB, "rw-s", 0, (0, 1), 1025, "/memfd:ram (deleted)")
    private = maps_line(RAM + 2 * GIB, RAM + 2 * GIB + 64 * MIB, "rw-p")
    noise = (
        maps_line(0x400000, 0x900000, "r-xp", 0, (8, 1), 77, "/usr/bin/qemu-system-x86_64")
        + maps_line(0x1000000, 0x9000000, "rw-p", path="[heap]")
        + maps_line(RAM - 2 * GIB, RAM - 2 * GIB + 0x3000, "rw-s", 0, (0, 15), 9, "anon_inode:kvm-vcpu:0")
        + maps_line(RAM - GIB, RAM - GIB + 128 * MIB, "---p")
        + maps_line(RAM + 4 * GIB, RAM + 4 * GIB + MIB, "rw-s", 0, (0, 15), 9, "anon_inode:[vfio-device]")
    )
    return FakeProcess(
        pid,
        comm="qemu (a) b)",
        uid=107,
        command=("qemu-system-x86_64", "-name", "guest=web1,debug-threads=on", "-m", "1G"),
        maps=noise + ram + private,
        smaps=ram + "Size: 1048576 kB\nRss: 204800 kB\nVmFlags: rd wr sh\n" + private + "Rss: 4096 kB\n",
        fds={
            0: "/dev/null",
            9: "/dev/kvm",
            10: "anon_inode:kvm-vm",
            11: "anon_inode:kvm-vcpu:0",
            12: "anon_inode:kvm-vcpu:1",
            13: "/memfd:ram (deleted)",
        },
        fdinfo={13: "pos:\t0\nflags:\t02100002\nmnt_id:\t1\nino:\t1025\n"},
        tasks={4000: "qemu-system-x86", 4003: "CPU 1/KVM", 4005: "IO mon_iothread", 4006: "vnc_worker"},
    )


def test_a_vm_is_known_by_its_fds_and_its_ram_by_shape(made: Tree) -> None:
    made.process(qemu())
    made.process(FakeProcess(1, comm="init"))
    (machine,) = kvm.machines(census.take(made.root))
    assert (machine.pid, machine.name, machine.start_ticks) == (4000, "web1", 12345)
    assert machine.command[0] == "qemu-system-x86_64"
    seen = machine.seen
    assert (seen.comm, seen.uid, seen.rss, seen.threads) == ("qemu (a) b)", 107, 512 * MIB, 4)
    assert seen.vcpus == (Vcpu(0, None), Vcpu(1, 4003))
    assert [(block.start, block.size, block.resident, block.backing) for block in seen.ram] == [
        (RAM, GIB, 200 * MIB, "/memfd:ram"),
        (RAM + 2 * GIB, 64 * MIB, 4 * MIB, "anonymous"),
    ]
    assert machine.memory == GIB + 64 * MIB
    assert [vma.inode for vma in machine.vmas] == [1025, 0]


def test_kernel_threads_and_zombies_have_no_files(made: Tree) -> None:
    made.process(FakeProcess(2, comm="kthreadd", kernel=True, maps="not read", fds={1: "anon_inode:kvm-vm"}))
    made.process(FakeProcess(3, comm="dead", state="Z", fds={1: "anon_inode:kvm-vm"}))
    found = census.take(made.root)
    assert [process.fds for process in found.processes.values()] == [{}, {}]
    assert kvm.machines(found) == ()


def test_memfds_join_their_holders_and_mappers(made: Tree) -> None:
    made.process(qemu())
    made.process(
        FakeProcess(5000, comm="db", maps=maps_line(RAM, RAM + GIB, "rw-s", 0, (0, 1), 1025, "/memfd:ram (deleted)"))
    )
    made.process(
        FakeProcess(
            6000,
            comm="adopted",
            maps=maps_line(RAM, RAM + GIB, "rw-s", 0, (0, 1), 2000, "/ (deleted)"),
            fds={5: "/ (deleted)"},
            fdinfo={5: "ino:\t2000\n"},
        )
    )
    first, second = memfds.memfds(census.take(made.root))
    assert (first.name, first.inode, first.holders, first.mappers) == ("ram", 1025, [(4000, 13)], [4000, 5000])
    assert (second.name, second.inode, second.holders, second.mappers) == ("", 2000, [(6000, 5)], [6000])


def test_the_mappings_of_given_memfds(made: Tree) -> None:
    made.process(qemu())
    found = list(census.take(made.root).mappings({(os.makedev(0, 1), 1025), (os.makedev(0, 1), 9)}))
    assert [(pid, vma.start, vma.size) for pid, vma in found] == [(4000, RAM, GIB)]


def test_a_torn_stat_is_named(made: Tree) -> None:
    made.write("/proc/9/stat", "9 (half S 1\n")
    with pytest.raises(BadFile, match="/proc/9/stat"):
        census.take(made.root)
