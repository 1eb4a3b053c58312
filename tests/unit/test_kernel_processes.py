"""VMAs, processes, VMs and memfds, read from trees of hosts that are not here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.machines import machines
from support.trees import FakeProcess, Tree, maps_line

from memconsole.backend.exports.mapped import FuseAlias
from memconsole.backend.kernel import census, memfds, procmaps
from memconsole.backend.kernel.procmaps import MappedBytes
from memconsole.backend.observe.mappings import region_mappings
from memconsole.errors import BadFile
from memconsole.model import Region, RegionState, Segment, Vcpu

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
    (machine,) = machines(census.take(made.root))
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


def test_how_memory_is_mapped_is_read_from_smaps(made: Tree) -> None:
    rows = [maps_line(GIB * at, GIB * at + 8 * MIB, "rw-s", path="/memfd:ram (deleted)") for at in range(1, 6)]
    counters = (
        "Rss: 8192 kB\nShmemPmdMapped: 6144 kB\nTHPeligible:    1\nVmFlags: rd wr sh\n",
        "Rss: 8192 kB\nFilePmdMapped: 8192 kB\nTHPeligible:    0\n",
        "Rss: 0 kB\nAnonHugePages: 0 kB\nShared_Hugetlb: 4096 kB\nPrivate_Hugetlb: 2048 kB\nTHPeligible:    0\n",
        "Rss: 4 kB\n",
        "Rss: 4096 kB\nAnonHugePages: 2048 kB\nTHPeligible:    1\n",
    )
    smaps = "".join(row + text for row, text in zip(rows, counters, strict=True))
    made.process(FakeProcess(4000, maps="".join(rows), smaps=smaps))
    assert procmaps.paged(made.root, 4000) == {
        GIB: MappedBytes(8 * MIB, 6 * MIB, True),
        2 * GIB: MappedBytes(8 * MIB, 8 * MIB, False),
        3 * GIB: MappedBytes(6 * MIB, 6 * MIB, False),
        4 * GIB: MappedBytes(4096, 0, None),
        5 * GIB: MappedBytes(4 * MIB, 2 * MIB, True),
    }


def test_huge_pages_of_the_pool_are_resident_too(made: Tree) -> None:
    shared = maps_line(RAM, RAM + GIB, "rw-s", 0, (0, 0x22), 5, "/dev/hugepages/vm1/ram0")
    private = maps_line(RAM + GIB, RAM + GIB + 256 * MIB, "rw-p", 0, (0, 0x10), 6, "/anon_hugepage (deleted)")
    rest = "Rss: 0 kB\nPss: 0 kB\n"
    process = FakeProcess(
        700,
        maps=shared + private,
        smaps=f"{shared}{rest}Shared_Hugetlb: 1048576 kB\nPrivate_Hugetlb: 0 kB\n"
        f"{private}{rest}Shared_Hugetlb: 0 kB\nPrivate_Hugetlb: 131072 kB\n",
        rss=8 * MIB,
        fds={5: "anon_inode:kvm-vm"},
    )
    made.process(process)
    made.write("/proc/700/status", "Name:\tx\nUid:\t0\t7\t0\t0\nHugetlbPages:\t 1179648 kB\n")
    (machine,) = machines(census.take(made.root))
    assert [(block.backing, block.resident) for block in machine.seen.ram] == [
        ("/dev/hugepages/vm1/ram0", GIB),
        ("/anon_hugepage", 128 * MIB),
    ]
    assert (machine.seen.uid, machine.seen.rss) == (7, 8 * MIB + 1152 * MIB)


BESIDE = [
    ("/[aio] (deleted)", 68 << 10),
    ("/memfd:pulseaudio (deleted)", 64 * MIB),
    ("/memfd:wayland-cursor (deleted)", MIB),
    ("/memfd:displaysurface (deleted)", 3 * MIB),
    ("/dev/dri/renderD128", 8 * MIB),
    ("/dev/nvidiactl", 8 * MIB),
    ("/drm mm object (deleted)", 4 * MIB),
    ("/dmabuf:", 4 * MIB),
    ("/SYSV00000000 (deleted)", MIB),
    ("/dev/mem", MIB),
    ("/proc/bus/pci/00/06.0", MIB),
    ("/sys/devices/pci0000:00/0000:00:06.0/resource0", MIB),
    ("anon_inode:[io_uring]", MIB),
]
RAMS = [
    "/memfd:ram (deleted)",
    "/dev/shm/ram",
    "/dev/hugepages-1G/vm/ram",
    "/dev/dax0.0",
    "/dev/zero (deleted)",
    "/vm.img",
]


def test_what_a_vmm_maps_beside_its_guest_is_not_its_ram(made: Tree) -> None:
    mapped = [*BESIDE, *((path, GIB) for path in RAMS)]
    lines = (
        maps_line(RAM + n * GIB, RAM + n * GIB + size, "rw-s", 0, (0, 1), n + 1, path)
        for n, (path, size) in enumerate(mapped)
    )
    made.process(FakeProcess(700, maps="".join(lines), fds={5: "anon_inode:kvm-vm"}))
    (machine,) = machines(census.take(made.root))
    assert [block.backing for block in machine.seen.ram] == [path.removesuffix(" (deleted)") for path in RAMS]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["-name", "web1"], "web1"),
        (["-name", "guest=web1,debug-threads=on"], "web1"),
        (["-name", "debug-threads=on,guest=web1"], "web1"),
        (["--name", "web1,process=vmhost"], "web1"),
        (["-name", "a,,b,debug-threads=on"], "a,b"),
        (["-name", "guest=a,,,debug-threads=on"], "a,"),
        (["-name", "guest=a=b"], "a=b"),
        (["-name", "debug-threads=on"], "vmm"),
        (["-name", "process=vmhost,debug-threads"], "vmm"),
        (["-name", ""], "vmm"),
        (["-name", "web1", "-name", "debug-threads=on"], "web1"),
        (["-name", "web1", "-name", "guest=web2"], "web2"),
        (["-S"], "vmm"),
    ],
)
def test_the_name_is_what_qemu_makes_of_its_option(made: Tree, words: list[str], name: str) -> None:
    made.process(FakeProcess(700, comm="vmm", command=("qemu", *words), fds={5: "anon_inode:kvm-vm"}))
    (machine,) = machines(census.take(made.root))
    assert machine.name == name


def test_kernel_threads_and_zombies_have_no_files(made: Tree) -> None:
    made.process(FakeProcess(2, comm="kthreadd", kernel=True, maps="not read", fds={1: "anon_inode:kvm-vm"}))
    made.process(FakeProcess(3, comm="dead", state="Z", threads=1, fds={1: "anon_inode:kvm-vm"}))
    found = census.take(made.root)
    assert [process.fds for process in found.processes.values()] == [{}, {}]
    assert machines(found) == ()


def test_a_process_whose_first_thread_has_left_is_alive_and_holds_and_maps(made: Tree) -> None:
    made.left_by_its_first_thread(qemu(), 4003)
    found = census.take(made.root)
    process = found.processes[4000]
    assert (process.state, process.task, process.place) == ("S", 4003, "/proc/4000/task/4003")
    assert (process.comm, process.start_ticks, process.rss) == ("qemu (a) b)", 12345, 512 * MIB)
    assert [pid for pid, _ in found.mappings({(os.makedev(0, 1), 1025)})] == [4000]
    (machine,) = machines(found)
    assert (machine.name, machine.seen.uid) == ("web1", 107)
    assert [block.resident for block in machine.seen.ram] == [200 * MIB, 4 * MIB]
    assert process.fds[13] == "/memfd:ram (deleted)"
    assert memfds.inode(made.root, process.place, 13) == 1025


@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_of_which_no_thread_lives_is_dead(made: Tree, threads: int) -> None:
    """Its last threads are zombies too until it is waited for."""
    dead = FakeProcess(900, state="Z", threads=threads)
    made.left_by_its_first_thread(dead, 901)
    made.directory("/proc/900/task/902")  # it ended while it was listed
    process = census.take(made.root).processes[900]
    assert (process.state, process.task, process.maps) == ("Z", 900, b"")


def test_the_mappings_of_given_memfds(made: Tree) -> None:
    made.process(qemu())
    found = list(census.take(made.root).mappings({(os.makedev(0, 1), 1025), (os.makedev(0, 1), 9)}))
    assert [(pid, vma.start, vma.size) for pid, vma in found] == [(4000, RAM, GIB)]


def test_a_file_is_known_by_device_and_inode_whatever_it_is_called(made: Tree) -> None:
    device, inode = os.makedev(0, 0x128), 30132038094815243
    names = ("/run/mount/guests/g/ram/web", "/vm.img", "/a b (deleted)", "/", "/memfd:x (deleted)", "")
    places = enumerate(names, 1)
    lines = [maps_line(RAM + n * MIB, RAM + n * MIB + 4096, "rw-s", 0, (0, 0x128), inode, name) for n, name in places]
    other = maps_line(RAM - MIB, RAM, "rw-s", 0, (0, 0x128), inode + 2, "/run/mount/guests/g/ram/web")
    else_where = maps_line(RAM - 2 * MIB, RAM - MIB, "rw-s", 0, (0, 0x28), inode, f"/x 00:128 {inode} y")
    made.process(FakeProcess(900, maps=else_where + other + "".join(lines)))
    found = list(census.take(made.root).mappings({(device, inode)}))
    assert [(pid, vma.start) for pid, vma in found] == [(900, RAM + n * MIB) for n in range(1, len(names) + 1)]


def test_a_region_is_mapped_through_a_file_of_the_mount_by_another_name(made: Tree) -> None:
    made.process(FakeProcess(900, maps=maps_line(RAM, RAM + 4 * MIB, "rw-s", MIB, (0, 0x28), 77, "/vm.img")))
    web = Region("web", "memfd", 8 * MIB, 4096, RegionState.RESERVED, segments=(Segment(1, 5, 8 * MIB),))
    face = FuseAlias("web", os.makedev(0, 0x28), 77, 0, "guests/g/ram/web")
    stranger = FuseAlias("db", os.makedev(0, 0x28), 78, 0, "guests/g/ram/db")
    (over,) = region_mappings(census.take(made.root), [web], [face, stranger])
    assert (over.region, over.pid, over.offset, over.through) == ("web", 900, MIB, "guests/g/ram/web")


def vcpus(made: Tree, ids: tuple[int, ...], names: dict[int, str]) -> list[tuple[int, int | None]]:
    fds = {5: "anon_inode:kvm-vm", **{10 + n: f"anon_inode:kvm-vcpu:{id}" for n, id in enumerate(ids)}}
    made.process(FakeProcess(700, fds=fds, tasks={700: "qemu", **names}))
    (machine,) = machines(census.take(made.root))
    assert machine.seen is not None
    assert machine.seen.vcpus is not None
    return [(vcpu.index, vcpu.tid) for vcpu in machine.seen.vcpus]


def test_vcpu_threads_are_told_by_their_order_for_indexes_and_apic_ids_are_two_things(made: Tree) -> None:
    """-smp 6,sockets=2,cores=3: the kernel's ids are APIC ids, QEMU names threads by CPU index."""
    names = {800 + n: f"CPU {n}/KVM" for n in (5, 0, 3, 1, 4, 2)}
    assert vcpus(made, (0, 1, 2, 4, 5, 6), names) == [(0, 800), (1, 801), (2, 802), (4, 803), (5, 804), (6, 805)]


@pytest.mark.parametrize("maker", [700, 703])
def test_the_kernel_says_which_thread_ran_a_vcpu_where_names_do_not(made: Tree, maker: int) -> None:
    base = f"/sys/kernel/debug/kvm/{maker}-5"
    for id, tid in ((0, 701), (4, 702), (5, 0), (6, 999)):  # one that never ran; one of another namespace
        made.write(f"{base}/vcpu{id}/pid", f"{tid}\n")
    made.directory("/sys/kernel/debug/kvm/701-77/vcpu0")
    made.write(f"{base}/create_vcpu", "")
    names = dict.fromkeys((701, 702, 703), "qemu")
    assert vcpus(made, (0, 4, 5, 6), names) == [(0, 701), (4, 702), (5, None), (6, None)]


def test_with_a_thread_less_than_vcpus_nothing_is_guessed(made: Tree) -> None:
    """A vCPU that was unplugged keeps its fd."""
    assert vcpus(made, (0, 1, 4), {800: "CPU 0/KVM", 803: "CPU 2/KVM"}) == [(0, None), (1, None), (4, None)]


def test_a_torn_stat_is_named_and_in_a_census_costs_no_other_process(made: Tree) -> None:
    made.write("/proc/9/stat", "9 (half S 1\n")
    made.process(FakeProcess(10))
    with pytest.raises(BadFile, match="/proc/9/stat"):
        census.process(made.root, 9)
    found = census.take(made.root)
    assert (tuple(found.processes), found.hidden) == ((10,), (9,))
    assert found.gaps()
