"""The Snapshot: one picture of a host."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from memconsole.model.base import SNAPSHOT_FORMAT, SNAPSHOT_VERSION, Value
from memconsole.model.devices import Device, Domain, Iommu, Window
from memconsole.model.handoff import HandoffReport, Readiness
from memconsole.model.host import Dax, Host, Memory, Range, Survival
from memconsole.model.memory import Grant, Guest, Quarantine, Region
from memconsole.model.noticed import Event, Finding, Unread
from memconsole.model.usage import HostUsage


class TableRef(Value, frozen=True):
    """An ExtentTable that belongs to a Snapshot: its key (``region:NAME``, ``guest:NAME``), rows and page size."""

    key: str
    rows: int
    page_size: int


class Snapshot(Value, frozen=True, kw_only=True):
    """One immutable picture of a host: kernel truth, ledger, and where they differ."""

    format: Literal["memconsole.snapshot"] = SNAPSHOT_FORMAT
    version: Annotated[int, Meta(ge=1)] = SNAPSHOT_VERSION
    taken_ns: int
    host: Host
    memory: Memory
    survival: Survival = Survival()
    regions: tuple[Region, ...] = ()
    guests: tuple[Guest, ...] = ()
    grants: tuple[Grant, ...] = ()
    quarantine: tuple[Quarantine, ...] = ()
    devices: tuple[Device, ...] = ()
    windows: tuple[Window, ...] = ()
    iommus: tuple[Iommu, ...] = ()
    domains: tuple[Domain, ...] = ()
    iomem: tuple[Range, ...] = ()
    firmware: tuple[Range, ...] = ()
    dax: tuple[Dax, ...] = ()
    findings: tuple[Finding, ...] = ()
    gaps: tuple[Unread, ...] = ()
    events: tuple[Event, ...] = ()
    tables: tuple[TableRef, ...] = ()
    handoff: HandoffReport | None = None
    readiness: Readiness | None = None
    usage: HostUsage | None = None
