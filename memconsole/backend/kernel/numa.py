"""Where the memory of a process lies by NUMA node, and which nodes CPUs belong to.

/proc/PID/numa_maps         a line a VMA; the kernel walks the page tables of all of them for it
    line    = START POLICY word*
    word    = "file=" PATH | "N" NODE "=" PAGES | "kernelpagesize_kB=" SIZE | others
    PATH has its blanks escaped, so that words are between blanks; a page of hugetlb is one page of its SIZE
lists of CPUs (sched_setaffinity, cpulist)
    list    = [FIRST ["-" LAST] ("," FIRST ["-" LAST])*]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.model import Node, NodeBytes

_SIZE = b"kernelpagesize_kB="


def placement(root: Root, pid: int, task: int | None = None) -> tuple[NodeBytes, ...]:
    """The bytes that a process maps, by node in order; nodes without any are left out.

    Raises:
        NotFound: this kernel knows no NUMA.
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"{tree.of_process(pid, task)}/numa_maps"
    found: Counter[int] = Counter()
    for row in tree.read(root, source).split(b"\n"):
        words = row.split()[2:]
        size = next((word[len(_SIZE) :] for word in words if word.startswith(_SIZE)), None)
        if size is None:  # nothing of the VMA is mapped
            continue
        try:
            for word in words:
                node, equals, pages = word[1:].partition(b"=")
                if word[:1] == b"N" and equals and node.isdigit():
                    found[int(node)] += int(pages) * int(size) << 10
        except ValueError as error:
            raise tree.malformed(source, row) from error
    return tuple(NodeBytes(node, size) for node, size in sorted(found.items()))


def cpu_list(cpus: Iterable[int]) -> str:
    """Numbers of CPUs as the kernel lists them: ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def nodes_of(cpus: Iterable[int], nodes: Sequence[Node]) -> tuple[int, ...] | None:
    """The NUMA nodes that CPUs belong to, in order; None where the kernel says of none.

    Raises:
        BadFile: a node's list of CPUs is not as the kernel writes it.
    """
    wanted = frozenset(cpus)
    found = tuple(node.number for node in nodes if wanted & tree.cpu_numbers(node.cpus))
    return found or None
