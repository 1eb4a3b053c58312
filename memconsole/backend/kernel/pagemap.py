"""Where the pages of a process's memory are: its page map, read by a reader that may be left behind (:mod:`.patient`).

/proc/PID/pagemap   u64 a page; the kernel takes the lock of the memory map for each part that is read
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from memconsole.backend.kernel import patient, tree

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable


class Span(NamedTuple):
    """A range of a process's memory: ``length`` bytes at ``start``; its first page is page ``base`` of the table."""

    start: int
    length: int
    base: int


def scan(pid: int, spans: Iterable[Span], task: int | None = None) -> ExtentTable:
    """One table of these ranges of a process, to be closed, read by its thread ``task``.

    Raises:
        Gone, Denied, KernelRefused: it cannot be read. Silent: it has its memory map locked. UsageError: ranges are not
        whole pages, show a page of the table twice, or there are none.
    """
    from memconsole.extents import ExtentTable

    def read(_: int) -> ExtentTable:
        tables: list[ExtentTable] = []
        try:
            tables += [ExtentTable.scan(task or pid, at, length, base=base) for at, length, base in spans]
            return ExtentTable.concat(tables)
        finally:
            for table in tables:
                table.close()

    return patient.call(pid, read)


@contextmanager
def opened(pid: int, task: int | None = None) -> Iterator[int]:
    """A process's page map, by its thread ``task``; what is read of it may wait for the lock of its memory map.

    Raises:
        Gone, Denied, KernelRefused: it cannot be opened.
    """
    path = f"{tree.of_process(pid, task)}/pagemap"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)
