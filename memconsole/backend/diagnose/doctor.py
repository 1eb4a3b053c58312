"""What this host can do for guest memory, what is missing, why, and what to do about it.

Every check is a function from the root of a host's tree to a verdict: level, why, remedy. A check that asks the kernel
by using it (``probes``) or runs a program says nothing about a recorded tree and is left out there. Nothing is changed,
and no check needs root: what an ordinary user may not see is a verdict too.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from memconsole.backend.kernel import host, iommu, kho, memory, probes, tree
from memconsole.backend.kernel.handover.memory import DEVMEM, KCORE, this_host
from memconsole.backend.kernel.tree import Root
from memconsole.backend.managers import libvirt, libvirt_setup
from memconsole.errors import Denied, KernelRefused, MemconsoleError, NotFound, with_rights
from memconsole.model import Capability, Unread
from memconsole.units import format_size

Level = Literal["yes", "partly", "no"]
Verdict = tuple[Level, str, str]

_CAPABILITIES = {21: "CAP_SYS_ADMIN", 19: "CAP_SYS_PTRACE", 22: "CAP_SYS_BOOT", 14: "CAP_IPC_LOCK"}
_AS_ROOT = "run as root"
_MOUNT = "mount -t debugfs none /sys/kernel/debug"
_PROGRAM_SECONDS = 10


class Check(NamedTuple):
    """One line of the doctor; ``live`` if only the running host can answer, ``concerns`` whether it is about a host."""

    id: str
    title: str
    live: bool
    verdict: Callable[[Root], Verdict]
    concerns: Callable[[Root], bool] = lambda _: True


def doctor(root: Root = "/") -> tuple[Capability, ...]:
    """Every capability of the host whose tree is at ``root``, most basic first; what is missing is a verdict too."""
    checks = [check for check in CHECKS if (tree.live(root) or not check.live) and check.concerns(root)]
    return tuple(Capability(check.id, check.title, *_verdict(check, root)) for check in checks)


def _verdict(check: Check, root: Root) -> Verdict:
    try:
        return check.verdict(root)
    except MemconsoleError as error:
        why = f"{error.what}: {error.why}" if error.why else error.what
        return "no", why, error.remedy


# --- the process and its rights ---------------------------------------------------------------------------------


def _root(root: Root) -> Verdict:
    for row in tree.text(tree.read(root, "/proc/self/status")).splitlines():
        if row.startswith("CapEff:"):
            held = int(row.split()[1], 16)
            missing = [name for bit, name in _CAPABILITIES.items() if not held >> bit & 1]
            if not missing:
                return "yes", "", ""
            level: Level = "no" if len(missing) == len(_CAPABILITIES) else "partly"
            return level, f"this process lacks {', '.join(missing)}", with_rights(_AS_ROOT)
    raise tree.malformed("/proc/self/status", "no CapEff")


def _pfns(_: Root) -> Verdict:
    if probes.pfns_visible():
        return "yes", "", ""
    return "no", "the kernel shows PFNs only to CAP_SYS_ADMIN", with_rights(_AS_ROOT)


def _pagemap_scan(_: Root) -> Verdict:
    probes.pagemap_scan()
    return "yes", "", ""


def _native(_: Root) -> Verdict:
    try:
        from memconsole.native import program
    except ImportError as error:
        return "no", f"the native core is not built: {error}", "install memconsole again with a C compiler"
    for name in ("memconsole-canary", "memconsole-keeper"):
        program(name)
    return "yes", "", ""


# --- guests -----------------------------------------------------------------------------------------------------


def _kvm(_: Root) -> Verdict:
    try:
        probes.kvm()
    except NotFound as error:
        return "no", error.what, "load kvm_intel or kvm_amd, or allow nested virtualization"
    except Denied as error:
        return "no", error.what, with_rights("run as root, or join the group of /dev/kvm")
    return "yes", "a VM with a vCPU was created", ""


def _qemu(_: Root) -> Verdict:
    name = f"qemu-system-{os.uname().machine}"
    said = _run(name, "--version")
    match = re.search(r"version (\d+)\.(\d+)", said)
    if match is None:
        return "partly", f"{name} --version gives no version", f"install QEMU 8.2 or later as {name}"
    version = int(match[1]), int(match[2])
    if version < (8, 2):
        why = f"QEMU {match[1]}.{match[2]} has no cpr-reboot: its guests cannot be carried through a handoff"
        return "partly", why, "install QEMU 8.2 or later"
    return "yes", f"QEMU {match[1]}.{match[2]}", ""


def _userfaultfd(_: Root) -> Verdict:
    features, whole = probes.userfaultfd()
    has = [name for name, bit in probes.UFFD_FEATURES.items() if features & bit]
    if not whole:
        return "partly", f"faults of user mode only, not those of KVM guests; {', '.join(has)}", with_rights(_AS_ROOT)
    wanted = [name for name in ("minor-fault shmem", "write-protect shmem") if name not in has]
    if wanted:
        return "partly", f"this kernel lacks {', '.join(wanted)}", "use Linux 5.19 or later"
    if "rwp" not in has:
        return "partly", f"has {', '.join(has)}; no rwp: revoke cannot take read access away", "use Linux 7.3 or later"
    return "yes", ", ".join(has), ""


def _has_domains(root: Root) -> bool:
    try:
        return any(name.endswith(".xml") for name in tree.names(root, libvirt.STATUS))
    except MemconsoleError:
        return False


def _libvirt(root: Root) -> Verdict:
    parts = libvirt_setup.status(root)
    lacking = libvirt_setup.lacking(parts)
    if not lacking:
        return "yes", "its hook, rights and order of units are there", ""
    why = "; ".join(f"{part.title}: {part.state}" for part in lacking)
    return "partly" if len(lacking) < len(parts) else "no", why, "; ".join(dict.fromkeys(p.remedy for p in lacking))


# --- memory -----------------------------------------------------------------------------------------------------


def _hugetlb(root: Root) -> Verdict:
    gaps: list[Unread] = []
    pools = memory.pools(root, gaps)
    if gaps:
        return "partly" if pools else "no", f"{gaps[0].source}: {gaps[0].why}", gaps[0].remedy
    if not pools:
        return "no", "this kernel has no hugetlb", "boot a kernel with CONFIG_HUGETLBFS=y"
    shown = ", ".join(f"{pool.free} of {pool.total} pages of {format_size(pool.page_size)} free" for pool in pools)
    if not any(pool.total for pool in pools):
        return "no", shown, "write a number to /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    return "yes" if any(pool.free for pool in pools) else "partly", shown, ""


def _shmem_thp(root: Root) -> Verdict:
    setting = memory.shmem_thp(root)
    where = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    if not setting:
        return "no", "this kernel has no transparent huge pages", "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y"
    if setting in {"always", "force", "within_size"}:
        return "yes", f"shmem_enabled is {setting}", ""
    if setting == "advise":
        return "yes", "shmem_enabled is advise: regions ask for huge pages", ""
    why = f"shmem_enabled is {setting}: regions get 4K pages, which are slower to revoke and to hand over"
    return "no", why, f"echo advise > {where}"


def _dax(root: Root) -> Verdict:
    from memconsole.backend.kernel import dax

    found = dax.dax(root)
    if not found:
        return (
            "no",
            "there is no devdax device",
            "nothing need be done unless you want one: boot with memmap=nn!ss; memconsole arena create NAME --devdax",
        )
    return "yes", ", ".join(f"{device.name} {format_size(device.size)}" for device in found), ""


def _fuse(root: Root) -> Verdict:
    if not tree.exists(root, "/dev/fuse"):
        return "no", "there is no /dev/fuse", "modprobe fuse"
    release = host.host(root).kernel
    if _release(release) < (6, 9):
        return "no", f"Linux {release} has no FUSE passthrough", "use Linux 6.9 or later"
    _open(root, "/dev/fuse")
    return _built(root, "CONFIG_FUSE_PASSTHROUGH")


# --- live update ------------------------------------------------------------------------------------------------


def _kho(root: Root) -> Verdict:
    survival = kho.survival(root)
    if survival.kho:
        sizes = ", ".join(format_size(part.end - part.start) for part in survival.scratch)
        return "yes", f"scratch {sizes}" if sizes else survival.detail, ""
    if survival.kho_cmdline:
        return "partly", f"kho=on was asked for; {survival.detail}", "" if kho.debugfs_mounted(root) else _MOUNT
    level, why, remedy = _built(root, "CONFIG_KEXEC_HANDOVER")
    if level == "no":
        return "no", why, remedy
    return "no", survival.detail, "boot with kho=on"


def _luo(root: Root) -> Verdict:
    survival = kho.survival(root)
    if not survival.luo:
        level, why, remedy = _built(root, "CONFIG_LIVEUPDATE")
        if level == "no":
            return "no", why, remedy
        return "no", "there is no /dev/liveupdate", "boot with kho=on liveupdate=on"
    try:
        _open(root, "/dev/liveupdate")
    except Denied as error:
        return "partly", f"{error.what}: {error.why}", error.remedy
    except KernelRefused as error:
        if error.errno != errno.EBUSY:
            raise
        return "yes", "another process has /dev/liveupdate open now: it has one opener at a time", ""
    return "yes", "/dev/liveupdate has one opener at a time, and is opened only when needed", ""


def _kexec(root: Root) -> Verdict:
    if tree.exists(root, "/proc/sys/kernel/kexec_load_disabled") and tree.number(
        root, "/proc/sys/kernel/kexec_load_disabled", 10
    ):
        return "no", "kernel.kexec_load_disabled is 1", "reboot: only that clears it"
    level, why, remedy = _built(root, "CONFIG_KEXEC_FILE")
    locked = tree.lockdown(root)
    if locked and level != "no":
        why = f"lockdown ({locked}): only an image that is signed with a key of this kernel is loaded"
        return "partly", why, f"sign the image, or {tree.UNLOCKED}"
    return level, why, remedy


def _debugfs(root: Root) -> Verdict:
    if not kho.debugfs_mounted(root):
        return "no", "debugfs is not mounted", _MOUNT
    locked = tree.lockdown(root)
    if locked:
        return (
            "partly",
            f"lockdown ({locked}): files that may be written or mapped cannot be opened",
            tree.UNLOCKED,
        )
    return "yes", "", ""


def _physical(root: Root) -> Verdict:
    found = [path for path in (KCORE, DEVMEM) if tree.exists(root, path)]
    if not found:
        return "no", f"there is neither {KCORE} nor {DEVMEM}", "boot a kernel with CONFIG_PROC_KCORE=y"
    if tree.live(root):
        with this_host(root) as memory:
            return "yes", memory.path, ""
    locked = tree.lockdown(root)
    shown = [path for path in found if not locked or (path == KCORE and locked == "integrity")]
    if not shown:
        return "no", f"lockdown ({locked}): {' and '.join(found)} cannot be opened", tree.UNLOCKED
    return "yes", ", ".join(shown), ""


# --- devices ----------------------------------------------------------------------------------------------------


def _iommu(root: Root) -> Verdict:
    gaps: list[Unread] = []
    units = iommu.units(root, gaps)
    domains = iommu.domains(root, gaps, leaves_max=0)
    if gaps:
        return "partly", f"{gaps[0].source}: {gaps[0].why}", gaps[0].remedy
    if not units:
        return "no", "the kernel runs no IOMMU", "enable it in the firmware; on Intel boot with intel_iommu=on"
    kinds = ", ".join(sorted({unit.kind for unit in units}))
    if not domains:
        return "partly", f"{kinds}, but no groups", "boot with iommu=pt or iommu.passthrough=0"
    return "yes", f"{kinds}, {len(domains)} groups", ""


def _iommufd(root: Root) -> Verdict:
    return _device(root, "/dev/iommu", "CONFIG_IOMMUFD")


def _vfio(root: Root) -> Verdict:
    return _device(root, "/dev/vfio/vfio", "CONFIG_VFIO_PCI")


def _systemd(root: Root) -> Verdict:
    if not tree.exists(root, "/run/systemd/system"):
        return "no", "systemd does not run here", "nothing need be done: the keeper has custody instead"
    if not tree.live(root):
        return "yes", "", ""
    match = re.match(r"systemd (\d+)", _run("systemctl", "--version"))
    if match is None or int(match[1]) < 254:
        why = f"systemd {match[1] if match else 'of unknown version'} drops its fd store when a unit stops"
        return "partly", why, "use systemd 254 or later, or the keeper (memconsole serve --custody keeper)"
    return "yes", f"systemd {match[1]}", ""


# --- how checks ask ---------------------------------------------------------------------------------------------


def _built(root: Root, option: str) -> Verdict:
    """Whether the kernel was built with an option, as far as it shows its configuration."""
    config = host.config(root)
    if config is None:
        return (
            "partly",
            f"this kernel does not show whether it has {option}",
            "boot a kernel with CONFIG_IKCONFIG_PROC=y to know",
        )
    if config.get(option) in {"y", "m"}:
        return "yes", f"{option}={config[option]}", ""
    return "no", f"this kernel was built without {option}", f"boot a kernel with {option}=y"


def _device(root: Root, path: str, option: str) -> Verdict:
    if not tree.exists(root, path):
        level, why, _ = _built(root, option)
        remedy = f"boot a kernel with {option}=y" if level == "no" else f"load the module of {option}"
        return "no", f"there is no {path}; {why}", remedy
    try:
        _open(root, path)
    except Denied as error:
        return "partly", f"{error.what}: {error.why}", error.remedy
    return "yes", path, ""


def _open(root: Root, path: str) -> None:
    """Open a device of this host and close it again: what access(2) allows, a policy may refuse all the same.

    Raises:
        NotFound, Denied, KernelRefused: it cannot be opened.
    """
    if not tree.live(root):
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise tree.failure(path, error) from error


def _release(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _run(program: str, argument: str) -> str:
    """What a program says; its silence and its failure are the same here.

    Raises:
        NotFound: it is not installed, or does not answer.
    """
    import shutil
    import subprocess

    path = shutil.which(program)
    if path is None:
        raise NotFound(f"{program} is not installed", "it is not on the PATH", f"install {program}")
    try:
        return subprocess.run(
            [path, argument], capture_output=True, text=True, check=False, timeout=_PROGRAM_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(
            f"{program} does not answer", str(error), f"see what {program} {argument} does in a shell"
        ) from error


CHECKS: tuple[Check, ...] = (
    Check("root", "Rights of root", True, _root),
    Check("native", "Native core, canary and keeper", True, _native),
    Check("pfns", "PFNs of other processes", True, _pfns),
    Check("pagemap-scan", "PAGEMAP_SCAN", True, _pagemap_scan),
    Check("kvm", "KVM", True, _kvm),
    Check("qemu", "QEMU", True, _qemu),
    Check("libvirt", "libvirt's guests in a handoff", False, _libvirt, _has_domains),
    Check("userfaultfd", "userfaultfd", True, _userfaultfd),
    Check("fuse-passthrough", "FUSE passthrough", False, _fuse),
    Check("shmem-thp", "Huge pages for memfds", False, _shmem_thp),
    Check("hugetlb", "hugetlb pools", False, _hugetlb),
    Check("dax", "devdax devices", False, _dax),
    Check("kho", "Kexec handover (KHO)", False, _kho),
    Check("luo", "Live update (LUO)", False, _luo),
    Check("kexec", "kexec_file_load", False, _kexec),
    Check("iommu", "IOMMU", False, _iommu),
    Check("iommufd", "iommufd", False, _iommufd),
    Check("vfio", "VFIO", False, _vfio),
    Check("debugfs", "debugfs", False, _debugfs),
    Check("physical", "Reading physical memory", False, _physical),
    Check("systemd", "systemd's fd store", False, _systemd),
)
