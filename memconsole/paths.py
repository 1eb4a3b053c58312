"""Where memconsole's files lie: sockets and guests' files in the runtime directory, state beside them."""

from __future__ import annotations

import os
from pathlib import Path

HOST = Path("/run/memconsole")
"""The runtime directory of the host's own service."""


def runtime_dir() -> Path:
    """``/run/memconsole`` for root, else a directory of the user's own."""
    if os.geteuid() == 0:
        return HOST
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "memconsole" if base else Path(f"/tmp/memconsole-{os.geteuid()}")  # noqa: S108 - made 0700


def control_socket(runtime: Path | None = None) -> Path:
    """The Varlink socket of the control process."""
    return (runtime or runtime_dir()) / "control"


def nearest_socket() -> Path:
    """The control socket to ask: the user's own where there is one, else the host's where this user may connect."""
    own, host = control_socket(), control_socket(HOST)
    return host if not own.exists() and os.access(host, os.W_OK) else own


def agents_socket(runtime: Path | None = None) -> Path:
    """The socket guests connect to for their grants."""
    return (runtime or runtime_dir()) / "agents"


def state_dir() -> Path:
    """Where the audit trail and the history are kept: ``/var/lib/memconsole`` for root, else ``$XDG_STATE_HOME``."""
    if os.geteuid() == 0:
        return Path("/var/lib/memconsole")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "memconsole"
