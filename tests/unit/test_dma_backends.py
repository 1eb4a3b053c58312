"""What devices are confined with: iommufd where it can be, VFIO's containers where not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trees import Tree

from memconsole.backend.dma import backends
from memconsole.backend.dma.backends import SpaceKind
from memconsole.errors import NotFound

BDF = "0000:00:04.0"
FILE = f"/sys/bus/pci/devices/{BDF}/vfio-dev"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    made.pci(BDF, ids=(1, 2), class_code=0xFF0000, driver="vfio-pci", group=7)
    return made


def test_iommufd_is_taken_where_the_device_has_a_file(tree: Tree) -> None:
    tree.write("/dev/iommu", "")
    tree.write("/dev/vfio/vfio", "")
    tree.directory(FILE)
    assert backends.choose_backend(tree.root, BDF) is SpaceKind.IOMMUFD


@pytest.mark.parametrize("there", ["/dev/iommu", FILE])
def test_a_container_is_taken_where_one_of_both_is_not(tree: Tree, there: str) -> None:
    tree.directory(there)
    tree.write("/dev/vfio/vfio", "")
    assert backends.choose_backend(tree.root, BDF) is SpaceKind.TYPE1


def test_where_there_is_neither_it_is_said(tree: Tree) -> None:
    tree.write("/dev/iommu", "")
    with pytest.raises(NotFound) as none:
        backends.choose_backend(tree.root, BDF)
    assert none.value.code == "NoVfio"
    assert "/dev/vfio/vfio" in none.value.why
