"""Devices go through a real handoff: quiet in between, afterwards the same IOVAs lead to the same frames."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import lab

SOAK = bool(os.environ.get("MEMCONSOLE_SOAK"))


@pytest.mark.group("handoff-devices")
def test_a_device_goes_along_and_whoever_dies_on_the_way_harms_nobody(tmp_path: Path) -> None:
    arguments = ["4", "differs"] if SOAK else ["1"]
    said = lab.run("handoff_devices", tmp_path, early=lab.RESUME, arguments=arguments)
    said.check()
    assert said.stages == (3 if SOAK else 2)


@pytest.mark.group("handoff-passthrough")
def test_a_qemu_takes_its_device_along_while_its_guest_is_suspended(tmp_path: Path) -> None:
    arguments = ["1" if SOAK else "0"]
    lab.run("handoff_passthrough", tmp_path, early=lab.RESUME, arguments=arguments).check()


OTHERS = (
    "edu,addr=6,multifunction=on,dma_mask=0xffffffffffff",
    "pci-testdev,addr=6.1",
    "pcie-root-port,id=root,addr=7",
    "virtio-rng-pci,bus=root",
)


@pytest.mark.group("handoff-devices-refused")
def test_what_keeps_a_device_from_going_along_is_said_by_its_name(tmp_path: Path) -> None:
    lab.run("handoff_devices_refused", tmp_path, devices=OTHERS).check()
