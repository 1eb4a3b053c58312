"""The doctor on trees of hosts that are not here: what is there, what is missing, why, and the remedy."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from support.trees import Tree

from memconsole.backend.diagnose.doctor import CHECKS, doctor
from memconsole.backend.managers import libvirt_setup
from memconsole.model import Capability

LIVE = {"root", "native", "pfns", "pagemap-scan", "kvm", "qemu", "userfaultfd"}


def examine(made: Tree) -> dict[str, Capability]:
    return {capability.id: capability for capability in doctor(made.root)}


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    found = Tree(tmp_path)
    found.host()
    return found


def config(made: Tree, text: str) -> None:
    made.write("/proc/config.gz", gzip.compress(text.encode()))


def test_a_recorded_tree_is_asked_only_what_files_can_answer(made: Tree) -> None:
    assert set(examine(made)) == {check.id for check in CHECKS} - LIVE - {"libvirt"}


def test_a_host_with_domains_of_libvirt_is_told_what_libvirt_lacks(made: Tree) -> None:
    made.write("/run/libvirt/qemu/web.xml", "<domstatus/>")
    made.write("/usr/sbin/libvirtd", "")
    found = examine(made)["libvirt"]
    assert (found.level, found.remedy) == ("no", "memconsole libvirt setup")
    assert "hook: missing" in found.why
    libvirt_setup.apply(libvirt_setup.setup(made.root), made.root)
    assert examine(made)["libvirt"].level == "yes"


def test_a_live_update_host_lacks_nothing(made: Tree) -> None:
    config(made, "CONFIG_FUSE_PASSTHROUGH=y\nCONFIG_KEXEC_FILE=y\n")
    made.meminfo(shmem_thp="always")
    made.pool(2 << 20, 8, 8)
    made.dax("dax0.0", size=1 << 30, align=2 << 20, node=0, start=1 << 32)
    made.kho(scratch=[(0x1000000, 16 << 20)])
    made.iommu("dmar0", ["0000:00:04.0"], "intel-iommu", {"cap": "1"})
    made.group(1, "DMA")
    for path in ("/dev/fuse", "/dev/liveupdate", "/dev/iommu", "/dev/vfio/vfio", "/proc/kcore", "/run/systemd/system"):
        made.write(path, b"")
    made.write("/proc/sys/kernel/kexec_load_disabled", "0\n")
    found = examine(made)
    assert {capability.level for capability in found.values()} == {"yes"}
    assert found["kho"].why == "scratch 16M"
    assert found["dax"].why == "dax0.0 1G"


def test_a_bare_host_says_why_and_what_to_do(made: Tree) -> None:
    made.host(kernel="6.1.0-13-amd64")
    config(made, "CONFIG_FUSE_FS=y\n")
    made.meminfo(shmem_thp="never")
    made.pool(2 << 20, 0, 0)
    made.write("/dev/fuse", b"")
    found = examine(made)
    assert {capability.level for capability in found.values()} == {"no"}
    assert all(capability.why and capability.remedy for capability in found.values() if capability.id != "dax")
    assert found["fuse-passthrough"].remedy == "use Linux 6.9 or later"
    assert "CONFIG_KEXEC_HANDOVER" in found["kho"].why
    assert "CONFIG_LIVEUPDATE" in found["luo"].why
    assert "shmem_enabled" in found["shmem-thp"].remedy


def test_a_kernel_that_hides_its_configuration_is_not_called_unable(made: Tree) -> None:
    made.write("/dev/fuse", b"")
    found = examine(made)
    assert found["fuse-passthrough"].level == "partly"
    assert found["kexec"].level == "partly"
    assert found["kho"].remedy == "boot with kho=on"


def test_a_disabled_kexec_and_an_unmounted_debugfs(made: Tree) -> None:
    made.host(command_line="kho=on")
    made.write("/proc/sys/kernel/kexec_load_disabled", "1\n")
    found = examine(made)
    assert (found["kexec"].level, found["kexec"].why) == ("no", "kernel.kexec_load_disabled is 1")
    assert (found["kho"].level, found["kho"].remedy) == ("partly", "mount -t debugfs none /sys/kernel/debug")


@pytest.mark.parametrize(
    ("words", "level", "physical"),
    [
        ("none [integrity] confidentiality", "integrity", ("yes", "/proc/kcore")),
        ("none integrity [confidentiality]", "confidentiality", ("no", "lockdown (confidentiality)")),
    ],
)
def test_what_a_locked_down_kernel_forbids_is_said_by_that_name(
    made: Tree, words: str, level: str, physical: tuple[str, str]
) -> None:
    config(made, "CONFIG_KEXEC_FILE=y\n")
    for path in ("/proc/kcore", "/dev/mem", "/sys/kernel/debug/kho/out/fdt"):
        made.write(path, b"")
    made.write("/sys/kernel/security/lockdown", f"{words}\n")
    found = examine(made)
    assert (found["kexec"].level, found["debugfs"].level) == ("partly", "partly")
    assert f"lockdown ({level})" in found["kexec"].why
    assert "sign" in found["kexec"].remedy
    assert "Secure Boot" in found["debugfs"].remedy
    assert found["physical"].level == physical[0]
    assert found["physical"].why.startswith(physical[1])


@pytest.mark.parametrize("words", ["[none] integrity confidentiality\n", "", "what\n"])
def test_a_kernel_that_is_not_locked_down_forbids_nothing(made: Tree, words: str) -> None:
    config(made, "CONFIG_KEXEC_FILE=y\n")
    made.write("/proc/kcore", b"")
    made.write("/sys/kernel/debug/kho/out/fdt", b"")
    made.write("/sys/kernel/security/lockdown", words)
    found = examine(made)
    assert {found[id].level for id in ("kexec", "debugfs", "physical")} == {"yes"}


def test_a_source_that_cannot_be_read_is_a_verdict(made: Tree) -> None:
    made.pool(2 << 20, 8, 8)
    made.write("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "many\n")
    found = examine(made)["hugetlb"]
    assert found.level == "no"
    assert "free_hugepages" in found.why


def test_used_up_huge_pages_are_partly_there(made: Tree) -> None:
    made.pool(2 << 20, 8, 0)
    assert examine(made)["hugetlb"].level == "partly"
