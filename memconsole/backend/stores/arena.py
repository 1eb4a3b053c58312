"""Arenas: ranges set aside at boot, each with an ext4 (dax) on it that says by itself which regions are in it.

    label of the file system       mc:NAME
    /                              trusted.memconsole = ArenaRecord
    /REGION                        the region's frames, one aligned run; trusted.memconsole = RegionRecord
    /.fresh.REGION                 the other file of a move that was cut short: never the one that counts
    a file without a record        was never finished

So a range can be read by any memconsole on any boot, without ledger and custody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from memconsole import decoding
from memconsole.actions import NAME
from memconsole.backend.kernel import mounts, pmem, tree
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import ext4
from memconsole.errors import BadFile, Denied, KernelRefused, MemconsoleError, NotFound, Refused
from memconsole.model import Finding, Grant, Region, Severity, Value
from memconsole.paths import make_directory
from memconsole.units import format_address, format_size

XATTR = "trusted.memconsole"
LABEL = "mc:"
NAME_MOST = 13
"""Letters of an arena's name: an ext4 label has 16."""
FRESH = ".fresh."
FORMAT = 1
OPTIONS = "dax=always,noatime,nodev,nosuid,noexec"
SMALLEST = 64 << 20
_MACHINE = "/etc/machine-id"
_HEAD, _SAMPLE, _SAMPLES = 4 << 20, 4096, 256
_OTHERS = {
    b"NVDIMM_PFN_INFO": "a namespace of mode fsdax with an info block",
    b"NVDIMM_DAX_INFO": "a devdax namespace",
    b"BTT_ARENA_INFO": "a namespace of mode sector (BTT)",
}
"""What the kernel writes at 4 KiB into a namespace that is somebody's."""
_DIRECTORY = "arenas"
"""Where arenas are mounted, in the runtime directory; only root enters it."""

T = TypeVar("T", bound="_Formatted")


class _Formatted(Value, frozen=True, kw_only=True):
    format: int = FORMAT


class ArenaRecord(_Formatted, frozen=True, kw_only=True):
    """What an arena says of itself; ``host`` is the machine id of the host that made it."""

    name: str
    host: str = ""
    created_ns: int = 0


class RegionRecord(_Formatted, frozen=True, kw_only=True, omit_defaults=True):
    """What a region's file says of itself; ``generation`` grows by one whenever its contents move."""

    region: Region
    generation: int = 1
    grants: tuple[Grant, ...] = ()


class Arena(NamedTuple):
    """An arena that is mounted: ``device`` is its st_dev; ``start`` its physical address, None where it is not shown.

    ``trouble``: why it may not be used; empty where it may.
    """

    name: str
    path: Path
    device: int
    source: str
    start: int | None
    size: int
    trouble: str = ""

    @property
    def free(self) -> int:
        """Bytes that regions may still have."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize


class Contents(NamedTuple):
    """What is in a range: an arena's name, or in words what else; nothing of both where it is empty.

    Of an arena's file system: its ``size`` in bytes, whether it has noted ``errors``, and whether its journal
    ``replays`` when it is mounted.
    """

    arena: str = ""
    other: str = ""
    errors: bool = False
    replays: bool = False
    size: int = 0


def directory(runtime: Path) -> Path:
    """Where arenas are mounted."""
    return runtime / _DIRECTORY


def machine_id(root: Root = "/") -> str:
    """The machine id of this host; empty where it has none."""
    try:
        return tree.line(root, _MACHINE)
    except tree.UNREADABLE:
        return ""


# --- records ----------------------------------------------------------------------------------------------------


def write_record(fd: int, record: _Formatted) -> None:
    """Have a file say what it is.

    Raises:
        KernelRefused: it cannot be written down.
    """
    try:
        os.setxattr(fd, XATTR, msgspec.json.encode(record))
        os.fsync(fd)
    except OSError as error:
        raise KernelRefused("setxattr", error.errno or 0, what="an arena cannot be written to") from None


def read_record(path: int | Path, kind: type[T]) -> T | None:
    """What a file says that it is; None where it says nothing.

    Raises:
        BadFile: it says something that this memconsole cannot read. Denied, KernelRefused: it cannot be asked.
    """
    try:
        raw = os.getxattr(path, XATTR)
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.ENOTSUP}:
            return None
        raise tree.failure(str(path), error) from None
    remedy = "start the memconsole that wrote it; until then it is left as it is"
    said = decoding.json(raw, kind, what=f"what {path} says of itself", remedy=remedy)
    if said.format > FORMAT:
        why = f"it is of format {said.format}, this memconsole reads {FORMAT}"
        raise BadFile(f"{path} is of a newer memconsole", why, remedy)
    return said


# --- which there are --------------------------------------------------------------------------------------------


def mounted(root: Root = "/") -> tuple[Arena, ...]:
    """The arenas that are mounted in this process's mount namespace, by name, whoever mounted them.

    Raises:
        BadFile: the kernel's list of mounts cannot be read.
    """
    found: dict[int, Arena] = {}
    known = {each.number: each for each in pmem.devices(root, [])}
    try:
        here = mounts.mounts(root)
    except NotFound:  # a recorded host need not have it
        return ()
    for each in here:
        if each.fstype == "ext4" and each.root == "/" and each.device not in found:
            with contextlib.suppress(Denied, KernelRefused, NotFound):
                arena = _arena(each, known.get(each.device), root)
                if arena is not None:
                    found[each.device] = arena
    return tuple(sorted(found.values()))


def _arena(at: mounts.MountInfo, on: Pmem | None, root: Root) -> Arena | None:
    trouble = ""
    try:
        said = read_record(at.path, ArenaRecord)
    except BadFile as error:
        said, trouble = ArenaRecord(name=at.path.name), f"{error.what}: {error.why}"
    if said is None:
        return None
    here = machine_id(root)
    if not trouble and said.host and here and said.host != here:
        trouble = f"another host made it (machine id {said.host})"
    if not trouble and not re.search(r"(^|,)dax(=always)?(,|$)", at.options):
        trouble = "it is mounted without dax"
    size = on.size if on is not None else os.statvfs(at.path).f_blocks * ext4.BLOCK
    return Arena(said.name, at.path, at.device, at.source, on.start if on is not None else None, size, trouble)


def named(name: str, root: Root = "/") -> Arena | None:
    """The mounted arena of this name."""
    return next((each for each in mounted(root) if each.name == name), None)


def contents(device: Pmem) -> Contents:
    """What a range holds, as far as it can be told: by its own marks, by blkid, by samples of its bytes.

    Raises:
        Denied, KernelRefused: it cannot be read. NotFound: it was taken away, or there is no blkid.
    """
    try:
        with open(device.path, "rb", buffering=0) as file:  # noqa: PTH123 - a device
            head = file.read(_HEAD)
            step = max(_SAMPLE, device.size // _SAMPLES // _SAMPLE * _SAMPLE)
            samples = [os.pread(file.fileno(), _SAMPLE, at) for at in range(0, device.size, step)]
            samples.append(os.pread(file.fileno(), _HEAD, max(0, device.size - _HEAD)))
    except OSError as error:
        raise tree.failure(device.path, error) from None
    found = ext4.superblock(head)
    if found is not None:
        name = found.label.removeprefix(LABEL)
        if found.label != name:
            return Contents(name, errors=found.errors, replays=found.replays, size=found.size)
        return Contents(other=f"an ext4 file system {found.label}".strip())
    for mark, what in _OTHERS.items():
        if head[4096 : 4096 + len(mark)] == mark:
            return Contents(other=what)
    said = ext4.run(["blkid", "-p", "-o", "export", device.path], f"{device.path} cannot be looked at", codes=(0, 2, 8))
    kinds = [row.partition("=")[2] for row in said.splitlines() if row.startswith(("TYPE=", "PTTYPE="))]
    if kinds or said.strip():
        return Contents(other=f"something of type {', '.join(kinds) or 'unknown'}")
    if any(head) or any(any(each) for each in samples):
        return Contents(other="bytes that nothing describes")
    return Contents()


# --- making and mounting ----------------------------------------------------------------------------------------


def create_refusals(name: str, device: Pmem, root: Root = "/") -> Iterator[tuple[str, str, str, str]]:
    """Why no arena of this name can be made on a device: code, what, why, remedy."""
    what = f"no arena {name} can be made on {device.path}"
    if not re.fullmatch(NAME, name) or len(name) > NAME_MOST:
        why = f"its name is an ext4 label: 1 to {NAME_MOST} letters, digits, dots, dashes and underscores"
        yield "BadName", f"{name!r} cannot be an arena's name", why, "choose another name"
        return
    if any(name == each.name for each in mounted(root)):
        yield "NameTaken", f"there is an arena {name} already", "names are unique", "choose another name"
    if device.size < SMALLEST:
        yield "TooSmall", what, f"it has {format_size(device.size)}; {format_size(SMALLEST)} are needed", words(root)
    if any(each.device == device.number for each in mounts.mounts(root)):
        yield "InUse", what, "it is mounted", f"umount {device.path}, if it is not needed"
        return
    keep, wipe = f"dd if={device.path} of=FILE bs=2M", f"wipefs -a {device.path}; blkdiscard -z {device.path}"
    yield from held_refusals(what, contents(device), keep, wipe)


def held_refusals(what: str, held: Contents, keep: str, wipe: str) -> Iterator[tuple[str, str, str, str]]:
    """Why no arena is made of a range that holds something, as :func:`create_refusals`.

    ``keep`` and ``wipe`` are the commands that copy such a range to a file, and leave nothing in it.
    """
    if held.arena:
        remedy = f"memconsole arena scan takes it up; memconsole arena remove {held.arena} gives it up"
        yield "HoldsArena", what, f"it holds the arena {held.arena}", remedy
    elif held.other:
        torn = "keep a copy first, it may be an arena with a torn beginning"
        remedy = f"{torn}: {keep}; if it is no longer needed: {wipe}"
        yield "HoldsUnknown", what, f"it holds {held.other}", remedy


def create(name: str, device: Pmem, runtime: Path, root: Root = "/") -> Arena:
    """Format a device, mount it and have it say what it is.

    Raises:
        NotFound, Refused: a tool is missing or failed. KernelRefused: it cannot be used.
    """
    try:
        os.close(os.open(device.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        raise KernelRefused(device.path, error.errno or 0, what=f"{device.path} is in use") from None
    ext4.make(device.path, LABEL + name, device.size)
    path = _mount(device, name, runtime)
    _mark(name, runtime).unlink(missing_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        write_record(fd, ArenaRecord(name=name, host=machine_id(root), created_ns=time.time_ns()))
    finally:
        os.close(fd)
    made = named(name, root)
    if made is None or made.trouble:
        why = made.trouble if made is not None else "it does not say what it is"
        raise Refused(f"the arena {name} cannot be used", why, "memconsole arena check", code="NoArena")
    return made


def mount_all(runtime: Path, root: Root = "/") -> list[Finding]:
    """Mount every arena that is not; what cannot be is a finding."""
    found: list[Finding] = []
    for device in pmem.devices(root, []):
        there = any(each.device == device.number for each in mounts.mounts(root))
        try:
            held = contents(device)
            if re.fullmatch(NAME, held.arena):
                found += _replayed(held.arena, runtime) if there else _mounted(device, held, runtime)
        except MemconsoleError as error:
            remedy = error.remedy or f"mount -o {OPTIONS} {device.path} says more"
            found.append(
                Finding("arena-unread", Severity.ERROR, device.name, f"{device.path}: {error.what}", error.why, remedy)
            )
    return found


def _mounted(device: Pmem, held: Contents, runtime: Path) -> Iterator[Finding]:
    """Mount an arena, and say what is to be said of it."""
    name = held.arena
    if held.errors:
        what = f"the arena {name} on {device.path} is not mounted: its file system has noted errors"
        remedy = f"e2fsck -f {device.path}, then memconsole arena scan; until then nothing in it changes"
        yield Finding("arena-unread", Severity.ERROR, device.name, what, "its superblock", remedy)
        return
    path = _mount(device, name, runtime)
    if read_record(path, ArenaRecord) is None:
        ext4.unmount(path)
        what = f"the arena {name} on {device.path} was never finished"
        remedy = f"if it is no longer needed: wipefs -a {device.path}, then memconsole arena create {name}"
        yield Finding("arena-unread", Severity.WARNING, device.name, what, "", remedy)
    else:
        if held.replays:
            _mark(name, runtime).touch()
        yield from _replayed(name, runtime)


def _mark(name: str, runtime: Path) -> Path:
    """What is there from when a journal was replayed until the next boot; memconsole-resume makes it, too."""
    return directory(runtime) / f".replayed-{name}"


def _replayed(name: str, runtime: Path) -> Iterator[Finding]:
    """Whether the kernel replayed the journal of an arena at its mount in this boot, whoever mounted it."""
    if _mark(name, runtime).exists():
        what = f"the journal of arena {name} was replayed: the kernel before ended without having held it still"
        remedy = "nothing need be done; memconsole arena check says whether anything in it is wrong"
        yield Finding("arena-replayed", Severity.INFO, name, what, "its superblock", remedy)


def _mount(device: Pmem, name: str, runtime: Path) -> Path:
    path = directory(runtime) / name
    make_directory(path.parent, 0o700)
    make_directory(path, 0o700)
    ext4.mount(device.path, path, OPTIONS)
    return path


def remove(arena: Arena) -> None:
    """Unmount an arena and write zeros over its range, its marks first: it holds nothing then.

    Raises:
        NotFound, Refused: a tool is missing or failed: it is in use.
    """
    ext4.unmount(arena.path)
    ext4.run(["wipefs", "--all", "--quiet", arena.source], f"the marks of {arena.source} cannot be taken away")
    ext4.run(["blkdiscard", "--zeroout", arena.source], f"{arena.source} cannot be written over with zeros")
    with contextlib.suppress(OSError):
        arena.path.rmdir()


# --- what the boot loader is to say -----------------------------------------------------------------------------


def words(root: Root = "/") -> str:
    """Which words set a range aside, with numbers that fit this host where its memory map is shown."""
    from memconsole.backend.kernel import iomem

    advice = "add memmap=SIZE!START to the kernel's command line and boot"
    try:
        ram = [each for each in iomem.iomem(root) if each.name == "System RAM" and each.depth == 0]
    except tree.UNREADABLE:
        return advice
    if not ram:
        return advice
    best = max(ram, key=lambda each: each.end - each.start)
    unit = 1 << 30 if best.end - best.start >= 8 << 30 else 128 << 20
    size = (best.end - best.start) // 4 // unit * unit
    start = (best.end - size) // unit * unit
    if not size or start < best.start:
        return advice
    word = f"memmap={format_size(size)}!{format_address(start)}"
    return f"add for example {word} to the kernel's command line and boot (GRUB_CMDLINE_LINUX, then update-grub)"
