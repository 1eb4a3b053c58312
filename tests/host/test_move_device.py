"""A region leaves a raw device for another store, and whoever dies meanwhile leaves it whole in one of them.

The device is a file here: what only a device has is seen in tests/vm/test_arena.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import arenas
from support.controls import M, region
from support.faultpoints import fault_points
from support.worlds import World, worlds

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.revoke import POINTS
from memconsole.backend.stores import ranges
from memconsole.backend.stores.pieces import PieceStore
from memconsole.extents import digest_fd

SIZE = 4 * M
TESTS = Path(__file__).parent.parent
MOVED = [point for point in POINTS if ".move." in point]
STAYS = MOVED[: MOVED.index("revoke.move.committed")]


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for a device, in this process as long as the test lasts."""
    file = tmp_path / "dax0.0"
    with file.open("wb") as new:
        new.truncate(32 * M)
    monkeypatch.setattr(ranges, "devdax", ranges.devdax)
    defaults = PieceStore.__init__.__kwdefaults__ or {}
    for name in ("nodes", "node"):
        monkeypatch.setitem(defaults, name, defaults[name])
    arenas.take_as_devdax(file)
    return file


@pytest.fixture
def world(device: Path) -> Iterator[World]:
    """A world that knows the device, in the processes that die there too."""
    prelude = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom pathlib import Path\nfrom support import arenas\n"
    with worlds(f"{prelude}arenas.take_as_devdax(Path({str(device)!r}))\n") as made:
        yield made


def store(control: Control) -> PieceStore:
    found = control._desk.stores["devdax"]
    assert isinstance(found, PieceStore)
    return found


def make(control: Control, device: Path) -> str:
    """A region on the device with contents that are nowhere twice; their digest."""
    control.apply(do.Reserve("web", SIZE, "devdax"))
    with device.open("r+b") as file:
        file.seek(region(control.snapshot(), "web").segments[0].start)
        file.write(os.urandom(4096) * (SIZE // 4096))
    return contents(control)


def contents(control: Control) -> str:
    """A digest of all bytes of the region, wherever it lives."""
    (fd,) = control._desk.fds("web")
    readable = control._desk.store_of("web").readable_fd(fd)
    try:
        return digest_fd(readable)
    finally:
        os.close(readable)


def left(control: Control, device: Path) -> bytes:
    """What is not zero on the device behind what it says of itself."""
    (arena,) = store(control).arenas()
    names = [each.name for each in arena.said.pieces]
    assert names == (["web"] if region(control.snapshot(), "web").store == "devdax" else [])
    return device.read_bytes()[2 * M :].strip(b"\0")


def test_a_region_leaves_a_device_and_zeros_stay_there(world: World, device: Path) -> None:
    with world.control() as control:
        control.apply(do.ArenaCreate("fast", devdax=True))
        kept = make(control, device)
        assert control.plan(do.Move("web", "devdax")).refusals[0].code == "SameStore"
        done = control.apply(do.Move("web", "memfd"))
        assert kept in done.text
        assert (region(control.snapshot(), "web").store, contents(control), left(control, device)) == (
            "memfd",
            kept,
            b"",
        )
        (refusal,) = control.plan(do.Move("web", "devdax")).refusals
        assert refusal.code == "NoCopy"
    with world.control() as control:
        assert contents(control) == kept


def test_whoever_dies_leaves_it_whole_in_exactly_one_store(world: World, device: Path) -> None:
    move = do.Move("web", "memfd")
    with world.control() as control:
        control.apply(do.ArenaCreate("fast", devdax=True))
        kept = make(control, device)
        points = fault_points(control.plan(move))
    for point in (*MOVED[2:], points[1]):
        world.dies(move, point)
        with world.control() as control:
            stays = point in STAYS
            assert region(control.snapshot(), "web").store == ("devdax" if stays else "memfd"), point
            assert contents(control) == kept, point
            assert control._state.unfinished == {}
            assert bool(left(control, device)) is stays, point
            held = [name for name in control._desk.custody.names() if not name.startswith("quarantine:")]
            assert held == ["ledger", "region:web:0"], point
            if not stays:
                control.apply(do.Release("web"))
                kept = make(control, device)
