"""Every condition of a handoff: each way to lose memory refuses by its own name, and a host free of them does not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memconsole.backend.handoff import check, facts
from memconsole.backend.handoff.facts import Facts, Held, Met
from memconsole.backend.handoff.image import Image
from memconsole.backend.handoff.passed import Passed
from memconsole.model import (
    Guest,
    GuestKind,
    GuestState,
    Memory,
    Range,
    Region,
    RegionState,
    Segment,
    Severity,
    Survival,
)

M, G = 1 << 20, 1 << 30
LINE = "console=ttyS0 kho=on liveupdate=on memmap=512M!4G"
IMAGE = Image("/boot/vmlinuz", 12 * M, "7.3.4", "zstd", 2 * M, 24 * M, facts.ABIS)
SCRATCH = (Range(0, 16 * M, "s"), Range(64 * M, 320 * M, "s"))


def region(name: str, size: int = 64 * M, page: int = 4096, segment: int | None = None) -> Region:
    return Region(name, "memfd", size, page, RegionState.RESERVED, segments=(Segment(1, 1, segment or size),))


def guest(name: str, kind: GuestKind = GuestKind.CANARY, state: GuestState = GuestState.RUNNING, **more: Any) -> Met:
    return Met(Guest(name, kind, state, 7, 7), state, **more)


CLEAN = Facts(
    jump=True,
    survival=Survival(kho=True, luo=True, kho_cmdline=True, luo_cmdline=True, scratch=SCRATCH),
    memory=Memory(total=8 * G, free=4 * G, available=4 * G, shmem_thp="advise"),
    kernel="/boot/vmlinuz",
    image=IMAGE,
    initrd_size=20 * M,
    line=LINE,
    here=LINE,
    regions=(Held(region("web"), 64 * M, runs=32),),
    guests=(guest("web"), guest("vm", GuestKind.QEMU)),
    custody="keeper, pid 7",
    limit=("/system.slice", G),
)


def test_a_clean_host_is_never_refused_nor_warned() -> None:
    found = check.check(CLEAN)
    assert [each.id for each in found if not each.ok] == []
    assert check.refusals(found) == []
    assert len({each.id for each in found}) == len(found)


def with_image(**changes: Any) -> dict[str, Any]:
    values = {name: getattr(IMAGE, name) for name in Image.__struct_fields__} | changes
    return {"image": Image(**values)}


def held(**changes: Any) -> dict[str, Any]:
    return {"regions": (replace(CLEAN.regions[0], **changes),)}


def passed(**changes: Any) -> dict[str, Any]:
    return {"devices": (Passed("0000:00:04.0", "web", ("g1",), **changes),)}


ERRORS: dict[str, dict[str, Any]] = {
    "live-update": {"survival": Survival(kho=True)},
    "kexec-disabled": {"kexec_disabled": True},
    "device-taken": {"opener": 812},
    "session-kept": {"kept": ("incoming:memconsole:web",)},
    "image-unreadable": {"initrd_why": "/boot/initrd: No such file or directory"},
    "image-kho-abi": with_image(abis=("kho-v3", "luo-v5", "memfd-v2")),
    "image-luo-abi": with_image(abis=("kho-v4", "luo-v4", "memfd-v2")),
    "image-memfd-abi": with_image(abis=("kho-v4", "luo-v5")),
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
    "device-lost": passed(lost="nobody holds it"),
    "device-restless": passed(restless="it still waited for memory after 1.5 s"),
    "device-group": passed(active=("0000:00:05.0 (e1000)",)),
    "device-driver": {**passed(), "missing": ("vfio_pci",)},
    "command-line-iommu": {**passed(), "here": f"{LINE} intel_iommu=on"},
}
WARNINGS: dict[str, dict[str, Any]] = {
    "image-of-another": {"loaded": True},
    "session-elsewhere": {"sessions": ((812, "other:one"),)},
    "image-abi-unknown": with_image(abis=None, why="zstd is not installed"),
    "fragmented": held(runs=32768, loose=128 * M),
    "scratch-migrates": held(in_scratch=4 * M),
    "memory-lost": {"lost": ("old",)},
    "guest-ended": {"guests": (guest("web", state=GuestState.GONE),)},
    "guest-process": {"guests": (guest("db", GuestKind.PROCESS),)},
    "guest-foreign": {"strangers": (Guest("qemu-9", GuestKind.FOREIGN, GuestState.RUNNING, 9),)},
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
    found = check.check(replace(CLEAN, **ERRORS[id]))
    bad = [each for each in found if not each.ok]
    assert [each.id for each in bad] == [id]
    assert bad[0].severity is Severity.ERROR
    assert bad[0].evidence or bad[0].remedy
    (refusal,) = check.refusals(found)
    assert refusal.code == check.code(id)
    assert refusal.remedy


@pytest.mark.parametrize("id", WARNINGS)
def test_what_makes_it_slow_or_ends_a_guest_warns_and_does_not_refuse(id: str) -> None:
    found = check.check(replace(CLEAN, **WARNINGS[id]))
    bad = [each for each in found if not each.ok]
    assert [(each.id, each.severity) for each in bad] == [(id, Severity.WARNING)]
    assert bad[0].remedy
    assert check.refusals(found) == []


def test_every_condition_is_provoked() -> None:
    known = {each.id for each in check.check(CLEAN)} | {"image-abi-unknown"}
    assert known == {*ERRORS, *WARNINGS}


def test_a_device_that_nothing_speaks_against_is_not_refused() -> None:
    found = check.check(replace(CLEAN, **passed(unpreserved="PRESERVE_FD of its iommufd: ENOENT")))
    assert [each.id for each in found if not each.ok] == []


def test_a_next_kernel_that_does_not_say_what_it_has_warns() -> None:
    found = check.check(replace(CLEAN, **passed(), missing=None))
    bad = [each for each in found if not each.ok]
    assert [(each.id, each.severity) for each in bad] == [("device-driver", Severity.WARNING)]


def test_without_devices_the_command_line_may_leave_the_iommu_out() -> None:
    assert check.refusals(check.check(replace(CLEAN, here=f"{LINE} intel_iommu=on"))) == []


def test_a_rehearsal_asks_nothing_of_the_next_kernel() -> None:
    here = replace(CLEAN, jump=False, image=None, image_why="none", survival=Survival(), line="", kexec_disabled=True)
    assert check.refusals(check.check(here)) == []


def test_sessions_of_systemd_are_its_own() -> None:
    found = check.check(replace(CLEAN, sessions=((1, "systemd:fdstore"),)))
    assert all(each.ok for each in found)


def test_scratch_that_is_not_shown_does_not_refuse() -> None:
    found = check.check(replace(CLEAN, survival=Survival(kho=True, luo=True), initrd_size=G))
    assert check.refusals(found) == []


def test_fragmented_memory_is_estimated_as_it_was_measured() -> None:
    assert 13e9 < check.boot_estimate(32768) < 15e9
    assert check.boot_estimate(64) < 1e6


def test_an_image_is_unpacked_once_however_many_ask_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    under_way, go_on = threading.Event(), threading.Event()

    def inspect(path: str) -> Image:
        asked.append(path)
        under_way.set()
        assert go_on.wait(10)
        return IMAGE

    monkeypatch.setattr(facts.images, "inspect", inspect)
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(facts._inspected, str(kernel)) for _ in range(4)]
        assert under_way.wait(10)
        go_on.set()
        assert [each.result() for each in found] == [IMAGE] * 4
    assert asked == [str(kernel)]
