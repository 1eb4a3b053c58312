"""DMA of a real device through a real IOMMU into a region: given, adopted, taken back while it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import lab


@pytest.fixture(scope="module")
def type1(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    return lab.run("dma_type1", tmp_path_factory.mktemp("type1"))


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    return lab.run("dma_qemu", tmp_path_factory.mktemp("qemu"))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    directory: Path = tmp_path_factory.mktemp("dma")
    return lab.run("dma", directory, processors=2)


@pytest.mark.group("dma")
def test_every_verdict_is_good(said: lab.Verdicts) -> None:
    said.check()


@pytest.mark.group("dma-type1")
def test_every_verdict_is_good_without_iommufd(type1: lab.Verdicts) -> None:
    type1.check()


@pytest.mark.group("dma-qemu")
def test_every_verdict_is_good_of_a_qemu(qemu: lab.Verdicts) -> None:
    qemu.check()


@pytest.mark.group("dma-amd")
def test_every_verdict_is_good_behind_an_iommu_of_amd(tmp_path: Path) -> None:
    words = "iommu=pt iommufd.allow_unsafe_interrupts=1"  # QEMU's machine lets AMD's driver remap no interrupts
    said = lab.run("dma_amd", tmp_path, iommu="amd-iommu,pt=off", append=words)
    said.check()
