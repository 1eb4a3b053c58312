"""Which processes a sitting at the console ends with itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from support.sitting import note_guests

from memconsole.model import GuestKind


class OneSnapshot:
    """A service whose Snapshot has these guests: (kind, PID)."""

    def __init__(self, *guests: tuple[GuestKind, int | None]) -> None:
        self._guests = [SimpleNamespace(kind=kind, pid=pid) for kind, pid in guests]
        self.guests: set[int] = set()

    def client(self) -> Any:
        return SimpleNamespace(snapshot=lambda: SimpleNamespace(guests=self._guests), close=lambda: None)


def test_the_guests_of_others_are_left_to_them() -> None:
    service: Any = OneSnapshot((GuestKind.CANARY, 10), (GuestKind.FOREIGN, 11), (GuestKind.QEMU, None))
    note_guests(service)
    assert service.guests == {10}
