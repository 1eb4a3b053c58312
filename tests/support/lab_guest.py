"""What a scenario uses inside the lab: its stage, its verdicts, and the jump."""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from pathlib import Path
from typing import Any

SHARE = Path("/run/lab")
SYS_REBOOT = 169
SYS_KEXEC_FILE_LOAD = 320
REBOOT_MAGIC = (0xFEE1DEAD, 672274793)
REBOOT_CMD_KEXEC = 0x45584543
_libc = ctypes.CDLL(None, use_errno=True)


def command_line() -> str:
    """This kernel's command line (/proc/cmdline)."""
    return Path("/proc/cmdline").read_text(encoding="ascii").strip()


def stage() -> int:
    """1 in the first kernel, one more after each kexec."""
    match = re.search(r"\bstage=(\d+)", command_line())
    return int(match[1]) if match else 0


def say(name: str, ok: bool = True, **details: Any) -> None:
    """One verdict; ``ok`` false fails the run."""
    line = json.dumps({"name": name, "ok": bool(ok), "stage": stage(), "at": time.monotonic(), **details}, default=str)
    with (SHARE / "verdicts").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def next_command_line() -> str:
    """This command line with the stage counted up."""
    return re.sub(r"\bstage=\d+", f"stage={stage() + 1}", command_line())


def load(line: str | None = None, image: str = "bzImage") -> None:
    """Load the next kernel by kexec_file_load(2)."""
    text = (line or next_command_line()).encode() + b"\0"
    kernel = os.open(SHARE / image, os.O_RDONLY)
    initrd = os.open(SHARE / "initrd", os.O_RDONLY)
    try:
        if _libc.syscall(SYS_KEXEC_FILE_LOAD, kernel, initrd, ctypes.c_ulong(len(text)), text, 0) != 0:
            raise OSError(ctypes.get_errno(), "kexec_file_load")
    finally:
        os.close(kernel)
        os.close(initrd)


def jump() -> None:
    """Boot the loaded kernel; returns only by raising."""
    os.sync()
    _libc.syscall(SYS_REBOOT, *(ctypes.c_ulong(magic) for magic in REBOOT_MAGIC), REBOOT_CMD_KEXEC, 0)
    raise OSError(ctypes.get_errno(), "reboot(LINUX_REBOOT_CMD_KEXEC)")
