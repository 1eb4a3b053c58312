"""The lab is what it says: a kernel that kexecs, verdicts that arrive, and an end that always comes."""

from __future__ import annotations

from pathlib import Path

import lab
import pytest


def test_a_real_kernel_really_kexecs(tmp_path: Path) -> None:
    said = lab.run("kexec_twice", tmp_path)
    said.check()
    assert said.stages == 3


def test_a_scenario_that_says_nothing_fails(tmp_path: Path) -> None:
    said = lab.run("no_such_scenario", tmp_path, timeout=60)
    with pytest.raises(AssertionError, match="never said 'end'"):
        said.check()
