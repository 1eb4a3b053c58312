"""Guests live through a real kexec, made as an operator makes it; faults before the jump leave every guest running."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import lab

JUMPS = 20 if os.environ.get("MEMCONSOLE_SOAK") else 2


def test_canaries_go_on_where_they_were_over_kexecs_in_a_row(tmp_path: Path) -> None:
    arguments = [str(JUMPS), "16,8"]
    said = lab.run("handoff", tmp_path, processors=2, packed=True, early=lab.RESUME, arguments=arguments)
    said.check()
    assert said.stages == JUMPS + 1
    assert said.of("freed")["ok"]


@pytest.mark.group("handoff-qemu")
def test_qemu_goes_along(tmp_path: Path) -> None:
    said = lab.run("handoff", tmp_path, early=lab.RESUME, arguments=["1", "8", "qemu"])
    said.check()
    assert said.stages == 2


WITHOUT = 'case "$(cat /proc/cmdline)" in *stage=4*) mv /dev/kvm /dev/kvm.away; OLD=$PATH; PATH=/nowhere;; esac'
"""The fourth kernel comes up without KVM, and without a QEMU that could be found."""


@pytest.mark.group("handoff-custody")
def test_what_cannot_be_rebuilt_is_kept_and_resumed_by_hand(tmp_path: Path) -> None:
    early = f"{WITHOUT}; {lab.RESUME}; PATH=${{OLD:-$PATH}}"
    said = lab.run("handoff_custody", tmp_path, early=early)
    said.check()
    assert said.stages == 4


@pytest.mark.group("handoff-mount")
def test_files_are_the_same_and_a_qemu_started_by_hand_keeps_its_memory(tmp_path: Path) -> None:
    said = lab.run("handoff_mount", tmp_path, early=lab.RESUME)
    said.check()
    assert said.stages == 2


@pytest.mark.group("handoff-services")
def test_databases_are_told_to_save_and_are_warm_in_the_next_kernel(tmp_path: Path) -> None:
    sizes = ["500000", "200000", str(128 << 20)] if os.environ.get("MEMCONSOLE_SOAK") else ["500", "500", str(40 << 20)]
    said = lab.run("handoff_services", tmp_path, memory="3G", early=lab.RESUME, arguments=sizes)
    said.check()
    assert said.stages == 2


@pytest.mark.group("handoff-faults")
def test_every_fault_before_the_jump_leaves_every_guest_running(tmp_path: Path) -> None:
    sample = "all" if os.environ.get("MEMCONSOLE_SOAK") else "3"
    said = lab.run("handoff_faults", tmp_path, arguments=[sample])
    said.check()


@pytest.mark.group("landing-faults")
def test_every_fault_behind_the_jump_ends_with_every_guest_going_on_once(tmp_path: Path) -> None:
    arguments = ["8", "qemu"] if os.environ.get("MEMCONSOLE_SOAK") else []
    said = lab.run("landing_faults", tmp_path, arguments=arguments)
    said.check()


@pytest.mark.group("handoff-refused")
@pytest.mark.parametrize(
    "name",
    [
        *("command-line-kho", "command-line-liveupdate", "command-line-memmap", "image-kho-abi", "image-luo-abi"),
        *("image-memfd-abi", "image-too-large", "image-unreadable", "image-without-initrd", "hugetlb", "memory-max"),
        *("sparse", "device-taken", "custody", "guest-silent", "guest-incapable", "kexec-disabled", "region-lost"),
    ],
)
def test_a_condition_is_provoked_and_refused_by_its_name(refused: lab.Verdicts, name: str) -> None:
    verdict = refused.of(f"refused-{name}")
    assert verdict["ok"], verdict


@pytest.mark.group("handoff-refused")
@pytest.mark.parametrize(
    "name",
    [
        *("image-abi-unknown", "image-of-another", "session-elsewhere", "fragmented", "base-pages"),
        *("scratch-migrates", "guest-ended", "guest-process", "guest-foreign"),
    ],
)
def test_a_condition_is_provoked_and_warned_of_by_its_name(refused: lab.Verdicts, name: str) -> None:
    verdict = refused.of(f"warned-{name}")
    assert verdict["ok"], verdict


@pytest.mark.group("handoff-refused")
@pytest.mark.parametrize("name", ["clean", "clean-again"])
def test_a_clean_host_is_not_refused(refused: lab.Verdicts, name: str) -> None:
    verdict = refused.of(name)
    assert verdict["ok"], verdict


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    directory: Path = tmp_path_factory.mktemp("refused")
    return lab.run("handoff_refused", directory, append="memmap=16M!1G")
