"""Every known way to lose memory at a handoff, or to make the blackout long, as a condition with a name.

A condition is judged from :class:`~.facts.HandoffFacts` alone. One that is an ``error`` and does not hold refuses
the handoff (its refusal is called by its id: ``image-too-large`` is ``ImageTooLarge``); a ``warning`` is shown. Each
says what is required, what a handoff without it risks, what was observed, and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from memconsole.backend.handoff import device_conditions, doubts, image, others, road_conditions, service_conditions
from memconsole.backend.handoff.facts import GuestFacts, HandoffFacts
from memconsole.backend.kernel import kho
from memconsole.model import Condition, GuestKind, GuestState, Refusal, Severity
from memconsole.units import PAGE, format_duration, format_size

ERROR, WARNING = Severity.ERROR, Severity.WARNING

QUADRATIC_NS = 13
"""ns the next boot takes per pair of runs of preserved base pages: 32,768 runs took 14 s more than none."""
LONG_BOOT_NS = 1_000_000_000
LARGEST_SEGMENT = 1 << 40
HUGE = 2 << 20

Judge = Callable[[HandoffFacts], Iterator[Condition]]


def check_conditions(facts: HandoffFacts) -> tuple[Condition, ...]:
    """Every condition of this handoff, those that hold and those that do not."""
    judges = (*_ALWAYS, *(_OF_A_JUMP if facts.jump else ()))
    return tuple(condition for judge in judges for condition in judge(facts))


def refusals(conditions: Iterable[Condition]) -> list[Refusal]:
    """What refuses: every error that does not hold."""
    return [
        Refusal(refusal_code(each.id), each.observed, each.risk, each.remedy) for each in conditions if each.refuses
    ]


def refusal_code(id: str) -> str:
    """A condition's id as the name of its refusal."""
    return "".join(word.capitalize() for word in id.split("-"))


def boot_estimate(runs: int) -> int:
    """How long the next kernel takes to reserve so many runs of base pages one by one, in ns."""
    return QUADRATIC_NS * runs * runs


# --- this kernel ----------------------------------------------------------------------------------------------------


def _this_kernel(facts: HandoffFacts) -> Iterator[Condition]:
    yield Condition(
        "kexec-disabled",
        ERROR,
        not facts.kexec_disabled,
        requirement="this kernel may load another one",
        risk="no other kernel can be booted until the next reboot",
        observed="kernel.kexec_load_disabled is 1" if facts.kexec_disabled else "",
        remedy="only a reboot clears it: find what sets kernel.kexec_load_disabled (sysctl.d) first",
    )
    yield Condition(
        "image-of-another",
        WARNING,
        not facts.loaded,
        requirement="no other kernel image is loaded",
        risk="an image loaded by kexec_load hands nothing over; the handoff replaces it",
        observed="another kernel image is loaded (/sys/kernel/kexec_loaded is 1)" if facts.loaded else "",
        remedy="see that the program that loaded it does not jump; kexec -u unloads the image",
    )
    others = [(pid, name) for pid, name in facts.sessions if not name.startswith(kho.SYSTEMDS)]
    named = ", ".join(f"process {pid} holds session {name}" for pid, name in others)
    yield Condition(
        "session-elsewhere",
        WARNING,
        not others,
        requirement="custody holds every live update session",
        risk="a session whose holder ends before the jump is lost, with the memory it preserved",
        observed=f"sessions are outside custody: {named}" if others else "",
        remedy="close the sessions, or keep their holders running until the jump",
    )


def _left(facts: HandoffFacts) -> Iterator[Condition]:
    yield Condition(
        "session-kept",
        ERROR,
        not facts.kept,
        requirement="no incoming session of the previous handoff is left",
        risk="its files cannot be preserved again; files in it that this memconsole does not know are lost at the jump",
        observed=f"incoming sessions are left: {', '.join(facts.kept)}" if facts.kept else "",
        remedy="once nothing in them is missed: --finish finishes them, and discards files that no entry refers to",
    )
    named = ", ".join(f"process {pid} maps {region}" for pid, region in facts.users)
    yield Condition(
        "mapped-elsewhere",
        WARNING,
        not facts.users,
        requirement="only guests map regions",
        risk="other processes end with this kernel; the memory is carried",
        observed=f"processes that are no guests map regions: {named}" if facts.users else "",
        remedy="shut them down first; after the jump the region is at the same path of the mount",
    )


# --- the next kernel ------------------------------------------------------------------------------------------------


def _next_kernel(facts: HandoffFacts) -> Iterator[Condition]:
    kernel = facts.image
    why = facts.image_why or facts.initrd_why
    yield Condition(
        "image-unreadable",
        ERROR,
        kernel is not None and not facts.initrd_why,
        requirement="the next kernel's image and initrd can be read",
        risk="there is nothing to boot",
        observed=why or f"{facts.kernel} {kernel.release if kernel else ''}".rstrip(),
        remedy="name both: --kernel FILE --initrd FILE",
    )
    if kernel is None:
        return
    yield Condition(
        "image-without-initrd",
        ERROR,
        bool(facts.initrd) or facts.bare,
        requirement="the next kernel has its initrd",
        risk="a kernel without the drivers in its initrd panics before it takes anything over",
        observed="" if facts.initrd or facts.bare else f"no initrd was named, and none was found for {facts.kernel}",
        remedy="pass --initrd FILE, or --initrd none for a kernel that needs none",
    )
    scratch = facts.survival.scratch
    short = image.shortage(kernel, facts.initrd_size, scratch) if scratch else ""
    unseen = f"the scratch regions are not shown ({_why(facts)}); the kernel checks the size when it loads"
    yield Condition(
        "image-too-large",
        ERROR,
        not short,
        requirement="kernel and initrd fit into KHO's scratch regions",
        risk="the kernel cannot be loaded",
        observed=short or ("" if scratch else unseen),
        remedy="boot with larger scratch regions (kho_scratch=), or use a smaller initrd",
    )


def _why(facts: HandoffFacts) -> str:
    return facts.survival.detail or "mount debugfs"


# --- memory ---------------------------------------------------------------------------------------------------------


def _memory(facts: HandoffFacts) -> Iterator[Condition]:
    if facts.road:  # nothing is preserved: what is on memfds is refused by name
        return
    huge = [held.region.name for held in facts.regions if held.region.page_size != PAGE]
    moves = "; ".join(f"memconsole move {name} --store dax" for name in huge)
    yield Condition(
        "hugetlb",
        ERROR,
        not huge,
        requirement="no region has hugetlb pages",
        risk="live update cannot preserve hugetlb pages: the region is lost",
        observed=f"regions of hugetlb pages: {', '.join(huge)}" if huge else "",
        remedy=f"move each to an arena, which survives by itself: {moves}; or reserve them again"
        " without --page-size (base pages come in 2 MiB folios where shmem_enabled allows it)",
    )
    vast = [held.region.name for held in facts.regions if any(s.size >= LARGEST_SEGMENT for s in held.region.segments)]
    yield Condition(
        "segment-too-large",
        ERROR,
        not vast,
        requirement="every segment of a region is smaller than 1 TiB",
        risk="the kernel's list of folios has no room for more: the segment cannot be preserved",
        observed=f"regions with a segment of 1 TiB or more: {', '.join(vast)}" if vast else "",
        remedy="reserve them again: new segments are smaller",
    )
    holes = sum(held.region.size - held.resident for held in facts.regions if held.region.page_size == PAGE)
    free = facts.memory.available
    yield Condition(
        "sparse",
        ERROR,
        holes <= free,
        requirement="there is memory to fill sparse regions",
        risk="preserving a region fills its holes: it fails part-way, and the handoff is undone",
        observed=f"{'enough' if holes <= free else 'not enough'} memory to fill sparse regions"
        f" ({format_size(holes)} of holes, {format_size(free)} available)",
        remedy=f"free {format_size(max(0, holes - free))} of memory",
    )
    total = sum(held.region.size for held in facts.regions)
    small = facts.limit is not None and facts.limit[1] < total
    where = f"the limit of {facts.limit[0]} is {format_size(facts.limit[1])}" if facts.limit else "there is no limit"
    yield Condition(
        "memory-max",
        WARNING if facts.limit_why else ERROR,
        not small and not facts.limit_why,
        requirement="the memory limit of memconsole-resume is not below the size of all regions",
        risk="the kernel kills the process that retrieves the memory, and the memory is lost",
        observed=facts.limit_why or f"{where}; the regions have {format_size(total)}",
        remedy="raise memory.max (MemoryMax=infinity), and run memconsole-resume outside of small cgroups",
    )
    yield from _layout(facts)


def _layout(facts: HandoffFacts) -> Iterator[Condition]:
    runs = sum(held.runs for held in facts.regions if held.loose)
    estimate = boot_estimate(runs)
    yield Condition(
        "fragmented",
        WARNING,
        estimate < LONG_BOOT_NS,
        requirement="the regions lie in few runs of frames",
        risk="the next kernel's boot, and so the blackout, grows with the square of the runs",
        observed=f"the regions have {runs:,} runs in base pages: about {format_duration(estimate)} more",
        remedy="reserve regions with --prefault while memory is free, and shmem_enabled at advise or always",
    )
    strayed = [held for held in facts.regions if held.in_scratch]
    size = format_size(sum(held.in_scratch for held in strayed))
    yield Condition(
        "scratch-migrates",
        WARNING,
        not strayed,
        requirement="no frame of a region lies in KHO's scratch",
        risk="preserving moves such frames away, which takes seconds a GiB; guests run meanwhile",
        observed=f"{size} of {', '.join(each.region.name for each in strayed)} lie in KHO's scratch" if strayed else "",
        remedy="boot with kho_scratch=16M,128M,0: a smaller scratch leaves less to move",
    )
    never = facts.memory.shmem_thp == "never"
    loose = any(held.loose >= HUGE for held in facts.regions)
    yield Condition(
        "base-pages",
        WARNING,
        not (never and loose),
        requirement="regions come in 2 MiB folios",
        risk="preserving and retrieving base pages takes 60 times as long",
        observed="regions come in base pages: shmem_enabled is never" if never and loose else "",
        remedy="echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, before regions are reserved",
    )


def _by_base_pages(facts: HandoffFacts) -> Iterator[Condition]:
    named = ", ".join(f"{guest} maps {region}" for guest, region in facts.misplaced)
    yield Condition(
        "guest-base-pages",
        WARNING,
        not facts.misplaced,
        requirement="every guest maps its memory at a multiple of 2 MiB",
        risk="elsewhere the kernel maps it by base pages, and the guest runs slower",
        observed=f"{named} at another address" if named else "",
        remedy="nothing need be done for guests that a handoff starts again; one started by hand needs align=2M in its"
        " memory backend",
    )


def _lazy(facts: HandoffFacts) -> Iterator[Condition]:
    fills = "preserving fills every page, and " if facts.jump else ""
    named = ", ".join(f"{grant} of {guest}" for grant, guest in facts.lazy)
    yield Condition(
        "lazy-granted",
        WARNING,
        not facts.lazy,
        requirement="no grant is lazy",
        risk=f"a lazy grant is an ordinary one afterwards: {fills}its userfaultfd ends with its VMM; no byte is lost",
        observed=f"lazy grants: {named}" if named else "",
        remedy="to count its faults again, revoke the grant afterwards and map it with --lazy",
    )


def _custody(facts: HandoffFacts) -> Iterator[Condition]:
    yield Condition(
        "custody",
        ERROR,
        facts.survives,
        requirement="a keeper or the service manager has custody of what must not vanish",
        risk="sessions and memory are lost if this process ends before the jump",
        observed=f"{facts.custody} has custody" + ("" if facts.survives else " itself, which ends with it"),
        remedy="run memconsole serve, and hand off from there",
    )


# --- guests ---------------------------------------------------------------------------------------------------------


def _guests(facts: HandoffFacts) -> Iterator[Condition]:
    vms = [met for met in facts.guests if met.guest.kind in {GuestKind.CANARY, GuestKind.QEMU}]
    silent = [met for met in vms if met.why_not]
    yield Condition(
        "guest-silent",
        ERROR,
        not silent,
        requirement="every guest answers",
        risk="a guest that does not answer cannot be stopped and saved",
        observed="; ".join(f"guest {met.guest.name} does not answer: {met.why_not}" for met in silent),
        remedy="find what holds it up (kill -CONT, if a signal has stopped its process), and wait until it answers",
    )
    incapable = [met for met in vms if met.incapable]
    yield Condition(
        "guest-incapable",
        ERROR,
        not incapable,
        requirement="every VMM can save its vCPU and device state, and start from it",
        risk="the guest cannot be carried: it ends with this kernel",
        observed="; ".join(f"guest {met.guest.name} cannot be saved: {met.incapable}" for met in incapable),
        remedy="suspend the guest if it has devices passed through (systemctl suspend inside); start it with a VMM that"
        " can save it (QEMU 8.2 or newer); or shut it down from inside",
    )
    ended = [met.guest.name for met in vms if met.state in {GuestState.GONE, GuestState.STOPPED}]
    yield Condition(
        "guest-ended",
        WARNING,
        not ended,
        requirement="every guest runs",
        risk="of a guest that does not run only the regions are carried",
        observed=f"guests do not run: {', '.join(ended)}" if ended else "",
        remedy="nothing need be done: its regions are carried; memconsole guest stop NAME ends its grants",
    )
    late = [met.guest.name for met in vms if met.agentless and met.state is GuestState.RUNNING]
    yield Condition(
        "guest-clock-behind",
        WARNING,
        not late,
        requirement="every QEMU has a channel for its guest agent",
        risk="the guest's wall clock stays behind by the blackout until something in the guest sets it",
        observed=f"QEMUs without a channel for the guest agent: {', '.join(late)}" if late else "",
        remedy="nothing need be done where the guest runs an NTP client that may step (chrony with makestep); else run"
        " hwclock --hctosys in it afterwards, or add an agent: memconsole guest start NAME --vmm qemu --agent",
    )
    yield from _of_a_jump(facts) if facts.jump else _of_a_rehearsal(facts, vms)


def _libvirt(facts: HandoffFacts) -> Iterator[Condition]:
    named = "; ".join(f"{part.title}: {part.state} ({part.why})" for part in facts.libvirt)
    mine = any(met.guest.managed is not None for met in facts.guests)
    yield Condition(
        "libvirt-setup",
        ERROR if mine else WARNING,
        not facts.libvirt,
        requirement="libvirt has memconsole's hook, rights and order of units, where its guests are",
        risk="libvirt starts a guest on other RAM than its own, or before its RAM is there",
        observed=named,
        remedy="; ".join(dict.fromkeys(part.remedy for part in facts.libvirt)) or "memconsole libvirt setup",
    )


def _of_a_rehearsal(facts: HandoffFacts, vms: Iterable[GuestFacts]) -> Iterator[Condition]:
    yield from others.staying(facts)
    staying = [met.guest.name for met in vms if met.stays]
    yield Condition(
        "guest-stays",
        WARNING,
        not staying,
        requirement="no VMM has a device passed through",
        risk="the guest runs on as it is, and its handoff is not rehearsed",
        observed=f"VMMs with a device passed through: {', '.join(staying)}" if staying else "",
        remedy="nothing need be done: a handoff carries such a guest while it is suspended",
    )


def _of_a_jump(facts: HandoffFacts) -> Iterator[Condition]:
    yield service_conditions.untold(facts)
    yield from others.conditions(facts)
    strangers = [guest.name for guest in facts.strangers if guest.managed is None]
    yield Condition(
        "guest-foreign",
        WARNING,
        not strangers,
        requirement="memconsole manages every VM on this host",
        risk="VMs that memconsole does not manage will be lost at the kexec",
        observed=f"memconsole does not manage {', '.join(strangers)}" if strangers else "",
        remedy="shut these VMs down first",
    )


_ALWAYS: tuple[Judge, ...] = (
    _custody,
    doubts.memory_doubts,
    road_conditions.stranded,
    _guests,
    service_conditions.services,
    _libvirt,
    _by_base_pages,
    _lazy,
    device_conditions.devices,
)
_OF_A_JUMP: tuple[Judge, ...] = (
    road_conditions.live_update,
    _this_kernel,
    _left,
    doubts.store_doubts,
    _next_kernel,
    road_conditions.next_kernel,
    road_conditions.memory_words,
    road_conditions.by_arena,
    _memory,
    device_conditions.device_conditions,
)
