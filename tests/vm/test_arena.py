"""The dax store on a kernel that hands nothing over: what is in an arena is found again by the next one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import lab, lab_raw

JUMPS = 20 if os.environ.get("MEMCONSOLE_SOAK") else 1
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
