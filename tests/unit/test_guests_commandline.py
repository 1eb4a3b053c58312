"""QEMU's command line: what is given, what the operator said already, what one of an earlier memconsole lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from memconsole.backend.guests import commandline


@pytest.fixture(autouse=True)
def _probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commandline, "accelerator", lambda: "probed")


def started(*args: str) -> list[str]:
    return commandline.started("vm", 64 << 20, Path("/x/qmp"), args)


@pytest.mark.parametrize(
    "words",
    [
        ("-accel", "kvm"),
        ("--accel", "kvm,kernel-irqchip=off"),
        ("-machine", "pc,accel=kvm:tcg"),
        ("--machine", "accel=tcg"),
        ("-M", "q35,accel=kvm"),
        ("-enable-kvm",),
        ("--enable-kvm", "-s"),
    ],
)
def test_the_operator_decides_by_what_the_guest_is_run(words: tuple[str, ...]) -> None:
    assert "probed" not in started(*words)
    assert started(*words)[-len(words) :] == list(words)


@pytest.mark.parametrize(
    "words", [(), ("-machine", "pc"), ("-M", "q35,memory-backend=ram"), ("-name", "accel=x"), ("-s", "accel")]
)
def test_who_says_nothing_of_it_gets_what_the_probe_found(words: tuple[str, ...]) -> None:
    assert started(*words)[started(*words).index("-accel") + 1] == "probed"


def test_a_guest_is_started_again_with_the_accelerator_it_was_saved_with(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = commandline.with_accelerator(("-s",))
    monkeypatch.setattr(commandline, "accelerator", lambda: "another")
    again = started(*kept)
    assert again.count("-accel") == 1
    assert again[again.index("-accel") + 1] == "probed"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("none /dev/kvm: No such file or directory\n", "tcg"),
        ("kvm 90000000 100000000\n", "kvm"),
        ("kvm 5000000 100000000\n", "kvm"),
        ("kvm 200000 1000000\n", "kvm"),
        ("kvm 26000 93000000\n", "tcg"),
        ("kvm 0 0\n", "kvm"),
    ],
)
def test_kvm_is_held_to_the_processor_it_runs_on(said: str, found: str) -> None:
    """Not to a figure of its own: a slow processor, or one whose exits are slow, has a KVM that works all the same."""
    assert commandline.judged(said) == found


def test_ram_is_mapped_where_huge_pages_can_be() -> None:
    (backend,) = [word for word in started() if word.startswith("memory-backend-file,")]
    assert backend.endswith(",share=on,align=2M")


def test_one_that_was_started_before_gets_it_when_it_is_started_again() -> None:
    now = started("-s")
    before = [word.removesuffix(",align=2M") for word in now]
    assert commandline.waiting(before) == [*now, "-incoming", "defer"]
    assert commandline.waiting(commandline.waiting(before)) == [*now, "-incoming", "defer"]
    theirs = [*before, "-object", "memory-backend-file,id=mine,size=64M,mem-path=/x,share=on"]
    assert commandline.waiting(theirs)[-3] == theirs[-1]


def test_the_ram_of_one_that_is_started_again_is_where_its_region_is_now() -> None:
    there = commandline.started("vm", 64 << 20, Path("/run/qmp"), ["-device", "x,offset=5"], offset=2 << 20)
    (backend,) = [word for word in there if word.startswith("memory-backend-file,")]
    assert backend.endswith(",align=2M,offset=2097152")
    moved = commandline.placed(there, 0)
    assert moved == [word.replace(",offset=2097152", "") for word in there]
    assert commandline.placed(moved, 2 << 20) == commandline.placed(there, 2 << 20) == there


def test_properties_in_both_forms_and_with_commas() -> None:
    assert commandline.properties("virtserialport,chardev=a,name=b,,c") == {
        "": "virtserialport",
        "chardev": "a",
        "name": "b,c",
    }
    assert commandline.properties('{"driver": "vmclock", "id": "c"}') == {"": "vmclock", "driver": "vmclock", "id": "c"}
    assert commandline.properties('{"driver": ') == {}
    assert commandline.properties("{" * 100_000) == {}


def test_a_device_passed_through_is_seen_in_its_command_line() -> None:
    assert commandline.given_a_device(["qemu", "--device", '{"driver": "vfio-pci", "host": "0000:00:04.0"}'])
    assert not commandline.given_a_device(["qemu", "-name", "vfio-pci", "-device", "virtio-net"])
