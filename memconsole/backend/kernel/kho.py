"""The kernel half of live update: whether KHO and LUO are here, and what was handed over.

    /proc/cmdline                                kho=on liveupdate=on
    /dev/liveupdate                              LUO's device; it has one opener, so it is only looked at
    /sys/kernel/debug/kho/out/scratch_{phys,len}     one 0xHEX a line, the regions in the same order
    /sys/kernel/debug/kho/{in,out}/sub_fdts/NAME     in/ only when booted through KHO
    in/sub_fdts/kexec-metadata                   u32 version = 1, char previous_release[65], u32 kexec_count; packed
    /sys/kernel/boot_params/setup_data/N/type    10 when x86 was booted through KHO

``in/sub_fdts/LUO`` is not read: the page behind it is freed at boot.
"""

from __future__ import annotations

import struct

from memconsole.backend.kernel import cmdline, tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import BadFile, Denied, NotFound
from memconsole.model import Range, Survival

DEBUGFS = "/sys/kernel/debug"
SYSTEMDS = "systemd"
"""What systemd, which holds sessions of live update too, calls its own by."""
_KHO = f"{DEBUGFS}/kho"
_SETUP_DATA = "/sys/kernel/boot_params/setup_data"
_SETUP_KHO = 10
_METADATA = struct.Struct("=I65sI")


def survival(root: Root = "/") -> Survival:
    """What of live update this host has; what of debugfs is not shown ``detail`` says, and the rest is inferred.

    Raises:
        KernelRefused, BadFile, NotFound, Denied: the command line cannot be read, or a file of KHO is torn.
    """
    words = cmdline.read(root)
    luo = tree.exists(root, "/dev/liveupdate")
    handed_over = _booted_through_kho(root)
    asked = {name: bool(cmdline.switched_on(words, name)) for name in ("kho", "liveupdate")}
    try:
        kho, detail = _kho_debugfs(root)
    except Denied as error:
        kho, detail = False, _hidden(error)
    if not kho:
        if handed_over:
            detail = f"booted through KHO; {detail}"
        return Survival(
            kho=luo or handed_over, luo=luo, kho_cmdline=asked["kho"], luo_cmdline=asked["liveupdate"], detail=detail
        )
    incoming = _names(root, f"{_KHO}/in/sub_fdts")
    details = []
    count = 0
    scratch: tuple[Range, ...] = ()
    try:
        count, detail = _metadata(root, incoming)
        details.append(detail)
    except Denied as error:
        details.append(_hidden(error))
    try:
        scratch = _scratch(root)
    except Denied as error:
        details.append(_hidden(error))
    return Survival(
        kho=True,
        luo=luo,
        kho_cmdline=asked["kho"],
        luo_cmdline=asked["liveupdate"],
        scratch=scratch,
        incoming=incoming,
        outgoing=_names(root, f"{_KHO}/out/sub_fdts"),
        kexec_count=count,
        detail="; ".join(filter(None, details)),
    )


def _hidden(error: Denied) -> str:
    return f"{error.what} ({error.why}): {error.remedy}"


def debugfs_mounted(root: Root = "/") -> bool:
    """Whether debugfs stands where it is looked for; it is never empty once mounted.

    Raises:
        Denied: this user may not look.
    """
    try:
        return bool(tree.names(root, DEBUGFS))
    except NotFound:
        return False


def _kho_debugfs(root: Root) -> tuple[bool, str]:
    """Whether KHO's debugfs is there, and if not, why."""
    if not debugfs_mounted(root):
        return False, "debugfs is not mounted"
    try:
        tree.names(root, _KHO)
    except NotFound:
        return False, "the kernel has no KHO, or it is off (kho=on)"
    return True, ""


def _booted_through_kho(root: Root) -> bool:
    try:
        kinds = tree.each(root, _SETUP_DATA, lambda name: tree.number(root, f"{_SETUP_DATA}/{name}/type"), [])
    except (NotFound, Denied):
        return False
    return _SETUP_KHO in kinds


def _names(root: Root, path: str) -> tuple[str, ...]:
    try:
        return tuple(tree.names(root, path))
    except (NotFound, Denied):
        return ()


def _scratch(root: Root) -> tuple[Range, ...]:
    starts, sizes = (_hex_lines(root, f"{_KHO}/out/scratch_{name}") for name in ("phys", "len"))
    if len(starts) != len(sizes):
        raise BadFile(
            f"{_KHO}/out is torn", f"{len(starts)} scratch regions, but {len(sizes)} lengths", "read it again"
        )
    return tuple(Range(start, start + size, "KHO scratch") for start, size in zip(starts, sizes, strict=True))


def _hex_lines(root: Root, path: str) -> list[int]:
    try:
        rows = tree.line(root, path).split()
    except NotFound:
        return []
    try:
        return [int(row, 16) for row in rows]
    except ValueError as error:
        raise tree.malformed(path, rows) from error


def _metadata(root: Root, incoming: tuple[str, ...]) -> tuple[int, str]:
    """How many kexecs this boot is away from the first, and from which kernel."""
    if "kexec-metadata" not in incoming:
        return 0, "booted through KHO" if incoming else ""
    source = f"{_KHO}/in/sub_fdts/kexec-metadata"
    blob = tree.read(root, source)
    if len(blob) < _METADATA.size:
        raise tree.malformed(source, blob)
    version, release, count = _METADATA.unpack_from(blob)
    if version != 1:
        return 0, f"booted through KHO; kexec-metadata of unknown version {version}"
    return count, f"booted through KHO from {tree.text(release.split(bytes(1))[0])} (kexec {count})"
