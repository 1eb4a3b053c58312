"""``memconsole serve`` under what should not be: clients without manners, full disks, ten thousand actions."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import raised
from support.guests import fd_links
from support.served import Raw
from support.services import Service, services
from support.waiting import until

from memconsole import actions
from memconsole.backend.wire import protocol
from memconsole.backend.wire.client import Client
from memconsole.errors import KernelRefused, WireError
from memconsole.model import Snapshot

M = 1 << 20
ACTIONS = 10_000 if os.environ.get("MEMCONSOLE_SOAK") else 2_000
GROWTH = 48 * M
"""Bytes of the service's own memory that abuse may cost: what the loop may buffer (32 MiB), and half as much again."""


@pytest.fixture
def service() -> Iterator[Service]:
    with services() as made:
        yield made


def held(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def anonymous(pid: int) -> int:
    """Bytes of a process's own memory: without what it maps of files and shared memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_no_descriptor_and_little_memory_is_left_after_many_actions(service: Service) -> None:
    process = service.start()
    with contextlib.closing(service.client()) as client:

        def act() -> None:
            client.apply(actions.Reserve("once", 4096))
            client.extents("region:once").close()
            client.apply(actions.Release("once"))

        for _ in range(ACTIONS // 4):  # by then it has done what it does now and then, too: recorded, judged, compacted
            act()
        client.snapshot()
        fds, memory = held(process.pid), anonymous(process.pid)
        for _ in range(ACTIONS // 2):
            act()
        until(lambda: held(process.pid) <= fds, "every descriptor is closed again")
        assert anonymous(process.pid) < memory + 24 * M  # what it keeps of events and of what it looked up is bounded
        assert [region.name for region in client.snapshot().regions] == []


def test_two_hundred_clients_without_manners_cost_little(service: Service) -> None:
    process = service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.Reserve("web", M))
        client.snapshot()
        fds, memory = held(process.pid), anonymous(process.pid)
        most = 0
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                raws = [stack.enter_context(Raw(service.path)) for _ in range(200)]
                for number, raw in enumerate(raws):
                    raw.sock.setblocking(False)
                    with contextlib.suppress(OSError):
                        match number % 4:
                            case 0:
                                raw.send(os.urandom(1000) + b"\0")
                            case 1:
                                raw.send(b'{"method":"io.memconsole.GetSn')
                            case 2:
                                for _ in range(40):
                                    raw.send(b"y" * 65536)
                with contextlib.closing(Client(service.path)) as newcomer:
                    assert newcomer.snapshot().regions[0].name == "web"
                most = max(most, anonymous(process.pid))
        assert most < memory + GROWTH
        until(lambda: held(process.pid) <= fds, "every connection is closed again")
        client.apply(actions.Release("web"))


def test_a_ledger_that_cannot_grow_refuses_and_loses_nothing(service: Service) -> None:
    process = service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.Reserve("web", M))
        client.apply(actions.Reserve("spare", M))
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        ledger = next(path for path, said in fd_links(process.pid).items() if "memconsole-ledger" in said)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (ledger.stat().st_size, hard))
        done = 0
        code = ""
        while not code:
            try:
                client.apply(actions.Reserve(f"r{done}", 4096))
            except KernelRefused as error:
                code = error.code
            else:
                done += 1
        assert code == "LedgerFull"
        names = {region.name for region in client.snapshot().regions}
        assert names == {"web", "spare", *(f"r{number}" for number in range(done))}
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        client.apply(actions.Reserve("later", 4096))
    service.end(9)
    service.start()
    with contextlib.closing(service.client()) as client:
        shown = client.snapshot()
        assert {region.name for region in shown.regions} == names | {"later"}
        assert raised(shown) == []


@pytest.fixture
def small_disk(service: Service) -> Iterator[Path]:
    """The service's state directory on a disk of 1 MiB."""
    service.state.mkdir(mode=0o700)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M,mode=0700", "tmpfs", service.state],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    yield service.state
    service.end(9)
    subprocess.run(["umount", service.state], check=True)


def test_a_full_disk_under_the_state_is_a_finding_and_stops_no_action_and_no_service(
    service: Service, small_disk: Path
) -> None:
    service.start("--record", "0.25")
    with contextlib.closing(service.client()) as client:
        until(lambda: len(client.history()) > 0, "something is recorded")
        (small_disk / "filler").write_bytes(b"")
        with (small_disk / "filler").open("r+b", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))

        def found(shown: Snapshot) -> set[str]:
            return {finding.id for finding in shown.findings}

        until(lambda: "history-stopped" in found(client.snapshot()), "that nothing is recorded is a finding")
        for number in range(200):
            client.apply(actions.Reserve(f"r{number}", 4096))
        until(lambda: "audit-behind" in found(client.snapshot()), "that the trail has gaps is a finding")
        assert len(client.snapshot().regions) == 200
    service.end(9)
    service.start("--record", "0.25")
    with contextlib.closing(service.client()) as client:
        until(lambda: {"history-stopped", "audit-behind"} <= found(client.snapshot()), "one that begins says it, too")
        assert len(client.snapshot().regions) == 200
        (small_disk / "filler").unlink()
        until(lambda: "history-stopped" not in found(client.snapshot()), "recording goes on")
        assert client.at(client.history()[-1]).regions


def test_a_client_of_another_version_is_told_and_loses_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.start()
    spoken = protocol.PROTOCOL
    monkeypatch.setattr(protocol, "PROTOCOL", 99)
    with pytest.raises(WireError) as caught:
        Client(service.path)
    assert caught.value.code == "ProtocolVersion"
    assert f"99 and {spoken}" in caught.value.what
    assert "upgrade" in caught.value.remedy
    monkeypatch.undo()
    service.client().close()
