"""The lab is what it says: a kernel that kexecs, verdicts that arrive, and an end that always comes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import lab


def test_a_real_kernel_really_kexecs(tmp_path: Path) -> None:
    said = lab.run("kexec_twice", tmp_path, processors=2)
    said.check()
    assert said.stages == 3


def test_a_scenario_that_says_nothing_fails(tmp_path: Path) -> None:
    said = lab.run("no_such_scenario", tmp_path)
    with pytest.raises(AssertionError, match="never said 'end'"):
        said.check()
