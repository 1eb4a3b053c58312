"""What an ext4 superblock says of an arena, to memconsole-resume: as Python reads it, and nothing from other bytes."""

from __future__ import annotations

import random
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from memconsole.actions import NAME
from memconsole.backend.stores import ext4
from memconsole.backend.stores.arena import LABEL, NAME_MOST

DRIVER = Path(__file__).with_name("arena_label_driver.c")
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fsanitize=address,undefined"]
ALPHABET = b"abcXYZ019._-/ \0\n\x80\xff"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("label") / "driver"
    subprocess.run([compiler, *FLAGS, "-fno-sanitize-recover=all", "-o", path, DRIVER], check=True)
    return path


def read(driver: Path, blocks: Iterable[bytes]) -> list[str]:
    """What C says of each."""
    done = subprocess.run([driver], input=b"".join(blocks), capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().split("\n")[:-1]


def superblock(label: bytes, *, magic: int = 0xEF53, state: int = 1, incompatible: int = 0) -> bytes:
    block = bytearray(1024)
    struct.pack_into("<HH", block, 0x38, magic, state)
    struct.pack_into("<I", block, 0x60, incompatible)
    block[0x78 : 0x78 + len(label)] = label
    return bytes(block)


def name_of(block: bytes) -> str:
    """The name of an arena as Python reads it; empty where it is none."""
    found = ext4.superblock(bytes(1024) + block)
    if found is None or not found.label.startswith(LABEL):
        return ""
    name = found.label.removeprefix(LABEL)
    return name if re.fullmatch(NAME, name) and len(name) <= NAME_MOST else ""


def test_what_a_superblock_says_is_read(driver: Path) -> None:
    blocks = [
        superblock(b"mc:home"),
        superblock(b"mc:" + b"x" * 13),
        superblock(b"mc:home", incompatible=4),
        superblock(b"mc:home", state=2),
        superblock(b"mc:home", magic=0xEF52),
        superblock(b"home"),
        superblock(b"mc:"),
        superblock(b"mc:../etc"),
        superblock(b"mc:.."),
        superblock(b"mc:-x"),
    ]
    errors = "its file system has noted errors: e2fsck, then memconsole arena scan"
    assert read(driver, blocks) == ["home 0 ", "x" * 13 + " 0 ", "home 1 ", f"home 0 {errors}", *["-"] * 6]


def test_any_bytes_are_read_as_python_reads_them(driver: Path) -> None:
    dice = random.Random(6)
    blocks = [
        superblock(
            b"mc:" + bytes(dice.choice(ALPHABET) for _ in range(dice.randint(0, 13))),
            magic=dice.choice((0xEF53, dice.getrandbits(16))),
            state=dice.getrandbits(16),
            incompatible=dice.getrandbits(32),
        )
        for _ in range(4000)
    ]
    blocks += [dice.randbytes(1024) for _ in range(1000)]
    said = [line.partition(" ")[0] for line in read(driver, blocks)]
    assert said == [name_of(block) or "-" for block in blocks]
    assert len(set(said)) > 100
