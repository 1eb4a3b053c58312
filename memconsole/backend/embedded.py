"""A control process inside the one that asks: a command without a service, a console by itself, tests."""

from __future__ import annotations

import os
from pathlib import Path

from memconsole.backend.control import HISTORY, Control

HISTORY_BYTES = 16 << 20
"""Bytes such a history may have: hours at a snapshot a second, in memory where the directory is a tmpfs."""


def embedded(
    runtime_dir: Path | None = None,
    *,
    read_only: str = "",
    root: Path = Path("/"),
    record_s: float = 0,
    brief: bool = False,
) -> Control:
    """A control process inside this one, which has custody itself; its directory is private unless one is given.

    With ``record_s`` it records a history of its own, at most one Snapshot every so many seconds. A ``brief`` one is
    for one command: it sees to nothing of itself.
    """
    from memconsole.backend.custody.holder import OwnCustody

    own = None
    if runtime_dir is None:
        base = Path("/run") if os.access("/run", os.W_OK) else Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp"))  # noqa: S108
        runtime_dir = own = base / f"memconsole-{os.getpid()}-{os.urandom(3).hex()}"
    past = None
    if record_s:
        from memconsole.backend.history.recorder import HistoryRecorder

        runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        past = HistoryRecorder(runtime_dir / HISTORY, record_s, max_bytes=HISTORY_BYTES)
    try:
        return Control(
            runtime_dir, OwnCustody(own), past=past, label="embedded", read_only=read_only, root=root, brief=brief
        )
    except BaseException:
        if past is not None:
            past.close()
        raise
