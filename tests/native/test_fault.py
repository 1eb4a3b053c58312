"""Copies into fresh frames and faults served, under sanitizers, with their own C driver (fault_driver.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.waiting import LONG_S

TREE = Path(__file__).parents[2]
NATIVE = TREE / "memconsole/native"
FLAGS = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]


@pytest.mark.parametrize("sanitizers", ["address,undefined"])
def test_copies_are_whole_and_every_fault_is_served(tmp_path: Path, sanitizers: str) -> None:
    program = tmp_path / "fault_driver"
    sources = [Path(__file__).parent / "fault_driver.c", NATIVE / "copy.c", NATIVE / "fault.c"]
    subprocess.run(["cc", *FLAGS, f"-fsanitize={sanitizers}", "-I", NATIVE, "-o", program, *sources], check=True)
    result = subprocess.run([program], check=False, capture_output=True, text=True, timeout=LONG_S)
    if result.returncode == 77:
        pytest.skip("this user may have no userfaultfd (vm.unprivileged_userfaultfd)")
    assert result.returncode == 0, result.stderr
