"""Writers of synthetic /proc and /sys trees: hosts that are not here, as the kernel would show them.

Each writer follows the kernel's own format (the source file stands beside it), so that a reader is held against the
kernel's text and not against its own idea of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

GIB = 1 << 30
BOOT_ID = "7c9f6d34-3a3f-4d38-9f0e-3f1d1f2a4b5c"


class Tree:
    """A host's tree under ``root``; every method adds one source."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, content: str | bytes) -> None:
        """One file by its absolute path on the host."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)

    def link(self, path: str, target: str) -> None:
        """One symbolic link, which may dangle."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def directory(self, path: str) -> None:
        """An empty directory."""
        (self.root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def host(
        self,
        *,
        name: str = "hv1",
        kernel: str = "7.3.4-test",
        arch: str = "x86_64",
        cpus: str = "0-7",
        page_size: int = 4096,
        command_line: str = "BOOT_IMAGE=/vmlinuz root=/dev/sda1 quiet",
    ) -> None:
        """What host.py reads (kernel/sysctl.c, fs/proc/uptime.c, fs/binfmt_elf.c)."""
        self.write("/proc/sys/kernel/hostname", f"{name}\n")
        self.write("/proc/sys/kernel/osrelease", f"{kernel}\n")
        self.write("/proc/sys/kernel/arch", f"{arch}\n")
        self.write("/proc/sys/kernel/random/boot_id", f"{BOOT_ID}\n")
        self.write("/proc/uptime", "3600.25 28000.00\n")
        self.write("/proc/cmdline", f"{command_line}\n")
        self.write("/sys/devices/system/cpu/online", f"{cpus}\n")
        self.write("/proc/self/auxv", struct.pack("=8Q", 16, 0xBFEBFBFF, 6, page_size, 17, 100, 0, 0))

    def meminfo(self, *, total: int = 64 * GIB, free: int = 32 * GIB, shmem_thp: str | None = "advise") -> None:
        """fs/proc/meminfo.c; mm/shmem.c."""
        rows = {
            "MemTotal": total,
            "MemFree": free,
            "MemAvailable": free + GIB,
            "Shmem": 3 * GIB,
            "ShmemHugePages": 2 * GIB,
            "SwapTotal": 8 * GIB,
            "SwapFree": 7 * GIB,
        }
        text = "".join(f"{key + ':':<16}{value >> 10:>8} kB\n" for key, value in rows.items())
        self.write("/proc/meminfo", f"{text}HugePages_Total:      16\nHugepagesize:       2048 kB\n")
        if shmem_thp is not None:
            words = ("always", "within_size", "advise", "never", "deny", "force")
            shown = " ".join(f"[{word}]" if word == shmem_thp else word for word in words)
            self.write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", f"{shown}\n")

    def node(self, number: int, total: int, free: int, cpus: str) -> None:
        """drivers/base/node.c."""
        base = f"/sys/devices/system/node/node{number}"
        self.write(
            f"{base}/meminfo",
            f"Node {number} MemTotal:       {total >> 10} kB\nNode {number} MemFree:        {free >> 10} kB\n"
            f"Node {number} HugePages_Total:     0\n",
        )
        self.write(f"{base}/cpulist", f"{cpus}\n")

    def pool(self, page_size: int, total: int, free: int, reserved: int = 0, surplus: int = 0) -> None:
        """mm/hugetlb_sysfs.c."""
        base = f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB"
        counts = {"nr": total, "free": free, "resv": reserved, "surplus": surplus}
        for key, value in counts.items():
            self.write(f"{base}/{key}_hugepages", f"{value}\n")

    def iomem(self, rows: Iterable[tuple[int, int, int, str]], *, hidden: bool = False, ports: bool = False) -> None:
        """Rows are (depth, start, inclusive end, name); kernel/resource.c:r_show, zeros without CAP_SYS_ADMIN."""
        width = 4 if ports else 8
        text = "".join(
            f"{'  ' * depth}{0 if hidden else start:0{width}x}-{0 if hidden else end:0{width}x} : {name}\n"
            for depth, start, end, name in rows
        )
        self.write("/proc/ioports" if ports else "/proc/iomem", text)

    def firmware(self, rows: Sequence[tuple[int, int, str]]) -> None:
        """Rows are (start, inclusive end, type); drivers/firmware/memmap.c."""
        for number, (start, end, kind) in enumerate(rows):
            base = f"/sys/firmware/memmap/{number}"
            self.write(f"{base}/start", f"0x{start:x}\n")
            self.write(f"{base}/end", f"0x{end:x}\n")
            self.write(f"{base}/type", f"{kind}\n")

    def dax(self, name: str, *, size: int, align: int, node: int, start: int) -> None:
        """drivers/dax/bus.c."""
        base = f"/sys/bus/dax/devices/{name}"
        self.write(f"{base}/size", f"{size}\n")
        self.write(f"{base}/align", f"{align}\n")
        self.write(f"{base}/target_node", f"{node}\n")
        self.write(f"{base}/numa_node", "0\n")
        self.write(f"{base}/resource", f"0x{start:x}\n")

    def pci(
        self,
        bdf: str,
        *,
        ids: tuple[int, int],
        class_code: int,
        driver: str | None = None,
        group: int | None = None,
        node: int = -1,
        bars: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Rows of ``bars`` are (start, inclusive end, flags) from row 0; drivers/pci/pci-sysfs.c."""
        base = f"/sys/bus/pci/devices/{bdf}"
        lines = [f"DRIVER={driver}"] if driver else []
        lines += [f"PCI_CLASS={class_code:04X}", f"PCI_ID={ids[0]:04X}:{ids[1]:04X}", f"PCI_SLOT_NAME={bdf}"]
        self.write(f"{base}/uevent", "".join(f"{line}\n" for line in lines))
        rows = [*bars, *[(0, 0, 0)] * (13 - len(bars))]
        self.write(f"{base}/resource", "".join(f"0x{a:016x} 0x{b:016x} 0x{c:016x}\n" for a, b, c in rows))
        self.write(f"{base}/numa_node", f"{node}\n")
        if group is not None:
            self.link(f"{base}/iommu_group", f"../../../kernel/iommu_groups/{group}")
            self.directory(f"/sys/kernel/iommu_groups/{group}/devices/{bdf}")

    def group(self, number: int, kind: str, reserved: Sequence[tuple[int, int, str]] = ()) -> None:
        """Rows of ``reserved`` are (start, inclusive end, kind); drivers/iommu/iommu.c."""
        base = f"/sys/kernel/iommu_groups/{number}"
        self.directory(f"{base}/devices")
        self.write(f"{base}/type", f"{kind}\n")
        self.write(f"{base}/reserved_regions", "".join(f"0x{a:016x} 0x{b:016x} {c}\n" for a, b, c in reserved))

    def iommu(
        self, name: str, devices: Sequence[str], kind: str = "", attributes: dict[str, str] | None = None
    ) -> None:
        """drivers/iommu/iommu-sysfs.c; ``kind`` is the directory of attributes a driver adds.

        A virtio-iommu adds none: its name is that of the PCI function, its ``device`` the virtio device.
        """
        self.directory(f"/sys/class/iommu/{name}/devices")
        for bdf in devices:
            self.link(f"/sys/class/iommu/{name}/devices/{bdf}", f"../../../../pci0000:00/{bdf}")
        if kind.startswith("virtio"):
            self.link(f"/sys/class/iommu/{name}/device", f"../../{kind}")
        for key, value in (attributes or {}).items():
            self.write(f"/sys/class/iommu/{name}/{kind}/{key}", f"{value}\n")

    def intel_tables(self, bdf: str, dump: str) -> None:
        """drivers/iommu/intel/debugfs.c, since Linux 6.5."""
        self.write(f"/sys/kernel/debug/iommu/intel/{bdf}/domain_translation_struct", dump)

    def process(self, process: FakeProcess) -> None:
        """fs/proc/array.c, fs/proc/fd.c, fs/proc/task_mmu.c."""
        self._task(f"/proc/{process.pid}", process)
        for tid, name in process.tasks.items():
            self.write(f"/proc/{process.pid}/task/{tid}/comm", f"{name}\n")

    def left_by_its_first_thread(self, process: FakeProcess, tid: int) -> None:
        """A process that goes on as thread ``tid``: its first one called pthread_exit, and has neither mm nor files."""
        gone = replace(process, state="Z", rss=0, maps="", smaps="", command=(), fds={}, fdinfo={})
        self.process(gone)
        self._task(f"/proc/{process.pid}/task/{process.pid}", gone)
        self._task(f"/proc/{process.pid}/task/{tid}", process)

    def _task(self, base: str, process: FakeProcess) -> None:
        numbers = ["0"] * 52
        numbers[0], numbers[1], numbers[2], numbers[3] = str(process.pid), f"({process.comm})", process.state, "1"
        numbers[8] = str(0x00200040 if process.kernel else 0x400000)
        numbers[19], numbers[21], numbers[23] = str(process.threads), str(process.start_ticks), str(process.rss >> 12)
        self.write(f"{base}/stat", " ".join(numbers) + "\n")
        self.write(f"{base}/status", f"Name:\t{process.comm}\nUid:\t{process.uid}\t{process.uid}\t{process.uid}\t0\n")
        self.write(f"{base}/cmdline", b"".join(word.encode() + b"\0" for word in process.command))
        self.write(f"{base}/maps", process.maps)
        self.write(f"{base}/smaps", process.smaps)
        self.directory(f"{base}/fd")
        for fd, target in process.fds.items():
            self.link(f"{base}/fd/{fd}", target)
        for fd, text in process.fdinfo.items():
            self.write(f"{base}/fdinfo/{fd}", text)

    def kho(self, *, incoming: Sequence[str] = (), scratch: Sequence[tuple[int, int]] = (), count: int = 0) -> None:
        """kernel/liveupdate/kexec_handover_debugfs.c, and drivers' entries in sub_fdts."""
        base = "/sys/kernel/debug/kho"
        self.directory(f"{base}/in" if incoming else f"{base}/out")
        self.write(f"{base}/out/scratch_phys", "".join(f"0x{start:x}\n" for start, _ in scratch))
        self.write(f"{base}/out/scratch_len", "".join(f"0x{size:x}\n" for _, size in scratch))
        for name in ("LUO", "kexec-metadata"):
            self.write(f"{base}/out/sub_fdts/{name}", b"")
        for name in incoming:
            self.write(f"{base}/in/sub_fdts/{name}", b"\xff" * 16)
        if "kexec-metadata" in incoming:
            self.write(f"{base}/in/sub_fdts/kexec-metadata", struct.pack("=I65sI", 1, b"7.3.3-old", count))


@dataclass
class FakeProcess:
    """A process to write; ``maps`` comes from :func:`maps_line`."""

    pid: int
    comm: str = "qemu-system-x86"
    state: str = "S"
    threads: int = 4
    start_ticks: int = 12345
    rss: int = 512 << 20
    uid: int = 0
    kernel: bool = False
    command: tuple[str, ...] = ()
    maps: str = ""
    smaps: str = ""
    fds: dict[int, str] = field(default_factory=dict)
    fdinfo: dict[int, str] = field(default_factory=dict)
    tasks: dict[int, str] = field(default_factory=dict)


def maps_line(
    start: int,
    end: int,
    perms: str,
    offset: int = 0,
    device: tuple[int, int] = (0, 0),
    inode: int = 0,
    path: str = "",
) -> str:
    """One line of /proc/PID/maps, padded as fs/proc/task_mmu.c:show_map_vma pads it."""
    head = f"{start:08x}-{end:08x} {perms} {offset:08x} {device[0]:02x}:{device[1]:02x} {inode} "
    return (f"{head:<73}" + path.replace("\n", "\\012") if path else head) + "\n"


def intel_dump(
    bdf: str,
    leaves: Iterable[tuple[int, int, int, int]],
    *,
    root: int = 0x1004F3000,
    pasid: int | None = None,
    padded: bool = False,
) -> str:
    """A dump of leaves (iova page, pfn, level 1-3, access bits), as drivers/iommu/intel/debugfs.c prints it.

    ``padded`` is how it was printed before Linux 6.7: with zeros for the levels below a large page.
    """
    name = f"Device {bdf}" if pasid is None else f"Device {bdf} with pasid {pasid:x}"
    titles = f"{'IOVA_PFN':<17}\t{'PML5E':<18}\t{'PML4E':<18}\t{'PDPE':<18}\t{'PDE':<18}\tPTE"
    lines = [f"{name} @0x{root:x}", titles]
    for iova, pfn, level, access in leaves:
        path = [0, 0x1004F4003, 0x1004F5003, 0x1004F6003, 0]
        if level == 1:
            path[4] = pfn << 12 | access
        else:
            path[5 - level] = pfn << 12 | 0x80 | access
            path[6 - level :] = [0] * (level - 1) if padded else []
        lines.append(f"0x{iova:013x} |\t" + "\t".join(f"0x{entry:016x}" for entry in path))
    return "\n".join(lines) + "\n\n"
