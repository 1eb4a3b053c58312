"""A stand-in for the service manager: takes sd_notify messages, keeps fds as systemd does, gives them back."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from pathlib import Path

F_DUPFD_QUERY = 1027


class Manager:
    """What systemd does with FDSTORE=1, FDSTOREREMOVE=1 and BARRIER=1 (sd_notify(3)), over a real NOTIFY_SOCKET.

    Like systemd it ignores an fd that is the same open file as one it holds, and drops silently what exceeds ``room``.
    """

    def __init__(self, directory: Path, room: int = 1000) -> None:
        self.path = directory / "notify"
        self.store: list[tuple[str, int]] = []
        self.room = room
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def environ(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), "FDSTORE": str(self.room)}

    def give_back(self) -> list[tuple[str, int]]:
        """What a service that starts again is passed."""
        return [(name, os.dup(fd)) for name, fd in self.store]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"END", str(self.path))
        self._thread.join()
        self._socket.close()
        for _, fd in self.store:
            os.close(fd)

    def _run(self) -> None:
        while True:
            text, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
            if text == b"END":
                return
            fields = dict(line.split("=", 1) for line in text.decode().splitlines())
            name = fields.get("FDNAME", "stored")
            assert ":" not in name
            assert len(name) <= 255
            if "FDSTOREREMOVE" in fields:
                for held in [entry for entry in self.store if entry[0] == name]:
                    self.store.remove(held)
                    os.close(held[1])
            for fd in fds:
                known = any(fcntl.fcntl(fd, F_DUPFD_QUERY, held) for _, held in self.store)
                if "FDSTORE" in fields and not known and len(self.store) < self.room:
                    self.store.append((name, fd))
                else:
                    os.close(fd)
