"""The playbook rehearse, by the real ansible-playbook: every VMM of three control processes is started anew."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.playbooks import local
from support.services import Service, services

from memconsole.actions import GuestStart
from memconsole.model import Guest

M = 1 << 20
NAMES = ("hv1", "hv2", "hv3")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reads PFNs and rules guests: root")


def guest(service: Service) -> Guest:
    with contextlib.closing(service.client()) as client:
        return next(each for each in client.snapshot().guests if each.name == "canary")


@pytest.fixture
def fleet() -> Iterator[dict[str, Service]]:
    """Three control processes with a canary each."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(services()) for name in NAMES}
        for service in found.values():
            service.start()
            with contextlib.closing(service.client()) as client:
                client.apply(GuestStart("canary", memory=8 * M))
        try:
            yield found
        finally:
            for service in found.values():
                pid = guest(service).pid
                assert pid is not None
                os.kill(pid, signal.SIGCONT)
                service.guests.add(pid)


def test_every_guest_of_every_host_is_started_anew_once_all_hosts_can(
    fleet: dict[str, Service], tmp_path: Path
) -> None:
    engine = local(tmp_path, {name: service.path for name, service in fleet.items()})
    before = {name: guest(service).pid for name, service in fleet.items()}
    stopped = before["hv2"]
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    held = engine.play("rehearse")
    assert held.returncode != 0
    assert engine.states() == ["waiting", "refused", "waiting"]
    assert "GuestSilent" in engine.report()["hosts"][1]["why"]
    assert {name: guest(service).pid for name, service in fleet.items()} == before

    os.kill(stopped, signal.SIGCONT)
    done = engine.play("rehearse", "-e", "memconsole_serial=2")
    assert done.returncode == 0, done.stdout
    report = engine.report()
    assert (report["title"], report["states"]) == ("Rehearsal", {"done": 3})
    for name in NAMES:
        found_of = engine.details(name)
        assert found_of["report"]["kind"] == "rehearse"
        assert found_of["blackouts"]["canary"] > 0
    for name, service in fleet.items():
        found = guest(service)
        assert found.pid != before[name]
        assert found.progress is not None
        assert found.progress.wrong == 0
