"""The protect rung where the kernel has it: UFFD_FEATURE_RWP, Linux 7.3."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import lab

pytestmark = pytest.mark.group("revoke-rwp")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    directory: Path = tmp_path_factory.mktemp("rwp")
    return lab.run("revoke_rwp", directory, processors=2)


def test_a_guest_that_does_not_answer_is_barred_and_its_memory_stays(said: lab.Verdicts) -> None:
    said.check()


def test_the_rung_is_the_ioctl(said: lab.Verdicts) -> None:
    """Not timed in a VM without KVM; the figures are there to be read."""
    rung = said.of("rung")
    assert rung["took_ns"] > 0
    assert rung["bare_ns"] > 0
    print(f"protect of 64 MiB took {rung['took_ns'] / 1e6:.2f} ms, the bare ioctl {rung['bare_ns'] / 1e6:.2f} ms")
