"""A QEMU's monitor as a value: what it is set to, what it does when it is told to migrate, and all it was told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memconsole.errors import GuestError

CAPABILITIES = ("x-ignore-shared", "xbzrle", "return-path", "switchover-ack")
ANSWERS = bytes.fromhex("00070000 00010004 00000000")
"""What it waits for from who reads: it may switch over, and all is well."""


@dataclass
class FakeQemu:
    """``refuses``: commands it refuses. ``cut``: bytes of its stream that it writes before it fails, if it does.

    ``never``: its guest dirties RAM for ever, so that the stream comes when the guest is stopped, or cancelled.
    """

    stream: bytes
    status: str = "running"
    capabilities: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(CAPABILITIES, False))
    bandwidth: int = 134217728
    migration: str = "none"
    refuses: frozenset[str] = frozenset()
    cut: int | None = None
    never: bool = False
    told: list[str] = field(default_factory=list)
    _pipe: int = -1

    def __call__(self, command: str, arguments: Mapping[str, object], fd: int | None = None) -> Any:
        """What it returns."""
        self.told.append(command)
        if command in self.refuses:
            raise GuestError(f"QEMU refused {command}", "a fault")
        return getattr(self, command.replace("-", "_"))(fd=fd, **{k.replace("-", "_"): v for k, v in arguments.items()})

    def query_status(self, **_: object) -> object:
        return {"status": self.status, "running": self.status == "running"}

    def query_migrate(self, **_: object) -> object:
        if self.migration == "none":
            return {}
        said: dict[str, object] = {"status": self.migration, "ram": {"dirty-sync-count": 3}, "downtime": 12}
        return {**said, "error-desc": "Broken pipe"} if self.migration == "failed" else said

    def query_migrate_capabilities(self, **_: object) -> object:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def query_migrate_parameters(self, **_: object) -> object:
        return {"max-bandwidth": self.bandwidth, "downtime-limit": 300}

    def migrate_set_capabilities(self, capabilities: list[dict[str, Any]], **_: object) -> object:
        wanted = self.capabilities | {each["capability"]: each["state"] for each in capabilities}
        if wanted.get("switchover-ack") and not wanted["return-path"]:
            raise GuestError("QEMU refused it", "Capability 'switchover-ack' requires capability 'return-path'")
        self.capabilities = wanted
        return {}

    def migrate_set_parameters(self, max_bandwidth: int, **_: object) -> object:
        self.bandwidth = max_bandwidth
        return {}

    def getfd(self, fd: int | None, fdname: str) -> object:
        assert fd is not None
        assert fdname
        self._pipe = os.dup(fd)
        return {}

    def closefd(self, **_: object) -> object:
        self._close()
        return {}

    def migrate(self, uri: str, **_: object) -> object:
        assert uri.startswith("fd:")
        self.migration = "active"
        if not self.never:
            self._send()
        return {}

    def stop(self, **_: object) -> object:
        self.status = "paused"
        if self.migration == "active":
            self._send()
        return {}

    def cont(self, **_: object) -> object:
        self.status = "running"
        return {}

    def migrate_cancel(self, **_: object) -> object:
        self.migration = "cancelled"
        self._close()
        return {}

    @property
    def holds_pipe(self) -> bool:
        return self._pipe >= 0

    def _send(self) -> None:
        if self.capabilities.get("return-path"):
            assert os.read(self._pipe, 64) == ANSWERS
        rest = memoryview(self.stream if self.cut is None else self.stream[: self.cut])
        try:
            while rest:
                rest = rest[os.write(self._pipe, rest) :]
        except BrokenPipeError:
            self.migration = "failed"
        else:
            self.migration = "completed" if self.cut is None else "failed"
        if self.migration == "completed":
            self.status = "postmigrate"
        self._close()

    def _close(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
        self._pipe = -1
