"""AMD's I/O page tables, as a real kernel fills them for QEMU's amd-iommu."""

from __future__ import annotations

from pathlib import Path

import lab
import pytest

pytestmark = pytest.mark.rotating("amd")


def test_the_walk_finds_the_frames_that_were_mapped(tmp_path: Path) -> None:
    lab.run("amd", tmp_path, timeout=400, iommu="amd-iommu", append="pci=nomsi").check()
