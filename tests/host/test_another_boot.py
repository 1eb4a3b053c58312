"""A ledger that comes into another boot with its memory, though memconsole did not make the kexec.

The other boot is played: another boot id, and the regions' contents in other files, which have no name of ours. That
the kernel and a service manager hand them over so is tests/vm/test_systemd.py's to see.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.controls import guest, raised, region
from support.worlds import World, worlds

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.custody.names import LANDED
from memconsole.backend.handoff import doubts, facts
from memconsole.backend.handoff.powers import HOST
from memconsole.backend.ledger import boots
from memconsole.errors import NotFound, Refused
from memconsole.model import GuestState, RegionState, Severity

M = 1 << 20
Boot = Callable[[str], None]


@pytest.fixture
def world() -> Iterator[World]:
    with worlds() as found:
        yield found


@pytest.fixture
def boot(world: World, monkeypatch: pytest.MonkeyPatch) -> Boot:
    """Boot another kernel: every guest is killed, every memfd of custody is another one, of the same contents."""

    def booted(id: str) -> None:
        for pid in world.processes():
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
            for name in keeper.names():
                fd, payload = keeper.get(name)
                if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/memfd:"):
                    other = _copied(fd)
                    keeper.put(name, other, payload)
                    os.close(other)
                os.close(fd)
        monkeypatch.setattr(boots, "boot_id", lambda _root="/": id)

    return booted


def _copied(fd: int) -> int:
    size = os.fstat(fd).st_size
    other = os.memfd_create("handed-over", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(other, size)
    os.pwrite(other, os.pread(fd, size, 0), 0)
    return other


def contents(world: World, name: str) -> bytes:
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        fd, _ = keeper.get(name)
        try:
            return os.pread(fd, 5, 0)
        finally:
            os.close(fd)


def fill(world: World, name: str) -> None:
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        fd, _ = keeper.get(name)
        os.pwrite(fd, b"hello", 0)
        os.close(fd)


def refused(control: Control) -> set[str]:
    """The conditions of memory that refuse a jump."""
    seen = replace(facts.gather_facts(control._desk, do.HandoffRehearse(), HOST, jump=False), jump=True)
    return {each.id for each in doubts.memory_doubts(seen) if not each.ok and each.severity is Severity.ERROR}


def findings(world: World) -> list[tuple[str, str]]:
    with world.control() as control:
        return [(each.id, each.subject) for each in raised(control.snapshot())]


def test_regions_are_known_again_and_guests_are_said_to_have_ended(world: World, boot: Boot) -> None:
    with world.control() as control:
        control.apply(do.GuestStart("watch", memory=4 * M))
        control.apply(do.Reserve("web", 2 * M, prefault=True))
        before = region(control.snapshot(), "web").segments[0]
    fill(world, "region:web:0")
    boot("another")
    with world.control() as control:
        shown = control.snapshot()
        assert {each.name: each.state for each in shown.regions} == {
            "watch": RegionState.RESTORED,
            "web": RegionState.RESTORED,
        }
        assert region(shown, "web").seen is not None
        assert region(shown, "web").segments[0].inode != before.inode
        assert [(each.id, each.subject) for each in raised(shown)] == [
            ("kexec-foreign", "host"),
            ("guest-ended", "watch"),
        ]
        ended = guest(shown, "watch")
        assert (ended.state, ended.pid) == (GuestState.GONE, None)
        assert "a kexec that memconsole did not make" in next(
            e.observed for e in shown.findings if e.id == "guest-ended"
        )
        assert not any("release" in each.remedy for each in shown.findings)
        assert control.events(0)[-1].kind == "kexec"
        assert contents(world, "region:web:0") == b"hello"
        assert refused(control) == set()
    assert findings(world) == [("guest-ended", "watch")]  # the next control process of the same boot
    with world.control() as control:
        control.apply(do.GuestStop("watch"))
        control.apply(do.Release("watch"))
        control.apply(do.Release("web"))
        assert raised(control.snapshot()) == []


def test_killed_while_it_learns_the_boot_it_learns_it_the_next_time(world: World, boot: Boot) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M))
    boot("another")
    with world.control() as control:
        first = region(control.snapshot(), "web").segments
        whole = control._state.checkpoint()
        assert whole.everything.boot == "another"
    with world.control() as control:
        assert region(control.snapshot(), "web").segments == first
        assert raised(control.snapshot()) == []


def test_what_custody_lacks_in_another_boot_is_lost_and_the_rest_is_not(world: World, boot: Boot) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M))
        control.apply(do.Reserve("gone", 2 * M))
    boot("another")
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        keeper.drop("region:gone:0")
    with world.control() as control:
        shown = control.snapshot()
        assert [(e.id, e.subject) for e in raised(shown)] == [("kexec-foreign", "host"), ("region-lost", "gone")]
        assert region(shown, "web").seen is not None
        assert refused(control) == {"region-lost"}


def test_a_move_that_a_kexec_cut_short_keeps_the_file_that_has_the_contents(world: World, boot: Boot) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M))
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        fd, payload = keeper.get("region:web:0")
        copy = _copied(fd)
        os.pwrite(copy, b"hello", 0)
        keeper.put("fresh:web:0", copy, payload)
        os.ftruncate(fd, 0)
        os.close(fd)
        os.close(copy)
    boot("another")
    with world.control() as control:
        assert region(control.snapshot(), "web").seen is not None
        assert "fresh:web:0" not in control._desk.custody.names()
    assert contents(world, "region:web:0") == b"hello"


def test_a_region_of_another_size_is_kept_said_and_refuses_a_handoff(world: World) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M))
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        fd, payload = keeper.get("region:web:0")
        os.close(fd)
        other = os.memfd_create("other")
        os.ftruncate(other, M)
        os.pwrite(other, b"hello", 0)
        keeper.put("region:web:0", other, payload)
        os.close(other)
    with world.control() as control:
        shown = control.snapshot()
        assert [(each.id, each.subject) for each in raised(shown)] == [("custody-other", "web")]
        assert "release" not in shown.findings[0].remedy
        assert region(shown, "web").size == M
        assert refused(control) == {"custody-other"}
    assert contents(world, "region:web:0") == b"hello"
    assert findings(world) == []


def test_a_region_whose_record_is_lost_is_taken_over_in_another_boot_too(world: World, boot: Boot) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M))
    fill(world, "region:web:0")
    boot("another")
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        keeper.drop("ledger")
    assert findings(world) == [("region-found", "web")]
    assert contents(world, "region:web:0") == b"hello"


def test_what_is_no_whole_region_stays_in_custody_until_it_is_given_up(world: World) -> None:
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        part = os.memfd_create("part")
        os.ftruncate(part, 2 * M)
        keeper.put("region:who:1", part, b"?")
        os.close(part)
    assert findings(world) == [("custody-unknown", "who")]
    with world.control() as control:
        assert "region:who:1" in control._desk.custody.names()
        assert refused(control) == {"custody-unknown"}
        control.apply(do.Release("who"))
        assert "region:who:1" not in control._desk.custody.names()
    assert findings(world) == []


def test_a_ledger_that_says_no_boot_means_the_one_it_was_made_in(world: World, boot: Boot) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M))
        assert control._state.boot == control._ledger.chain
    with contextlib.closing(KeeperCustody(world.keeper)) as keeper:
        fd, _ = keeper.get("ledger")
        keeper.put(LANDED, fd, b"")
        os.close(fd)
    boot("another")  # of an older memconsole that landed here: this boot is the one that is meant
    with world.control() as control:
        assert control._state.boot == ""
        assert not boots.is_other_boot(control._desk)


def test_a_guest_is_not_waited_for_that_a_kexec_ended(world: World, boot: Boot) -> None:
    with world.control() as control:
        control.apply(do.GuestStart("watch", memory=4 * M))
    boot("another")
    with world.control() as control:
        with pytest.raises((Refused, NotFound)):
            control.apply(do.GuestResume("watch"))
        control.apply(do.GuestStop("watch"))
        assert [each.name for each in control.snapshot().regions] == ["watch"]
