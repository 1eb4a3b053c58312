"""Canaries on this host: as a KVM guest where KVM runs one, and as a plain process."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.guests import collapse, fd_links, frames, given, hubs, mapping_of, own_frames, read, region, segment_of
from support.waiting import until

from memconsole.backend.exports.fd import Hub
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.kernel import procmaps
from memconsole.backend.peers.handle import Handle
from memconsole.backend.stores import memfd
from memconsole.errors import Gone, GuestError, Refused
from memconsole.model import Access, GuestState
from memconsole.native import program

M = 1 << 20
PAGE = 4096
Hubs = Callable[[], Hub]


@pytest.fixture
def make_hub() -> Iterator[Hubs]:
    with hubs() as make:
        yield make


@pytest.fixture(params=["kvm", "process"])
def canary(request: pytest.FixtureRequest, make_hub: Hubs, tmp_path: Path) -> Iterator[tuple[CanaryGuest, Hub]]:
    if request.param == "kvm":
        probe = subprocess.run([program("memconsole-canary"), "--probe"], capture_output=True, text=True, check=True)
        if not probe.stdout.startswith("kvm "):
            pytest.skip(f"KVM does not run the canary here: {probe.stdout.strip()}")
    hub = make_hub()
    guest = CanaryGuest.start("bird", hub, tmp_path / "bird", args=["--as", request.param])
    try:
        yield guest, hub
    finally:
        guest.kill()
        guest.close()


def beats(guest: CanaryGuest) -> int:
    progress = guest.progress()
    assert progress is not None
    assert progress.wrong == 0
    return progress.beats


def runs_on(guest: CanaryGuest, count: int = 20) -> None:
    """It makes so many more beats, and finds no wrong byte."""
    goal = beats(guest) + count
    until(lambda: beats(guest) >= goal, "beats")


def wrong(guest: CanaryGuest) -> int:
    progress = guest.progress()
    assert progress is not None
    return progress.wrong


def sweep(guest: CanaryGuest, pages: int) -> None:
    """It checks all of so many pages."""
    progress = guest.progress()
    assert progress is not None
    goal = progress.checked + pages + 1024
    until(lambda: (now := guest.progress()) is not None and now.checked > goal, "a sweep")


def test_it_runs_in_its_grant_and_checks_every_page(
    canary: tuple[CanaryGuest, Hub], request: pytest.FixtureRequest
) -> None:
    guest, hub = canary
    assert guest.state() is GuestState.PAUSED
    assert guest.agent()
    with region(M) as fd, given(fd, "g-1", M) as offer:
        assert guest.offer(offer, 10)
        assert hub.mapped("bird") == {"g-1"}
        sweep(guest, 256)
        assert guest.state() is GuestState.RUNNING
        progress = guest.progress()
        assert progress is not None
        assert progress.runs_as == ("kvm" if "kvm" in request.node.name else "process")
        assert progress.wrong == 0
        # Its memory is the region's own frames, page by page.
        start, length = mapping_of(guest.pid, segment_of(fd))
        assert length == M
        seen = frames(guest.pid, start, 256)
        pairs = [(pfn, own) for pfn, own in zip(seen, own_frames(fd, M), strict=True) if pfn]
        assert len(pairs) >= 252
        assert all(pfn == own for pfn, own in pairs)
        assert why(guest) == ""


def test_it_maps_its_memory_by_huge_pages(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, _ = canary
    with region(8 * M) as fd, given(fd, "bird-1", 8 * M) as offer:
        collapse(fd, 8 * M)
        assert guest.offer(offer, 30)
        runs_on(guest)
        start, _ = mapping_of(guest.pid, segment_of(fd))
        read(guest.pid, start, 8 * M)
        assert procmaps.paged("/", guest.pid)[start].huge == 8 * M
        assert guest.request_unmap("bird-1", 30)


def test_it_counts_every_wrong_byte(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, _ = canary
    with region(M) as fd, given(fd, "g-1", M) as offer:
        guest.offer(offer, 10)
        sweep(guest, 256)
        guest.pause()
        with mmap.mmap(fd, M) as memory:
            for page in (17, 200):
                memory[page * PAGE] ^= 0xFF
                memory[page * PAGE + 9] ^= 1
        guest.resume()
        until(lambda: wrong(guest) == 4, "four wrong bytes")
        sweep(guest, 256)
        assert wrong(guest) == 4


def test_it_gives_a_grant_back_and_goes_on_where_it_stood(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, hub = canary
    with region(M) as fd:
        with given(fd, "g-1", M) as offer:
            guest.offer(offer, 10)
            sweep(guest, 256)
            assert guest.request_unmap("g-1", 10)
            assert hub.mapped("bird") == set()
            stood = beats(guest)
            assert guest.state() is GuestState.PAUSED
            assert str(os.fstat(fd).st_ino) not in Path(f"/proc/{guest.pid}/maps").read_text().split()
            assert not any("memconsole" in said for said in fd_links(guest.pid).values())
        with mmap.mmap(fd, M) as memory:
            kept = bytes(memory)
        assert any(kept)
        assert beats(guest) == stood
        with given(fd, "g-2", M, gpa=None) as offer:
            guest.offer(offer, 10)
            sweep(guest, 256)
        assert beats(guest) > stood


def test_it_notices_that_it_was_given_other_memory_back(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, _ = canary
    with region(M) as fd, region(M) as other:
        with given(fd, "g-1", M) as offer:
            guest.offer(offer, 10)
            sweep(guest, 256)
            guest.request_unmap("g-1", 10)
        with given(other, "g-2", M) as offer:
            guest.offer(offer, 10)
            assert wrong(guest) >= PAGE


def test_a_commanded_pause_is_no_gap_and_another_is(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, _ = canary
    with region(M) as fd, given(fd, "g-1", M) as offer:
        guest.offer(offer, 10)
        runs_on(guest)
        guest.pause()
        stood = beats(guest)
        assert guest.state() is GuestState.PAUSED
        with Handle(guest.pid) as process:
            process.signal(signal.SIGSTOP)
            until(process.stopped, "a stop")
            process.wait(1.0)
            process.signal(signal.SIGCONT)
            assert beats(guest) == stood
            guest.resume()
            runs_on(guest)
            before = guest.progress()
            assert before is not None
            assert before.gap_ns < 1_000_000_000
            process.signal(signal.SIGSTOP)
            until(process.stopped, "a stop")
            process.wait(1.0)
            process.signal(signal.SIGCONT)
        runs_on(guest)
        after = guest.progress()
        assert after is not None
        assert after.gap_ns >= 1_000_000_000
        assert after.gaps > before.gaps


def test_memory_taken_by_force_stops_it_and_it_says_so(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, _ = canary
    (fd,) = memfd.reserve_segments("test", M)
    with given(fd, "g-1", M) as offer:
        guest.offer(offer, 10)
        runs_on(guest)
        os.ftruncate(fd, 0)
        until(lambda: _state(guest) is GuestState.STOPPED, "its end")
        assert why(guest)
        assert guest.request_unmap("g-1", 10)
    os.close(fd)


def test_a_guest_that_leaves_its_memory_never_runs_again(
    canary: tuple[CanaryGuest, Hub], request: pytest.FixtureRequest
) -> None:
    guest, _ = canary
    with region(M) as fd, given(fd, "g-1", M) as offer:
        guest.offer(offer, 10)
        runs_on(guest)
        guest.pause()
        with mmap.mmap(fd, M) as memory:
            memory[8:16] = (1 << 20).to_bytes(8, "little")  # struct header: pages
        guest.resume()
        until(lambda: _state(guest) is GuestState.STOPPED, "its end")
        assert ("where no RAM is" if "kvm" in request.node.name else "its header says") in why(guest)
        before = guest.progress()
        guest.resume()
        assert guest.state() is GuestState.STOPPED
        assert guest.progress() == before


def why(guest: CanaryGuest) -> str:
    """Why it cannot go on, as it says."""
    progress = guest.progress()
    assert progress is not None
    return progress.why


def _state(guest: CanaryGuest) -> GuestState | None:
    try:
        return guest.state()
    except GuestError:
        return None  # it reconnects


def test_two_grants_are_two_ranges_and_a_read_only_one_is_never_written(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, hub = canary
    with region(M) as fd, region(M) as more, region(M) as readable:
        with (
            given(fd, "g-1", M) as home,
            given(more, "g-2", M, gpa=16 * M) as second,
            given(readable, "g-3", M, gpa=32 * M, access=Access.RO) as third,
        ):
            for offer in (home, second, third):
                assert guest.offer(offer, 10)
            sweep(guest, 1024)
            assert guest.request_unmap("g-2", 10)
            runs_on(guest)
            assert hub.mapped("bird") == {"g-1", "g-3"}
        with mmap.mmap(more, M) as memory, mmap.mmap(readable, M) as untouched:
            assert any(memory[100 * PAGE : 101 * PAGE])
            assert not any(bytes(untouched))


@pytest.mark.parametrize(
    ("length", "gpa", "why"),
    [
        (4 * PAGE, 0, "Invalid argument"),
        (M, 123, "Invalid argument"),
        (M, 600 << 30, "Invalid argument"),
        (2 * M, 0, "out of range"),
    ],
)
def test_a_grant_it_cannot_map_is_refused_and_withdrawn(
    canary: tuple[CanaryGuest, Hub], length: int, gpa: int, why: str
) -> None:
    guest, hub = canary
    with region(M) as fd, given(fd, "g-1", length, gpa=gpa) as offer:
        with pytest.raises(GuestError, match=why):
            guest.offer(offer, 10)
        assert hub.mapped("bird") == set()
        with given(fd, "g-1", M) as good:
            assert guest.offer(good, 10)
            with given(fd, "g-2", M) as same_place, pytest.raises(GuestError, match="exists"):
                guest.offer(same_place, 10)
            runs_on(guest)


def test_it_outlives_the_control_process(canary: tuple[CanaryGuest, Hub], make_hub: Hubs) -> None:
    guest, _ = canary
    with region(M) as fd, given(fd, "g-1", M) as offer, given(fd, "g-2", M, gpa=64 * M) as revoked:
        guest.offer(offer, 10)
        guest.offer(revoked, 10)
        runs_on(guest)
        stood = beats(guest)
        hub = make_hub()
        # What it still has and is not granted any more is asked back; what it has is not sent again.
        adopted = CanaryGuest.adopt("bird", guest.pid, guest.start_ticks, hub, [offer])
        try:
            assert hub.connected("bird", 30)
            until(lambda: hub.mapped("bird") == {"g-1"}, "the unmapping of g-2")
            runs_on(adopted)
            assert beats(adopted) > stood
            with pytest.raises(Refused):
                CanaryGuest.adopt("other", guest.pid, guest.start_ticks, hub)
            with pytest.raises(Gone):
                CanaryGuest.adopt("late", guest.pid, guest.start_ticks + 1, hub)
            adopted.stop(10)
            assert adopted.state() is GuestState.GONE
        finally:
            adopted.kill()
            adopted.close()


STARTER = """
import sys
from pathlib import Path
from memconsole.backend.exports.fd import Hub
from memconsole.backend.guests.canary import CanaryGuest
hub = Hub(Path(sys.argv[1]))
guest = CanaryGuest.start("bird", hub, Path(sys.argv[2]), args=["--as", "process"])
print(guest.pid, guest.start_ticks, flush=True)
sys.stdin.read()
"""


def test_it_does_not_die_with_a_control_process_that_is_killed(make_hub: Hubs, tmp_path: Path) -> None:
    path = make_hub().path
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(path), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    pid, ticks = (int(word) for word in starter.stdout.readline().split())
    starter.kill()
    starter.communicate()
    guest = CanaryGuest.adopt("bird", pid, ticks, hub := make_hub())
    try:
        assert hub.connected("bird", 30)
        assert guest.state() is GuestState.PAUSED
        assert os.getsid(pid) == pid
    finally:
        guest.kill()
        guest.close()


def test_stop_kill_and_what_is_gone(canary: tuple[CanaryGuest, Hub]) -> None:
    guest, _ = canary
    guest.kill()
    assert guest.state() is GuestState.GONE
    guest.kill()
    guest.stop(10)
    with pytest.raises(Gone):
        guest.pause()
    with pytest.raises(Gone):
        guest.progress()


def test_a_canary_that_does_not_start_says_why(make_hub: Hubs, tmp_path: Path) -> None:
    hub = make_hub()
    with pytest.raises(GuestError, match="usage"):
        CanaryGuest.start("bird", hub, tmp_path, args=["--as", "bird"])
    guest = CanaryGuest.start("bird", hub, tmp_path, args=["--as", "process"])
    guest.stop(10)
    assert guest.state() is GuestState.GONE
    guest.close()
