"""A Snapshot as metrics, in two formats and two ways: an HTTP endpoint on a unix socket, and a textfile.

The endpoint speaks OpenMetrics 1.0: families of samples, each with its type, unit and help, and ``# EOF``. What reads
the textfile (node_exporter) knows only the older exposition format 0.0.4, in which a family has the whole name of its
samples, and there is no unit, no end and no info: that is a gauge. A sample whose value the kernel did not give is left
out, never zero.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from memconsole import unforeseen, wholefile
from memconsole.backend.wire.families import PARTS, Family, Labels, families
from memconsole.backend.wire.loop import PeerConnection
from memconsole.backend.wire.roles import Role
from memconsole.backend.wire.server import Service
from memconsole.backend.wire.shared_survey import SharedSnapshot
from memconsole.errors import KernelRefused, MemconsoleError
from memconsole.model import Snapshot

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PREFIX = "memconsole_"
"""Of every name."""


def text(snapshot: Snapshot) -> str:
    """The metrics of a Snapshot in OpenMetrics 1.0."""
    return "".join(_openmetrics(family) for family in families(snapshot)) + "# EOF\n"


def exposition(snapshot: Snapshot) -> str:
    """The metrics of a Snapshot in the exposition format 0.0.4."""
    return "".join(_exposition(family) for family in families(snapshot))


def _openmetrics(family: Family) -> str:
    name = f"{PREFIX}{family.name}"
    unit = f"# UNIT {name} {family.unit}\n" if family.unit else ""
    return f"# TYPE {name} {family.kind}\n{unit}# HELP {name} {family.help}\n" + _lines(family)


def _exposition(family: Family) -> str:
    name = f"{PREFIX}{family.name}{family.suffix}"
    kind = "gauge" if family.kind == "info" else family.kind
    return f"# HELP {name} {family.help}\n# TYPE {name} {kind}\n" + _lines(family)


def _lines(family: Family) -> str:
    name = f"{PREFIX}{family.name}{family.suffix}"
    return "".join(f"{name}{_labels(labels)} {value:.17g}\n" for labels, value in family.samples)


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(str(value))}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@dataclass(eq=False)
class Endpoint:
    """The speaker of HTTP on the metrics socket: ``GET /metrics`` for whoever may look, one request a connection."""

    service: Service
    end: bytes = b"\r\n\r\n"

    def opened(self, connection: PeerConnection) -> None:
        """Nothing is said until the peer asks."""

    def closed(self, connection: PeerConnection) -> None:
        """Nothing is kept of a peer."""

    def refuse(self, connection: PeerConnection, code: str, why: str) -> None:
        """Say which bound of the loop the peer ran into."""
        self._reply(connection, "400 Bad Request", f"{code}: {why}\n")

    def received(self, connection: PeerConnection, message: bytes) -> None:
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
            self.service.survey.get(lambda taken: self._taken(connection, taken), PARTS)

    def _taken(self, connection: PeerConnection, taken: SharedSnapshot | MemconsoleError) -> None:
        if isinstance(taken, MemconsoleError):
            self._reply(connection, "503 Service Unavailable", f"{taken}\n")
            return

        def job() -> None:
            body = unforeseen.attempt("the metrics", "call", lambda: text(taken.snapshot))
            if isinstance(body, MemconsoleError):
                connection.loop.call(lambda: self._reply(connection, "500 Internal Server Error", f"{body}\n"))
            else:
                connection.loop.call(lambda: self._reply(connection, "200 OK", body, CONTENT_TYPE))

        if not self.service.read(job):
            self._reply(connection, "503 Service Unavailable", "the service is busy\n")

    def _reply(
        self, connection: PeerConnection, status: str, body: str, kind: str = "text/plain; charset=utf-8"
    ) -> None:
        raw = body.encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
        connection.send(head.encode() + raw)
        connection.finish()


def write_textfile(path: Path, snapshot: Snapshot) -> None:
    """Put the metrics where node_exporter's textfile collector finds them; a reader sees the old or the new, whole.

    Written by root, the file is its directory's owner's and group's to read: the collector is not root.

    Raises:
        KernelRefused: the file cannot be written; the old one stays.
    """
    try:
        about = path.parent.stat()
        owner = (about.st_uid, about.st_gid) if os.geteuid() == 0 else None
        with wholefile.written(path, mode=0o640 if owner else None, owner=owner) as file:
            file.write(exposition(snapshot).encode())
    except OSError as error:
        raise KernelRefused(f"write {path}", error.errno or 0, remedy="make room, or give another file") from None
