"""LUO over a real kexec, every refusal by its name, and what is handed over as a dump taken at the jump shows it."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import lab
from support.luo_incoming import covers

from memconsole.backend.kernel.handover import describe
from memconsole.backend.kernel.handover.values import Handover
from memconsole.units import PAGE

MARK = "LAB-FROZEN"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    directory: Path = tmp_path_factory.mktemp("luo")
    return lab.run("luo", directory)


def test_every_verdict_is_good(said: lab.Verdicts) -> None:
    said.check()
    assert said.stages == 2


@pytest.mark.parametrize(
    "name",
    [
        *("session-exists", "hugetlb", "null", "vast", "not-a-session", "second-opener", "unknown-session"),
        *("token-used", "preserved-twice", "retrieve-outgoing", "finish-outgoing", "image-too-large", "not-a-kernel"),
        *("retrieved-twice", "unknown-token", "preserve-incoming", "lost", "nothing-in", "wild-kcore", "wild-devmem"),
    ],
)
def test_a_refusal_has_its_name(said: lab.Verdicts, name: str) -> None:
    verdict = said.of(f"refused-{name}")
    assert verdict["ok"], verdict


def test_memory_is_the_same_after_the_jump(said: lab.Verdicts) -> None:
    for token in (7, 8, 9):
        same = said.of(f"same-{token}")
        assert all(same[what] for what in ("place", "contents", "size", "position", "closed-on-exec")), same


# --- the moment of the jump


def halting(kernel: Path, image: Path) -> None:
    """A kernel image that says a word on the serial line and halts, in place of all it would do."""
    data = bytearray(kernel.read_bytes())
    code = bytes.fromhex("66baf803 488d350c000000 ac 84c0 7403 ee ebf8 faf4 ebfd") + MARK.encode() + b"\n\0"
    entry = ((data[0x1F1] or 4) + 1) * 512 + 0x200
    data[entry : entry + len(code)] = code
    image.write_bytes(data)


class Monitor(threading.Thread):
    """Waits until the lab's console says MARK, dumps its memory, and ends it."""

    def __init__(self, console: Path, monitor: Path, dump: Path) -> None:
        super().__init__()
        self.ended = threading.Event()
        self._console, self._monitor, self._dump = console, monitor, dump

    def run(self) -> None:
        while not self.ended.wait(0.1):
            if self._console.exists() and MARK.encode() in self._console.read_bytes():
                break
        else:
            return
        with socket.socket(socket.AF_UNIX) as peer, peer.makefile("rw") as stream:
            peer.connect(str(self._monitor))
            self._call(stream, "qmp_capabilities")
            self._call(stream, "dump-guest-memory", paging=False, protocol=f"file:{self._dump}")
            self._call(stream, "quit")

    @staticmethod
    def _call(stream: Any, command: str, **arguments: object) -> None:
        stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        stream.flush()
        while True:
            answer = json.loads(stream.readline() or '{"error": "the monitor hung up"}')
            if "error" in answer:
                raise AssertionError(answer)
            if "return" in answer:
                return


@pytest.fixture(scope="module")
def frozen() -> Iterator[tuple[dict[str, Any], tuple[Handover, ...], Path]]:
    """What the scenario knew before the jump, and what the dump says."""
    with tempfile.TemporaryDirectory(prefix="mc-lab-") as name:
        share = Path(name)
        halting(lab.the_kernel(), share / "bzImage.frozen")
        monitor = Monitor(share / "console", share / "qmp", share / "dump")
        monitor.start()
        try:
            options = ("-qmp", f"unix:{share}/qmp,server=on,wait=off")
            run = lab.run("luo", share, memory="1G", options=options, arguments=["frozen"])
        finally:
            monitor.ended.set()
            monitor.join()
        assert run.of("covered")["ok"]
        assert (share / "dump").exists(), run.console[-2000:]
        yield json.loads((share / "notes.json").read_text()), describe(str(share / "dump")), share


def pages(rows: Any) -> dict[int, int]:
    return {row[0] + n: row[1] + n for row in rows for n in range(row[2])}


@pytest.mark.group("luo-frozen")
def test_the_dump_lists_our_sessions_and_nothing_else(
    frozen: tuple[dict[str, Any], tuple[Handover, ...], Path],
) -> None:
    notes, (found,), _ = frozen
    assert not found.gaps
    assert found.luo is not None
    assert found.metadata is not None
    assert found.metadata.kexec_count == 1, "it counts the jump that is made"
    listed = {session.name: [file.token for file in session.files] for session in found.luo.sessions}
    assert listed == notes["sessions"]


@pytest.mark.group("luo-frozen")
def test_folios_are_where_the_extents_were(frozen: tuple[dict[str, Any], tuple[Handover, ...], Path]) -> None:
    notes, (found,), _ = frozen
    assert found.luo is not None
    assert found.preserved is not None
    for file in (file for session in found.luo.sessions for file in session.files):
        assert file.memfd is not None
        assert file.memfd.size == notes["sizes"][str(file.token)]
        assert file.memfd.position == notes["positions"][str(file.token)]
        _, rows = notes["placed"][str(file.token)]
        assert pages((run.index, run.pfn, run.count) for run in file.memfd.extents) == pages(rows)
        assert all(covers(found.preserved, run.pfn, run.count) for run in file.memfd.extents)
        assert (file.memfd.folios < file.memfd.size // PAGE) == (file.token == 8), "only one is of large folios"


@pytest.mark.group("luo-frozen")
def test_the_live_tree_is_the_one_handed_over(frozen: tuple[dict[str, Any], tuple[Handover, ...], Path]) -> None:
    notes, (found,), _ = frozen
    assert found.preserved is not None
    assert [list(run) for run in found.preserved.runs] == notes["runs"]
