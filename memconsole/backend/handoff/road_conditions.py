"""Conditions of the road that guests take: what live update needs of both kernels, or what an arena needs.

See :mod:`.roads`. Where an arena carries the manifest, nothing is asked of live update at all; a region that only it
could carry is refused by its name then.
"""

from __future__ import annotations

from collections.abc import Iterator

from memconsole.backend.handoff.facts import HandoffFacts
from memconsole.backend.handoff.roads import WORDS
from memconsole.backend.kernel import cmdline
from memconsole.backend.kernel.handover import abi
from memconsole.model import Condition, Severity
from memconsole.units import format_size

ERROR, WARNING = Severity.ERROR, Severity.WARNING


def live_update(facts: HandoffFacts) -> Iterator[Condition]:
    """Live update of the kernel that runs."""
    if facts.road:
        return
    here = facts.survival
    yield Condition(
        "live-update",
        ERROR,
        here.luo,
        requirement="this kernel has live update",
        risk="without live update no memory is carried into the next kernel",
        observed="/dev/liveupdate is there" if here.luo else f"there is no /dev/liveupdate; {here.detail}".rstrip("; "),
        remedy="boot a kernel that has CONFIG_LIVEUPDATE with kho=on liveupdate=on; memconsole handoff rehearse works"
        " on any kernel. What is in an arena survives every kexec: memconsole move REGION --store dax",
    )
    yield Condition(
        "device-taken",
        ERROR,
        facts.opener is None,
        requirement="no other process has /dev/liveupdate open",
        risk="the kernel allows one opener at a time: memconsole cannot open it and preserves nothing",
        observed=f"process {facts.opener} has /dev/liveupdate open" if facts.opener is not None else "",
        remedy=f"have process {facts.opener} close it; its sessions end with it, so see what they preserve first",
    )


def next_kernel(facts: HandoffFacts) -> Iterator[Condition]:
    """What the next kernel needs to take over what live update hands it: the ABI words, and its own words."""
    if facts.road:
        return
    kernel, words = facts.image, cmdline.parse(facts.line)
    if kernel is not None and kernel.abis is not None:
        yield from _abis(facts, kernel.abis)
    elif kernel is not None:
        yield Condition(
            "image-abi-unknown",
            WARNING,
            False,
            requirement="the ABI words of the next kernel can be read from its image",
            risk="a kernel of another ABI version loses the memory or panics",
            observed=f"the ABI words of {facts.kernel} cannot be read: {kernel.why}",
            remedy="install the program that unpacks it (zstd, lz4), or make sure that both kernels have one ABI",
        )
    for name in WORDS:
        on = bool(cmdline.switched_on(words, name))
        yield Condition(
            f"command-line-{name}",
            ERROR,
            on,
            requirement=f"the next kernel's command line has {name}=on",
            risk="the memory is set aside in the next kernel and cannot be reached",
            observed="" if on else f"the command line lacks {name}=on: {facts.line}",
            remedy=f'add {name}=on: --append "... {name}=on"',
        )


_LOSES = {
    "kho": "a kernel of another KHO version finds nothing: the memory is lost without a message",
    "luo": "a kernel of another LUO version panics",
    "memfd": "a kernel of another memfd version cannot restore the guests' memory",
}


def _abis(facts: HandoffFacts, found: tuple[str, ...]) -> Iterator[Condition]:
    unknown = []
    for family in abi.FAMILIES:
        ours = ", ".join(word for word in facts.abis if abi.family(word) == family)
        theirs = ", ".join(word for word in found if family in word)
        verdict = abi.compare(family, facts.abis, found)
        if verdict is abi.Verdict.UNKNOWN:
            unknown.append(f"this kernel has {ours or 'none that is known'}, {facts.kernel} has {theirs}")
            continue
        yield Condition(
            f"image-{family}-abi",
            ERROR,
            verdict is abi.Verdict.SAME,
            requirement=f"the next kernel has the ABI {ours}, as this one",
            risk=_LOSES[family],
            observed=f"{facts.kernel} has {theirs}" if theirs else f"{facts.kernel} has no ABI word of {family}",
            remedy=f"choose a kernel that has KEXEC_HANDOVER, LIVEUPDATE and {ours}",
        )
    if unknown:
        yield Condition(
            "image-abi-unknown",
            WARNING,
            False,
            requirement="the ABI words of both kernels have a form that memconsole knows",
            risk="the next kernel may not read what this one writes: the memory is lost, or the kernel panics",
            observed=f"ABI words of an unknown form: {'; '.join(unknown)}",
            remedy="install a memconsole that knows them, or try the two kernels where no guest can be lost",
        )


def memory_words(facts: HandoffFacts) -> Iterator[Condition]:
    """The ranges that ``memmap=`` sets aside here are set aside by the next kernel too, however that is written."""
    here, then = cmdline.parse(facts.here), cmdline.parse(facts.line)
    kept = {each.meaning for each in cmdline.memmaps(then)}
    owners = {start: f" (arena {name})" for name, start in facts.arenas}
    lacks: dict[str, str] = {}  # a word, and whose it is
    for word in here:
        if word.name != "memmap" or word in then:
            continue
        ranges = cmdline.memmaps([word])
        lacks |= {f"memmap={each.said}": owners.get(each.start, "") for each in ranges if each.meaning not in kept}
        if not ranges:  # exactmap, or what only the kernel understands
            lacks[str(word)] = ""
    named = ", ".join(word + owner for word, owner in lacks.items())
    yield Condition(
        "command-line-memmap",
        ERROR,
        not lacks,
        requirement="the next kernel's command line repeats every memmap= of this one",
        risk="memory that memmap= reserves becomes ordinary memory, and is overwritten",
        observed=f"the command line lacks {named}" if lacks else "",
        remedy=f'add it: --append "... {" ".join(lacks)}"',
    )


def by_arena(facts: HandoffFacts) -> Iterator[Condition]:
    """What an arena cannot do that live update does, and the room it needs for what is left in it."""
    if not facts.road:
        return
    left = [held.region.name for held in facts.regions]
    why = "this kernel has no live update" if not facts.survival.luo else "the next command line leaves live update off"
    yield Condition(
        "memfd-regions",
        ERROR,
        not left,
        requirement="every region lies in an arena where no live update carries memory",
        risk="a region on a memfd ends with this kernel, and its guest with it",
        observed=f"{why}; on memfds: {', '.join(left)}" if left else "",
        remedy="; ".join(f"memconsole move {name} --store dax" for name in left)
        + "; or boot both kernels with kho=on liveupdate=on",
    )
    needed, free = facts.room
    yield Condition(
        "arena-room",
        ERROR,
        needed <= free,
        requirement="an arena has room for the state of its guests",
        risk="a guest's state cannot be written down: the handoff is taken back",
        observed=f"{facts.road} has {format_size(free)} free, {format_size(needed)} are needed",
        remedy="make another arena of a range of its own: memconsole arena create NAME",
    )


def stranded(facts: HandoffFacts) -> Iterator[Condition]:
    """Guests whose RAM neither comes along nor is found."""
    named = ", ".join(f"{guest} ({region})" for guest, region in facts.stranded)
    way = {True: "memconsole move {} --store dax", False: "memconsole move {} --store memfd"}[bool(facts.road)]
    moves = "; ".join(way.format(region) for _, region in facts.stranded)
    yield Condition(
        "guest-stranded",
        ERROR,
        not facts.stranded,
        requirement="every VM has its RAM on a store from which memconsole-resume gets it",
        risk="the VM cannot be started again: it ends, and its region keeps the contents",
        observed=f"VMs on regions that memconsole-resume does not find: {named}" if named else "",
        remedy=f"have it live where it is found: {moves}; or shut the guest down in its own way (docs/stores.md);"
        " memconsole arena check says what keeps an arena from being used",
    )
