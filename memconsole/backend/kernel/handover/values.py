"""What a kernel hands over, as values: addresses are physical, in bytes; pfns and counts are in pages."""

from __future__ import annotations

from typing import NamedTuple

from memconsole.model import Range, Unread, Value


class Run(NamedTuple):
    """Consecutive preserved frames."""

    pfn: int
    count: int  # type: ignore[assignment]  # the field's own word


class FolioRun(NamedTuple):
    """Consecutive folios of a memfd: page index in the file, first frame, pages, and MEMFD_LUO_FOLIO_* flags."""

    index: int  # type: ignore[assignment]  # the field's own word
    pfn: int
    count: int  # type: ignore[assignment]
    flags: int


class Preserved(Value, frozen=True):
    """The set of frames the next kernel leaves alone: runs in order of pfn, how many blocks of each order, leaves."""

    runs: tuple[Run, ...]
    orders: dict[int, int]
    leaves: int

    @property
    def pages(self) -> int:
        """How many frames the set holds."""
        return sum(run.count for run in self.runs)


class PreservedMemfd(Value, frozen=True):
    """A preserved memfd: its position, size and seals, how many folios, and where they are."""

    position: int
    size: int
    seals: int
    flags: int
    folios: int
    extents: tuple[FolioRun, ...] = ()


class File(Value, frozen=True):
    """A file of a session; ``memfd`` is None where ``compatible`` is not one this decoder knows."""

    compatible: str
    token: int
    data: int
    memfd: PreservedMemfd | None = None


class PreservedSession(Value, frozen=True):
    """A session and its files, in the order in which they were preserved."""

    name: str
    files: tuple[File, ...] = ()


class Flb(Value, frozen=True):
    """An object of the kernel's own that files depend on (file-lifecycle-bound data); ``count`` files do."""

    name: str
    data: int
    count: int


class Luo(Value, frozen=True):
    """LUO's state. Sessions are written at the jump, so a running kernel's outgoing state has none."""

    liveupdate_number: int
    sessions: tuple[PreservedSession, ...] = ()
    flbs: tuple[Flb, ...] = ()


class Metadata(Value, frozen=True):
    """The kernel that wrote it, and which kexec since the cold boot it is handed over by (1 is the first)."""

    previous_release: str
    kexec_count: int


class Blob(Value, frozen=True):
    """A subsystem's data: ``kind`` is its ABI, or ``opaque``."""

    name: str
    address: int
    size: int
    kind: str = "opaque"


class Handover(Value, frozen=True):
    """All of one handover; what could not be read is a gap."""

    side: str
    compatible: str
    blobs: tuple[Blob, ...] = ()
    metadata: Metadata | None = None
    luo: Luo | None = None
    reserved: tuple[Range, ...] = ()
    preserved: Preserved | None = None
    gaps: tuple[Unread, ...] = ()
