"""A Snapshot as OpenMetrics text, and two ways to it: an HTTP endpoint on a unix socket, and a textfile.

The text follows the OpenMetrics 1.0 exposition format: families of samples, each with its type, unit and help, and
``# EOF``. A sample whose value the kernel did not give is left out, never zero.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import memconsole
from memconsole.backend.wire.loop import Connection
from memconsole.backend.wire.roles import Role
from memconsole.backend.wire.server import Service
from memconsole.backend.wire.shared import Taken
from memconsole.errors import KernelRefused
from memconsole.model import GuestState, Snapshot

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Labels = Mapping[str, object]
Sample = tuple[Labels, float | None]


def text(snapshot: Snapshot) -> str:
    """The metrics of a Snapshot."""
    families = [*_host(snapshot), *_regions(snapshot), *_guests(snapshot), *_devices(snapshot), *_noticed(snapshot)]
    return "".join(families) + "# EOF\n"


def _family(name: str, kind: str, help: str, samples: Iterable[Sample], unit: str = "") -> str:
    """One family; nothing if it has no sample. A counter's samples end in ``_total``, an info's in ``_info``."""
    whole = f"memconsole_{name}_{unit}" if unit else f"memconsole_{name}"
    suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
    lines = [f"{whole}{suffix}{_labels(labels)} {value:.17g}\n" for labels, value in samples if value is not None]
    if not lines:
        return ""
    head = f"# TYPE {whole} {kind}\n" + (f"# UNIT {whole} {unit}\n" if unit else "") + f"# HELP {whole} {help}\n"
    return head + "".join(lines)


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(str(value))}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _host(snapshot: Snapshot) -> Iterable[str]:
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


def _regions(snapshot: Snapshot) -> Iterable[str]:
    sizes = [({"region": r.name, "store": r.store, "state": r.state}, r.size) for r in snapshot.regions]
    yield _family("region_size", "gauge", "Memory set aside.", sizes, "bytes")
    seen = [({"region": r.name}, r.seen) for r in snapshot.regions if r.seen is not None]
    yield _family("region_resident", "gauge", "Memory with frames.", [(n, s.resident) for n, s in seen], "bytes")
    yield _family("region_runs", "gauge", "Contiguous runs at the last scan.", [(n, s.runs) for n, s in seen])
    yield _family("region_mappers", "gauge", "Processes that map it.", [(n, len(s.mappers)) for n, s in seen])
    states = Counter((grant.guest, grant.state) for grant in snapshot.grants)
    grants = [({"guest": guest, "state": state}, count) for (guest, state), count in states.items()]
    yield _family("grants", "gauge", "Grants by guest and state.", grants)
    lazy = [({"guest": g.guest, "grant": g.id}, g.faults) for g in snapshot.grants if g.faults is not None]
    yield _family("lazy_working_set", "gauge", "Put in place by faults.", [(n, f.present) for n, f in lazy], "bytes")
    faults = [
        ({**n, "kind": kind}, count) for n, f in lazy for kind, count in (("minor", f.minor), ("missing", f.missing))
    ]
    yield _family("lazy_faults", "counter", "Page faults served.", faults)
    refused = [(n, f.refused) for n, f in lazy]
    yield _family("lazy_faults_refused", "counter", "Page faults there was no memory for.", refused)


def _guests(snapshot: Snapshot) -> Iterable[str]:
    def of(guest: str) -> Labels:
        return {"guest": guest}

    guests = snapshot.guests
    running = [({"guest": g.name, "kind": g.kind}, g.state is GuestState.RUNNING) for g in guests]
    yield _family("guest_running", "gauge", "Whether a guest runs.", running)
    yield _family("guest_memory", "gauge", "Guest RAM.", [(of(g.name), g.memory) for g in guests], "bytes")
    seen = [(of(g.name), g.seen) for g in guests if g.seen is not None]
    yield _family("guest_rss", "gauge", "Memory its process has in place.", [(n, s.rss) for n, s in seen], "bytes")
    canaries = [(of(g.name), g.progress) for g in guests if g.progress is not None]
    yield _family("canary_beats", "counter", "Beats of a canary.", [(n, p.beats) for n, p in canaries])
    yield _family("canary_checked_pages", "counter", "Pages a canary checked.", [(n, p.checked) for n, p in canaries])
    yield _family("canary_wrong_bytes", "counter", "Wrong bytes it found.", [(n, p.wrong) for n, p in canaries])
    gaps = [(n, p.gap_ns / 1e9) for n, p in canaries]
    yield _family("canary_longest_gap", "gauge", "Longest pause a canary noticed.", gaps, "seconds")


def _devices(snapshot: Snapshot) -> Iterable[str]:
    windows = [({"window": w.id, "guest": w.guest or ""}, len(w.holders)) for w in snapshot.windows if w.holders]
    yield _family("window_holders", "gauge", "Processes that map an MMIO window.", windows)
    domains = [({"group": domain.group, "kind": domain.kind}, domain.mapped) for domain in snapshot.domains]
    yield _family("domain_mapped", "gauge", "IOVA space that leads somewhere.", domains, "bytes")


def _noticed(snapshot: Snapshot) -> Iterable[str]:
    found = Counter((finding.severity, finding.id) for finding in snapshot.findings)
    findings = [({"severity": severity, "finding": id}, count) for (severity, id), count in found.items()]
    yield _family("findings", "gauge", "Differences between what should be and what is.", findings)
    yield _family("gaps", "gauge", "Sources that could not be read.", [({}, len(snapshot.gaps))])
    if snapshot.events:
        yield _family("events", "counter", "Events so far.", [({}, snapshot.events[-1].seq)])


@dataclass(eq=False)
class Endpoint:
    """The speaker of HTTP on the metrics socket: ``GET /metrics`` for whoever may look, one request a connection."""

    service: Service
    end: bytes = b"\r\n\r\n"

    def opened(self, connection: Connection) -> None:
        """Nothing is said until the peer asks."""

    def closed(self, connection: Connection) -> None:
        """Nothing is kept of a peer."""

    def refuse(self, connection: Connection, code: str, why: str) -> None:
        """Say which bound of the loop the peer ran into."""
        self._reply(connection, "400 Bad Request", f"{code}: {why}\n")

    def received(self, connection: Connection, message: bytes) -> None:
        """Answer one request."""
        connection.busy = True
        words = message.split(b"\r\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/"):
            self._reply(connection, "400 Bad Request", "this is no HTTP request\n")
        elif words[0] != b"GET":
            self._reply(connection, "405 Method Not Allowed", "only GET\n")
        elif words[1] not in {b"/metrics", b"/"}:
            self._reply(connection, "404 Not Found", "there is only /metrics\n")
        elif self.service.roles.of(connection.peer) < Role.VIEWER:
            self.service.record_denial(connection.peer, "metrics")
            self._reply(connection, "403 Forbidden", "your user is neither operator nor viewer\n")
        else:
            self.service.survey.get(lambda taken: self._taken(connection, taken))

    def _taken(self, connection: Connection, taken: Taken | Exception) -> None:
        if isinstance(taken, Exception):
            self._reply(connection, "503 Service Unavailable", f"{taken}\n")
            return

        def job() -> None:
            body = text(taken.snapshot)
            connection.loop.call(lambda: self._reply(connection, "200 OK", body, CONTENT_TYPE))

        if not self.service.read(job):
            self._reply(connection, "503 Service Unavailable", "the service is busy\n")

    def _reply(self, connection: Connection, status: str, body: str, kind: str = "text/plain; charset=utf-8") -> None:
        raw = body.encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
        connection.send(head.encode() + raw)
        connection.finish()


def write_textfile(path: Path, snapshot: Snapshot) -> None:
    """Put the metrics where node_exporter's textfile collector finds them; a reader sees the old or the new, whole.

    Raises:
        KernelRefused: the file cannot be written; the old one stays.
    """
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        whole.write_text(text(snapshot), encoding="utf-8")
        whole.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            whole.unlink()
        raise KernelRefused(f"write {path}", error.errno or 0, remedy="make room, or give another file") from None
