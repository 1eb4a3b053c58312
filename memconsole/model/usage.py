"""What host, guests and threads use: time, memory, I/O."""

from __future__ import annotations

from memconsole.model.base import Value
from memconsole.model.process import ProcessId


class NodeBytes(Value, frozen=True):
    """Bytes on a NUMA node."""

    node: int
    size: int


class ThreadUsage(Value, frozen=True):
    """What a vCPU's thread has used (/proc/PID/task/TID/stat) and where it may run (sched_getaffinity).

    ``cpu_ns`` of CPU time since it started; ``cpus`` as the kernel lists them (``0-3,8``); ``busy`` see :class:`Rates`.
    """

    index: int
    tid: int
    name: str = ""
    cpu_ns: int | None = None
    cpus: str | None = None
    nodes: tuple[int, ...] | None = None
    busy: float | None = None


class Stalls(Value, frozen=True):
    """Ns since the host started in which a part of its tasks waited for a resource (/proc/pressure: some, total)."""

    cpu_ns: int
    memory_ns: int
    io_ns: int


class Trends(Value, frozen=True):
    """What was so of the Snapshots before and is of this one, oldest first; empty where it is not known.

    ``memory`` and ``touched`` bytes (RSS, or what the host has in use; the working set of lazy grants); page ``faults``
    a second (of a host those that lazy grants had served); ``cpu``, ``memory_wait`` and ``io``: stalls, as parts of the
    time (of a guest: CPUs that its vCPUs waited for); ``guests``: CPUs that all guests together kept busy.
    """

    memory: tuple[float, ...] = ()
    touched: tuple[float, ...] = ()
    faults: tuple[float, ...] = ()
    cpu: tuple[float, ...] = ()
    memory_wait: tuple[float, ...] = ()
    io: tuple[float, ...] = ()
    guests: tuple[float, ...] = ()


class Rates(Value, frozen=True):
    """What changed between two Snapshots, ``over_ns`` apart: worked out by a face that has both, never by a reader.

    ``busy`` CPUs (1.0: one CPU all the time); ``read`` and ``written`` bytes a second; page ``faults`` a second;
    ``waited``: CPUs that its vCPUs were ready to run on and did not have. ``trend``: ``busy`` of the Snapshots before
    and of this one, oldest first; ``trends``: more of the kind, where there are few guests.
    """

    over_ns: int
    busy: float | None = None
    read: int | None = None
    written: int | None = None
    trend: tuple[float, ...] = ()
    faults: float | None = None
    waited: float | None = None
    trends: Trends = Trends()


class Usage(Value, frozen=True):
    """What a process has used since it started, all of its threads together, and where it may run; None: not known.

    ``at_ns`` of CLOCK_MONOTONIC it was read; ``age_ns`` since it started. CPU time in ns, in steps of 10 ms
    (/proc/PID/stat: utime, stime); ``read`` and ``written``: bytes it had fetched from and sent to storage
    (/proc/PID/io). ``cpus`` its first thread may run on, as the kernel lists them (``0-3,8``), and their NUMA
    ``nodes``; ``memory``: bytes it maps, by node (/proc/PID/numa_maps). ``faults``: page faults (/proc/PID/stat);
    ``waited_ns`` in which its vCPUs, or all threads of one without, were ready to run and had no CPU (schedstat).
    ``unknown``: what is not known, and why.
    """

    pid: int
    start_ticks: int
    at_ns: int
    age_ns: int | None = None
    user_ns: int | None = None
    system_ns: int | None = None
    threads: int | None = None
    read: int | None = None
    written: int | None = None
    cpus: str | None = None
    nodes: tuple[int, ...] | None = None
    memory: tuple[NodeBytes, ...] | None = None
    vcpus: tuple[ThreadUsage, ...] = ()
    unknown: str = ""
    rates: Rates | None = None
    faults: int | None = None
    waited_ns: int | None = None

    @property
    def process(self) -> ProcessId:
        """Which process it is."""
        return ProcessId(self.pid, self.start_ticks)

    @property
    def cpu_ns(self) -> int | None:
        """CPU time in user mode (which a guest's own code is) and in the kernel."""
        return None if self.user_ns is None or self.system_ns is None else self.user_ns + self.system_ns


class HostUsage(Value, frozen=True):
    """What the host's CPUs did since it started, all together, in ns of CPU time (/proc/stat), and its load.

    ``user_ns`` has what guests ran (``guest_ns``) in it; ``idle_ns`` has what was waited for I/O in it; ``steal_ns``
    was taken by the hypervisor below. ``load``: runnable and waiting threads over 1, 5 and 15 minutes (/proc/loadavg).
    ``service`` is the control process, ``service_rss`` its memory in bytes. ``rates.busy``: CPUs that were not idle.
    ``stalls`` are None where this kernel does not count them.
    """

    at_ns: int
    user_ns: int
    system_ns: int
    idle_ns: int
    guest_ns: int = 0
    steal_ns: int = 0
    load: tuple[float, ...] = ()
    service: Usage | None = None
    service_rss: int | None = None
    rates: Rates | None = None
    stalls: Stalls | None = None
