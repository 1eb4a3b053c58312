"""An arena without a file system grows into a range that became larger, and into no other one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desks import desks
from support.pieces import SIZE, Host, M, hosts, reserve, with_store

from memconsole.actions import ArenaGrow
from memconsole.backend import steps
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import ranges
from memconsole.backend.stores.arena import Arena
from memconsole.backend.stores.described import COPY, UNIT
from memconsole.backend.stores.pieces import PieceStore
from memconsole.backend.verbs import arenas as verbs
from memconsole.errors import Refused


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with hosts(tmp_path) as made:
        yield made


@pytest.fixture
def store(host: Host) -> PieceStore:
    return host.lab()


def larger(host: Host) -> None:
    """The range has become larger, as after a boot with another word."""
    with Path(host.device.path).open("r+b") as file:
        file.truncate(2 * SIZE)
    host.device = host.device._replace(size=2 * SIZE)


def test_an_arena_whose_range_became_larger_has_all_of_it_once_it_is_told_to(host: Host, store: PieceStore) -> None:
    fd = reserve(store, "web")
    host.spoil(UNIT, b"kept")
    os.close(fd)
    generation = store.arenas()[0].generation
    store.close()
    larger(host)
    later = host.store()
    regions, (finding,) = later.found(())
    assert not regions
    assert "describes a range of 32M, and this one has 64M" in finding.evidence
    assert "memconsole arena grow NAME" in finding.remedy
    assert later.larger() == {"lab": host.device}
    before = host.raw(0, UNIT)
    grown = later.grow(host.device)
    assert (grown.generation, grown.free[0]) == (generation + 2, 2 * SIZE - 3 * UNIT)
    assert later.larger() == {}
    (found,), told = later.found(())
    assert (found.region.name, told) == ("web", [])
    assert os.pread(found.fds[0], 4, UNIT) == b"kept"
    os.close(found.fds[0])
    for torn in (0, COPY):  # one that is cut short while it writes the other copy grows with the next attempt
        host.spoil(0, before)
        host.spoil(torn, b"\0" * COPY)
        assert ranges.smaller(host.device) is not None


@pytest.mark.parametrize("why", ["as it was", "smaller", "of another host", "not ours"])
def test_an_arena_grows_only_into_a_range_that_became_larger(host: Host, store: PieceStore, why: str) -> None:
    store.close()
    if why == "smaller":
        host.device = host.device._replace(size=SIZE // 2)
    elif why != "as it was":
        larger(host)
    if why == "of another host":
        host.tree.write("/etc/machine-id", "another\n")
    elif why == "not ours":
        host.spoil(0, bytes(UNIT))
    before = host.raw(0, UNIT)
    with pytest.raises(Refused) as refused:
        host.store().grow(host.device)
    assert refused.value.code == ("OtherHost" if why == "of another host" else "NotLarger")
    assert host.raw(0, UNIT) == before


def test_the_verb_grows_what_became_larger_takes_its_regions_up_and_refuses_all_else_by_name(
    tmp_path: Path, host: Host, store: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(reserve(store, "web"))
    store.close()
    files = Arena("files", tmp_path, 1, "/dev/pmem0", None, 64 * M)
    monkeypatch.setattr(arenas, "mounted", lambda *_: (files,))
    with desks(tmp_path) as desk:
        assert [each.code for each in verbs.grow(desk, ArenaGrow("lab")).refusals] == ["NoService"]
        monkeypatch.setattr(desk.custody, "survives", True)
        with_store(desk, host)
        expected = {"files": "NoGrow", "lab": "NotLarger", "other": "NoSuchArena"}
        for name, code in expected.items():
            (refusal,) = verbs.grow(desk, ArenaGrow(name)).refusals
            assert (refusal.code, bool(refusal.why), bool(refusal.remedy)) == (code, True, True)
        desk.stores["devdax"].close()
        larger(host)
        with_store(desk, host)
        work = verbs.grow(desk, ArenaGrow("lab"))
        desk.carry(steps.run("arena-grow", work.steps))
        assert "regions taken up: web" in work.text
        assert [each.name for each in work.change.regions] == ["web"]
        assert "region:web:0" in desk.custody.names()
