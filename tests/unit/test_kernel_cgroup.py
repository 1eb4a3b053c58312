"""The memory limit over this process, on either hierarchy; one that is not found where it should be is not none."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trees import GIB, Tree

from memconsole.backend.kernel import cgroup
from memconsole.backend.kernel.cgroup import Limit, memory_limit
from memconsole.errors import BadFile, NotFound

V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"


@pytest.fixture
def made(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def mounted(made: Tree, *rows: tuple[str, str, str, str]) -> None:
    """Rows are (root, path, filesystem, its options)."""
    lines = (
        f"{30 + n} 1 0:{n} {top} {path} rw - {kind} none {options}\n"
        for n, (top, path, kind, options) in enumerate(rows)
    )
    made.write("/proc/self/mountinfo", "".join(lines))


@pytest.mark.parametrize("unit", ["hv.service", "hv@fd00::1.service", "a:b.scope"])
def test_a_limit_of_a_unit_whatever_it_is_called(made: Tree, unit: str) -> None:
    made.write("/proc/self/cgroup", f"0::/system.slice/{unit}\n")
    made.write(f"{V2}/system.slice/{unit}/memory.max", f"{GIB}\n")
    assert memory_limit(made.root) == Limit(f"/system.slice/{unit}", GIB)


def test_the_tightest_of_all_above_counts(made: Tree) -> None:
    made.write("/proc/self/cgroup", "0::/a/b/c\n")
    made.write(f"{V2}/a/memory.max", f"{2 * GIB}\n")
    made.write(f"{V2}/a/b/memory.max", "max\n")
    made.directory(f"{V2}/a/b/c")  # the controller is not on in it
    assert memory_limit(made.root) == Limit("/a", 2 * GIB)
    made.write(f"{V2}/memory.max", f"{GIB}\n")  # the first cgroup that a container sees
    assert memory_limit(made.root) == Limit("/", GIB)


def test_version_1_has_the_memory_where_it_has_the_controller(made: Tree) -> None:
    made.write("/proc/self/cgroup", "4:cpu,memory:/vmm/hv\n3:cpuset:/\n1:name=systemd:/vmm\n0::/elsewhere\n")
    made.write(f"{V1}/vmm/hv/memory.limit_in_bytes", f"{(1 << 63) - 4096}\n")
    made.write(f"{V1}/vmm/memory.limit_in_bytes", f"{GIB}\n")
    assert memory_limit(made.root) == Limit("/vmm", GIB)


def test_it_is_looked_for_where_its_hierarchy_is_mounted(made: Tree) -> None:
    made.write("/proc/self/cgroup", "4:memory:/docker/x/hv\n0::/\n")
    mounted(
        made,
        ("/", "/sys/fs/cgroup/unified", "cgroup2", "rw"),
        ("/", "/cg/cpu", "cgroup", "rw,cpu"),
        ("/docker/x", "/cg/memory", "cgroup", "rw,memory"),
    )
    made.write("/cg/memory/hv/memory.limit_in_bytes", f"{GIB}\n")
    assert memory_limit(made.root) == Limit("/hv", GIB)


def test_no_limit_is_none_where_all_was_seen(made: Tree) -> None:
    assert memory_limit(made.root) is None, "a kernel without cgroups"
    made.write("/proc/self/cgroup", "1:name=systemd:/a\n")
    assert memory_limit(made.root) is None, "no hierarchy counts memory"
    made.write("/proc/self/cgroup", "0::/a\n")
    made.write(f"{V2}/a/memory.max", "max\n")
    assert memory_limit(made.root) is None


@pytest.mark.parametrize("said", ["0::/gone\n", "0::/../outside\n", "4:memory:/gone\n0::/\n"])
def test_cgroups_that_are_not_where_they_are_said_to_be_are_not_without_a_limit(made: Tree, said: str) -> None:
    made.directory(V2)
    made.write("/proc/self/cgroup", said)
    with pytest.raises(NotFound):
        memory_limit(made.root)
    mounted(made, ("/", "/", "ext4", "rw"))
    with pytest.raises(NotFound, match="not mounted"):
        memory_limit(made.root)


@pytest.mark.parametrize(("said", "limit"), [("0::/a\n", "lots"), ("nonsense\n", "1"), ("0::a\n", "1")])
def test_what_is_not_as_the_kernel_writes_it_is_named(made: Tree, said: str, limit: str) -> None:
    made.write("/proc/self/cgroup", said)
    made.write(f"{V2}/a/memory.max", f"{limit}\n")
    with pytest.raises(BadFile, match="cgroup"):
        cgroup.memory_limit(made.root)
