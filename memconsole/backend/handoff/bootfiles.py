r"""The kernel and initrd that a host boots when none is named, and the initrd of a kernel, as distributions call them.

    /boot/loader/entries/ID.conf      { KEY blanks VALUE "\n" }: linux PATH, initrd PATH [$VARIABLE]...
    /boot/grub2/grubenv, grub/grubenv saved_entry=ID (or its place in the list, the newest version first)
    /boot/loader/loader.conf          default GLOB
    /boot/vmlinuz                     a link to the default (SUSE)
    /boot/vmlinuz-V, kernel-V         else the highest version V, or of those without a number the newest file

    initrd.img-V (Debian), initramfs-V.img (Fedora, Arch), initrd-V (SUSE), initrd-V.img, initramfs-V (Alpine)

What package managers leave behind, and kernels for rescue, are neither. PATH is from the top of the filesystem that the
entry is on: /boot itself, where that is one of its own, else what it is part of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root

_BOOT = "/boot"
_ENTRIES = f"{_BOOT}/loader/entries"
_ENVIRONMENTS = (f"{_BOOT}/grub2/grubenv", f"{_BOOT}/grub/grubenv")
_LARGEST = 1 << 16
"""Bytes of an entry or of GRUB's environment; they have a few hundred."""
_DIGITS = 6
"""As many digits has no place in a list of entries."""
_KERNELS = ("vmlinuz-", "kernel-")
_INITRDS = ("initrd.img-{}", "initramfs-{}.img", "initrd-{}", "initrd-{}.img", "initramfs-{}")
_LEFT_BEHIND = re.compile(
    r".*(?:\.(?:bak|old|orig|save|tmp|dpkg-\w+|rpmsave|rpmnew|rpmorig|sig|hmac|sha\d+\w*)|~|[-.]rescue(?:[-.].*)?)"
    r"|.*-0-rescue-.*"
)
_PIECES = re.compile(r"~|\d+|[^\d~]+")


class BootFiles(NamedTuple):
    """A kernel and its initrd, by their paths on the host; empty where there is none."""

    kernel: str
    initrd: str


def default(root: Root = "/") -> BootFiles:
    """What this host boots when none is named."""
    entries = [entry for name in _names(root, _ENTRIES) if (entry := _entry(root, name)) is not None]
    if entries:
        return _chosen(root, sorted(entries, key=lambda entry: version(entry.id), reverse=True)).boots
    linked = tree.link_name(root, f"{_BOOT}/vmlinuz") or ""
    kernels = [name for name in _names(root, _BOOT) if name.startswith(_KERNELS) and not _LEFT_BEHIND.fullmatch(name)]
    if not kernels:
        return BootFiles("", "")
    kernel = f"{_BOOT}/{linked if linked in kernels else _newest(root, kernels)}"
    return BootFiles(kernel, initrd_of(kernel, root))


def initrd_of(kernel: str, root: Root = "/") -> str:
    """The initrd that lies beside a kernel's image under the name that belongs to its version; empty if none does."""
    directory, _, name = kernel.rpartition("/")
    of = name.partition("-")[2] if name.startswith(_KERNELS) else ""
    names = (f"{directory}/{pattern.format(of)}" for pattern in _INITRDS) if of else ()
    return next((path for path in names if tree.exists(root, path)), "")


def version(text: str) -> list[tuple[int, int, str]]:
    """A key by which versions are in order: numbers by their value, ``-rc`` and ``~`` before what has neither."""
    return [*(_weight(piece) for piece in _PIECES.findall(text.replace("-rc", "~rc"))), (1, 0, "")]


def _weight(piece: str) -> tuple[int, int, str]:
    if piece == "~":
        return 0, 0, ""
    return (3, int(piece), "") if piece.isdecimal() else (2, 0, piece)


class _LoaderEntry(NamedTuple):
    id: str
    boots: BootFiles


def _entry(root: Root, name: str) -> _LoaderEntry | None:
    """An entry whose kernel is there; one for rescue, or of something else than a kernel, is none."""
    id, ends = name.removesuffix(".conf"), name.endswith(".conf")
    rows = [row.split() for row in _rows(root, f"{_ENTRIES}/{name}")] if ends and not _LEFT_BEHIND.fullmatch(id) else []
    kernels = [path for row in rows if row[:1] == ["linux"] for path in _found(root, row[1:])]
    initrds = [path for row in rows if row[:1] == ["initrd"] for path in _found(root, row[1:])]
    if not kernels:
        return None
    # Microcode comes first where there are several: one initrd can be given, and the last is the system's.
    return _LoaderEntry(id, BootFiles(kernels[-1], initrds[-1] if initrds else initrd_of(kernels[-1], root)))


def _chosen(root: Root, entries: Sequence[_LoaderEntry]) -> _LoaderEntry:
    """The entry that the boot loader is told to take; the newest where it is told none of these."""
    rows = [row.partition("=") for path in _ENVIRONMENTS for row in _rows(root, path)]
    saved = [value for key, _, value in rows if key == "saved_entry"]
    for id in saved:
        if id.isdecimal() and len(id) < _DIGITS and int(id) < len(entries):
            return entries[int(id)]
        if known := next((entry for entry in entries if entry.id == id), None):
            return known
    for words in (row.split() for row in _rows(root, f"{_BOOT}/loader/loader.conf")):
        if words[:1] == ["default"] and len(words) == 2:
            pattern = words[1].removesuffix(".conf")
            if known := next((entry for entry in entries if fnmatchcase(entry.id, pattern)), None):
                return known
    return entries[0]


def _found(root: Root, words: Iterable[str]) -> list[str]:
    """The paths among the words of an entry as paths of the host; what is none, or leads nowhere, is left out."""
    paths = (word for word in words if word.startswith("/") and ".." not in word.split("/"))
    places = (next((each for each in (f"{_BOOT}{path}", path) if tree.exists(root, each)), "") for path in paths)
    return [place for place in places if place]


def _newest(root: Root, kernels: Iterable[str]) -> str:
    names = list(kernels)
    numbered = [name for name in names if any(piece.isdecimal() for piece in _PIECES.findall(name))]
    if numbered:
        return max(numbered, key=lambda name: version(name.partition("-")[2]))
    return max(names, key=lambda name: (tree.modified(root, f"{_BOOT}/{name}"), name))


def _names(root: Root, directory: str) -> list[str]:
    try:
        return tree.names(root, directory)
    except tree.UNREADABLE:
        return []


def _rows(root: Root, path: str) -> list[str]:
    """The lines of a small file; none of one that is not there, or cannot be read."""
    try:
        return [row.strip() for row in tree.text(tree.read(root, path, limit=_LARGEST)).splitlines()]
    except tree.UNREADABLE:
        return []
