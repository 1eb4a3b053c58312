"""Rates from two Snapshots: what their counters of CPU time and I/O grew by, over the time between them; no I/O.

    before, now ─→ now, with ``Usage.rates``, ``ThreadUsage.busy`` and ``HostUsage.rates`` filled in

A rate needs two answers about the same process (PID and start) in the same boot, and counters that did not fall;
otherwise it is None, never 0. Of the same answer again the rates are those it had.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from msgspec.structs import replace

from memconsole.model import Faults, Guest, HostUsage, ProcessId, Rates, Snapshot, ThreadUsage, Trends, Usage

TREND = 64
"""How many Snapshots a trend is of at the most."""
MOST_TRENDED = 256
"""Guests up to which each has all of its trends; of more, each has that of its CPU alone."""
SECOND = 1_000_000_000

Used = TypeVar("Used", Usage, HostUsage)


def rated(before: Snapshot | None, now: Snapshot) -> Snapshot:
    """The Snapshot ``now`` with its rates since ``before``; as it is where one of them says nothing of usage."""
    if before is None or before is now or now.usage is None or before.host.boot_id != now.host.boot_id:
        return now
    if before.usage is None:
        return now
    known = {guest.process: used for guest in before.guests if (used := usage_of(guest)) is not None}
    guests = tuple(_guest(known, guest) for guest in now.guests)
    lazy = lazy_of(now)
    if len(guests) <= MOST_TRENDED:
        guests = tuple(_with_trends(known.get(guest.process), lazy.get(guest.name), guest) for guest in guests)
    host = _host(before.usage, now.usage)
    if host.rates is not None and host.rates is not before.usage.rates:
        host = replace(host, rates=replace(host.rates, trends=_trends(before.usage, host, now, guests, lazy.values())))
    return replace(now, guests=guests, usage=host)


def lazy_of(snapshot: Snapshot) -> Mapping[str, Faults]:
    """The page faults of each guest's lazy grants together: bytes put in place, and faults a second."""
    found: dict[str, Faults] = {}
    for grant in snapshot.grants:
        if grant.faults is not None:
            was = found.get(grant.guest, Faults(served=True))
            present, rate = was.present + grant.faults.present, was.rate + grant.faults.rate
            found[grant.guest] = replace(was, present=present, rate=rate)
    return found


def _with_trends(before: Usage | None, lazy: Faults | None, guest: Guest) -> Guest:
    """A guest with its trends, which go on from those of its usage before."""
    used, was = usage_of(guest), before.rates if before is not None else None
    if guest.seen is None or used is None or used.rates is None or used.rates is was:
        return guest
    old = was.trends if was is not None else Trends()
    trends = Trends(
        memory=_on(old.memory, guest.seen.rss),
        touched=_on(old.touched, None if lazy is None else lazy.present),
        faults=_on(old.faults, used.rates.faults),
        cpu=_on(old.cpu, used.rates.waited),
    )
    used = replace(used, rates=replace(used.rates, trends=trends))
    return replace(guest, seen=replace(guest.seen, usage=used))


def _trends(
    was: HostUsage, used: HostUsage, now: Snapshot, guests: Collection[Guest], lazy: Collection[Faults]
) -> Trends:
    """The host's trends, which go on from those of the usage before."""
    old = was.rates.trends if was.rates is not None else Trends()
    over = used.at_ns - was.at_ns
    before, stalls = was.stalls, used.stalls

    def part(name: str) -> float | None:
        if before is None or stalls is None:
            return None
        return _growth(getattr(before, name), getattr(stalls, name), over)

    return Trends(
        memory=_on(old.memory, now.memory.total - now.memory.available),
        touched=_on(old.touched, sum(each.present for each in lazy) if lazy else None),
        faults=_on(old.faults, sum(each.rate for each in lazy) if lazy else None),
        cpu=_on(old.cpu, part("cpu_ns")),
        memory_wait=_on(old.memory_wait, part("memory_ns")),
        io=_on(old.io, part("io_ns")),
        guests=_on(old.guests, guests_busy(guests)),
    )


def guests_busy(guests: Collection[Guest]) -> float | None:
    """CPUs that all guests together keep busy; None while it is known of none."""
    used = [found.rates.busy for guest in guests if (found := usage_of(guest)) and found.rates]
    known = [each for each in used if each is not None]
    return sum(known) if known else None


def _on(trend: tuple[float, ...], value: float | None) -> tuple[float, ...]:
    """A trend that goes on with a value; as it is where that is not known."""
    return trend if value is None else (*trend[1 - TREND :], value)


def usage_of(guest: Guest) -> Usage | None:
    """What a guest's process uses, where that was asked for and is known."""
    return guest.seen.usage if guest.seen is not None else None


def why_not(guest: Guest) -> str:
    """Why something of a guest's usage is not known; empty where all of it is."""
    used = usage_of(guest)
    if guest.seen is None:
        return "it has no process that can be looked at"
    if used is None:
        return "usage was not asked for when this was taken, or the process ended meanwhile"
    first = "rates need a second Snapshot" if used.rates is None else ""
    return "; ".join(filter(None, (first, used.unknown)))


def percent(rates: Rates | ThreadUsage) -> float | None:
    """CPU time in per cent of one CPU."""
    return None if rates.busy is None else 100 * rates.busy


def _guest(known: Mapping[ProcessId | None, Usage], guest: Guest) -> Guest:
    used, was = usage_of(guest), known.get(guest.process)
    if guest.seen is None or used is None or was is None:
        return guest
    return replace(guest, seen=replace(guest.seen, usage=process(was, used)))


def process(was: Usage, now: Usage) -> Usage:
    """What a process uses, with its rates since ``was``, which is of the same process."""
    over = now.at_ns - was.at_ns
    if was.process != now.process or over < 0:
        return now
    if over == 0:
        return replace(now, rates=was.rates, vcpus=was.vcpus)
    busy = _growth(was.cpu_ns, now.cpu_ns, over)
    rates = Rates(
        over_ns=over,
        busy=busy,
        read=_per_second(was.read, now.read, over),
        written=_per_second(was.written, now.written, over),
        trend=_on(was.rates.trend if was.rates is not None else (), busy),
        faults=_each_second(was.faults, now.faults, over),
        waited=_growth(was.waited_ns, now.waited_ns, over),
    )
    return replace(now, rates=rates, vcpus=_vcpus(was.vcpus, now.vcpus, over))


def _vcpus(was: Collection[ThreadUsage], now: Collection[ThreadUsage], over: int) -> tuple[ThreadUsage, ...]:
    known = {(each.index, each.tid): each.cpu_ns for each in was}
    return tuple(replace(each, busy=_growth(known.get((each.index, each.tid)), each.cpu_ns, over)) for each in now)


def _host(was: HostUsage, now: HostUsage) -> HostUsage:
    over = now.at_ns - was.at_ns
    service = now.service
    if service is not None and was.service is not None:
        service = process(was.service, service)
    if over <= 0:
        return replace(now, service=service, rates=was.rates if over == 0 else None)
    busy = _growth(_worked(was), _worked(now), over)
    return replace(
        now, service=service, rates=Rates(over, busy, trend=_on(was.rates.trend if was.rates is not None else (), busy))
    )


def _worked(used: HostUsage) -> int:
    return used.user_ns + used.system_ns


def _growth(was: int | None, now: int | None, over: int) -> float | None:
    """What a counter grew by in each of ``over``; None where one is not known, or it fell."""
    if was is None or now is None or now < was:
        return None
    return (now - was) / over


def _per_second(was: int | None, now: int | None, over: int) -> int | None:
    grown = _each_second(was, now, over)
    return None if grown is None else round(grown)


def _each_second(was: int | None, now: int | None, over: int) -> float | None:
    grown = _growth(was, now, over)
    return None if grown is None else grown * SECOND
