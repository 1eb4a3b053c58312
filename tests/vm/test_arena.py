"""The dax store on a kernel that hands nothing over: what is in an arena is found again by the next one."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from support import lab, lab_raw
from support.waiting import until

JUMPS = 20 if os.environ.get("MEMCONSOLE_SOAK") else 1
CUTS, PATIENCE_S = 6, 1800.0
WORDS = "kho=off liveupdate=off memmap=256M!1G"


def test_guests_on_an_arena_go_on_over_handoffs_and_its_regions_are_found_again(tmp_path: Path) -> None:
    wordless = ["wordless"] if JUMPS > 1 else []
    said = lab.run("arena", tmp_path, append=WORDS, early=lab.RESUME, arguments=[str(JUMPS), *wordless])
    said.check()
    assert said.stages == JUMPS + 2 + len(wordless)


@pytest.mark.group("arena-devdax")
def test_a_raw_device_says_by_itself_what_is_in_it(tmp_path: Path) -> None:
    words = [str(JUMPS), *(["qemu"] if JUMPS > 1 else [])]
    said = lab.run("devdax", tmp_path, append=f"{WORDS} {lab_raw.WORD}", arguments=words)
    said.check()
    assert said.stages == JUMPS + 1


@pytest.mark.group("arena-cut")
def test_what_was_done_is_there_after_the_power_was_cut_in_the_middle(tmp_path: Path) -> None:
    """Memory is a file, as if it kept what it holds; regions are made, moved and given up when QEMU is killed."""
    if not os.environ.get("MEMCONSOLE_SOAK"):
        pytest.skip("MEMCONSOLE_SOAK=1 runs it")
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="memconsole-lab-") as ram:
        backed = f"memory-backend-file,id=ram,size=2G,mem-path={ram.name},share=on"
        ram.truncate(2 << 30)
        for turn in range(CUTS + 1):
            share = tmp_path / str(turn)
            share.mkdir()
            if turn:
                shutil.copy(tmp_path / str(turn - 1) / "done", share)
            command = lab.prepare(
                "arena_cut",
                share,
                append=WORDS,
                options=["-object", backed, "-machine", "memory-backend=ram"],
                arguments=[str(turn), str(CUTS)],
            )
            cut_until(command, share, f'"number": {random.randrange(2, 8)}' if turn < CUTS else '"name": "end"')


def cut_until(command: list[str], share: Path, said: str) -> None:
    """Let the lab run until it says this, and cut its power."""
    verdicts = share / "verdicts"
    with lab.started(command, share / "console") as qemu:
        until(
            lambda: qemu.poll() is not None or (verdicts.exists() and said in verdicts.read_text()),
            f"the lab says {said}",
            PATIENCE_S,
        )
    lines = verdicts.read_text().splitlines() if verdicts.exists() else []
    assert any(said in line for line in lines), (share / "console").read_text(errors="replace")[-2000:]
    for line in lines:
        assert '"ok": true' in line, line
