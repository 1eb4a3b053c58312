"""Every known way to lose memory at a handoff, or to make the blackout long, as a condition with a name.

A condition is judged from :class:`~.facts.Facts` alone. One that is an ``error`` and does not hold refuses the handoff
(its refusal is called by its id: ``image-too-large`` is ``ImageTooLarge``); a ``warning`` is shown. What a condition
guards against stands in its text, what it was judged by in its evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from memconsole.backend.handoff import image
from memconsole.backend.handoff.facts import Facts
from memconsole.backend.kernel import kho
from memconsole.model import Condition, GuestKind, GuestState, Refusal, Severity
from memconsole.units import PAGE, format_duration, format_size

ERROR, WARNING = Severity.ERROR, Severity.WARNING

QUADRATIC_NS = 13
"""ns the next boot takes per pair of runs of preserved base pages: 32,768 runs took 14 s more than none."""
LONG_BOOT_NS = 1_000_000_000
LARGEST_SEGMENT = 1 << 40
HUGE = 2 << 20
_OF_IOMMUS = ("iommu=", "intel_iommu=", "amd_iommu=", "iommu.", "vfio_iommu_type1.", "iommufd.")

Judge = Callable[[Facts], Iterator[Condition]]


def check(facts: Facts) -> tuple[Condition, ...]:
    """Every condition of this handoff, those that hold and those that do not."""
    judges = (*_ALWAYS, *(_OF_A_JUMP if facts.jump else ()))
    return tuple(condition for judge in judges for condition in judge(facts))


def refusals(conditions: Iterable[Condition]) -> list[Refusal]:
    """What refuses: every error that does not hold."""
    return [
        Refusal(code(each.id), f"wanted: {each.what}", each.evidence, each.remedy)
        for each in conditions
        if not each.ok and each.severity is ERROR
    ]


def code(id: str) -> str:
    """A condition's id as the name of its refusal."""
    return "".join(word.capitalize() for word in id.split("-"))


def boot_estimate(runs: int) -> int:
    """How long the next kernel takes to reserve so many runs of base pages one by one, in ns."""
    return QUADRATIC_NS * runs * runs


# --- this kernel ----------------------------------------------------------------------------------------------------


def _this_kernel(facts: Facts) -> Iterator[Condition]:
    here = facts.survival
    yield Condition(
        "live-update",
        ERROR,
        here.luo,
        "this kernel has live update: without it nothing is carried",
        "there is a /dev/liveupdate" if here.luo else f"there is no /dev/liveupdate; {here.detail}".rstrip("; "),
        "boot a kernel with CONFIG_LIVEUPDATE with kho=on liveupdate=on, or rehearse: memconsole handoff rehearse",
    )
    yield Condition(
        "kexec-disabled",
        ERROR,
        not facts.kexec_disabled,
        "this kernel may load another one",
        "kexec_load_disabled is 1" if facts.kexec_disabled else "",
        "nothing takes it back but a reboot: look what sets kernel.kexec_load_disabled (sysctl.d)",
    )
    yield Condition(
        "image-of-another",
        WARNING,
        not facts.loaded,
        "no image is loaded yet: one loaded by kexec_load would hand nothing over, so it is replaced",
        "/sys/kernel/kexec_loaded is 1" if facts.loaded else "",
        "whoever loaded it must not jump: kexec -u unloads it",
    )
    yield Condition(
        "device-taken",
        ERROR,
        facts.opener is None,
        "/dev/liveupdate is free: it has one opener at a time",
        f"process {facts.opener} has it open" if facts.opener is not None else "",
        f"end process {facts.opener}, or have it close the device",
    )
    others = [(pid, name) for pid, name in facts.sessions if not name.startswith(kho.SYSTEMDS)]
    yield Condition(
        "session-elsewhere",
        WARNING,
        not others,
        "every session is in custody: one held by a process that ends before the jump is gone without a word",
        ", ".join(f"{name} of process {pid}" for pid, name in others),
        "close them, or take care that their holders live until the jump",
    )


def _left(facts: Facts) -> Iterator[Condition]:
    yield Condition(
        "session-kept",
        ERROR,
        not facts.kept,
        "no session of the kernel before is kept: its files cannot be preserved anew, what is unknown in it ends here",
        ", ".join(facts.kept),
        "once nobody misses anything: --finish finishes them, and discards what nobody knows in them",
    )
    yield Condition(
        "mapped-elsewhere",
        WARNING,
        not facts.users,
        "nobody maps a region but its guest: whoever else does ends with this kernel, though the memory is carried",
        ", ".join(f"process {pid} maps {region}" for pid, region in facts.users),
        "end it in order; after the jump it finds the region at the same path of the mount",
    )


# --- the next kernel ------------------------------------------------------------------------------------------------


def _next_kernel(facts: Facts) -> Iterator[Condition]:
    kernel = facts.image
    yield Condition(
        "image-unreadable",
        ERROR,
        kernel is not None and not facts.initrd_why,
        "the next kernel's image and initrd can be read",
        facts.image_why or facts.initrd_why or f"{facts.kernel} {kernel.release if kernel else ''}".rstrip(),
        "name them: --kernel FILE --initrd FILE",
    )
    if kernel is None:
        return
    if kernel.abis is None:
        yield Condition(
            "image-abi-unknown",
            WARNING,
            False,
            "what the next kernel understands can be read from its image",
            kernel.why,
            "install what unpacks it (zstd, lz4), or be sure of it",
        )
    else:
        yield from _abis(facts, kernel.abis)
    scratch = facts.survival.scratch
    short = image.shortage(kernel, facts.initrd_size, scratch) if scratch else ""
    yield Condition(
        "image-too-large",
        ERROR,
        not short,
        "kernel and initrd fit into KHO's scratch regions",
        short or ("" if scratch else "the regions are not shown: mount debugfs; the kernel checks it when it loads"),
        "boot with larger scratch regions (kho_scratch=), or use a smaller initrd",
    )


_LOSES = {
    "kho": "another version finds nothing, and the memory is lost without a word",
    "luo": "another version makes the next kernel panic",
    "memfd": "another version cannot restore the guests' memory",
}


def _abis(facts: Facts, found: tuple[str, ...]) -> Iterator[Condition]:
    for wanted in facts.abis:
        kind = wanted.partition("-")[0]
        theirs = [each for each in found if each.startswith(f"{kind}-")]
        yield Condition(
            f"image-{kind}-abi",
            ERROR,
            wanted in theirs,
            f"the next kernel speaks {wanted}, as this one does: {_LOSES[kind]}",
            f"it speaks {', '.join(theirs)}" if theirs else f"{facts.kernel} has no such word in it",
            "choose a kernel with KEXEC_HANDOVER and LIVEUPDATE of this version",
        )


def _command_line(facts: Facts) -> Iterator[Condition]:
    words = facts.line.partition(" -- ")[0].split()
    for name in ("kho", "liveupdate"):
        value = next((word.partition("=")[2] for word in reversed(words) if word.startswith(f"{name}=")), "")
        yield Condition(
            f"command-line-{name}",
            ERROR,
            value in kho.TRUE,
            f"the next command line has {name}=on: without it the memory is set aside and cannot be reached",
            f"it is: {facts.line}" if value not in kho.TRUE else "",
            f'add {name}=on: --append "... {name}=on"',
        )
    carved = [word for word in facts.here.split() if word.startswith("memmap=")]
    missing = [word for word in carved if word not in words]
    yield Condition(
        "command-line-memmap",
        ERROR,
        not missing,
        "the next command line repeats every memmap= of this one: what it carves out would become ordinary memory",
        f"missing: {' '.join(missing)}" if missing else "",
        f'add it: --append "... {" ".join(missing)}"',
    )


# --- memory ---------------------------------------------------------------------------------------------------------


def _memory(facts: Facts) -> Iterator[Condition]:
    huge = [held.region.name for held in facts.regions if held.region.page_size != PAGE]
    yield Condition(
        "hugetlb",
        ERROR,
        not huge,
        "no region is of hugetlb pages: this kernel cannot carry those",
        ", ".join(huge),
        "reserve it again without --page-size: base pages come in 2 MiB folios where shmem_enabled allows",
    )
    vast = [held.region.name for held in facts.regions if any(s.size >= LARGEST_SEGMENT for s in held.region.segments)]
    yield Condition(
        "segment-too-large",
        ERROR,
        not vast,
        "every segment is under 1 TiB: the kernel's list of folios has no room for more",
        ", ".join(vast),
        "reserve it again: it is made of smaller segments",
    )
    holes = sum(held.region.size - held.resident for held in facts.regions if held.region.page_size == PAGE)
    yield Condition(
        "sparse",
        ERROR,
        holes <= facts.memory.available,
        "there is memory for every hole of the regions: preserving fills them",
        f"holes of {format_size(holes)}, {format_size(facts.memory.available)} can be had",
        "release a region, or free memory",
    )
    total = sum(held.region.size for held in facts.regions)
    small = facts.limit is not None and facts.limit[1] < total
    where = f"memory.max of {facts.limit[0]} is {format_size(facts.limit[1])}" if facts.limit else "there is no limit"
    yield Condition(
        "memory-max",
        ERROR,
        not small,
        "who retrieves the memory may have it: a smaller memory.max has it killed, and the memory is lost",
        f"{where}; regions of {format_size(total)}",
        "raise memory.max (MemoryMax=infinity), and run memconsole-resume outside of small cgroups",
    )
    yield from _layout(facts)


def _layout(facts: Facts) -> Iterator[Condition]:
    runs = sum(held.runs for held in facts.regions if held.loose)
    estimate = boot_estimate(runs)
    yield Condition(
        "fragmented",
        WARNING,
        estimate < LONG_BOOT_NS,
        "the regions lie in few runs of frames: the next boot's time grows with their square",
        f"{runs} runs in base pages: about {format_duration(estimate)} more",
        "reserve regions with --prefault while memory is free, with shmem_enabled at advise or always",
    )
    strayed = [held for held in facts.regions if held.in_scratch]
    yield Condition(
        "scratch-migrates",
        WARNING,
        not strayed,
        "no frame lies in KHO's scratch: preserving moves those away, which takes seconds a GiB",
        f"{format_size(sum(held.in_scratch for held in strayed))} of {', '.join(each.region.name for each in strayed)}"
        if strayed
        else "",
        "they are moved while the guests run, before anything else; kho_scratch=16M,128M,0 leaves less to move",
    )
    never = facts.memory.shmem_thp == "never"
    loose = any(held.loose >= HUGE for held in facts.regions)
    yield Condition(
        "base-pages",
        WARNING,
        not (never and loose),
        "regions come in 2 MiB folios: preserving and retrieving base pages takes 60 times as long",
        "shmem_enabled is never" if never else "",
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, before regions are reserved",
    )


def _lazy(facts: Facts) -> Iterator[Condition]:
    fills = "preserving puts every page in place, and " if facts.jump else ""
    yield Condition(
        "lazy-granted",
        WARNING,
        not facts.lazy,
        f"no grant is lazy: {fills}its userfaultfd ends with its VMM: the kernel alone serves its faults afterwards",
        ", ".join(f"{grant} of {guest}" for grant, guest in facts.lazy),
        "no byte is lost; to count its faults again, revoke it afterwards and map it with --lazy",
    )


def _custody(facts: Facts) -> Iterator[Condition]:
    yield Condition(
        "custody",
        ERROR,
        facts.survives,
        "a keeper, or the service manager, holds what must not vanish: this process may die meanwhile",
        f"custody: {facts.custody}",
        "run memconsole serve, and hand off from there",
    )
    yield Condition(
        "memory-lost",
        WARNING,
        not facts.lost,
        "the memory of every region is there",
        ", ".join(facts.lost),
        "memconsole release REGION forgets it",
    )


# --- guests ---------------------------------------------------------------------------------------------------------


def _guests(facts: Facts) -> Iterator[Condition]:
    vms = [met for met in facts.guests if met.guest.kind is not GuestKind.PROCESS]
    silent = [met for met in vms if met.why_not]
    yield Condition(
        "guest-silent",
        ERROR,
        not silent,
        "every guest answers: one that does not cannot be stopped and saved",
        "; ".join(f"{met.guest.name}: {met.why_not}" for met in silent),
        "wait until it answers, or stop it: memconsole guest stop NAME",
    )
    incapable = [met for met in vms if met.incapable]
    yield Condition(
        "guest-incapable",
        ERROR,
        not incapable,
        "every VMM can be saved beside its RAM, and started from that",
        "; ".join(f"{met.guest.name}: {met.incapable}" for met in incapable),
        "have it suspend itself, if that is what it lacks (systemctl suspend); start it with a VMM that can (--device,"
        " QEMU 8.2 or newer); or stop it",
    )
    ended = [met.guest.name for met in vms if met.state in {GuestState.GONE, GuestState.STOPPED}]
    yield Condition(
        "guest-ended",
        WARNING,
        not ended,
        "every guest runs: of one that does not, the regions are carried and nothing else",
        ", ".join(ended),
        "memconsole guest stop NAME forgets it",
    )
    if not facts.jump:
        staying = [met.guest.name for met in vms if met.stays]
        yield Condition(
            "guest-stays",
            WARNING,
            not staying,
            "no VMM has devices in its own hands: such a one goes on as it is, and is not rehearsed",
            ", ".join(staying),
            "a handoff carries it, while its guest is suspended",
        )
    processes = [met.guest.name for met in facts.guests if met.guest.kind is GuestKind.PROCESS]
    if facts.jump:
        yield Condition(
            "guest-process",
            WARNING,
            not processes,
            "no guest is an ordinary process: its regions are carried, the process ends with this kernel",
            ", ".join(processes),
            "have it write down what it needs; start it again after the jump: memconsole guest attach NAME --pid PID",
        )
        strangers = [guest.name for guest in facts.strangers]
        yield Condition(
            "guest-foreign",
            WARNING,
            not strangers,
            "no VM runs here without memconsole: such a one ends with this kernel, memory and all",
            ", ".join(strangers),
            "shut it down first",
        )


# --- devices --------------------------------------------------------------------------------------------------------


def _devices(facts: Facts) -> Iterator[Condition]:
    found = facts.devices
    yield Condition(
        "device-lost",
        ERROR,
        not any(each.lost for each in found),
        "every device that a grant is for is in custody, and works: one that is not cannot be given back",
        "; ".join(f"{each.bdf} of {each.guest}: {each.lost}" for each in found if each.lost),
        "revoke its grants, and map them again with --dma; of a guest that is held: memconsole guest resume NAME",
    )
    yield Condition(
        "device-restless",
        ERROR,
        not any(each.restless for each in found),
        "the bus can be taken from every device: one that writes on during the jump writes anywhere",
        "; ".join(f"{each.bdf}: {each.restless}" for each in found if each.restless),
        "revoke its grants first: that closes it",
    )
    yield Condition(
        "device-group",
        ERROR,
        not any(each.active for each in found),
        "no driver has another device of a device's IOMMU group: such a group is given to nobody",
        "; ".join(f"{each.bdf}: {', '.join(each.active)}" for each in found if each.active),
        "take it from its driver: echo BDF > /sys/bus/pci/devices/BDF/driver/unbind",
    )
    hidden = [each for each in found if each.hidden]
    yield Condition(
        "device-hidden",
        WARNING,
        not hidden,
        "the kernel shows where every device's page tables lead: else the ledger's word is compared, which proves less",
        hidden[0].hidden if hidden else "",
        "mount debugfs; a kernel with CONFIG_INTEL_IOMMU_DEBUGFS shows them",
    )


def _devices_beyond(facts: Facts) -> Iterator[Condition]:
    """What devices need on the other side; where there are none, it is no matter."""
    found = facts.devices
    yield Condition(
        "device-driver",
        ERROR if facts.missing is not None else WARNING,
        facts.missing == (),
        "the next kernel has vfio-pci and iommufd: without them no device comes back, and its guest stays paused",
        f"it lacks {', '.join(facts.missing)}" if facts.missing else "" if facts.missing == () else "it does not say",
        "choose a kernel with VFIO_PCI, VFIO_DEVICE_CDEV and IOMMUFD, or revoke the devices' grants",
    )
    words = facts.line.partition(" -- ")[0].split()
    gone = [word for word in facts.here.split() if found and word.startswith(_OF_IOMMUS) and word not in words]
    yield Condition(
        "command-line-iommu",
        ERROR,
        not gone,
        "the next command line repeats what this one says of the IOMMU: without it devices are given to nobody",
        f"missing: {' '.join(gone)}" if gone else "",
        f'add it: --append "... {" ".join(gone)}"',
    )
    wanted = [each for each in found if each.wanted]
    yield Condition(
        "device-wanted",
        WARNING,
        not wanted,
        "no driver of the next kernel wants a device: one that takes it first sets it up anew, and its guest waits",
        "; ".join(f"{each.bdf}: {', '.join(each.wanted)}" for each in wanted),
        'give it to vfio-pci as it boots: --append "... vfio-pci.ids=VENDOR:DEVICE"',
    )
    beside = [each for each in found if each.beside]
    yield Condition(
        "device-beside",
        WARNING,
        not beside,
        "every device is alone in its IOMMU group: a driver that takes another of it in the next kernel is in the way",
        "; ".join(f"{each.bdf}: {', '.join(each.beside)}" for each in beside),
        "let no driver have those in the next kernel (vfio-pci.ids=, modprobe.d), or use a slot with ACS",
    )
    resets = [each.bdf for each in found if each.resets]
    yield Condition(
        "device-reset",
        WARNING,
        not resets,
        "every device keeps its registers: one that can be reset is, when it is opened again",
        ", ".join(resets),
        "its guest's driver must set it up anew, as after a reset",
    )


_ALWAYS: tuple[Judge, ...] = (_custody, _guests, _lazy, _devices)
_OF_A_JUMP: tuple[Judge, ...] = (_this_kernel, _left, _next_kernel, _command_line, _memory, _devices_beyond)
