"""Kernel images of x86 as the tests make them: what stands in them, packed in every way that is known."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

MIB = 1 << 20
ELF = (
    b"\x7fELF" + bytes(1000) + b"text kho-v4\0other\0luo-v5\0\xff\xffmemfd-v2\0xkho-v9\0kho-v77 \0luo-v\0" + bytes(5000)
)
SIZED = struct.pack("<I", len(ELF))


def tool(*command: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        if shutil.which(command[0]) is None:
            pytest.skip(f"no {command[0]}")
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout + SIZED

    return pack


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32) + SIZED,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + SIZED,
    "bzip2": lambda data: bz2.compress(data) + SIZED,
    "zstd": tool("zstd", "-qc"),
    "lz4": tool("lz4", "-lqc"),
    "none": lambda data: data,
}


def bzimage(
    path: Path, payload: bytes, release: bytes = b"7.3.4-test (who@where) #1", init_size: int = 20 * MIB
) -> str:
    """A bzImage as arch/x86/boot/tools/build.c lays it out."""
    sectors = 4
    data = bytearray((sectors + 1) * 512)
    data[0x1F1] = sectors
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x20E, 0x300)
    struct.pack_into("<I", data, 0x230, 2 * MIB)
    struct.pack_into("<II", data, 0x248, 0x40, len(payload))
    struct.pack_into("<I", data, 0x260, init_size)
    data[0x500 : 0x500 + len(release) + 1] = release + b"\0"
    path.write_bytes(bytes(data) + bytes(0x40) + payload + b"behind")
    return str(path)
