"""The columns of guests: what they are, what their processes use, and what a manager of theirs says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from memconsole.field import Field, Show, Table, moment_field, number_field, or_dash, shown_text, size_field
from memconsole.model import Guest, Managed, NodeBytes, Part, Rates, Usage
from memconsole.rates import percent, usage_of, why_not
from memconsole.units import format_duration, format_percent, format_size, spark

TREND = 16
"""Cells of a trend, a Snapshot each."""


def _trend(busy: Sequence[float]) -> str:
    return spark(busy[-TREND:], 1.0)


def _service(guest: Guest) -> str:
    how = guest.service
    if how is not None and how.is_user:
        return "a user" if how.quota is None else f"a user, {format_size(how.quota)} at most"
    return "" if how is None else how.unit or " ".join(how.command)


def _nodes(found: Sequence[NodeBytes]) -> str:
    return " ".join(f"{each.node}:{format_size(each.size)}" for each in found) or "none"


def _used(id: str, title: str, help: str, get: Callable[[Usage], Any], show: Show, *, unit: str, width: int) -> Field:
    """A column of what a guest's process uses; numbers, which have a unit, to the right."""

    def of_guest(guest: Guest) -> Any:
        used = usage_of(guest)
        return None if used is None else get(used)

    right = bool(unit)
    part = Part.PLACEMENT if id == "ram_nodes" else Part.USAGE
    shown = or_dash(show)
    return Field(id, title, help, of_guest, shown, unit, width, right, False, part, news=False)


def _rate(id: str, title: str, help: str, get: Callable[[Rates], Any], show: Show, *, unit: str, width: int) -> Field:
    """... and a rate of it, which needs two Snapshots."""
    return _used(
        id, title, help, lambda used: None if used.rates is None else get(used.rates), show, unit=unit, width=width
    )


_CPU = _rate("cpu", "CPU %", "CPU it keeps busy, of one CPU", percent, format_percent, unit="%", width=6)
_TREND = _rate("cpu_trend", "CPU trend", "CPU % up to now", lambda r: r.trend or None, _trend, unit="", width=TREND)
_STALL = _rate(
    "stall",
    "Stall %",
    "time its vCPUs were ready to run and had no CPU, in % of one CPU",
    lambda r: None if r.waited is None else 100 * r.waited,
    format_percent,
    unit="%",
    width=7,
)
_PAGE_FAULTS = _rate(
    "page_faults",
    "Faults/s",
    "page faults its process took a second",
    lambda r: r.faults,
    lambda value: f"{value:,.0f}",
    unit="1/s",
    width=8,
)
_USED = (
    _STALL,
    _PAGE_FAULTS,
    _used("cpu_time", "CPU time", "CPU time it used", lambda u: u.cpu_ns, format_duration, unit="time", width=8),
    _used("affinity", "CPUs", "CPUs it may run on", lambda u: u.cpus, shown_text, unit="", width=8),
    _used("nodes", "Nodes", "NUMA nodes of those CPUs", lambda u: u.nodes, shown_text, unit="", width=5),
    _used("ram_nodes", "RAM nodes", "bytes it maps on each NUMA node", lambda u: u.memory, _nodes, unit="", width=16),
    _rate("read", "Read/s", "bytes a second from storage", lambda r: r.read, format_size, unit="bytes", width=8),
    _rate("written", "Write/s", "bytes a second to storage", lambda r: r.written, format_size, unit="bytes", width=8),
    _used("uptime", "Uptime", "since its process started", lambda u: u.age_ns, format_duration, unit="time", width=8),
    Field("usage", "Usage", "what of these is not known, and why", why_not, width=40, default=False, part=Part.USAGE),
)


def _pages(guest: Guest) -> tuple[int, int] | None:
    """Bytes of a guest's RAM mapped by 2 MiB or more an entry, and by base pages."""
    huge, mapped = (guest.seen.huge, guest.seen.mapped) if guest.seen is not None else (None, None)
    return None if huge is None or mapped is None else (huge, mapped - huge)


def _by_page(pages: tuple[int, int]) -> str:
    huge, base = pages
    return f"2M {format_size(huge)} 4K {format_size(base)}"


_PAGES = Field(
    "pages", "By page", "bytes of its RAM by the size of the pages that map them", _pages, or_dash(_by_page), "", 18,
    default=False,
)  # fmt: skip


def _without_usage(guest: Guest) -> Guest:
    if usage_of(guest) is None or guest.seen is None:
        return guest
    return replace(guest, seen=replace(guest.seen, usage=None))


def _vcpus(guest: Guest) -> int | None:
    return None if guest.seen is None or guest.seen.vcpus is None else len(guest.seen.vcpus)


def _helpers(guest: Guest) -> tuple[str, ...]:
    seen = guest.seen.helpers if guest.seen is not None else ()
    return tuple(str(pid) for pid in sorted({each.pid for each in (*guest.helpers, *seen)}))


def _managed(id: str, title: str, help: str, get: Callable[[Managed], Any], *, width: int = 12) -> Field:
    """A column of what the manager that runs a VM says of it."""
    return Field(id, title, help, lambda g: None if g.managed is None else get(g.managed), width=width, default=False)


def _labels(managed: Managed) -> str:
    return "; ".join(f"{label.name}={label.text}" for label in managed.labels)


def _ram_kind(managed: Managed) -> str:
    ram = managed.ram
    words = (ram.backing, "shared" * ram.shared, "huge pages" * ram.huge_pages, "discard" * ram.discard)
    return " ".join(filter(None, words))


def _begins(managed: Managed) -> str:
    return ("persistent" if managed.persistent else "transient") + (", autostart" if managed.autostart else "")


_MANAGED = (
    _managed("manager", "Manager", "who runs the VM: libvirt", lambda m: m.manager, width=8),
    _managed("manager_user", "User", "the user (UID) whose session daemon runs it", lambda m: m.user, width=6),
    _managed("uuid", "UUID", "its UUID, by its manager", lambda m: m.uuid, width=36),
    _managed("title", "Title", "its title, by its manager", lambda m: m.title, width=20),
    _managed("manager_state", "Says", "its manager's word on its state", lambda m: m.state, width=10),
    _managed("manager_reason", "Reason", "why, by its manager", lambda m: m.reason),
    _managed("begins", "Begins", "persistent or transient; whether it starts with the host", _begins, width=22),
    _managed("ram_kind", "RAM as", "what backs its RAM: anonymous, memfd, file", _ram_kind, width=16),
    _managed("host_devices", "Passed through", "PCI functions and mdevs it has", lambda m: m.host_devices + m.mediated),
    _managed("taps", "Taps", "its network interfaces on the host", lambda m: m.taps),
    _managed("labels", "Labels", "what Nova, oVirt and others say of it", _labels, width=40),
)

GUESTS = Table(
    "guests",
    "Guests",
    lambda snapshot: snapshot.guests,
    lambda guest: str(guest.name),
    (
        Field("name", "Name", "what the guest is called", lambda g: g.name, width=18),
        Field(
            "kind",
            "Kind",
            "canary, qemu, process; foreign: a VM that memconsole does not manage",
            lambda g: str(g.kind),
            width=8,
        ),
        Field("state", "State", "running, paused, stopped, gone, silent", lambda g: str(g.state), width=8),
        Field("pid", "PID", "its process", lambda g: g.pid, width=8, right=True),
        _CPU,
        size_field("memory", "Memory", "bytes of guest RAM", lambda g: g.memory),
        size_field("rss", "RSS", "resident bytes of its process (/proc/PID/stat)", lambda g: g.seen and g.seen.rss),
        size_field(
            "huge",
            "By 2M",
            "bytes of its RAM mapped by 2 MiB or more an entry",
            lambda g: g.seen and g.seen.huge,
        ),
        _PAGES,
        _TREND,
        number_field(
            "threads", "Threads", "threads of its process", lambda g: g.seen and g.seen.threads, width=7, default=False
        ),
        number_field("vcpus", "vCPUs", "its vCPUs, as the kernel or its VMM reports them", _vcpus, width=5),
        Field("grants", "Grants", "grants it holds", lambda g: g.grants, width=10),
        number_field("beats", "Beats", "a canary's own count", lambda g: g.progress and g.progress.beats, width=12),
        number_field(
            "wrong", "Wrong", "wrong bytes a canary found", lambda g: g.progress and g.progress.wrong, width=5
        ),
        Field(
            "gap",
            "Gap",
            "longest pause a canary noticed",
            lambda g: g.progress and g.progress.gap_ns,
            or_dash(format_duration),
            "time",
            8,
            right=True,
        ),
        Field(
            "runs_as",
            "Runs as",
            "whether a canary runs in KVM",
            lambda g: g.progress and g.progress.runs_as,
            width=8,
            default=False,
        ),
        Field("agent", "Agent", "whether it answers requests to unmap", lambda g: g.agent, width=5, default=False),
        moment_field("answered", "Answered", "when a silent guest last answered", lambda g: g.answered_ns),
        Field("silent", "Silent", "why it does not answer", lambda g: g.silent, width=40, default=False),
        Field(
            "helpers",
            "Helpers",
            "processes that work for it: vhost-user backends, and those an operator named",
            _helpers,
            width=16,
            default=False,
        ),
        *_MANAGED,
        Field("comm", "Process", "name of its process", lambda g: g.seen and g.seen.comm, width=16, default=False),
        *_USED,
        Field("service", "Service", "what starts it again after a handoff", _service, width=24, default=False),
        Field("command", "Command", "how it was started", lambda g: " ".join(g.command), width=40, default=False),
    ),
    _without_usage,
)
