"""The words of the console, the command line and the documents, and what each means; docs/glossary.md has the same.

``_TEXT`` is a term a line: ``WORD[, WORD...]: meaning``; lines that are indented go on with the one before.
"""

from __future__ import annotations

from typing import NamedTuple

_TEXT = """\
region: named memory set aside for one owner: its frames exist and stay reserved whether or not a process maps
    them. One memfd, or several segments of 512 GiB
segment: one memfd of a region
store: where a region's frames live and how they survive a kexec. memfd: live update (LUO) carries it
grant: the right of one guest to map a range of a region, given by map, taken back by revoke
guest: what holds grants: a VM (QEMU, a canary) or any process (a database)
canary: a tiny guest that comes with memconsole. It stamps and checks patterns in its memory, and notices gaps
    in its own time: the proof that memory and vCPUs came through
window: an MMIO range of a PCI device (a BAR), granted to a guest like memory
BDF: a PCI function's address, 0000:41:00.0: domain, bus, device, function
domain: an IOMMU address space: which frames the devices of a group reach at which IOVA
pfn, frame: a page frame number: where a page is in physical memory, in units of 4 KiB
gpa, hva, iova: an address as the guest's CPU sees it, as the VMM's process sees it, as a device sees it
extent: a run of pages that are contiguous both in a region and in physical memory: offset, pfn, count, flags
run: contiguous frames; a region in few runs is preserved quickly and mapped by large pages
resident: said of pages that have a frame now
in place: said of pages that have their frames, and of contents that stay in theirs through a revoke or a handoff
moved: said of pages that are in another frame than before: the kernel migrated, swapped or copied them
prefault: giving every page of a region its frame when it is reserved, not when it is first touched
lazy: said of a grant whose page faults are handed to memconsole (userfaultfd) and served by it
WSS: working set size: what a lazy grant touched so far
usage: what a process used since it started (CPU time, I/O) and where it may run; read for those who ask
placement: how the memory that a process maps lies on the host's NUMA nodes
stall: time in which work waited: a part of the host's tasks for a CPU, memory or I/O (/proc/pressure, some); a
    guest's vCPUs for a CPU (schedstat)
custody: who holds the file descriptors without which memory, sessions and the ledger would vanish: the keeper,
    or systemd's fd store
keeper: a small static C program that has custody and makes the jump; the service may be killed, the keeper
    holds on
control process: memconsole serve: the one writer. Consoles and commands are its clients
embedded: a control process inside a console or command; what it reserves ends with it
ledger: what was meant: a log in a memfd in custody. What the kernel shows is kept apart and never mixed
    with it
finding: a difference between what was meant and what the kernel shows, with a severity, evidence and a remedy
rung: a step of revoke, from gentle to hard: ask the guest, protect its mapping, copy the contents away, kill
    the process
cut, proved, quarantined: how certain the end of a revoke is: no mapping is left; no pin either; or a pin
    remains, and the frames are given to no one until it drops
quarantine: revoked frames that something still pins; nothing else gets them until the pin drops
pin: a long-lived hold on a page by the kernel for DMA, vmsplice or io_uring; it outlives every mapping
KHO: Kexec HandOver: the part of Linux that keeps pages where they are across a kexec
LUO: Live Update Orchestrator: /dev/liveupdate, through which user space has memfds preserved, by session
session: a set of files that LUO preserves together; it ends with its last descriptor
preserve: to have the kernel keep memory, contents and frames, over the next kexec
scratch: memory the next kernel boots in; nothing preserved may lie there
manifest: the description of everything preserved, itself preserved, versioned and checksummed
boot plan: how each VMM is started again in the next kernel, for memconsole-resume
handoff: check, preserve, pause, save, jump, adopt, verify, rebuild, resume, report
rehearsal: a handoff in which the jump is replaced by a restart of every VMM on the running kernel
condition: a known way to lose memory, looked at before a handoff; one that is not met refuses it or warns
blackout: the time a guest did not run, as the guest sees it
adopted guest: a VM that another program started (libvirt, by hand), whose RAM came into custody while it ran
adoption: what a control process does when it starts: it takes over what custody and ledger hold
"""
_HEAD = """\
# Glossary

The words of the console, the command line and these documents, for someone who knows Linux and virtual machines.
They stand in the console too, under `?`.

| word | meaning |
|---|---|
"""


class Term(NamedTuple):
    """A word (or several that belong together) and what it means."""

    word: str
    meaning: str


def _terms(text: str) -> tuple[Term, ...]:
    lines = text.replace("\n    ", " ").splitlines()
    return tuple(Term(word, meaning) for word, _, meaning in (line.partition(": ") for line in lines))


TERMS = _terms(_TEXT)


def markdown() -> str:
    """The glossary as docs/glossary.md has it."""
    return _HEAD + "".join(f"| **{term.word}** | {term.meaning} |\n" for term in TERMS)
