"""QEMU with its RAM in a region: the same frames, its monitor, its end."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guests import HUGE, collapse, frames, given, mapping_of, own_frames, read, region, segment_of
from support.open_fds import nothing_stays_open
from support.waiting import until

from memconsole.backend.exports.offer import Offer
from memconsole.backend.guests import commandline, qemu
from memconsole.backend.guests.qemu import QemuGuest
from memconsole.backend.kernel import procmaps
from memconsole.backend.peers.handle import Handle
from memconsole.errors import Gone, GuestError
from memconsole.model import Access, GuestState

M = 1 << 20
RAM = 32 * M


@pytest.fixture(autouse=True)
def _qemu() -> None:
    if shutil.which(commandline.BINARY) is None:
        pytest.skip(f"{commandline.BINARY} is not installed")


@pytest.fixture
def ram() -> Iterator[Offer]:
    with region(RAM) as fd, given(fd, "vm-1", RAM) as offer:
        yield offer


@pytest.fixture
def guest(ram: Offer, tmp_path: Path) -> Iterator[QemuGuest]:
    guest = QemuGuest.start("vm", ram, tmp_path)
    with Handle(guest.pid, guest.start_ticks, child=True) as process:
        yield guest
        process.kill()
    guest.close()


def test_its_ram_is_the_region_frame_by_frame(guest: QemuGuest, ram: Offer) -> None:
    start, length = mapping_of(guest.pid, segment_of(ram.fd))
    assert length == RAM
    until(lambda: any(frames(guest.pid, start, RAM // 4096)), "the firmware's first touch")
    guest.pause()
    theirs, ours = frames(guest.pid, start, RAM // 4096), own_frames(ram.fd, RAM)
    touched = [page for page, pfn in enumerate(theirs) if pfn]
    assert touched
    assert [theirs[page] for page in touched] == [ours[page] for page in touched]
    assert len(set(ours)) == len(ours)


def test_it_pauses_resumes_and_answers_for_its_state(guest: QemuGuest, ram: Offer) -> None:
    assert guest.state() is GuestState.RUNNING
    guest.pause()
    assert guest.state() is GuestState.PAUSED
    guest.resume()
    assert guest.state() is GuestState.RUNNING
    assert guest.agent()
    assert guest.offer(ram, 1)
    assert not guest.offer(Offer("other", ram.fd, 0, RAM, Access.RW, None), 1)
    assert not guest.request_unmap("vm-1", 1)
    assert guest.progress() is None


def test_it_outlives_the_object_and_is_adopted(guest: QemuGuest, tmp_path: Path) -> None:
    assert guest.state() is GuestState.RUNNING
    guest.close()
    adopted = QemuGuest.adopt("vm", guest.pid, guest.start_ticks, tmp_path, "vm-1")
    assert adopted.state() is GuestState.RUNNING
    with pytest.raises(Gone):
        QemuGuest.adopt("vm", guest.pid, guest.start_ticks + 1, tmp_path, "vm-1")
    adopted.stop(30)
    assert adopted.state() is GuestState.GONE
    with pytest.raises(Gone):
        adopted.pause()
    adopted.close()


def test_stop_ends_it_in_order_and_by_force_when_it_does_not_answer(guest: QemuGuest) -> None:
    with Handle(guest.pid) as process:
        process.signal(signal.SIGSTOP)
        until(process.stopped, "a stop")
        guest.stop(0.5)
        assert guest.state() is GuestState.GONE
        assert not process.alive()


def test_a_held_monitor_is_an_error_with_a_remedy(
    guest: QemuGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.close()
    monkeypatch.setattr(qemu, "ANSWERS", 0.5)
    adopted = QemuGuest.adopt("vm", guest.pid, guest.start_ticks, tmp_path, "vm-1")
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "qmp"))
        assert b"QMP" in other.recv(4096)
        with pytest.raises(GuestError) as caught:
            adopted.pause()
        assert "monitor" in caught.value.remedy
    assert adopted.state() is GuestState.RUNNING
    adopted.close()


def test_a_qemu_that_exits_at_once_says_its_last_words(ram: Offer, tmp_path: Path) -> None:
    with nothing_stays_open(), pytest.raises(GuestError, match="no-such-device"):
        QemuGuest.start("vm", ram, tmp_path, args=["-device", "no-such-device"])


def test_a_part_of_a_region_or_a_read_only_one_is_no_ram(ram: Offer, tmp_path: Path) -> None:
    for offer in (Offer("vm-1", ram.fd, 4096, RAM, Access.RW, 0), Offer("vm-1", ram.fd, 0, RAM, Access.RO, 0)):
        with pytest.raises(GuestError, match="whole region"):
            QemuGuest.start("vm", offer, tmp_path)


def test_the_user_may_override_what_we_chose(ram: Offer, tmp_path: Path) -> None:
    guest = QemuGuest.start("vm", ram, tmp_path, args=["-S", "-machine", "pc"])
    try:
        assert guest.state() is GuestState.PAUSED
        assert b"pc" in Path(f"/proc/{guest.pid}/cmdline").read_bytes().split(b"\0")
    finally:
        guest.stop(30)
        guest.close()


def test_a_missing_qemu_is_an_error_with_a_remedy(ram: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commandline, "BINARY", "qemu-system-nowhere")
    with pytest.raises(GuestError) as caught:
        QemuGuest.start("vm", ram, tmp_path)
    assert "install qemu-system-nowhere" in caught.value.remedy


def test_a_device_passed_through_is_seen_in_its_command_line() -> None:
    args = ("-accel", "tcg")
    again = QemuGuest.again("vm", 1 << 20, Path("/x"), args, "state", "ram", devices=("iommu:vm", "vfio:0"))
    assert again.words[-8:] == (
        "-object", "iommufd,id=memconsole,fd=4", "-device", "vfio-pci,id=memconsole-0,iommufd=memconsole,fd=5",
        *args, "-incoming", "defer",
    )  # fmt: skip
    assert again.fds == (("ram", 3), ("iommu:vm", 4), ("vfio:0", 5), ("state", 6))
    assert commandline.given_a_device(again.words)


def test_its_ram_is_mapped_by_huge_pages(tmp_path: Path) -> None:
    """2 MiB of frames that lie together are one entry of QEMU's page tables, at whatever size its RAM ends."""
    for size in (64 * M, 64 * M + 8192):
        with region(size) as fd, given(fd, "vm-1", size) as offer:
            whole = size - size % HUGE
            collapse(fd, whole)
            guest = QemuGuest.start("vm", offer, tmp_path, args=["-S"])
            try:
                start, length = mapping_of(guest.pid, segment_of(fd))
                assert length == size
                read(guest.pid, start, whole)
                assert procmaps.paged("/", guest.pid)[start].huge == whole
            finally:
                guest.stop(30)
                guest.close()


@pytest.mark.parametrize("words", [["-accel", "tcg,thread=single"], ["-machine", "pc,accel=tcg"]])
def test_the_operators_own_accelerator_is_the_only_one(words: list[str], ram: Offer, tmp_path: Path) -> None:
    guest = QemuGuest.start("vm", ram, tmp_path, args=words)
    try:
        assert guest.state() is GuestState.RUNNING
        started = Path(f"/proc/{guest.pid}/cmdline").read_text(encoding="utf-8").split("\0")
        assert [word for word in started if word in {"-accel", "tcg,thread=single"}] == (
            words if words[0] == "-accel" else []
        )
    finally:
        guest.stop(30)
        guest.close()
