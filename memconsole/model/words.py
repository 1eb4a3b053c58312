"""The words that states, kinds and degrees are called by."""

from __future__ import annotations

import enum


class RegionState(enum.StrEnum):
    """Where a region stands in its life."""

    RESERVED = "reserved"
    MAPPED = "mapped"
    RESTORED = "restored"


class GuestKind(enum.StrEnum):
    """What a guest is: a VM we run, a process that joined, or a VM that runs here without us."""

    CANARY = "canary"
    QEMU = "qemu"
    PROCESS = "process"
    FOREIGN = "foreign"


class GuestState(enum.StrEnum):
    """Whether a guest runs; ``gone`` is a guest whose process ended without being stopped.

    ``suspended``: to RAM, by itself; ``paused``: its vCPUs were stopped from outside. ``silent``: its process is there
    and did not answer in time, so that whether it runs is not known.
    """

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    GONE = "gone"
    SILENT = "silent"


class GrantState(enum.StrEnum):
    """``offered``: the process may map it and has not said it did; ``mapped``: it has."""

    OFFERED = "offered"
    MAPPED = "mapped"


class Access(enum.StrEnum):
    """What a grant allows."""

    RO = "ro"
    RW = "rw"


class Severity(enum.StrEnum):
    """How bad a finding is: ``error`` loses memory or mixes owners, ``warning`` will, ``info`` is worth knowing."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Rung(enum.StrEnum):
    """The rungs of the revoke ladder, mildest first."""

    ASK = "ask"
    PROTECT = "protect"
    COPY = "copy"
    KILL = "kill"


class RevokeOutcome(enum.StrEnum):
    """``cut``: no mapping left; ``proved``: no pin either; ``quarantined``: a pin remains, the frames are nobody's."""

    CUT = "cut"
    PROVED = "proved"
    QUARANTINED = "quarantined"


class Part(enum.StrEnum):
    """A part of a Snapshot that is taken only where it is asked for, so that others need not pay for it.

    ``usage``: what host, service and guests use (CPU, threads, I/O) and where they may run; ``placement``: on which
    NUMA nodes the memory of guests lies, for which the kernel walks all of their page tables.
    """

    USAGE = "usage"
    PLACEMENT = "placement"
