"""DMA of a real device through a real IOMMU into a region: given, adopted, taken back while it runs."""

from __future__ import annotations

from pathlib import Path

import lab
import pytest


@pytest.fixture(scope="module")
def type1(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    return lab.run("dma_type1", tmp_path_factory.mktemp("type1"), timeout=900)


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    return lab.run("dma_qemu", tmp_path_factory.mktemp("qemu"), timeout=900)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    directory: Path = tmp_path_factory.mktemp("dma")
    return lab.run("dma", directory, timeout=400)


@pytest.mark.rotating("dma")
def test_every_verdict_is_good(said: lab.Verdicts) -> None:
    said.check()


@pytest.mark.rotating("dma-type1")
def test_every_verdict_is_good_without_iommufd(type1: lab.Verdicts) -> None:
    type1.check()


@pytest.mark.rotating("dma-qemu")
def test_every_verdict_is_good_of_a_qemu(qemu: lab.Verdicts) -> None:
    qemu.check()


@pytest.mark.rotating("dma-amd")
def test_every_verdict_is_good_behind_an_iommu_of_amd(tmp_path: Path) -> None:
    words = "iommu=pt iommufd.allow_unsafe_interrupts=1"  # QEMU's machine lets AMD's driver remap no interrupts
    said = lab.run("dma_amd", tmp_path, timeout=600, iommu="amd-iommu,pt=off", append=words)
    said.check()
