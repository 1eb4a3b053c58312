"""What is in the ranges that were set aside at boot, read from the ranges themselves; changes nothing."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator

from memconsole.backend.kernel import pmem
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import dax, ext4
from memconsole.backend.stores import ranges as devices
from memconsole.backend.stores import raw as reserved
from memconsole.backend.stores.arena import Arena, Contents
from memconsole.backend.stores.described import free
from memconsole.backend.stores.noted import word_of
from memconsole.backend.stores.ranges import Range
from memconsole.errors import MemconsoleError, UsageError
from memconsole.model import Finding, Severity, Value
from memconsole.units import format_address, format_size

_DAMAGED = "a description of memconsole"
"""How :func:`.ranges.contents` begins to say that a range says something that cannot be used."""


class InArena(Value, frozen=True):
    """A region of an arena: bytes, and its physical address, None where that is not shown; ``runs`` of its range."""

    name: str
    size: int
    start: int | None
    runs: int
    generation: int
    guests: tuple[str, ...] = ()


class ArenaRange(Value, frozen=True):
    """A range by its device: what it holds in words, and, of an arena that is mounted, where and its regions.

    ``words``: what of the command line sets it aside; empty where that is no word of it (an NVDIMM). ``unused``: bytes
    that the arena's file system does not have, as the range was smaller when it was made.
    """

    device: str
    size: int
    start: int | None
    holds: str
    arena: str = ""
    mounted: str = ""
    free: int | None = None
    regions: tuple[InArena, ...] = ()
    trouble: str = ""
    words: str = ""
    unused: int = 0


def ranges(root: Root = "/", *, raw: Collection[int] = ()) -> tuple[ArenaRange, ...]:
    """Every range; what cannot be read of one is its ``trouble``.

    ``raw``: where ranges begin that somebody named; no other one that the kernel does not manage is looked into.

    Raises:
        Denied, KernelRefused, BadFile: they cannot be listed.
    """
    mounted = {each.device: each for each in arenas.mounted(root)}
    blocks = tuple(_range(device, mounted.get(device.number), root) for device in pmem.devices(root))
    kept = {each.name: each for each in reserved.reserved(root)}
    wanted = {each.name: each for each in reserved.named(root, raw)}
    unseen = tuple(_unseen(each, root) for name, each in kept.items() if name not in wanted)
    return (*blocks, *(_raw(each, root) for each in (*devices.devdax(root), *wanted.values())), *unseen)


def _unseen(device: Range, root: Root) -> ArenaRange:
    """A range that is kept from the kernel, and that no operator named: it may be broken, or another program's."""
    trouble = device.trouble or f"it was not named: memconsole arena list --raw {device.name} looks into it"
    return ArenaRange(device.name, device.size, device.start, "", trouble=trouble, words=word_of(device.start, root))


def _raw(device: Range, root: Root) -> ArenaRange:
    """A range without a file system."""
    trouble, said = device.trouble, None
    generation, holds = 0, ""
    if not trouble:
        try:
            held = devices.contents(device)
            holds = f"arena {held.arena}" if held.arena else held.other or "nothing"
            found = devices.look(device)
            said, generation = found.description, found.generation
            if said is not None and said.host and (here := arenas.machine_id(root)) and said.host != here:
                trouble = f"another host made it (machine id {said.host})"
        except MemconsoleError as error:
            trouble = f"{error.what}: {error.why}"
    inside = tuple(
        InArena(
            name=piece.name,
            size=piece.size,
            start=device.start + piece.start if device.start is not None else None,
            runs=1,
            generation=generation,
            guests=tuple(sorted({grant.guest for grant in piece.grants})),
        )
        for piece in (said.pieces if said is not None else ())
        if piece.region is not None
    )
    return ArenaRange(
        device=device.name,
        size=device.size,
        start=device.start,
        holds=holds,
        arena=said.name if said is not None else "",
        free=free(said, device.size)[0] if said is not None else None,
        regions=inside,
        trouble=trouble,
        words=word_of(device.start, root),
    )


def _range(device: Pmem, arena: Arena | None, root: Root) -> ArenaRange:
    trouble = arena.trouble if arena is not None else ""
    held, inside = Contents(), tuple[InArena, ...]()
    try:
        held = arenas.contents(device)
        inside = tuple(_inside(arena)) if arena is not None else ()
    except MemconsoleError as error:
        trouble = trouble or f"{error.what}: {error.why}"
    return ArenaRange(
        device=device.name,
        size=device.size,
        start=device.start,
        holds=f"arena {held.arena}" if held.arena else held.other or ("" if trouble else "nothing"),
        arena=held.arena,
        mounted=str(arena.path) if arena is not None else "",
        free=arena.free if arena is not None else None,
        regions=inside,
        trouble=trouble,
        words=word_of(device.start, root),
        unused=max(0, device.size - held.size) if held.size else 0,
    )


def _inside(arena: Arena) -> Iterator[InArena]:
    for name, record, why in dax.read_arena(arena):
        if record is None or why or name.startswith(arenas.FRESH):
            continue
        fd = os.open(arena.path / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            runs = ext4.runs(fd, record.region.size)
        finally:
            os.close(fd)
        start = arena.start + runs[0].physical if runs and arena.start is not None else None
        guests = tuple(sorted({grant.guest for grant in record.grants}))
        yield InArena(name, record.region.size, start, len(runs), record.generation, guests)


def check(
    name: str = "", root: Root = "/", noted: Iterable[Finding] = (), *, raw: Collection[int] = ()
) -> tuple[Finding, ...]:
    """What is wrong with the arenas of this host, or with one; an arena that is not mounted is checked by e2fsck.

    ``noted``: what is known of those that are not there (:mod:`..stores.noted`). ``raw``: as for :func:`ranges`.

    Raises:
        Denied, KernelRefused, BadFile: they cannot be listed. UsageError: there is no arena of this name.
    """
    mounted = {each.device: each for each in arenas.mounted(root)}
    found = [each for each in noted if name in {"", each.subject}]
    known = len(found)
    for device in pmem.devices(root):
        arena = mounted.get(device.number)
        try:
            label = arena.name if arena is not None else arenas.contents(device).arena
        except MemconsoleError as error:
            found.append(_finding("arena-unread", device.name, f"{error.what}: {error.why}", error.remedy))
            continue
        if not label or (name and label != name):
            continue
        known += 1
        found += _check_mounted(arena) if arena is not None else _check_unmounted(device, label)
    named = reserved.named(root, raw)
    for each in (*devices.devdax(root), *named):
        if each.trouble and each not in named:
            continue
        seen = _raw(each, root)
        if name and seen.arena != name:
            continue
        known += bool(seen.arena)
        if seen.trouble:
            found.append(_finding("arena-unused", seen.arena or each.name, seen.trouble, "nothing in it is lost"))
        elif seen.holds.startswith(_DAMAGED):
            found.append(_finding("arena-unread", each.name, f"{each.where} holds {seen.holds}", "see dmesg"))
    if name and not known:
        raise UsageError(f"there is no arena {name}", "no range holds one of this name", "memconsole arena list")
    return tuple(found)


def _check_mounted(arena: Arena) -> Iterator[Finding]:
    if arena.trouble:
        yield _finding("arena-unused", arena.name, arena.trouble, "it is left as it is; nothing in it is lost")
    for file, record, why in dax.read_arena(arena):
        if why or record is None:
            what = why or "it does not say what it is: it was never finished"
            remedy = "what was never finished goes with the next start of the service; all else is left as it is"
            yield _finding("arena-file", file, f"a file of arena {arena.name}: {what}", remedy)
    for region in _inside(arena):
        if region.runs != 1 or (region.start or 0) % ext4.CLUSTER:
            at = format_address(region.start) if region.start is not None else "an address that is not shown"
            what = f"region {region.name} of arena {arena.name} lies in {region.runs} runs, from {at}"
            yield _finding("arena-file", region.name, what, "copy its contents to a new region")


def _check_unmounted(device: Pmem, label: str) -> Iterator[Finding]:
    try:
        ext4.run(["e2fsck", "-f", "-n", device.path], f"the file system of arena {label} is damaged")
    except MemconsoleError as error:
        yield _finding("arena-unread", label, f"{error.what}: {error.why}", f"e2fsck -f {device.path}")
    yield _finding("arena-unused", label, f"arena {label} on {device.path} is not mounted", "memconsole arena scan")


def _finding(id: str, subject: str, what: str, remedy: str) -> Finding:
    return Finding(id, Severity.WARNING, subject, what, "", remedy)


def lines(found: ArenaRange) -> Iterator[str]:
    """A range in words, a line each."""
    at = f" at {format_address(found.start)}" if found.start is not None else ""
    free = f", {format_size(found.free)} free" if found.free is not None else ""
    place = f", mounted at {found.mounted}" if found.mounted else ""
    yield f"{found.device}  {format_size(found.size)}{at}: {found.holds or 'not known'}{free}{place}"
    if found.words:
        yield f"    set aside by {found.words}: the next kernel needs the same word"
    if found.unused >= ext4.CLUSTER:
        why = "the range was smaller when the arena was made, and a file system with clusters cannot grow"
        yield f"    {format_size(found.unused)} of it are not used: {why} (docs/stores.md)"
    if found.trouble:
        yield f"    not used: {found.trouble}"
    for region in found.regions:
        at = f" at {format_address(region.start)}" if region.start is not None else ""
        guests = f", granted to {', '.join(region.guests)}" if region.guests else ""
        yield f"    {region.name}  {format_size(region.size)}{at}, generation {region.generation}{guests}"
