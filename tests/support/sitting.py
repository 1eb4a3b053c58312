"""The host that a person sits at: a service that records, and two canaries."""

from __future__ import annotations

import contextlib
import subprocess

from memconsole.model import GuestKind
from support.services import Service


def guests_of(service: Service) -> None:
    """Start the service and its guests."""
    service.start("--record", "0.5")
    for name in ("canary-a", "canary-b"):
        started = subprocess.run(
            service.command("guest", "start", name, "--memory", "32M"), capture_output=True, text=True, check=False
        )
        assert started.returncode == 0, started.stderr
        note_guests(service)


def note_guests(service: Service) -> None:
    """Have the guests that there are now ended with the service; those of others on this host are theirs."""
    with contextlib.closing(service.client()) as client:
        ours = [guest for guest in client.snapshot().guests if guest.kind is not GuestKind.FOREIGN]
        service.guests |= {guest.pid for guest in ours if guest.pid is not None}
