"""The ledger: what was appended is read back, and what is damaged is cut and said, never guessed."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memconsole.backend.ledger import log as ledger_log
from memconsole.backend.ledger.log import Ledger, RecordKind
from memconsole.errors import BadFile, KernelRefused, Refused, UsageError
from memconsole.model import Severity

SMALL = 4096
F_ADD_SEALS, F_SEAL_GROW = 1033, 4


@pytest.fixture
def log() -> Iterator[Ledger]:
    made = Ledger.create("boot-1", capacity=SMALL)
    yield made
    made.close()


def filled(count: int, size: int = 20) -> Ledger:
    made = Ledger.create("boot-1", capacity=SMALL)
    for n in range(count):
        made.append(RecordKind.INTENT, bytes([n + 1]) * (size + n))
    return made


def pays(log: Ledger) -> bool:
    """Whether a compaction would."""
    return log.worth_compacting


def copy_of(image: bytes) -> int:
    fd = os.memfd_create("copy", os.MFD_CLOEXEC)
    os.write(fd, image)
    return fd


def reopened(image: bytes) -> tuple[list[bytes], ledger_log.CutTail | None]:
    """The payloads and the cut, read twice: once as it is, once more after it was cut, when nothing may be amiss."""
    first = Ledger.open(copy_of(image))
    payloads = [record.payload for record in first.records()]
    again = Ledger.open(copy_of(first.image()))
    assert again.dropped is None
    assert [record.payload for record in again.records()] == payloads
    assert again.append(RecordKind.DONE, b"goes on") == first.next_seq
    again.close()
    first.close()
    return payloads, first.dropped


def test_what_is_appended_is_read_back(log: Ledger) -> None:
    assert log.append(RecordKind.INTENT, {"action": "reserve", "name": "web"}) == 1
    assert log.append(RecordKind.DONE, b"") == 2
    first, second = log.records()
    assert (first.seq, first.kind, first.value()) == (1, RecordKind.INTENT, {"action": "reserve", "name": "web"})
    assert (second.seq, second.kind, second.payload) == (2, RecordKind.DONE, b"")
    assert [record.seq for record in log.records(after=1)] == [2]
    with pytest.raises(BadFile, match="record 2 cannot be read"):
        second.value()


def test_a_ledger_is_found_again_through_its_fd() -> None:
    made = filled(3)
    again = Ledger.open(os.dup(made.fd))
    assert (again.chain, again.next_seq, again.dropped) == ("boot-1", 4, None)
    assert [record.payload[0] for record in again.records()] == [1, 2, 3]
    again.close()
    made.close()


def test_it_grows_and_loses_nothing(log: Ledger) -> None:
    payloads = [bytes([n % 251]) * (n % 97) for n in range(3000)]
    for payload in payloads:
        log.append(RecordKind.EVENT, payload)
    assert log.generation > 1
    assert [record.payload for record in log.records()] == payloads
    assert reopened(log.image()) == (payloads, None)


def test_a_record_larger_than_the_ledger_fits(log: Ledger) -> None:
    log.append(RecordKind.STATE, b"x" * ledger_log.MAX_PAYLOAD)
    assert [len(record.payload) for record in log.records()] == [ledger_log.MAX_PAYLOAD]


def test_a_record_that_is_too_long_is_refused(log: Ledger) -> None:
    with pytest.raises(Refused) as caught:
        log.append(RecordKind.STATE, b"x" * (ledger_log.MAX_PAYLOAD + 1))
    assert caught.value.code == "RecordTooLong"
    with pytest.raises(Refused):
        log.compact([(RecordKind.STATE, b"x" * (ledger_log.MAX_PAYLOAD + 1))])
    assert log.next_seq == 1


def test_compaction_replaces_the_records_and_goes_on_counting(log: Ledger) -> None:
    for n in range(2000):
        log.append(RecordKind.EVENT, {"n": n})
    assert pays(log)
    log.compact([(RecordKind.STATE, {"regions": 1}), (RecordKind.STATE, {"regions": 2})])
    assert not pays(log)
    assert log.append(RecordKind.INTENT, b"next") == 2003
    assert [(record.seq, record.kind) for record in log.records()] == [(2001, 5), (2002, 5), (2003, 1)]


def test_compaction_keeps_the_memory_bounded(log: Ledger) -> None:
    sizes = set()
    for _ in range(40):
        for n in range(300):
            log.append(RecordKind.EVENT, bytes(n % 50))
        log.compact([(RecordKind.STATE, b"all")])
        sizes.add(os.fstat(log.fd).st_size)
    assert max(sizes) <= 16 * SMALL + 64 * 1024


def test_truncated_at_every_byte_of_the_last_three_records() -> None:
    made = filled(6)
    image, whole = made.image(), [record.payload for record in made.records()]
    made.close()
    start, ends = ledger_log.read(image).superblock.start, []
    boundaries = {start}
    for payload in whole:
        ends.append(start + ledger_log._FRAMING + len(payload))
        start = ledger_log._frame_size(ends[-1])
        boundaries |= set(range(ends[-1], start + 1))
    for cut in range(ends[2], start):
        kept = sum(end <= cut for end in ends)
        payloads, dropped = reopened(image[:cut])
        assert payloads == whole[:kept], cut
        assert dropped is not None
        assert dropped.finding().severity is Severity.ERROR
        # the same with zeros where the rest was
        payloads, dropped = reopened(image[:cut].ljust(len(image), b"\0"))
        assert payloads == whole[:kept], cut
        assert (dropped is None) == (cut in boundaries), cut


@pytest.mark.parametrize("written", range(4, 40))
def test_an_append_that_did_not_end_is_torn_and_cut(written: int) -> None:
    made = filled(3)
    frame = ledger_log._pack_frame(ledger_log.Record(4, RecordKind.DONE, b"never said done"), made.generation)
    image = bytearray(made.image())
    end = ledger_log.read(bytes(image)).end
    image[end + 4 : end + written] = frame[4:written]
    made.close()
    payloads, dropped = reopened(bytes(image))
    assert len(payloads) == 3
    if any(frame[4:written]):
        assert dropped is not None
        assert dropped.torn
        assert dropped.finding().severity is Severity.WARNING


def test_every_bit_that_flips_is_noticed() -> None:
    made = filled(4)
    image, whole = made.image(), [record.payload for record in made.records()]
    start, end = ledger_log.read(image).superblock.start, ledger_log.read(image).end
    used = 4096 if made.generation % 2 else 0
    made.close()
    for byte in (*range(used, used + ledger_log._SUPER.size), *range(start, end + 16)):
        for bit in range(8):
            flipped = bytearray(image)
            flipped[byte] ^= 1 << bit
            if byte < start:
                with pytest.raises(BadFile):
                    ledger_log.read(bytes(flipped))
                continue
            found = ledger_log.read(bytes(flipped))
            assert found.dropped is not None, (byte, bit)
            payloads = [record.payload for record in found.records]
            assert payloads == whole[: len(payloads)]
            assert len(payloads) < 4 or byte >= end


def test_records_behind_damage_are_counted_and_not_believed() -> None:
    made = filled(5)
    image = bytearray(made.image())
    image[ledger_log.read(bytes(image)).superblock.start] ^= 0xFF
    made.close()
    found = ledger_log.read(bytes(image))
    assert found.records == ()
    assert found.dropped is not None
    assert not found.dropped.torn
    assert "4 whole records" in found.dropped.why


class Stop(Exception):
    """The process was killed here."""


class Stopping:
    """A mapping that is killed in its ``stores``-th store, after ``part`` of its bytes."""

    def __init__(self, map: Any, stores: int, part: float) -> None:
        self.map, self.stores, self.part = map, stores, part

    def __setitem__(self, where: slice, data: bytes) -> None:
        self.stores -= 1
        if self.stores == 0:
            end = where.start + int(len(data) * self.part)
            self.map[where.start : end] = data[: end - where.start]
            raise Stop
        self.map[where] = data

    def __getitem__(self, where: Any) -> Any:
        return self.map[where]

    def __len__(self) -> int:
        return len(self.map)

    def close(self) -> None:
        self.map.close()


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99, 1])
@pytest.mark.parametrize("stores", range(1, 6))
def test_killed_at_any_store_of_a_compaction_it_is_the_old_ledger_or_the_new_one(stores: int, part: float) -> None:
    made = filled(4)
    made.compact([(RecordKind.STATE, b"old")])  # both areas were used, so there is room and nothing is mapped anew
    made.compact([(RecordKind.STATE, b"old")])
    real = made._map
    made._map = Stopping(real, stores, part)  # type: ignore[assignment]
    try:
        made.compact([(RecordKind.STATE, b"new 1"), (RecordKind.STATE, b"new 2")])
        ended = True
    except Stop:
        ended = False
    assert ended == (stores > 3)
    payloads, dropped = reopened(real[:])
    assert dropped is None
    assert payloads in ([b"new 1", b"new 2"], [b"old"])
    if stores > 2:
        assert payloads == [b"new 1", b"new 2"]
    made._map = real
    made.close()


@pytest.mark.parametrize("stores", [1, 2])
@pytest.mark.parametrize("part", [0, 0.3, 0.6, 1])
def test_killed_at_any_store_of_an_append_it_is_there_or_not(stores: int, part: float) -> None:
    made = filled(2)
    real = made._map
    made._map = Stopping(real, stores, part)  # type: ignore[assignment]
    with pytest.raises(Stop):
        made.append(RecordKind.DONE, b"the third record")
    payloads, dropped = reopened(real[:])
    committed = stores == 2 and part > 0  # the length's low byte makes the record whole
    assert payloads[2:] == ([b"the third record"] if committed else [])
    assert (dropped is not None) == (not committed and (stores, part) != (1, 0))
    made._map = real
    made.close()


def test_a_ledger_that_cannot_grow_says_so_and_stays_as_it_was(log: Ledger) -> None:
    small = b"x" * 1000
    for _ in range(3):
        log.append(RecordKind.EVENT, small)
    before = log.image()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        with pytest.raises(KernelRefused) as caught:
            log.append(RecordKind.EVENT, b"x" * 2000)
        assert caught.value.code == "LedgerFull"
        assert log.image() == before
        assert log.append(RecordKind.EVENT, b"small enough") == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.append(RecordKind.EVENT, b"x" * 2000) == 5


def test_a_sealed_ledger_refuses_to_grow(log: Ledger) -> None:
    fcntl.fcntl(log.fd, F_ADD_SEALS, F_SEAL_GROW)
    with pytest.raises(KernelRefused):
        log.append(RecordKind.EVENT, b"x" * 5000)
    assert log.next_seq == 1


def test_a_ledger_has_a_limit(log: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_log, "MAX_CAPACITY", SMALL)
    while log.used + 224 <= SMALL:
        log.append(RecordKind.EVENT, b"x" * 200)
    before = log.image()
    with pytest.raises(Refused) as caught:
        log.append(RecordKind.EVENT, b"x" * 200)
    assert caught.value.code == "LedgerFull"
    assert log.image() == before


@pytest.mark.parametrize("image", [b"", b"MCLEDGER", b"\x7fELF".ljust(20000, b"\1"), bytes(20000)])
def test_what_is_no_ledger_is_a_bad_file_and_left_alone(image: bytes) -> None:
    fd = copy_of(image)
    with pytest.raises(BadFile):
        Ledger.open(fd)
    assert os.pread(fd, len(image) + 1, 0) == image
    os.close(fd)


def test_a_newer_version_is_a_bad_file_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_log, "VERSION", 7)
    newer = filled(1)
    monkeypatch.undo()
    with pytest.raises(BadFile, match="version 7"):
        Ledger.open(newer.fd)
    newer.close()


@pytest.mark.parametrize("chain", ["", "x" * 65])
def test_a_chain_id_that_does_not_fit_is_refused(chain: str) -> None:
    with pytest.raises(UsageError):
        Ledger.create(chain)


class LedgerMachine(RuleBasedStateMachine):
    """A ledger against a list."""

    def __init__(self) -> None:
        super().__init__()
        self.log = Ledger.create("boot-1", capacity=SMALL)
        self.model: list[tuple[int, int, bytes]] = []
        self.seq = 0

    @rule(kind=st.integers(1, 65535), payload=st.binary(max_size=3000))
    def append(self, kind: int, payload: bytes) -> None:
        self.seq += 1
        assert self.log.append(kind, payload) == self.seq
        self.model.append((self.seq, kind, payload))

    @rule(payloads=st.lists(st.binary(max_size=600), max_size=4))
    def compact(self, payloads: list[bytes]) -> None:
        self.log.compact([(RecordKind.STATE, payload) for payload in payloads])
        self.model = [(self.seq + n, int(RecordKind.STATE), payload) for n, payload in enumerate(payloads, 1)]
        self.seq += len(payloads)

    @rule()
    def reopen(self) -> None:
        fd = os.dup(self.log.fd)
        self.log.close()
        self.log = Ledger.open(fd)
        assert self.log.dropped is None

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        image = bytearray(self.log.image())
        found = ledger_log.read(bytes(image))
        byte = data.draw(st.integers(found.superblock.start, found.end - 1))
        image[byte] ^= data.draw(st.integers(1, 255))
        self.log.close()
        self.log = Ledger.open(copy_of(bytes(image)))
        assert self.log.dropped is not None
        left = len(list(self.log.records()))
        assert left < len(self.model)
        self.model = self.model[:left]
        self.seq = self.model[-1][0] if self.model else found.superblock.seq - 1

    @invariant()
    def agrees(self) -> None:
        assert [tuple(record) for record in self.log.records()] == self.model

    def teardown(self) -> None:
        self.log.close()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
