"""An arena torn at a block of its metadata: what is wrong is said by name, by e2fsck's word, and nothing is written."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from support import arenas as images

from memconsole.backend.diagnose import arenas as looked
from memconsole.backend.kernel import pmem
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.stores import arena, ext4
from memconsole.backend.stores.dax import DaxStore
from memconsole.errors import UsageError
from memconsole.model import Region, RegionState

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
M = 1 << 20
SIZE = 96 * M
PLACES = {
    "group descriptors": r"Group descriptors at (\d+)",
    "block bitmap": r"Block bitmap at (\d+)",
    "inode bitmap": r"Inode bitmap at (\d+)",
    "inode table": r"Inode table at (\d+)",
}


class Ranged(Pmem):
    """A range that is a file."""

    @property
    def path(self) -> str:
        return self.name


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arena with a region, not mounted any more."""
    place = tmp_path_factory.mktemp("arena")
    with images.images(place, "host", SIZE) as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "mounted", lambda *_: (images.at(path),))
        store = DaxStore(place, lasting=True)
        (fd,) = store.reserve_segments("web", 8 * M, 4096, None, prefault=False, promised=0)
        store.describe([fd], Region("web", "dax", 8 * M, 4096, RegionState.RESERVED))
        os.close(fd)
        store.close()
    return place / "image"


@pytest.fixture
def device(image: Path, monkeypatch: pytest.MonkeyPatch) -> Pmem:
    found = Ranged(str(image), SIZE, None, "namespace0.0", 0)
    monkeypatch.setattr(pmem, "devices", lambda *_: (found,))
    return found


def blocks(image: Path) -> dict[str, int]:
    """Where its metadata is, in blocks; the journal's and the root directory's are of their inodes."""
    shown = subprocess.run(["dumpe2fs", image], capture_output=True, text=True, check=True).stdout
    found = {what: int(re.search(pattern, shown)[1]) for what, pattern in PLACES.items()}  # type: ignore[index]
    for what, inode in (("journal", "<8>"), ("root directory", "<2>")):
        asked = subprocess.run(["debugfs", "-R", f"blocks {inode}", image], capture_output=True, text=True, check=True)
        found[what] = int(asked.stdout.split()[0])
    return found


class Torn:
    """A block of a file with other bytes in it, for a while."""

    def __init__(self, image: Path, block: int) -> None:
        self.image, self.at = image, block * ext4.BLOCK

    def __enter__(self) -> bytes:
        with self.image.open("r+b") as file:
            file.seek(self.at)
            self.before = file.read(ext4.BLOCK)
            file.seek(self.at)
            file.write(bytes(byte ^ 0xA5 for byte in self.before))
        return self.image.read_bytes()

    def __exit__(self, *_: object) -> None:
        with self.image.open("r+b") as file:
            file.seek(self.at)
            file.write(self.before)


def test_an_arena_that_is_whole_is_only_not_mounted(device: Pmem) -> None:
    assert [each.id for each in looked.check()] == ["arena-unused"]


@pytest.mark.parametrize("what", [*PLACES, "journal", "root directory"])
def test_a_torn_block_of_metadata_is_said_by_e2fsck(device: Pmem, image: Path, what: str) -> None:
    with Torn(image, blocks(image)[what]) as torn:
        told = looked.check("host")
        assert [each.id for each in told] == ["arena-unread", "arena-unused"]
        assert "the file system of arena host is damaged: e2fsck -f -n" in told[0].observed
        assert told[0].remedy == f"e2fsck -f {device.path}"
        assert image.read_bytes() == torn, "looking writes nothing"
    assert [each.id for each in looked.check("host")] == ["arena-unused"]


def test_without_its_first_block_it_is_no_arena_and_is_not_formatted(device: Pmem, image: Path) -> None:
    with Torn(image, 0):
        with pytest.raises(UsageError, match="there is no arena host"):
            looked.check("host")
        (refusal,) = arena.create_refusals("host", device)
        assert refusal[0] == "HoldsUnknown"
