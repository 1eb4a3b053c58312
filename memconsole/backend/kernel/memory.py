"""The host's memory: /proc/meminfo, NUMA nodes, hugetlb pools, the THP setting of shmem.

/proc/meminfo                                   Name: N kB
/sys/devices/system/node/nodeN/meminfo          Node N Name: N kB
/sys/kernel/mm/hugepages/hugepages-NkB/*        one number a file, in pages
/sys/kernel/mm/transparent_hugepage/shmem_enabled   always within_size [advise] never deny force
"""

from __future__ import annotations

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound
from memconsole.model import HugePool, Memory, Node

_NODES = "/sys/devices/system/node"
_POOLS = "/sys/kernel/mm/hugepages"
_SHMEM_THP = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


def memory(root: Root = "/") -> Memory:
    """All of the host's memory, in bytes; a kernel without NUMA has no nodes, one without hugetlb no pools.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: a source cannot be read.
    """
    rows = meminfo(root)
    try:
        return Memory(
            total=rows["MemTotal"],
            free=rows["MemFree"],
            available=rows["MemAvailable"],
            shmem=rows.get("Shmem", 0),
            huge_shmem=rows.get("ShmemHugePages", 0),
            swap_total=rows.get("SwapTotal", 0),
            swap_free=rows.get("SwapFree", 0),
            shmem_thp=shmem_thp(root),
            nodes=nodes(root),
            pools=pools(root),
        )
    except KeyError as error:
        raise tree.malformed("/proc/meminfo", f"no {error.args[0]}") from error


def meminfo(root: Root = "/") -> dict[str, int]:
    """The rows of /proc/meminfo by name, kB as bytes, plain numbers (HugePages_Total) as they are.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: it cannot be read.
    """
    return _rows("/proc/meminfo", tree.read(root, "/proc/meminfo"), skip=0)


def nodes(root: Root = "/") -> tuple[Node, ...]:
    """The NUMA nodes in order, sizes in bytes; empty where the kernel knows none.

    Raises:
        Denied, KernelRefused, BadFile: a node cannot be read.
    """
    try:
        found = tree.names(root, _NODES)
    except NotFound:
        return ()
    numbers = sorted(int(name[4:]) for name in found if name.startswith("node") and name[4:].isdecimal())
    return tuple(_node(root, number) for number in numbers)


def pools(root: Root = "/") -> tuple[HugePool, ...]:
    """The hugetlb pools by page size in bytes; their counts in pages; empty without hugetlb.

    Raises:
        Denied, KernelRefused, BadFile: a pool cannot be read.
    """
    try:
        found = tree.names(root, _POOLS)
    except NotFound:
        return ()
    sizes = sorted(int(name[10:-2]) for name in found if name.startswith("hugepages-") and name[10:-2].isdecimal())
    return tuple(_pool(root, kib) for kib in sizes)


def shmem_thp(root: Root = "/") -> str:
    """The word in brackets of shmem_enabled (``never``, ``advise``...); empty without transparent huge pages.

    Raises:
        Denied, KernelRefused, BadFile: it cannot be read.
    """
    try:
        words = tree.line(root, _SHMEM_THP)
    except NotFound:
        return ""
    _, opened, rest = words.partition("[")
    chosen, closed, _ = rest.partition("]")
    if not (opened and closed):
        raise tree.malformed(_SHMEM_THP, words)
    return chosen


def _node(root: Root, number: int) -> Node:
    base = f"{_NODES}/node{number}"
    rows = _rows(f"{base}/meminfo", tree.read(root, f"{base}/meminfo"), skip=2)
    try:
        return Node(number, rows["MemTotal"], rows["MemFree"], tree.line(root, f"{base}/cpulist"))
    except KeyError as error:
        raise tree.malformed(f"{base}/meminfo", f"no {error.args[0]}") from error


def _pool(root: Root, kib: int) -> HugePool:
    base = f"{_POOLS}/hugepages-{kib}kB"
    total, free, reserved, surplus = (
        tree.number(root, f"{base}/{name}_hugepages", 10) for name in ("nr", "free", "resv", "surplus")
    )
    return HugePool(kib << 10, total, free, reserved, surplus)


def _rows(source: str, raw: bytes, *, skip: int) -> dict[str, int]:
    """``[skip words] Name: N [kB]`` rows as bytes."""
    rows: dict[str, int] = {}
    for row in tree.text(raw).splitlines():
        words = row.split()[skip:]
        if not words:
            continue
        try:
            rows[words[0].removesuffix(":")] = int(words[1]) << (10 if words[2:] == ["kB"] else 0)
        except (IndexError, ValueError) as error:
            raise tree.malformed(source, row) from error
    return rows
