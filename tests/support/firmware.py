"""The firmware of guests whose code is the test's own, built with the assembler.

firmware.S and counting.S; each begins with protected.S.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

STATUS, SRC, DST = 0x100000, 0x200000, 0x300000
"""Where in its RAM a guest says how far it is, and what it has a device carry from where to where."""

HOLE = range(0xA0, 0x100)
"""Pages of a PC that its firmware and its screen have; RAM there only as its guest says."""


def firmware(directory: Path, sleeps: int = 0) -> tuple[str, ...]:
    """What QEMU is told to run it, built in a directory; ``sleeps``: after how many rounds it is suspended to RAM."""
    told = ("-device", f"loader,addr={STATUS + 32:#x},data={sleeps},data-len=4") if sleeps else ()
    return ("-bios", str(_image(directory, "firmware.S")), *told)


def counting(directory: Path) -> tuple[str, ...]:
    """What QEMU is told to run one that checks and writes its memory, round after round (counting.S).

    At STATUS are the rounds and the words that were wrong, 4 bytes each.
    """
    return ("-bios", str(_image(directory, "counting.S")))


def _image(directory: Path, source: str) -> Path:
    made, image = directory / "firmware.o", directory / "firmware.bin"
    subprocess.run(
        ["as", "--32", "-I", Path(__file__).parent, "-o", made, Path(__file__).with_name(source)], check=True
    )
    link = ["ld", "-m", "elf_i386", "-Ttext", "0xffff0000", "-e", "0xfffffff0", "--oformat", "binary"]
    subprocess.run([*link, "-o", image, made], check=True)
    return image
