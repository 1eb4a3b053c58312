"""What a host boots when no kernel is named, as distributions call their files; and the initrd of a kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.trees import Tree

from memconsole.actions import HandoffRun
from memconsole.backend.handoff import bootfiles, facts
from memconsole.backend.handoff.bootfiles import BootFiles


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    found = Tree(tmp_path)
    found.host(command_line="kho=on")
    return found


def boot(made: Tree, *names: str) -> None:
    """Files below /boot, each newer than the one before it."""
    for at, name in enumerate(names):
        made.write(f"/boot/{name}", b"x")
        os.utime(made.root / "boot" / name, (1000 + at, 1000 + at))


@pytest.mark.parametrize(
    ("names", "kernel", "initrd"),
    [
        (["initrd.img-7.3.4", "vmlinuz-7.3.4"], "vmlinuz-7.3.4", "initrd.img-7.3.4"),
        (
            ["initramfs-7.3.4-200.fc44.x86_64.img", "vmlinuz-7.3.4-200.fc44.x86_64"],
            "vmlinuz-7.3.4-200.fc44.x86_64",
            "initramfs-7.3.4-200.fc44.x86_64.img",
        ),
        (["initrd-7.3.4-2-default", "vmlinuz-7.3.4-2-default"], "vmlinuz-7.3.4-2-default", "initrd-7.3.4-2-default"),
        (["initramfs-linux.img", "vmlinuz-linux"], "vmlinuz-linux", "initramfs-linux.img"),
        (["initramfs-lts", "vmlinuz-lts"], "vmlinuz-lts", "initramfs-lts"),
        (["initramfs-7.3.4-gentoo.img", "kernel-7.3.4-gentoo"], "kernel-7.3.4-gentoo", "initramfs-7.3.4-gentoo.img"),
        # the highest version, whenever it was installed
        (
            ["initrd.img-7.10.0", "vmlinuz-7.10.0", "initrd.img-7.9.9", "vmlinuz-7.9.9"],
            "vmlinuz-7.10.0",
            "initrd.img-7.10.0",
        ),
        (["vmlinuz-7.4.0", "initrd.img-7.4.0", "vmlinuz-7.4.0-rc7"], "vmlinuz-7.4.0", "initrd.img-7.4.0"),
        # names without a number say nothing of their age
        (["vmlinuz-linux-zen", "vmlinuz-linux", "initramfs-linux.img"], "vmlinuz-linux", "initramfs-linux.img"),
        # another kernel's initrd is none
        (["initrd.img-7.3.3", "vmlinuz-7.3.4"], "vmlinuz-7.3.4", ""),
        (["config-7.3.4", "System.map-7.3.4"], "", ""),
        ([], "", ""),
    ],
)
def test_the_default_by_the_names_of_distributions(made: Tree, names: list[str], kernel: str, initrd: str) -> None:
    boot(made, *names)
    path = "/boot/{}".format
    assert bootfiles.default(made.root) == BootFiles(path(kernel) if kernel else "", path(initrd) if initrd else "")


@pytest.mark.parametrize(
    "left",
    [
        "vmlinuz-7.3.9.dpkg-bak",
        "vmlinuz-7.3.9.dpkg-new",
        "vmlinuz-7.3.9.old",
        "vmlinuz-7.3.9.bak",
        "vmlinuz-7.3.9~",
        "vmlinuz-7.3.9.rpmsave",
        "vmlinuz-7.3.9.sig",
        "vmlinuz-7.3.9.sha512hmac",
        "vmlinuz-7.3.9-rescue",
        "vmlinuz-0-rescue-5a9f52a2dd124ed9a0d1b5e31ce27b5c",
    ],
)
def test_what_package_managers_leave_behind_is_never_booted(made: Tree, left: str) -> None:
    boot(made, "initrd.img-7.3.4", "vmlinuz-7.3.4", left, left.replace("vmlinuz-", "initrd.img-"))
    assert bootfiles.default(made.root) == BootFiles("/boot/vmlinuz-7.3.4", "/boot/initrd.img-7.3.4")


def test_a_link_to_the_default_is_followed(made: Tree) -> None:
    boot(made, "initrd-7.3.3-1-default", "vmlinuz-7.3.3-1-default", "initrd-7.3.4-1-default", "vmlinuz-7.3.4-1-default")
    made.link("/boot/vmlinuz", "vmlinuz-7.3.3-1-default")
    assert bootfiles.default(made.root) == BootFiles("/boot/vmlinuz-7.3.3-1-default", "/boot/initrd-7.3.3-1-default")
    (made.root / "boot/vmlinuz").unlink()
    made.link("/boot/vmlinuz", "vmlinuz-7.3.5-1-default")  # which was removed
    assert bootfiles.default(made.root).kernel == "/boot/vmlinuz-7.3.4-1-default"


def entry(made: Tree, id: str, release: str, more: str = "", top: str = "") -> None:
    text = f"title Linux\nversion {release}\nlinux   {top}/vmlinuz-{release}\n"
    text += f"initrd  {top}/initramfs-{release}.img $tuned\n"
    made.write(f"/boot/loader/entries/{id}.conf", f"{text}{more}options root=/dev/sda1\n")
    boot(made, f"vmlinuz-{release}", f"initramfs-{release}.img")


OLD, NEW = "5a9f-7.9.4-200.fc44.x86_64", "5a9f-7.10.1-100.fc44.x86_64"


@pytest.fixture
def entries(made: Tree) -> Tree:
    entry(made, NEW, "7.10.1-100.fc44.x86_64")
    entry(made, OLD, "7.9.4-200.fc44.x86_64", top="/boot")
    entry(made, "5a9f-0-rescue", "0-rescue-5a9f")
    made.write("/boot/loader/entries/5a9f-9.9.9.conf", "linux /vmlinuz-9.9.9\ninitrd /nothing\n")
    made.write("/boot/loader/entries/memtest.conf", "efi /memtest.efi\n")
    return made


@pytest.mark.parametrize(
    ("path", "said", "release"),
    [
        ("/nothing", "", "7.10.1-100"),
        ("/boot/grub2/grubenv", f"# GRUB Environment Block\nsaved_entry={OLD}\nkernelopts=x\n####", "7.9.4-200"),
        ("/boot/grub/grubenv", f"saved_entry={OLD}\n", "7.9.4-200"),
        ("/boot/grub2/grubenv", "saved_entry=1\n", "7.9.4-200"),
        ("/boot/grub2/grubenv", "saved_entry=0\n", "7.10.1-100"),
        ("/boot/grub2/grubenv", "saved_entry=gone\n", "7.10.1-100"),
        ("/boot/grub2/grubenv", "saved_entry=\n", "7.10.1-100"),
        ("/boot/loader/loader.conf", "timeout 3\ndefault 5a9f-7.9*\n", "7.9.4-200"),
        ("/boot/loader/loader.conf", f"default\t{OLD}.conf\n", "7.9.4-200"),
        ("/boot/loader/loader.conf", "default @saved\n", "7.10.1-100"),
    ],
)
def test_the_entry_that_the_boot_loader_takes(entries: Tree, path: str, said: str, release: str) -> None:
    entries.write(path, said)
    booted = bootfiles.default(entries.root)
    assert booted.kernel == f"/boot/vmlinuz-{release}.fc44.x86_64"
    assert booted.initrd == f"/boot/initramfs-{release}.fc44.x86_64.img"


def test_of_several_initrds_the_systems_is_the_last(made: Tree) -> None:
    boot(made, "intel-ucode.img", "initramfs-linux.img", "vmlinuz-linux")
    text = "linux /vmlinuz-linux\ninitrd /intel-ucode.img\ninitrd /initramfs-linux.img\n"
    made.write("/boot/loader/entries/arch.conf", text)
    assert bootfiles.default(made.root) == BootFiles("/boot/vmlinuz-linux", "/boot/initramfs-linux.img")
    made.write("/boot/loader/entries/arch.conf", "linux /vmlinuz-linux\n")
    assert bootfiles.default(made.root).initrd == "/boot/initramfs-linux.img"
    made.write("/boot/loader/entries/arch.conf", "linux /../etc/passwd\nlinux relative\n")
    made.write("/etc/passwd", "x")
    assert bootfiles.default(made.root).kernel == "/boot/vmlinuz-linux", "entries of nothing are none"


def test_an_initrd_that_is_not_named_is_the_kernels_own(made: Tree) -> None:
    boot(made, "initrd.img-7.3.4", "vmlinuz-7.3.4", "initrd.img-7.2.0", "vmlinuz-7.2.0", "other")
    top = str(made.root / "boot")

    def target(**named: str) -> tuple[str, str, bool]:
        found = facts.boot_target(replace(HandoffRun(), **named), made.root)
        return found.kernel.removeprefix(f"{top}/"), found.initrd.removeprefix(f"{top}/"), found.bare

    assert target() == ("vmlinuz-7.3.4", "initrd.img-7.3.4", False)
    assert target(kernel=f"{top}/vmlinuz-7.2.0") == ("vmlinuz-7.2.0", "initrd.img-7.2.0", False)
    assert target(kernel=f"{top}/other") == ("other", "", False)
    assert target(kernel=f"{top}/vmlinuz-7.2.0", initrd=f"{top}/other") == ("vmlinuz-7.2.0", "other", False)
    assert target(initrd=f"{top}/other") == ("vmlinuz-7.3.4", "other", False)
    assert target(initrd="none") == ("vmlinuz-7.3.4", "", True)
    assert target(kernel=f"{top}/vmlinuz-7.2.0", initrd="none") == ("vmlinuz-7.2.0", "", True)


def test_versions_are_in_the_order_of_their_numbers() -> None:
    order = ["6.9", "6.10-rc1", "6.10-rc10", "6.10", "6.10.1", "6.10.1-2", "6.10.1-10", "6.10.1-10.fc9", "7.0"]
    assert sorted(sorted(order), key=bootfiles.version) == order
