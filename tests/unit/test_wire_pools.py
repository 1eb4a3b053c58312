"""Who reads tables that take long keeps nobody waiting who wants a Snapshot."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

from support.served import ServedSource
from support.waiting import LONG_S

from memconsole.backend.wire.client import Client
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.extents import ExtentTable

READERS = 8


class SlowTables(ServedSource):
    """A source whose PFN maps are there once ``go`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Semaphore(0)
        self.go = threading.Event()

    def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
        self.asked.release()
        assert self.go.wait(LONG_S)
        return super().extents(key)


def read(client: Client, key: str) -> None:
    client.extents(key).close()


def test_a_snapshot_waits_for_no_table(tmp_path: Path) -> None:
    source, path = SlowTables(), tmp_path / "control"
    clients: list[Client] = []
    handle = serve_in_thread(source, path)
    try:
        clients += [Client(path) for _ in range(READERS)]
        key = f"region:{source.snapshot().regions[0].name}"
        readers = [threading.Thread(target=partial(read, each, key)) for each in clients]
        for reader in readers:
            reader.start()
        try:
            assert all(source.asked.acquire(timeout=LONG_S) for _ in range(4)), "all threads that read tables read"
            clients.append(Client(path))
            assert clients[-1].snapshot().host == source.snapshot().host
        finally:
            source.go.set()
            for reader in readers:
                reader.join()
    finally:
        for client in clients:
            client.close()
        handle.close()
