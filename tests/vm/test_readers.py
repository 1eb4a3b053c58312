"""Kernel readers where LUO, KHO, an IOMMU and its page tables are real."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import lab


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> lab.Verdicts:
    directory: Path = tmp_path_factory.mktemp("readers")
    return lab.run("readers", directory)


def test_every_reader_answered_in_both_kernels(said: lab.Verdicts) -> None:
    said.check()
    assert said.stages == 2


def test_kho_is_seen_cold_and_after_a_jump(said: lab.Verdicts) -> None:
    cold, warm = (verdict for verdict in said.said if verdict["name"] == "survival")
    assert cold["kexec_count"] == 0
    assert not cold["incoming"]
    assert warm["kexec_count"] == 1
    assert "LUO" in warm["incoming"]
    assert cold["scratch"] == warm["scratch"] != []


def test_the_iommu_shows_its_domains(said: lab.Verdicts) -> None:
    domains = said.of("domains")["domains"]
    assert any("0000:00:04.0" in domain["devices"] for domain in domains)
    assert any(domain["reserved"] for domain in domains)
