"""The service as a client that others wrote sees it: typed by its interface, with descriptors passed.

asyncvarlink describes an interface by Python's types, is strict about what comes, and takes file descriptors.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
from asyncvarlink import (
    FileDescriptor,
    GenericVarlinkErrorReply,
    VarlinkClientProtocol,
    VarlinkInterface,
    VarlinkInterfaceProxy,
    connect_unix_varlink,
    varlinkmethod,
)
from support.served import ServedSource
from support.synthetic import snapshot

from memconsole.backend.wire import protocol
from memconsole.backend.wire.serving import RunningService, serve_in_thread
from memconsole.extents import ExtentTable
from memconsole.model import Event


class Greeting(TypedDict):
    protocol: int
    version: str
    label: str
    role: str
    read_only: str


class Extents(TypedDict):
    fd: FileDescriptor
    rows: int
    page_size: int


class Segments(TypedDict):
    fds: list[FileDescriptor]
    sizes: list[int]


class Taken(TypedDict, total=False):
    generation: int
    base: int
    snapshot: dict[str, Any]
    changes: dict[str, Any]


class Console(VarlinkInterface, name="io.memconsole"):
    """As much of the interface as a client wants."""

    @varlinkmethod(allow_foreign=True)
    def Hello(self, *, protocol: int) -> Greeting: ...

    @varlinkmethod(allow_foreign=True)
    def GetSnapshot(self, *, known: int | None = None) -> Taken: ...

    @varlinkmethod(allow_foreign=True)
    def GetExtents(self, *, key: str) -> Extents: ...

    @varlinkmethod(allow_foreign=True)
    def OpenRegion(self, *, region: str) -> Segments: ...

    @varlinkmethod(return_parameter="plan", allow_foreign=True)
    def Plan(self, *, action: dict[str, Any]) -> dict[str, Any]: ...

    @varlinkmethod(return_parameter="outcome", allow_foreign=True)
    def Apply(self, *, action: dict[str, Any]) -> dict[str, Any]: ...

    @varlinkmethod(return_parameter="events", allow_foreign=True)
    def Events(self, *, after: int | None = None) -> Iterator[list[dict[str, Any]]]: ...

    @varlinkmethod(allow_foreign=True)
    def Watch(self, *, every_ms: int | None = None) -> Iterator[Taken]: ...


@pytest.fixture
def source() -> ServedSource:
    return ServedSource(snapshot(20, 5))


@pytest.fixture
def serving(source: ServedSource, tmp_path: Path) -> Iterator[RunningService]:
    handle = serve_in_thread(source, tmp_path / "control")
    yield handle
    handle.close()


@contextlib.asynccontextmanager
async def console(path: Path) -> AsyncIterator[VarlinkInterfaceProxy]:
    transport, client = await connect_unix_varlink(VarlinkClientProtocol, path)
    try:
        yield client.make_proxy(Console)
    finally:
        transport.close()
        await asyncio.sleep(0)


async def test_calls_are_answered_as_their_types_say(
    serving: RunningService, source: ServedSource, tmp_path: Path
) -> None:
    async with console(tmp_path / "control") as proxy:
        assert (await proxy.Hello(protocol=protocol.PROTOCOL))["role"] == "operator"
        shown = await proxy.GetSnapshot()
        assert shown["snapshot"]["regions"][0]["name"] == source.snapshot().regions[0].name
        assert set(await proxy.GetSnapshot(known=shown["generation"])) == {"generation"}
        action = {"do": "reserve", "name": "theirs", "size": 4096}
        assert (await proxy.Plan(action=action))["plan"]["effects"]
        assert (await proxy.Apply(action=action))["outcome"]["subject"] == "theirs"


async def test_an_error_has_its_name_and_its_sentences(serving: RunningService, tmp_path: Path) -> None:
    async with console(tmp_path / "control") as proxy:
        with pytest.raises(GenericVarlinkErrorReply) as caught:
            await proxy.GetExtents(key="region:nowhere")
        assert caught.value.name == "io.memconsole.NotFound"
        assert caught.value.parameters["code"] == "NotFound"


async def test_a_table_comes_by_descriptor(serving: RunningService, source: ServedSource, tmp_path: Path) -> None:
    key = f"region:{source.snapshot().regions[0].name}"
    async with console(tmp_path / "control") as proxy:
        with (
            await proxy.GetExtents(key=key) as found,
            source.extents(key) as local,
            ExtentTable.from_fd(found["fd"].fileno()) as table,
        ):
            assert table.to_bytes() == local.to_bytes()
            assert (found["rows"], found["page_size"]) == (len(table), table.page_size)


async def test_segments_come_by_descriptor_in_order(
    serving: RunningService, source: ServedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for number in range(3):
        made.append(os.memfd_create(f"segment-{number}"))
        os.truncate(made[-1], 4096 << number)
    inodes = [os.fstat(fd).st_ino for fd in made]
    monkeypatch.setattr(source, "open_readonly", lambda region, *, peer="": tuple(made))
    async with console(tmp_path / "control") as proxy:
        with await proxy.OpenRegion(region="web") as found:
            assert found["sizes"] == [4096, 8192, 16384]
            assert [os.fstat(fd.fileno()).st_ino for fd in found["fds"]] == inodes


async def test_streams_go_on(serving: RunningService, source: ServedSource, tmp_path: Path) -> None:
    async with console(tmp_path / "control") as proxy:
        pieces = proxy.Watch(every_ms=250)
        first = await anext(pieces)
        assert first["snapshot"]["host"]["name"] == source.snapshot().host.name
        source.show(snapshot(20, 5, beats=9))
        second = await anext(pieces)
        assert second["base"] == first["generation"]
        assert second["changes"]["changed"]["guests"]
    async with console(tmp_path / "control") as proxy, console(tmp_path / "control") as other:
        news = proxy.Events(after=source.events(0)[-1].seq)
        coming = asyncio.ensure_future(anext(news))
        await other.Apply(action={"do": "reserve", "name": "fresh", "size": 4096})
        (event,) = (await coming)["events"]
        assert Event(**event).subject == "fresh"
