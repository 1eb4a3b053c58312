"""The RAM of VMs that others run, for a desk as a value: a memfd a block, and a monitor that says which is which."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from memconsole.backend.managers.guest_memory import Block
from memconsole.backend.stores.adopted import RamFile
from memconsole.errors import Gone, NotFound
from memconsole.model import Guest


class ForeignRam:
    """``ram``: the blocks of each process by its PID, each with its file and a descriptor; ``asked``: who was asked."""

    ram: dict[int, list[tuple[Block, RamFile, int]]]
    asked: list[str]

    def hold_ram(self, ram: Iterable[tuple[int, Sequence[Block]]]) -> None:
        self.asked = []
        self.ram = {pid: [_block_memory(block) for block in blocks] for pid, blocks in ram}

    def close_ram(self) -> None:
        for each in self.ram.values():
            for _, _, fd in each:
                os.close(fd)

    def ram_files(self, guest: Guest) -> tuple[RamFile, ...]:
        if guest.pid not in self.ram:
            raise Gone(f"guest {guest.name} is gone", "its process ended", "")
        return tuple(file for _, file, _ in self.ram[guest.pid])

    def monitor_process(self, qmp: str) -> int:
        if not qmp.rpartition("-")[2].isdecimal():
            raise NotFound(f"nobody listens at {qmp}", "", "")
        return int(qmp.rpartition("-")[2])

    def ask_ram(self, guest: Guest, qmp: str) -> tuple[Block, ...]:
        self.asked.append(guest.name)
        return tuple(block for block, _, _ in self.ram[guest.pid or 0])

    def open_ram(self, guest: Guest, file: RamFile) -> int:
        return os.dup(next(fd for _, each, fd in self.ram[guest.pid or 0] if each == file))


def _block_memory(block: Block) -> tuple[Block, RamFile, int]:
    """A block with a file of its size, and a descriptor of it."""
    fd = os.memfd_create(block.name, os.MFD_CLOEXEC)
    os.ftruncate(fd, block.size)
    seen = os.fstat(fd)
    return block, RamFile(block.hva, block.size, seen.st_dev, seen.st_ino, "memfd", "/memfd:ram"), fd
