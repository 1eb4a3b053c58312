"""Record the tree of a host: exactly the files the readers read, so that another machine can read them too.

Command lines of processes are part of it (docs/service.md says what is). What this user may not read is left out, and
reads as absent from the recording. A file above 64 MiB (a very large page table) is left out, never cut.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from memconsole.backend.kernel import census, tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import UsageError

_FILE_MAX = 64 << 20

_FILES = (
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/arch",
    "/proc/sys/kernel/random/boot_id",
    "/proc/sys/kernel/kexec_load_disabled",
    "/sys/kernel/security/lockdown",
    "/proc/uptime",
    "/proc/cmdline",
    "/proc/config.gz",
    "/boot/config-*",
    "/proc/self/auxv",
    "/proc/meminfo",
    "/proc/iomem",
    "/proc/ioports",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/node/node*/meminfo",
    "/sys/devices/system/node/node*/cpulist",
    "/sys/devices/system/memory/block_size_bytes",
    "/sys/kernel/mm/hugepages/hugepages-*/*_hugepages",
    "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "/sys/firmware/memmap/*/start",
    "/sys/firmware/memmap/*/end",
    "/sys/firmware/memmap/*/type",
    "/sys/bus/dax/devices/*/size",
    "/sys/bus/dax/devices/*/align",
    "/sys/bus/dax/devices/*/target_node",
    "/sys/bus/dax/devices/*/numa_node",
    "/sys/bus/dax/devices/*/resource",
    "/sys/bus/pci/devices/*/uevent",
    "/sys/bus/pci/devices/*/resource",
    "/sys/bus/pci/devices/*/numa_node",
    "/sys/class/uio/*/maps/*/addr",
    "/sys/class/uio/*/maps/*/size",
    "/sys/kernel/iommu_groups/*/type",
    "/sys/kernel/iommu_groups/*/reserved_regions",
    "/sys/class/iommu/*/*-iommu/*",
    "/sys/kernel/boot_params/setup_data/*/type",
    "/sys/kernel/debug/kho/out/scratch_*",
    "/sys/kernel/debug/kho/in/sub_fdts/kexec-metadata",
    "/sys/kernel/debug/iommu/intel/domain_translation_struct",
    "/sys/kernel/debug/iommu/intel/*/domain_translation_struct",
)
_LINKS = (
    "/sys/bus/pci/devices/*/iommu_group",
    "/sys/class/iommu/*/devices/*",
    "/sys/class/uio/*/device",
    "/sys/class/vfio-dev/*/device",
    "/sys/kernel/iommu_groups/*/devices/*",
    "/sys/devices/system/node/node*/memory[0-9]*",
)
_PRESENCE = (
    "/dev/liveupdate",
    "/dev/fuse",
    "/dev/iommu",
    "/dev/mem",
    "/dev/vfio/vfio",
    "/proc/kcore",
    "/run/systemd/system",
    "/sys/kernel/debug/kho/*/sub_fdts/*",
    "/sys/kernel/debug/iommu/amd/*",
)
_DIRECTORIES = (
    "/sys/bus/dax/devices",
    "/sys/bus/pci/devices",
    "/sys/class/iommu/*/devices",
    "/sys/firmware/memmap",
    "/sys/kernel/debug/*",
    "/sys/kernel/iommu_groups/*/devices",
)
_OF_PROCESS = ("stat", "status", "cmdline", "maps", "task/*/comm", "fdinfo/*")
_OF_THREAD = ("stat", "cmdline", "status", "maps", "fdinfo/*")


def record(destination: Path, root: Root = "/") -> int:
    """Write the tree of the host at ``root`` into a new directory; the bytes written.

    Raises:
        UsageError: the directory exists and is not empty.
        NotFound, Denied, KernelRefused, BadFile: the processes cannot be listed.
        OSError: the recording cannot be written.
    """
    destination.mkdir(mode=0o700, parents=True, exist_ok=True)
    if destination.exists() and any(destination.iterdir()):
        raise UsageError(f"{destination} is not empty", "a recording is a directory of its own", "name a new one")
    written = sum(_file(destination, root, path) for pattern in _FILES for path in _found(root, pattern))
    for pattern in _LINKS:
        for path in _found(root, pattern):
            _link(destination, root, path)
    for pattern in _DIRECTORIES:
        for path in _found(root, pattern):
            _below(destination, path).mkdir(parents=True, exist_ok=True)
    for pattern in _PRESENCE:
        for path in _found(root, pattern):
            place = _below(destination, path)
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
    return written + _processes(destination, root)


def _processes(destination: Path, root: Root) -> int:
    """Every process with its files; page counts (a walk of its memory) of VMs only; of kernel threads what they are."""
    written = 0
    for process in census.take(root).processes.values():
        base = f"/proc/{process.pid}"
        wanted: list[str] = ["stat"] if process.kernel else list(_OF_PROCESS)
        if process.task != process.pid:
            wanted += [f"task/{process.task}/{name}" for name in _OF_THREAD]
        if process.holds("anon_inode:kvm-vm"):
            wanted.append(f"{process.place}/smaps".removeprefix(f"{base}/"))
        for name in wanted:
            written += sum(_file(destination, root, path) for path in _found(root, f"{base}/{name}"))
        _below(destination, f"{process.place}/fd").mkdir(parents=True, exist_ok=True)
        for fd, target in process.fds.items():
            _below(destination, f"{process.place}/fd/{fd}").symlink_to(target)
    return written


def _found(root: Root, pattern: str) -> list[str]:
    base = tree.below(root, "")
    return [path[len(base) :] for path in glob.glob(f"{glob.escape(base)}{pattern}")]


def _file(destination: Path, root: Root, path: str) -> int:
    """Copy one file if it is one, may be read, is not gone, and is not too large."""
    if os.path.isdir(tree.below(root, path)):
        return 0
    try:
        content = tree.read(root, path, limit=_FILE_MAX)
    except tree.UNREADABLE:
        return 0
    place = _below(destination, path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return len(content)


def _link(destination: Path, root: Root, path: str) -> None:
    target = tree.link(root, path)
    if target is not None:
        place = _below(destination, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)


def _below(destination: Path, path: str) -> Path:
    return destination / path.lstrip("/")
