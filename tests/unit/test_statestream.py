"""The state of a QEMU taken while it runs, against a monitor that is a value: each step, each fault, each way back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
from support import streams
from support.fake_qemu import CAPABILITIES, FakeQemu
from support.streams import PAGE, Page, Stream

from memconsole.backend import steps
from memconsole.backend.guests import statestream
from memconsole.backend.guests.statestream import StateStream
from memconsole.backend.managers.migration import Elsewhere
from memconsole.errors import GuestError, KernelRefused, MemconsoleError, Refused

RAM = 8 * PAGE
BANDWIDTH = 134217728
STREAM = Stream((("pc.ram", RAM), ("pc.bios", PAGE)), ((Page("pc.ram", 0, b"\1" * PAGE), Page("pc.bios", 0)),))
LOCKED = streams.without(STREAM, frozenset({"pc.ram"}), lock=True).raw()
ELSEWHERE = (Elsewhere("pc.ram", RAM),)
HEAD = b"what stands before it"


@pytest.fixture
def target() -> Iterator[int]:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    os.write(fd, HEAD)
    yield fd
    os.close(fd)


def taking(qemu: FakeQemu, target: int, *, within: float = 60.0, converge: float = 60.0) -> StateStream:
    return StateStream("web", os.getpid(), qemu, target, ELSEWHERE, guarded=True, within=within, converge=converge)


def run(stream: StateStream) -> None:
    for _ in steps.run("take", stream.steps()):
        pass


def contents(fd: int) -> bytes:
    return os.pread(fd, 1 << 20, 0)


def is_as_before(qemu: FakeQemu, *, status: str = "running") -> bool:
    as_set = qemu.capabilities == dict.fromkeys(CAPABILITIES, False) and qemu.bandwidth == BANDWIDTH
    return as_set and qemu.status == status and not qemu.holds_pipe


def test_the_state_is_behind_what_stands_in_the_file_locked_and_the_guest_stands_still(target: int) -> None:
    qemu = FakeQemu(STREAM.raw())
    stream = taking(qemu, target)
    run(stream)
    assert contents(target) == HEAD + LOCKED
    assert qemu.status == "postmigrate"
    assert qemu.capabilities["x-ignore-shared"]
    assert stream.taken is not None
    assert (stream.taken.rounds, stream.taken.downtime_ms) == (3, 12)
    assert [block.dropped for block in stream.taken.stream.blocks] == [1, 0]


def test_what_was_done_is_undone_step_by_step(target: int) -> None:
    qemu = FakeQemu(STREAM.raw())
    stream = taking(qemu, target)
    run(stream)
    for step in reversed(stream.steps()):
        if step.undo is not None:
            step.undo()
    assert is_as_before(qemu)
    assert contents(target) == HEAD
    assert stream.taken is None


def test_another_process_takes_it_back_by_what_was_recorded(target: int) -> None:
    qemu = FakeQemu(STREAM.raw())
    stream = taking(qemu, target)
    run(stream)
    for _ in range(2):
        statestream.take_back(qemu, stream.before)
        assert is_as_before(qemu)


@pytest.mark.parametrize("status", ["paused", "prelaunch"])
def test_one_that_was_paused_or_not_started_yet_stays_so(target: int, status: str) -> None:
    qemu = FakeQemu(STREAM.raw(), status=status)
    stream = taking(qemu, target)
    run(stream)
    statestream.take_back(qemu, stream.before)
    assert is_as_before(qemu, status="postmigrate")


def test_a_capability_that_was_on_is_on_again_and_one_that_is_refused_is_off_meanwhile(target: int) -> None:
    was = {**dict.fromkeys(CAPABILITIES, False), "xbzrle": True, "auto-converge": True}
    qemu = FakeQemu(STREAM.raw(), capabilities=dict(was))
    stream = taking(qemu, target)
    run(stream)
    assert qemu.capabilities == {**dict.fromkeys(CAPABILITIES, True), "xbzrle": False, "auto-converge": True}
    statestream.take_back(qemu, stream.before)
    assert qemu.capabilities == was


def test_nobody_else_can_save_it_while_its_ram_is_left_out(target: int) -> None:
    """What libvirt tells a QEMU first when a domain is saved."""
    qemu = FakeQemu(STREAM.raw())
    run(taking(qemu, target))
    with pytest.raises(GuestError, match="switchover-ack"):
        qemu("migrate-set-capabilities", {"capabilities": [{"capability": "return-path", "state": False}]})


def test_all_of_ram_is_sent_where_somebody_else_could_save_it_meanwhile(target: int) -> None:
    """A libvirt that knows both capabilities switches both off, and would then save an image without RAM."""
    qemu = FakeQemu(STREAM.raw())
    stream = StateStream("web", os.getpid(), qemu, target, ELSEWHERE, within=30.0, converge=30.0)
    run(stream)
    assert not any(qemu.capabilities[name] for name in ("x-ignore-shared", "switchover-ack", "return-path"))
    assert not stream.before.leaves_out
    assert stream.taken is not None
    assert [block.dropped for block in stream.taken.stream.blocks] == [1, 0]


@pytest.mark.parametrize("lacks", ["switchover-ack", "return-path", "x-ignore-shared"])
def test_ram_is_left_out_only_where_nobody_else_could_have_that(target: int, lacks: str) -> None:
    known = {name: False for name in CAPABILITIES if name != lacks}
    qemu = FakeQemu(STREAM.raw(), capabilities={**known, "xbzrle": True})
    run(taking(qemu, target))
    left_out = lacks == "x-ignore-shared"
    assert qemu.capabilities.get("x-ignore-shared", False) is False
    assert qemu.capabilities.get("switchover-ack", False) is left_out
    assert contents(target) == HEAD + LOCKED


def test_ram_that_is_moved_is_sent_whatever_it_is(target: int) -> None:
    """Shared RAM in a file on a disk, or of huge pages: what is left out of the stream would be zeros."""
    qemu = FakeQemu(STREAM.raw(), capabilities={**dict.fromkeys(CAPABILITIES, False), "x-ignore-shared": True})
    file = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(file, RAM)
    stream = StateStream("web", os.getpid(), qemu, target, (Elsewhere("pc.ram", RAM, file),))
    run(stream)
    assert not any(qemu.capabilities.values())
    assert os.pread(file, PAGE, 0) == b"\1" * PAGE
    os.close(file)


@pytest.mark.parametrize("command", ["migrate-set-capabilities", "migrate-set-parameters", "getfd", "migrate"])
def test_whatever_it_refuses_it_is_as_before(target: int, command: str) -> None:
    qemu = FakeQemu(STREAM.raw(), refuses=frozenset({command}))
    with pytest.raises(GuestError, match=f"refused {command}"):
        run(taking(qemu, target))
    assert is_as_before(qemu)
    assert contents(target) == HEAD


@pytest.mark.parametrize("cut", [0, 100, len(STREAM.raw()) - 1])
def test_a_migration_that_fails_is_taken_back_and_says_why(target: int, cut: int) -> None:
    qemu = FakeQemu(STREAM.raw(), cut=cut)
    with pytest.raises(GuestError) as caught:
        run(taking(qemu, target))
    assert caught.value.why == "Broken pipe"
    assert is_as_before(qemu)
    assert contents(target) == HEAD


def test_a_stream_with_what_is_not_known_is_refused_by_name_and_taken_back(target: int) -> None:
    qemu = FakeQemu(replace(STREAM, between=b"\4\0\0\0\7\4vfio").raw())
    with pytest.raises(Refused) as caught:
        run(taking(qemu, target))
    assert "vfio" in caught.value.why
    assert is_as_before(qemu)


def test_a_file_that_takes_nothing_is_the_error_and_not_the_broken_pipe(target: int) -> None:
    qemu = FakeQemu(STREAM.raw())
    full = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(KernelRefused, match="migration stream"):
            run(taking(qemu, full))
    finally:
        os.close(full)
    assert qemu.status == "running"
    assert not qemu.capabilities["x-ignore-shared"]


def test_a_guest_that_dirties_its_ram_for_ever_is_stopped_in_the_end(target: int) -> None:
    qemu = FakeQemu(STREAM.raw(), never=True)
    run(taking(qemu, target, converge=0.1))
    assert "stop" in qemu.told
    assert contents(target) == HEAD + LOCKED


def test_one_that_never_ends_is_cancelled(target: int) -> None:
    qemu = FakeQemu(STREAM.raw(), never=True, refuses=frozenset({"stop"}))
    with pytest.raises(GuestError):
        run(taking(qemu, target, within=0.3, converge=0.1))
    assert "migrate_cancel" in qemu.told
    assert is_as_before(qemu)


def test_what_could_not_be_undone_is_in_the_error(target: int) -> None:
    qemu = FakeQemu(STREAM.raw(), cut=50, refuses=frozenset({"cont"}), status="running")
    qemu.status = "running"
    stream = taking(qemu, target)
    run_all = list(stream.steps())
    run_all[0].do()
    run_all[1].do()
    qemu.status = "paused"  # by somebody else
    with pytest.raises(MemconsoleError) as caught:
        run_all[2].do()
    assert "and not undone: QEMU refused cont" in caught.value.why


@pytest.mark.parametrize(
    ("qemu", "code"),
    [
        (FakeQemu(b"", migration="active"), "JobUnderWay"),
        (FakeQemu(b"", status="postmigrate"), "NotRunning"),
        (FakeQemu(b"", status="guest-panicked"), "NotRunning"),
    ],
)
def test_one_that_cannot_be_streamed_is_refused_before_anything_is_changed(
    target: int, qemu: FakeQemu, code: str
) -> None:
    with pytest.raises(Refused) as caught:
        run(taking(qemu, target))
    assert caught.value.code == code
    assert not [command for command in qemu.told if not command.startswith("query")]


def test_an_answer_that_is_none_is_named() -> None:
    def answers(command: str, arguments: Mapping[str, object], fd: int | None = None) -> object:
        return ["nonsense"]

    with pytest.raises(GuestError, match="query-migrate"):
        statestream.look(answers, "web")
