"""A process that appends to a ledger is killed at any moment: what it said is committed is there, in order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from memconsole.backend.ledger.log import Ledger

WRITER = """
import os, sys
from memconsole.backend.ledger.log import RecordKind, Ledger
log = Ledger.open(int(sys.argv[1]))
while True:
    seq = log.append(RecordKind.EVENT, bytes([log.next_seq % 251]) * (log.next_seq % 90))
    os.write(1, b"%d\\n" % seq)
    if seq % 500 == 0:
        log.compact([(RecordKind.STATE, b"")])
"""


@pytest.mark.parametrize("seed", range(8))
def test_what_was_acknowledged_is_there_after_a_kill(seed: int) -> None:
    rng = random.Random(seed)
    log = Ledger.create("boot-1", capacity=4096)
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(log.fd)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[log.fd]) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(rng.random() / 20)
            writer.kill()
            said = [
                int(line) for line in (first + writer.stdout.read()).splitlines(keepends=True) if line[-1:] == b"\n"
            ]
        again = Ledger.open(os.dup(log.fd))
        records = list(again.records())
        assert again.dropped is None or again.dropped.torn
        assert [record.seq for record in records] == list(range(records[0].seq, records[-1].seq + 1))
        assert said[-1] <= records[-1].seq <= said[-1] + 2  # one more, and one of a compaction, were not said
        assert all(record.payload == bytes([record.seq % 251]) * (record.seq % 90) for record in records[1:])
        again.close()
    log.close()
