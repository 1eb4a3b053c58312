"""What host, service and guests use: read by psutil, for a Snapshot that was asked for it.

    usage       /proc/stat, loadavg, pressure; of each process /proc/PID/{stat,io}, its affinity, its vCPUs' threads
    placement   /proc/PID/numa_maps, by a thread of lowest priority; a Snapshot waits ``WAIT_S`` for it at the most, and
                has what was read before where it takes longer

Counters are as the kernel counts them since the process, or the host, started: whoever has two Snapshots has rates
(:mod:`memconsole.rates`). A process is known by PID and start: what was read of one that has its PID by now is
dropped. What cannot be read is None, and ``unknown`` says why.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TypeVar

import psutil
from msgspec.structs import replace

from memconsole import rates
from memconsole.backend.kernel import census, numa, tree, waits
from memconsole.backend.kernel.tree import Root
from memconsole.backend.peers.asked import Poller
from memconsole.errors import MemconsoleError
from memconsole.model import Guest, HostUsage, Node, NodeBytes, ProcessId, Snapshot, ThreadUsage, Unread, Usage, Vcpu

LOOK_S = 5.0
"""Seconds between the end of a look at placement and the next one; ten times as long as it took, if that is more."""
WAIT_S = 0.5
_LEAST_URGENT = 19
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


def with_usage(taken: Snapshot, root: Root) -> Snapshot:
    """A Snapshot with what host, service and guests use; of a recorded tree that is not known, which is a gap."""
    if not tree.live(root):
        return replace(taken, gaps=(*taken.gaps, Unread("usage", "it is known of the running host only")))
    nodes = taken.memory.nodes
    guests = tuple(_with_usage(guest, nodes) for guest in taken.guests)
    try:
        host = host_usage(nodes)
    except (psutil.Error, OSError, MemconsoleError) as error:
        return replace(taken, guests=guests, gaps=(*taken.gaps, Unread("/proc/stat", str(error))))
    return replace(taken, guests=guests, usage=host)


def host_usage(nodes: Collection[Node]) -> HostUsage:
    """What the host's CPUs did, and what this process used.

    Raises:
        psutil.Error, OSError, MemconsoleError: /proc does not say.
    """
    at_ns = time.monotonic_ns()
    times = psutil.cpu_times()
    own = psutil.Process()
    return HostUsage(
        at_ns=at_ns,
        # The kernel counts what guests ran in user and nice, too.
        user_ns=_ns(times.user + times.nice),
        system_ns=_ns(times.system + times.irq + times.softirq),
        idle_ns=_ns(times.idle + times.iowait),
        guest_ns=_ns(times.guest + times.guest_nice),
        steal_ns=_ns(times.steal),
        load=os.getloadavg(),
        service=usage_of(census.process("/", own.pid).id, nodes),
        service_rss=own.memory_info().rss,
        stalls=waits.stalls(),
    )


def usage_of(process: ProcessId, nodes: Collection[Node], vcpus: Collection[Vcpu] = ()) -> Usage | None:
    """What a process has used; None of one that ended, or whose PID another one has by now."""
    read = _Reader(process.pid)
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - process.start_ticks * _TICK_NS
    at_ns = time.monotonic_ns()
    with read.process.oneshot() if read.process is not None else contextlib.nullcontext():
        times = read("CPU time", lambda process: process.cpu_times())
        threads = read("threads", lambda process: process.num_threads())
        io = read("I/O", _io)
        cpus = read("affinity", lambda process: process.cpu_affinity())
        of_threads = read("vCPUs", _thread_times) if vcpus else None
    faults = read("page faults", lambda process: waits.page_faults("/", process.pid))
    waited_ns = read("waits for a CPU", partial(_waited, vcpus))
    found = Usage(
        pid=process.pid,
        start_ticks=process.start_ticks,
        at_ns=at_ns,
        age_ns=max(age_ns, 0),
        user_ns=None if times is None else _ns(times.user),
        system_ns=None if times is None else _ns(times.system),
        threads=threads,
        read=None if io is None else io[0],
        written=None if io is None else io[1],
        cpus=None if cpus is None else numa.cpu_list(cpus),
        nodes=None if cpus is None else _nodes(cpus, nodes),
        vcpus=tuple(_vcpu(process.pid, each, of_threads or {}, nodes) for each in vcpus if each.tid is not None),
        unknown="; ".join(read.unknown),
        faults=faults,
        waited_ns=waited_ns,
    )
    # What it had all the while, it has now.
    try:
        return found if census.process("/", process.pid).id == process else None
    except MemconsoleError:
        return None


class _Reader:
    """Reads one value after the other of a process; what cannot be had is None, and ``unknown`` says why."""

    def __init__(self, pid: int) -> None:
        self.unknown: list[str] = []
        self.process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self.process = psutil.Process(pid)

    def __call__(self, what: str, read: Callable[[psutil.Process], T]) -> T | None:
        if self.process is None:
            return None
        try:
            return read(self.process)
        except psutil.AccessDenied:
            why = "it is not shown to this user"
        except psutil.NoSuchProcess:  # a zombie is one, too
            why = "the process ended"
        except NotImplementedError:
            why = "this kernel does not count it"
        except MemconsoleError as error:
            why = error.why or str(error)
        except (OSError, ValueError, RuntimeError) as error:
            why = str(error)
        self.unknown.append(f"{what}: {why}")
        return None


def _io(process: psutil.Process) -> tuple[int, int]:
    """Bytes from and to storage."""
    if not hasattr(process, "io_counters"):  # psutil has it where /proc/PID/io is
        raise NotImplementedError
    counted = process.io_counters()
    return counted.read_bytes, counted.write_bytes


def _waited(vcpus: Collection[Vcpu], process: psutil.Process) -> int:
    """Ns in which a process's vCPUs, or all of its threads, were ready to run and had no CPU."""
    tids = [vcpu.tid for vcpu in vcpus if vcpu.tid is not None]
    found = waits.waited("/", process.pid, tids or [each.id for each in process.threads()])
    if found is None:
        raise NotImplementedError
    return found


def _thread_times(process: psutil.Process) -> dict[int, int]:
    """Ns of CPU time by TID."""
    return {each.id: _ns(each.user_time + each.system_time) for each in process.threads()}


def _vcpu(pid: int, vcpu: Vcpu, times: Mapping[int, int], nodes: Collection[Node]) -> ThreadUsage:
    tid = vcpu.tid or 0
    name, cpus = "", None
    with contextlib.suppress(OSError, *tree.UNREADABLE):  # a vCPU that went; its thread may not be looked at
        name = tree.line("/", f"/proc/{pid}/task/{tid}/comm")
        cpus = os.sched_getaffinity(tid)
    return ThreadUsage(
        index=vcpu.index,
        tid=tid,
        name=name,
        cpu_ns=times.get(tid),
        cpus=None if cpus is None else numa.cpu_list(cpus),
        nodes=None if cpus is None else _nodes(cpus, nodes),
    )


def _nodes(cpus: Collection[int], nodes: Collection[Node]) -> tuple[int, ...] | None:
    try:
        return numa.nodes_of(cpus, tuple(nodes))
    except MemconsoleError:
        return None


def _with_usage(guest: Guest, nodes: Collection[Node]) -> Guest:
    if guest.seen is None or guest.process is None:
        return guest
    used = usage_of(guest.process, nodes, guest.seen.vcpus or ())
    return replace(guest, seen=replace(guest.seen, usage=used))


def _ns(seconds: float) -> int:
    """Psutil's seconds are whole ticks."""
    return round(seconds * 1e9 / _TICK_NS) * _TICK_NS


class Placement:
    """Where the memory of guests lies by NUMA node, as far as one control process has looked."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._asked: Poller[Mapping[ProcessId, tuple[NodeBytes, ...] | str]] = Poller("placement", self._look)
        self._changed = threading.Lock()
        self._keys: frozenset[ProcessId] = frozenset()
        self._number = 0
        self._due = 0.0

    def shown(self, taken: Snapshot) -> Snapshot:
        """A Snapshot with what the last look found; another look begins if one is due, or there are other guests."""
        keys = frozenset(used.process for guest in taken.guests if (used := rates.usage_of(guest)) is not None)
        if not keys:
            return taken
        with self._changed:
            if keys != self._keys or time.monotonic() > self._due:
                self._keys, self._due = keys, time.monotonic() + LOOK_S
                self._number = self._asked.begin()
            number = self._number
        heard = self._asked.poll(number, time.monotonic() + WAIT_S)
        found = heard.answer or {}
        late = f"memory by node: {heard.why or 'it has not been read yet'}"
        return replace(taken, guests=tuple(_placed(guest, found, late) for guest in taken.guests))

    def close(self) -> None:
        """Look no more."""
        self._asked.end()

    def _look(self) -> Mapping[ProcessId, tuple[NodeBytes, ...] | str]:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_URGENT)
        with self._changed:
            keys = self._keys
        found = {key: self._read(key) for key in keys}
        now = time.monotonic()
        with self._changed:
            self._due = now + max(LOOK_S, 10 * (now - began))
        return found

    def _read(self, key: ProcessId) -> tuple[NodeBytes, ...] | str:
        try:
            process = census.process(self._root, key.pid)
            found = numa.placement(self._root, key.pid, process.task)
            same = process.id == key == census.process(self._root, key.pid).id
        except MemconsoleError as error:
            return error.why or str(error)
        return found if same else "the process ended"


def _placed(guest: Guest, found: Mapping[ProcessId, tuple[NodeBytes, ...] | str], late: str) -> Guest:
    used = rates.usage_of(guest)
    if used is None or guest.seen is None:
        return guest
    placed = found.get(used.process)
    if isinstance(placed, tuple):
        used = replace(used, memory=placed)
    else:
        why = late if placed is None else f"memory by node: {placed}"
        used = replace(used, unknown="; ".join(filter(None, (used.unknown, why))))
    return replace(guest, seen=replace(guest.seen, usage=used))
