"""What a scenario uses inside the lab: its stage, its verdicts, and the jump. Who imports it is told of if he fails."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

SHARE = Path("/run/lab")
LOGS = (SHARE, Path("/run"), Path("/run/state"))
RUNTIME = Path("/run/memconsole")
"""Each guest's VMM has a log of its own there."""
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


def say(name: str, ok: object = True, **details: Any) -> None:
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


def image_of(payload: bytes, path: str) -> str:
    """The path of an image as the lab's kernel has it, with another payload."""
    image = (SHARE / "bzImage").read_bytes()
    start = (image[0x1F1] + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    made = bytearray(image[:start]) + payload
    made[0x24C:0x250] = len(payload).to_bytes(4, "little")
    Path(path).write_bytes(made)
    return path


def jump() -> None:
    """Boot the loaded kernel; returns only by raising."""
    os.sync()
    _libc.syscall(SYS_REBOOT, *(ctypes.c_ulong(magic) for magic in REBOOT_MAGIC), REBOOT_CMD_KEXEC, 0)
    raise OSError(ctypes.get_errno(), "reboot(LINUX_REBOOT_CMD_KEXEC)")


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Whatever ends a scenario, the host is told, with the logs, and where everybody stands."""
    lines = "".join(traceback.format_exception(kind, error, trace))
    say("exception", ok=False, text=f"{kind.__name__}: {error}", trace=lines[-3000:], logs=_logs(), stacks=_stacks())


def _logs() -> dict[str, str]:
    """How each log ends, the VMMs' too, and the kernel's own."""
    logs = [*(path for directory in LOGS for path in directory.glob("*.log")), *RUNTIME.glob("*/*/log")]
    found = {str(path): path for path in logs}
    dmesg = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout
    return {name: path.read_text(errors="replace")[-3000:] for name, path in found.items()} | {"dmesg": dmesg[-1500:]}


def _stacks() -> dict[str, str]:
    """Where every process of user space stands in the kernel (/proc/PID/stack): for a run that stood still."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stack"):
        with contextlib.suppress(OSError):
            if (path.parent / "exe").readlink():  # a thread of the kernel has none
                found[f"{path.parent.name} {(path.parent / 'comm').read_text().strip()}"] = path.read_text().strip()
    return found


sys.excepthook = _tell
