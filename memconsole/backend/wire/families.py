"""What of a Snapshot is measured: families of samples, by their names, labels and values, whoever tells them.

A sample whose value the kernel did not give is left out, never zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import memconsole
from memconsole import readiness, unforeseen
from memconsole.model import GuestKind, GuestState, Part, Snapshot, Usage
from memconsole.readiness import Verdict

PARTS = (Part.USAGE,)
"""What of a Snapshot that must be asked for is in the metrics."""

Labels = Mapping[str, object]
Sample = tuple[Labels, float | None]


class Family(NamedTuple):
    """Samples of one name, which has no prefix yet, and no suffix; its unit is the end of it."""

    name: str
    kind: str
    help: str
    unit: str
    samples: list[tuple[Labels, float]]

    @property
    def suffix(self) -> str:
        """What the names of samples of its kind end in."""
        return _SUFFIX.get(self.kind, "")


_SUFFIX = {"counter": "_total", "info": "_info"}


def families(snapshot: Snapshot) -> Iterator[Family]:
    """The families that have samples."""
    parts = (_host, _readiness, _regions, _guests, _usage, _devices, _noticed, _failed)
    return (family for part in parts for family in part(snapshot) if family.samples)


def _family(name: str, kind: str, help: str, samples: Iterable[Sample], unit: str = "") -> Family:
    """One family, its name without unit."""
    known = [(labels, float(value)) for labels, value in samples if value is not None]
    return Family(f"{name}_{unit}" if unit else name, kind, help, unit, known)


def _host(snapshot: Snapshot) -> Iterator[Family]:
    host, memory = snapshot.host, snapshot.memory
    about = {"version": memconsole.__version__, "host": host.name, "kernel": host.kernel, "boot_id": host.boot_id}
    yield _family("build", "info", "The tool and the host.", [(about, 1)])
    yield _family("snapshot_time", "gauge", "When this was taken.", [({}, snapshot.taken_ns / 1e9)], "seconds")
    yield _family("kexecs", "counter", "Kexecs since the cold boot.", [({}, snapshot.survival.kexec_count)])
    kinds = ("total", "free", "available", "shmem", "huge_shmem", "swap_total", "swap_free")
    samples = [({"kind": kind}, getattr(memory, kind)) for kind in kinds]
    yield _family("memory", "gauge", "The host's memory by kind.", samples, "bytes")
    nodes = [
        ({"node": n.number, "kind": k}, v) for n in memory.nodes for k, v in (("total", n.total), ("free", n.free))
    ]
    yield _family("node_memory", "gauge", "Memory of NUMA nodes.", nodes, "bytes")
    pools = [
        ({"page_size": pool.page_size, "kind": kind}, getattr(pool, kind))
        for pool in memory.pools
        for kind in ("total", "free", "reserved", "surplus")
    ]
    yield _family("huge_pool", "gauge", "Pages of hugetlb pools.", pools, "pages")


def _readiness(snapshot: Snapshot) -> Iterator[Family]:
    found = snapshot.readiness
    judged = readiness.verdict(found)
    known: list[Sample] = [({}, judged is Verdict.READY)] if judged is not Verdict.UNKNOWN else []
    yield _family("handoff_ready", "gauge", "Whether no condition refuses a handoff; absent: not known.", known)
    if found is not None:
        failing = Counter((each.severity, each.id) for each in found.failing)
        samples = [({"severity": severity, "condition": id}, count) for (severity, id), count in failing.items()]
        yield _family("handoff_conditions_failing", "gauge", "Conditions of a handoff that do not hold.", samples)
        checked: list[Sample] = [({}, found.checked_ns / 1e9)]
        yield _family("handoff_checked_time", "gauge", "When the conditions were judged.", checked, "seconds")


def _regions(snapshot: Snapshot) -> Iterator[Family]:
    sizes = [({"region": r.name, "store": r.store, "state": r.state}, r.size) for r in snapshot.regions]
    yield _family("region_size", "gauge", "Memory set aside.", sizes, "bytes")
    seen = [({"region": r.name}, r.seen) for r in snapshot.regions if r.seen is not None]
    yield _family("region_resident", "gauge", "Resident memory.", [(n, s.resident) for n, s in seen], "bytes")
    yield _family("region_runs", "gauge", "Contiguous runs at the last scan.", [(n, s.runs) for n, s in seen])
    yield _family("region_mappers", "gauge", "Processes that map it.", [(n, len(s.mappers)) for n, s in seen])
    states = Counter((grant.guest, grant.state) for grant in snapshot.grants)
    grants = [({"guest": guest, "state": state}, count) for (guest, state), count in states.items()]
    yield _family("grants", "gauge", "Grants by guest and state.", grants)
    lazy = [({"guest": g.guest, "grant": g.id}, g.faults) for g in snapshot.grants if g.faults is not None]
    yield _family(
        "lazy_working_set", "gauge", "Made resident by page faults.", [(n, f.present) for n, f in lazy], "bytes"
    )
    faults = [
        ({**n, "kind": kind}, count) for n, f in lazy for kind, count in (("minor", f.minor), ("missing", f.missing))
    ]
    yield _family("lazy_faults", "counter", "Page faults served.", faults)
    refused = [(n, f.refused) for n, f in lazy]
    yield _family("lazy_faults_refused", "counter", "Page faults there was no memory for.", refused)


def _guests(snapshot: Snapshot) -> Iterator[Family]:
    def of(guest: str) -> Labels:
        return {"guest": guest}

    guests = snapshot.guests
    named = [({"guest": g.name, "kind": g.kind}, g) for g in guests]
    heard = [(n, g.state is GuestState.RUNNING) for n, g in named if g.state is not GuestState.SILENT]
    yield _family("guest_running", "gauge", "Whether a guest runs; of a silent one that is not known.", heard)
    silent = [(n, g.state is GuestState.SILENT) for n, g in named if g.kind is not GuestKind.FOREIGN]
    yield _family("guest_silent", "gauge", "Whether a guest did not answer in time.", silent)
    ages = [(n, (snapshot.taken_ns - g.answered_ns) / 1e9) for n, g in named if g.silent and g.answered_ns is not None]
    yield _family("guest_answer_age", "gauge", "How old the last answer of a silent guest is.", ages, "seconds")
    yield _family("guest_memory", "gauge", "Guest RAM.", [(of(g.name), g.memory) for g in guests], "bytes")
    seen = [(of(g.name), g.seen) for g in guests if g.seen is not None]
    yield _family("guest_rss", "gauge", "Resident memory of its process.", [(n, s.rss) for n, s in seen], "bytes")
    huge = [(n, s.huge) for n, s in seen]
    yield _family("guest_huge_mapped", "gauge", "Guest RAM mapped by huge pages.", huge, "bytes")
    vcpus = [(n, None if s.vcpus is None else len(s.vcpus)) for n, s in seen]
    yield _family("guest_vcpus", "gauge", "vCPUs of a guest.", vcpus)
    canaries = [(of(g.name), g.progress) for g in guests if g.progress is not None]
    yield _family("canary_beats", "counter", "Beats of a canary.", [(n, p.beats) for n, p in canaries])
    yield _family("canary_checked_pages", "counter", "Pages a canary checked.", [(n, p.checked) for n, p in canaries])
    yield _family("canary_wrong_bytes", "counter", "Wrong bytes it found.", [(n, p.wrong) for n, p in canaries])
    gaps = [(n, p.gap_ns / 1e9) for n, p in canaries]
    yield _family("canary_longest_gap", "gauge", "Longest pause a canary noticed.", gaps, "seconds")


def _usage(snapshot: Snapshot) -> Iterator[Family]:
    """CPU time, I/O and threads, where they were asked for: counters of which whoever scrapes makes rates."""
    host = snapshot.usage
    if host is not None:
        modes = ("user", "system", "idle", "guest", "steal")
        cpu = [({"mode": mode}, _seconds(getattr(host, f"{mode}_ns"))) for mode in modes]
        yield _family("host_cpu", "counter", "CPU time of the host; user has guest in it.", cpu, "seconds")
        loads = [({"minutes": minutes}, load) for minutes, load in zip((1, 5, 15), host.load, strict=False)]
        yield _family("host_load", "gauge", "Runnable and waiting threads.", loads)
        rss: list[Sample] = [({}, host.service_rss)]
        yield _family("service_rss", "gauge", "Resident memory of the control process.", rss, "bytes")
        if host.service is not None:
            yield from _process("service", "the control process", [({}, host.service)])
    guests = [({"guest": g.name}, g.seen.usage) for g in snapshot.guests if g.seen is not None and g.seen.usage]
    yield from _process("guest", "its process", guests)
    vcpus = [({**labels, "vcpu": vcpu.index}, _seconds(vcpu.cpu_ns)) for labels, used in guests for vcpu in used.vcpus]
    yield _family("guest_vcpu_cpu", "counter", "CPU time of a vCPU's thread.", vcpus, "seconds")


def _process(name: str, what: str, found: Sequence[tuple[Labels, Usage]]) -> Iterator[Family]:
    cpu = [({**labels, "mode": mode}, _seconds(ns)) for labels, used in found for mode, ns in _modes(used)]
    yield _family(f"{name}_cpu", "counter", f"CPU time of {what}.", cpu, "seconds")
    yield _family(f"{name}_threads", "gauge", f"Threads of {what}.", [(labels, used.threads) for labels, used in found])
    read, written = ([(labels, getattr(used, way)) for labels, used in found] for way in ("read", "written"))
    yield _family(f"{name}_storage_read", "counter", f"Fetched from storage for {what}.", read, "bytes")
    yield _family(f"{name}_storage_written", "counter", f"Sent to storage by {what}.", written, "bytes")
    ages = [(labels, _seconds(used.age_ns)) for labels, used in found]
    yield _family(f"{name}_age", "gauge", f"Since the start of {what}.", ages, "seconds")


def _modes(used: Usage) -> tuple[tuple[str, int | None], ...]:
    return ("user", used.user_ns), ("system", used.system_ns)


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e9


def _devices(snapshot: Snapshot) -> Iterator[Family]:
    windows = [({"window": w.id, "guest": w.guest or ""}, len(w.holders)) for w in snapshot.windows if w.holders]
    yield _family("window_holders", "gauge", "Processes that map an MMIO window.", windows)
    domains = [({"group": domain.group, "kind": domain.kind}, domain.mapped) for domain in snapshot.domains]
    yield _family("domain_mapped", "gauge", "IOVA space that is mapped.", domains, "bytes")


def _noticed(snapshot: Snapshot) -> Iterator[Family]:
    found = Counter((finding.severity, finding.id) for finding in snapshot.findings)
    findings = [({"severity": severity, "finding": id}, count) for (severity, id), count in found.items()]
    yield _family("findings", "gauge", "Findings by severity and kind.", findings)
    yield _family("gaps", "gauge", "Sources that could not be read.", [({}, len(snapshot.gaps))])
    if snapshot.events:
        yield _family("events", "counter", "Events so far.", [({}, snapshot.events[-1].seq)])


def _failed(_: Snapshot) -> Iterable[Family]:
    counts = [({"place": place}, count) for place, count in unforeseen.counts().items()]
    yield _family("unforeseen", "counter", "Exceptions that were not foreseen.", counts)
