"""Findings of ``memconsole audit``, brought about for real by strangers, guests and devices; a clean host has none.

Where the others are: a guest that ended, and a region that is lost, in host/test_control_restart.py; frames in
quarantine in host/test_revoke_hostile.py; what a handoff finds in test_handoff_devices.py and test_handoff.py; what
custody and the audit trail lost in host/test_serve_killed.py and host/test_serve_abused.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import lab

pytestmark = pytest.mark.group("audit")

PAIR = (
    "pcie-root-port,id=root,addr=7",
    "pcie-pci-bridge,id=bridge,bus=root",
    "edu,bus=bridge,addr=1,dma_mask=0xffffffffffff",
    "pci-testdev,bus=bridge,addr=2",
)
"""Two devices that share what a bridge cannot keep apart."""


def test_whatever_is_not_as_it_should_be_is_found_and_nothing_else(tmp_path: Path) -> None:
    lab.run("audit", tmp_path, devices=[*PAIR, "virtio-rng-pci,addr=8"]).check()


def test_a_device_whose_interrupts_are_not_remapped_is_found(tmp_path: Path) -> None:
    lab.run("audit", tmp_path, iommu="intel-iommu,intremap=off", arguments=["interrupts"]).check()
