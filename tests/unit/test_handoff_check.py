"""Every condition of a handoff: each way to lose memory refuses by its own name, and a host free of them does not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.handoffs import IMAGE, into_next_kernel
from support.waiting import LONG_S

from memconsole.backend.custody.manager import UnitFdStore
from memconsole.backend.handoff import apart, check, doubts, facts
from memconsole.backend.handoff.device_facts import DeviceFacts
from memconsole.backend.handoff.facts import GuestFacts, HandoffFacts, RegionFacts
from memconsole.backend.handoff.hindrances import hindrances
from memconsole.backend.handoff.image import KernelImage
from memconsole.backend.managers.libvirt_setup import Part
from memconsole.backend.managers.sealed import Standing
from memconsole.model import (
    Finding,
    Guest,
    GuestKind,
    GuestState,
    Managed,
    ManagedRam,
    Memory,
    Range,
    Refusal,
    Region,
    RegionState,
    Segment,
    Service,
    Severity,
    Survival,
)

M, G = 1 << 20, 1 << 30
MEMMAP = "memmap=512M!4G"
LINE = f"console=ttyS0 kho=on liveupdate=on {MEMMAP}"
SCRATCH = (Range(0, 16 * M, "s"), Range(64 * M, 320 * M, "s"))


def region(name: str, size: int = 64 * M, page: int = 4096, segment: int | None = None) -> Region:
    return Region(name, "memfd", size, page, RegionState.RESERVED, segments=(Segment(1, 1, segment or size),))


def guest(
    name: str, kind: GuestKind = GuestKind.CANARY, state: GuestState = GuestState.RUNNING, **more: Any
) -> GuestFacts:
    return GuestFacts(Guest(name, kind, state, 7, 7), state, **more)


REDIS = Guest(
    "r", GuestKind.PROCESS, GuestState.RUNNING, 7, 7, command=("/usr/bin/redis-server *:6379",), service=Service()
)
CLEAN = into_next_kernel(
    HandoffFacts(
        jump=True,
        survival=Survival(kho=True, luo=True, kho_cmdline=True, luo_cmdline=True, scratch=SCRATCH),
        memory=Memory(total=8 * G, free=4 * G, available=4 * G, shmem_thp="advise"),
        regions=(RegionFacts(region("web"), 64 * M, runs=32),),
        guests=(guest("web"), guest("vm", GuestKind.QEMU)),
        custody="keeper, pid 7",
        limit=("/system.slice", G),
    ),
    LINE,
)


def test_a_clean_host_is_never_refused_nor_warned() -> None:
    found = check.check_conditions(CLEAN)
    assert [each.id for each in found if not each.ok] == []
    assert check.refusals(found) == []
    assert len({each.id for each in found}) == len(found)


def with_image(**changes: Any) -> dict[str, Any]:
    values = {name: getattr(IMAGE, name) for name in KernelImage.__struct_fields__} | changes
    return {"image": KernelImage(**values)}


def held(**changes: Any) -> dict[str, Any]:
    return {"regions": (replace(CLEAN.regions[0], **changes),)}


def passed(**changes: Any) -> dict[str, Any]:
    return {"devices": (DeviceFacts("0000:00:04.0", "web", ("g1",), **changes),)}


LACKING = Part("hook", "libvirt's hook", "/etc/x", Standing.MISSING, "there is none", "memconsole libvirt setup")
ERRORS: dict[str, dict[str, Any]] = {
    "live-update": {"survival": Survival(kho=True)},
    "kexec-disabled": {"kexec_disabled": True},
    "device-taken": {"opener": 812},
    "session-kept": {"kept": ("incoming:memconsole:web",)},
    "image-unreadable": {"initrd_why": "/boot/initrd: No such file or directory"},
    "image-kho-abi": with_image(abis=("kho-v3", "luo-v5", "memfd-v2")),
    "image-luo-abi": with_image(abis=("kho-v4", "luo-v4", "memfd-v2")),
    "image-memfd-abi": with_image(abis=("kho-v4", "luo-v5")),
    "image-without-initrd": {"initrd": ""},
    "image-too-large": {"initrd_size": 600 * M},
    "command-line-kho": {"line": "liveupdate=on memmap=512M!4G kho=on kho=off"},
    "command-line-liveupdate": {"line": "kho=on memmap=512M!4G -- liveupdate=on"},
    "command-line-memmap": {"line": "kho=on liveupdate=on memmap=512M!5G"},
    "hugetlb": held(region=region("web", page=2 * M)),
    "segment-too-large": held(region=region("web", segment=1 << 40)),
    "sparse": {**held(resident=8 * M), "memory": Memory(total=8 * G, free=M, available=32 * M)},
    "memory-max": {"limit": ("/system.slice/memconsole.service", 32 * M)},
    "custody": {"survives": False},
    "guest-silent": {"guests": (guest("web", why_not="no answer to query-status within 5 s"),)},
    "guest-incapable": {"guests": (guest("vm", GuestKind.QEMU, incapable="it is too old"),)},
    "device-lost": passed(lost="it is not in custody"),
    "device-restless": passed(restless="it still waited for memory after 1.5 s"),
    "device-group": passed(active=("0000:00:05.0 (e1000)",)),
    "device-driver": {**passed(), "missing": ("vfio_pci",)},
    "command-line-iommu": {**passed(), "here": f"{LINE} intel_iommu=on"},
}
_HELPED = Managed("libvirt", "web shop", "u", ram=ManagedRam("memfd", shared=True), helped=("TPM (swtpm)",))
ERRORS["guest-adopted"] = {
    "guests": (
        GuestFacts(
            Guest("web", GuestKind.FOREIGN, GuestState.RUNNING, 9, adopted=True), GuestState.RUNNING, kept=("a job",)
        ),
    )
}
ERRORS["guest-managed"] = {"strangers": (Guest("web", GuestKind.FOREIGN, GuestState.RUNNING, 9, managed=_HELPED),)}
ERRORS["region-named"] = {"named": ("web.pc.ram",)}
ERRORS["region-lost"] = {"lost": ("old",)}
ERRORS["guest-stranded"] = {"stranded": (("vm", "ram"),)}
BY_ARENA: dict[str, Any] = {"road": "arena:lab", "room": (10 * M, 64 * M), "arenas": (("lab", 4 * G),)}
ERRORS["memfd-regions"] = BY_ARENA
ERRORS["arena-room"] = {**BY_ARENA, "regions": (), "room": (10 * M, 8 * M)}
ERRORS |= {
    id: {"doubts": (Finding(id, Severity.ERROR, "old", "something is in doubt", "custody", "look into it"),)}
    for id in doubts.DOUBTS
}
WARNINGS: dict[str, dict[str, Any]] = {
    "fdstore-left": {"stores": (UnitFdStore("cache.service", 3),)},
    "image-of-another": {"loaded": True},
    "guest-clock-behind": {"guests": (guest("web"), guest("vm", GuestKind.QEMU, agentless=True))},
    "guest-base-pages": {"misplaced": (("vm", "vm"),)},
    "session-elsewhere": {"sessions": ((812, "other:one"),)},
    "image-abi-unknown": with_image(abis=None, why="zstd is not installed"),
    "fragmented": held(runs=32768, loose=128 * M),
    "scratch-migrates": held(in_scratch=4 * M),
    "guest-ended": {"guests": (guest("web", state=GuestState.GONE),)},
    "guest-process": {"guests": (guest("db", GuestKind.PROCESS),)},
    "guest-cold": {"guests": (GuestFacts(REDIS, GuestState.RUNNING),)},
    "guest-foreign": {"strangers": (Guest("qemu-9", GuestKind.FOREIGN, GuestState.RUNNING, 9),)},
    "libvirt-setup": {"libvirt": (LACKING,)},
    "device-hidden": passed(hidden="/sys/kernel/debug/iommu is not there"),
    "device-wanted": passed(wanted=("nvme",)),
    "device-beside": passed(beside=("0000:00:04.1",)),
    "device-reset": passed(resets=True),
    "lazy-granted": {"lazy": (("g2", "web"),)},
    "mapped-elsewhere": {"users": ((812, "web"),)},
}
WARNINGS["base-pages"] = {
    **held(loose=64 * M),
    "memory": Memory(total=8 * G, free=4 * G, available=4 * G, shmem_thp="never"),
}


@pytest.mark.parametrize("id", ERRORS)
def test_a_way_to_lose_memory_refuses_by_its_name_alone(id: str) -> None:
    found = check.check_conditions(replace(CLEAN, **ERRORS[id]))
    bad = [each for each in found if not each.ok]
    assert [each.id for each in bad] == [id]
    assert bad[0].severity is Severity.ERROR
    assert all((bad[0].requirement, bad[0].risk, bad[0].observed, bad[0].remedy))
    (refusal,) = check.refusals(found)
    assert refusal == Refusal(check.refusal_code(id), bad[0].observed, bad[0].risk, bad[0].remedy)


def test_a_stranded_vm_goes_to_an_arena_where_that_is_the_road() -> None:
    met = check.check_conditions(replace(CLEAN, **BY_ARENA, **ERRORS["guest-stranded"]))
    (bad,) = (each for each in met if each.id == "guest-stranded")
    assert "memconsole move ram --store dax" in bad.remedy


@pytest.mark.parametrize(
    ("id", "command"),
    [
        ("hugetlb", "memconsole move web --store dax"),
        ("guest-stranded", "memconsole move ram --store memfd"),
        ("live-update", "memconsole move REGION --store dax"),
    ],
)
def test_what_the_other_store_would_carry_is_moved_there_by_a_command(id: str, command: str) -> None:
    (bad,) = [each for each in check.check_conditions(replace(CLEAN, **ERRORS[id])) if not each.ok]
    assert command in bad.remedy


def test_a_guest_of_libvirt_that_is_to_go_along_is_refused_where_libvirt_would_not_give_it_its_ram() -> None:
    met = guest("vm", GuestKind.QEMU)
    managed = msgspec.structs.replace(met.guest, managed=Managed("libvirt", "vm", "uuid"))
    found = check.check_conditions(replace(CLEAN, guests=(replace(met, guest=managed),), libvirt=(LACKING,)))
    assert [each.code for each in check.refusals(found)] == ["LibvirtSetup"]


@pytest.mark.parametrize("id", WARNINGS)
def test_what_makes_it_slow_or_ends_a_guest_warns_and_does_not_refuse(id: str) -> None:
    found = check.check_conditions(replace(CLEAN, **WARNINGS[id]))
    bad = [each for each in found if not each.ok]
    assert [(each.id, each.severity) for each in bad] == [(id, Severity.WARNING)]
    assert all((bad[0].requirement, bad[0].risk, bad[0].observed, bad[0].remedy))
    assert check.refusals(found) == []


def test_a_domain_is_refused_with_all_that_speaks_against_carrying_it() -> None:
    managed = Managed(
        "libvirt",
        "web shop",
        "u",
        host_devices=("0000:41:00.0",),
        helped=("virtiofs share", "TPM (swtpm)"),
        job="migration out",
        block_jobs=("copy of vda",),
    )
    assert hindrances(managed) == [
        "private RAM",
        "host devices 0000:41:00.0",
        "virtiofs share",
        "TPM (swtpm)",
        "migration out under way",
        "copy of vda under way",
    ]
    assert hindrances(replace_ram(managed, huge_pages=True))[0] == "hugetlb RAM"
    stranger = Guest("web", GuestKind.FOREIGN, GuestState.RUNNING, 9, managed=_HELPED)
    (found,) = [each for each in check.check_conditions(replace(CLEAN, strangers=(stranger,))) if not each.ok]
    assert found.observed == "guests of libvirt are not adopted: web (TPM (swtpm))"
    assert found.remedy.endswith("virsh managedsave 'web shop'")


def replace_ram(managed: Managed, **changes: Any) -> Managed:
    return msgspec.structs.replace(managed, ram=msgspec.structs.replace(managed.ram, **changes))


def test_an_adopted_guest_that_ended_refuses_nothing() -> None:
    ended = GuestFacts(Guest("web", GuestKind.FOREIGN, GuestState.GONE, 9, adopted=True), GuestState.GONE)
    assert check.refusals(check.check_conditions(replace(CLEAN, guests=(ended,)))) == []


def test_the_observation_says_what_is_missing_in_numbers() -> None:
    found = check.check_conditions(replace(CLEAN, **ERRORS["sparse"]))
    (sparse,) = [each for each in found if each.id == "sparse"]
    assert sparse.observed == "not enough memory to fill sparse regions (56M of holes, 32M available)"
    assert sparse.remedy == "free 24M of memory"
    (sparse,) = [each for each in check.check_conditions(CLEAN) if each.id == "sparse"]
    assert sparse.observed == "enough memory to fill sparse regions (0 of holes, 4G available)"


def test_a_rehearsal_shows_what_is_in_doubt_and_refuses_only_where_it_drops_something() -> None:
    doubted = {id: each["doubts"] for id, each in ERRORS.items() if "doubts" in each}
    for id, found in doubted.items():
        refused = check.refusals(check.check_conditions(replace(CLEAN, jump=False, doubts=found)))
        assert [each.code for each in refused] == (["HandoffGuestHeld"] if id == "handoff-guest-held" else [])
    shown = check.check_conditions(replace(CLEAN, jump=False, lost=("old",)))
    assert [(each.id, each.severity) for each in shown if not each.ok] == [("region-lost", Severity.WARNING)]


def test_fd_stores_that_systemctl_does_not_tell_of_are_unknown_and_not_fine() -> None:
    (found,) = [each for each in check.check_conditions(replace(CLEAN, stores_why="it timed out")) if not each.ok]
    assert (found.id, found.observed) == ("fdstore-left", "it timed out")


def test_every_condition_is_provoked() -> None:
    known = {each.id for seen in (CLEAN, replace(CLEAN, **BY_ARENA)) for each in check.check_conditions(seen)}
    known |= {"image-abi-unknown"}
    assert known == {*ERRORS, *WARNINGS}


def test_a_device_that_nothing_speaks_against_is_not_refused() -> None:
    found = check.check_conditions(replace(CLEAN, **passed(unpreserved="PRESERVE_FD of its iommufd: ENOENT")))
    assert [each.id for each in found if not each.ok] == []


def test_a_next_kernel_that_does_not_say_what_it_has_warns() -> None:
    found = check.check_conditions(replace(CLEAN, **passed(), missing=None))
    bad = [each for each in found if not each.ok]
    assert [(each.id, each.severity) for each in bad] == [("device-driver", Severity.WARNING)]


@pytest.mark.parametrize(
    "line",
    [
        'dyndbg="file drivers/vfio/* +p" kho=on liveupdate=on memmap=512M!4G',
        '"kho=on" liveupdate="on" "memmap=512M!4G"',
        "kho=ON liveupdate=Yes memmap=512M!4G -- kho=off",
    ],
)
def test_the_next_command_line_is_read_as_the_kernel_reads_it(line: str) -> None:
    assert check.refusals(check.check_conditions(replace(CLEAN, line=line))) == []


def test_words_within_quotes_are_part_of_another() -> None:
    line = 'systemd.setenv="NOTE=was kho=on liveupdate=on memmap=512M!4G intel_iommu=on before"'
    found = check.check_conditions(replace(CLEAN, **passed(), line=line, here=f"{LINE} intel_iommu=on"))
    names = {"command-line-kho", "command-line-liveupdate", "command-line-memmap", "command-line-iommu"}
    assert {each.id for each in found if not each.ok} == names


@pytest.mark.parametrize(
    "abis",
    [
        ("kho-v4", "luo-v5;block-v1", "memfd-v2"),
        ("kho-v4", "luo-v3-block-v1", "memfd-v2"),
        ("kho-v4", "luo-v5+flags", "memfd_luo_v3"),
        ("kho-v4", "luo-v5", "guest_memfd_luo_v1"),
    ],
)
def test_words_that_are_not_understood_are_unknown_and_refuse_nothing(abis: tuple[str, ...]) -> None:
    found = check.check_conditions(replace(CLEAN, **with_image(abis=abis)))
    bad = [each for each in found if not each.ok]
    assert [(each.id, each.severity) for each in bad] == [("image-abi-unknown", Severity.WARNING)]
    assert any(word in bad[0].observed for word in abis[1:])


def test_a_kernel_of_which_it_was_said_that_it_needs_no_initrd_is_not_refused() -> None:
    assert check.refusals(check.check_conditions(replace(CLEAN, initrd="", bare=True))) == []


def test_one_of_several_versions_is_enough() -> None:
    offered = with_image(abis=("kho-v3", "kho-v4", "luo-v4", "luo-v5", "luo-v6;b-v1", "memfd-v1", "memfd-v2"))
    assert [each.id for each in check.check_conditions(replace(CLEAN, **offered)) if not each.ok] == []
    ours = ("kho-v4", "luo-v7;x-v1", "luo-v5", "memfd-v2")
    assert [each.id for each in check.check_conditions(replace(CLEAN, abis=ours)) if not each.ok] == []


def test_without_devices_the_command_line_may_leave_the_iommu_out() -> None:
    assert check.refusals(check.check_conditions(replace(CLEAN, here=f"{LINE} intel_iommu=on"))) == []


def test_a_rehearsal_asks_nothing_of_the_next_kernel() -> None:
    here = replace(CLEAN, jump=False, image=None, image_why="none", survival=Survival(), line="", kexec_disabled=True)
    assert check.refusals(check.check_conditions(here)) == []


def test_sessions_of_systemd_are_its_own() -> None:
    found = check.check_conditions(replace(CLEAN, sessions=((1, "systemd:fdstore"),)))
    assert all(each.ok for each in found)


def test_scratch_that_is_not_shown_does_not_refuse() -> None:
    found = check.check_conditions(replace(CLEAN, survival=Survival(kho=True, luo=True), initrd_size=G))
    assert check.refusals(found) == []


def test_a_limit_that_is_not_known_warns() -> None:
    found = check.check_conditions(replace(CLEAN, limit=None, limit_why="there is no /sys/fs/cgroup/gone"))
    bad = [each for each in found if not each.ok]
    assert [(each.id, each.severity) for each in bad] == [("memory-max", Severity.WARNING)]
    assert "gone" in bad[0].observed


def test_fragmented_memory_is_estimated_as_it_was_measured() -> None:
    assert 13e9 < check.boot_estimate(32768) < 15e9
    assert check.boot_estimate(64) < 1e6


def test_an_image_is_unpacked_once_however_many_ask_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    under_way, go_on = threading.Event(), threading.Event()

    def inspect(path: str, _fd: int) -> KernelImage:
        asked.append(path)
        under_way.set()
        assert go_on.wait(LONG_S)
        return IMAGE

    monkeypatch.setattr(apart, "inspect", inspect)
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(facts._inspected, str(kernel)) for _ in range(4)]
        assert under_way.wait(LONG_S)
        go_on.set()
        assert [each.result() for each in found] == [msgspec.structs.replace(IMAGE, path=str(kernel))] * 4
    assert asked == [str(kernel)]


def test_an_arena_carries_guests_where_there_is_no_live_update_and_says_what_it_cannot() -> None:
    bare = replace(CLEAN, survival=Survival(), line=f"quiet {MEMMAP}", here=f"quiet {MEMMAP}", opener=9, **BY_ARENA)
    assert check.refusals(check.check_conditions(replace(bare, regions=()))) == []
    (refusal,) = check.refusals(check.check_conditions(bare))
    assert (refusal.code, "memconsole move web --store dax" in refusal.remedy) == ("MemfdRegions", True)
    assert refusal.what == "this kernel has no live update; on memfds: web"
    (refusal,) = check.refusals(check.check_conditions(replace(bare, survival=CLEAN.survival)))
    assert refusal.what == "the next command line leaves live update off; on memfds: web"


@pytest.mark.parametrize(
    ("line", "lacks"),
    [
        ("memmap=512M!4G", ""),
        ("memmap=0x20000000!4096M", ""),
        ("memmap=1M$8G,524288K!0x100000000", ""),
        ("memmap=512M!5G", "the command line lacks memmap=512M!4G (arena lab)"),
        ("memmap=256M!4G", "the command line lacks memmap=512M!4G (arena lab)"),
        ("memmap=512M$4G", "the command line lacks memmap=512M!4G (arena lab)"),
        ("-- memmap=512M!4G", "the command line lacks memmap=512M!4G (arena lab)"),
    ],
)
def test_the_words_of_an_arena_count_by_what_the_kernel_makes_of_them(line: str, lacks: str) -> None:
    seen = replace(CLEAN, regions=(), line=line, here=f"quiet {MEMMAP}", **BY_ARENA)
    assert [each.what for each in check.refusals(check.check_conditions(seen))] == ([lacks] if lacks else [])
