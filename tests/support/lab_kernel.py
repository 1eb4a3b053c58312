"""The lab's kernel as an image that need not be unpacked.

    setup | lab_kernel.S | ELF, its text and data as they lie in memory

To unpack xz takes three seconds of an emulated processor at every boot, and thrice as many in a process that looks what
an image says of itself. The kernel, its setup and what the image says are those of the image it is made of.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import subprocess
import tempfile
from pathlib import Path

STUB = Path(__file__).with_suffix(".S")
XZ = b"\xfd7zXZ"
STUB_SIZE, HEADERS = 0x7000, 0x1000
LOAD = 1
_ELF, _SEGMENT = "<16sHHIQQQIHHHHHH", "<IIQQQQQQ"


def image(kernel: Path, cache: Path) -> Path:
    """The image of a kernel that is not packed, from the cache or made there; the kernel itself if it is not of xz."""
    data = kernel.read_bytes()
    name = hashlib.sha256(data + STUB.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:24]
    found = cache / f"kernel-{name}"
    if found.exists():
        return found
    setup, at, length = ((data[0x1F1] or 4) + 1) * 512, *struct.unpack_from("<II", data, 0x248)
    payload = data[setup + at : setup + at + length]
    if not payload.startswith(XZ):
        return kernel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        new = Path(directory, "image")
        new.write_bytes(_made(data[:setup], lzma.LZMADecompressor().decompress(payload), Path(directory)))
        new.rename(found)
    return found


def renamed(image: bytes, release: str) -> bytes:
    """The same kernel, which says in its image and when it runs that it is of another release of as many characters.

    ``uname`` of both, the banner and the setup's version have it; nothing else of the kernel changes.
    """
    found = release_of(image)
    if len(found) != len(release):
        raise ValueError(f"{release} has not as many characters as {found}, the release of the lab's kernel")
    return image.replace(found.encode(), release.encode())


def release_of(image: bytes) -> str:
    """The release that an image says it is of."""
    at = int.from_bytes(image[0x20E:0x210], "little") + 0x200
    return image[at : image.index(b" ", at)].decode("ascii")


def _made(setup: bytes, kernel: bytes, directory: Path) -> bytes:
    """A setup that is told of the payload behind the stub, the stub, and the payload."""
    header = list(struct.unpack_from(_ELF, kernel))
    entry, first, count = header[4], header[5], header[10]
    rows = [list(struct.unpack_from(_SEGMENT, kernel, first + number * 56)) for number in range(count)]
    loads = [row for row in rows if row[0] == LOAD]
    start, lowest = loads[0][2], loads[0][4]
    if any(row[4] - row[2] != lowest - start for row in loads):
        raise ValueError("the segments of the lab's kernel do not lie in its file as in memory")
    end = loads[-1][2] + loads[-1][5]
    moved = kernel[start:end] + bytes(-end % 16)
    symbols = {"TEXT": STUB_SIZE + HEADERS, "SIZE": len(moved), "ENTRY": entry - lowest}
    for row in rows:
        row[2] += HEADERS - start
    header[5], header[6], header[11], header[12], header[13] = 64, 0, 0, 0, 0  # there are no sections
    headers = struct.pack(_ELF, *header) + b"".join(struct.pack(_SEGMENT, *row) for row in rows)
    payload = headers.ljust(HEADERS, b"\0") + moved
    told = bytearray(setup)
    struct.pack_into("<II", told, 0x248, STUB_SIZE, len(payload))
    struct.pack_into("<I", told, 0x1F4, -(-(STUB_SIZE + len(payload)) // 16))
    return bytes(told) + _stub(symbols, directory) + payload


def _stub(symbols: dict[str, int], directory: Path) -> bytes:
    made, image = directory / "stub.o", directory / "stub"
    words = [word for name, value in symbols.items() for word in ("--defsym", f"{name}={value}")]
    subprocess.run(["as", "--64", *words, "-o", made, STUB], check=True)
    subprocess.run(["ld", "-Ttext", "0", "-e", "0", "--oformat", "binary", "-o", image, made], check=True)
    data = image.read_bytes()
    if len(data) != STUB_SIZE:
        raise ValueError(f"the stub of the lab's kernel has {len(data)} bytes")
    return data
