"""How long work waited: on the whole host for a CPU, memory or I/O; a process's threads for a CPU; and page faults.

/proc/pressure/{cpu,memory,io}   "some" AVERAGES "total=" US NL [ "full" ... NL ]   some task waited, since boot
/proc/PID/task/TID/schedstat     RUN_NS WAITED_NS SLICES NL                        ready to run, and had no CPU
/proc/PID/stat                   behind the last ")", word 7 is minflt, word 9 majflt
"""

from __future__ import annotations

from collections.abc import Collection

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Gone, NotFound
from memconsole.model import Stalls

_RESOURCES = ("cpu", "memory", "io")
_MINFLT, _MAJFLT = 7, 9


def stalls(root: Root = "/") -> Stalls | None:
    """Ns in which some task of the host waited, for each resource; None where this kernel counts no pressure.

    Raises:
        Denied, KernelRefused, BadFile: it cannot be read.
    """
    try:
        return Stalls(**{f"{each}_ns": _some(root, f"/proc/pressure/{each}") for each in _RESOURCES})
    except NotFound:
        return None


def _some(root: Root, source: str) -> int:
    text = tree.text(tree.read(root, source))
    for row in text.splitlines():
        words = row.split() or [""]
        total = words[-1]
        if words[0] == "some" and total.startswith("total=") and total[6:].isdecimal():
            return int(total[6:]) * 1000
    raise tree.malformed(source, text)


def waited(root: Root, pid: int, tids: Collection[int]) -> int | None:
    """Ns in which these threads of a process were ready to run and had no CPU; None where the kernel does not count it.

    A thread that ended meanwhile is left out.

    Raises:
        Denied, KernelRefused, BadFile: it cannot be read.
    """
    total, counted = 0, False
    for tid in tids:
        source = f"/proc/{pid}/task/{tid}/schedstat"
        try:
            words = tree.line(root, source).split()
        except (NotFound, Gone):
            continue
        if len(words) != 3 or not words[1].isdecimal():
            raise tree.malformed(source, words)
        total, counted = total + int(words[1]), True
    return total if counted else None


def page_faults(root: Root, pid: int) -> int:
    """Page faults of a process since it started, with and without I/O.

    Raises:
        NotFound, Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"/proc/{pid}/stat"
    words = tree.read(root, source).rpartition(b")")[2].split()
    if len(words) <= _MAJFLT or not (words[_MINFLT].isdigit() and words[_MAJFLT].isdigit()):
        raise tree.malformed(source, words)
    return int(words[_MINFLT]) + int(words[_MAJFLT])
