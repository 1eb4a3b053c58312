"""The host's memory: /proc/meminfo, NUMA nodes, hugetlb pools, the THP setting of shmem.

/proc/meminfo                                   Name: N kB
/sys/devices/system/node/nodeN/meminfo          Node N Name: N kB
/sys/devices/system/node/nodeN/memoryM          a link: memory block M is the node's
/sys/devices/system/memory/block_size_bytes     hexadecimal
/sys/kernel/mm/hugepages/hugepages-NkB/*        one number a file, in pages
/sys/kernel/mm/transparent_hugepage/shmem_enabled   always within_size [advise] never deny force
"""

from __future__ import annotations

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound
from memconsole.model import HugePool, Memory, Node, Range, Unread

_NODES = "/sys/devices/system/node"
_BLOCK = "/sys/devices/system/memory/block_size_bytes"
_POOLS = "/sys/kernel/mm/hugepages"
_SHMEM_THP = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


def memory(root: Root = "/", gaps: list[Unread] | None = None) -> Memory:
    """All of the host's memory, in bytes; a kernel without NUMA has no nodes, one without hugetlb no pools.

    A node or pool that cannot be read is named in ``gaps``; without them it is raised.

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
            nodes=nodes(root, gaps),
            pools=pools(root, gaps),
        )
    except KeyError as error:
        raise tree.malformed("/proc/meminfo", f"no {error.args[0]}") from error


def meminfo(root: Root = "/") -> dict[str, int]:
    """The rows of /proc/meminfo by name, kB as bytes, plain numbers (HugePages_Total) as they are.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: it cannot be read.
    """
    return _rows("/proc/meminfo", tree.read(root, "/proc/meminfo"), skip=0)


def nodes(root: Root = "/", gaps: list[Unread] | None = None) -> tuple[Node, ...]:
    """The NUMA nodes in order, sizes in bytes; empty where the kernel knows none. One that goes meanwhile is left out.

    One that cannot be read is named in ``gaps``; without them it is raised.

    Raises:
        Denied, KernelRefused: they cannot be listed. BadFile, or these: without ``gaps``, one of them cannot be read.
    """

    def node(name: str) -> Node | None:
        return _node(root, int(name[4:]), block) if name.startswith("node") and name[4:].isdecimal() else None

    try:
        block = _block_size(root)
        found = tree.each(root, _NODES, node, gaps)
    except NotFound:
        return ()
    return tuple(sorted(filter(None, found), key=lambda node: node.number))


def pools(root: Root = "/", gaps: list[Unread] | None = None) -> tuple[HugePool, ...]:
    """The hugetlb pools by page size in bytes; their counts in pages; empty without hugetlb.

    One that cannot be read is named in ``gaps``; without them it is raised.

    Raises:
        Denied, KernelRefused: they cannot be listed. BadFile, or these: without ``gaps``, one of them cannot be read.
    """

    def pool(name: str) -> HugePool | None:
        return _pool(root, int(name[10:-2])) if name.startswith("hugepages-") and name[10:-2].isdecimal() else None

    try:
        found = tree.each(root, _POOLS, pool, gaps)
    except NotFound:
        return ()
    return tuple(sorted(filter(None, found), key=lambda pool: pool.page_size))


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


def _block_size(root: Root) -> int | None:
    """Bytes of a memory block; None where the kernel has none."""
    try:
        return tree.number(root, _BLOCK, 16)
    except NotFound:
        return None


def _blocks(root: Root, base: str, number: int, size: int) -> tuple[Range, ...]:
    """The addresses of a node's memory blocks, in order, those that continue each other as one."""
    names = (name[6:] for name in tree.names(root, base) if name.startswith("memory"))
    ranges: list[Range] = []
    for block in sorted(int(name) for name in names if name.isdecimal()):
        start = block * size
        if ranges and ranges[-1].end == start:
            start = ranges.pop().start
        ranges.append(Range(start, (block + 1) * size, f"node {number}"))
    return tuple(ranges)


def _node(root: Root, number: int, block: int | None) -> Node:
    base = f"{_NODES}/node{number}"
    rows = _rows(f"{base}/meminfo", tree.read(root, f"{base}/meminfo"), skip=2)
    try:
        ranges = _blocks(root, base, number, block) if block else ()
        return Node(number, rows["MemTotal"], rows["MemFree"], tree.line(root, f"{base}/cpulist"), ranges)
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
