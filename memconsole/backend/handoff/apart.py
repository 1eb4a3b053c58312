"""A kernel image that others may have made is unpacked by a process of its own, which is bounded and may be killed.

    parent   python -m memconsole.backend.handoff.apart PATH     stdin: the image   stdout: one JSON value
    reply    {"image": Image}  or  {"fault": {"what": ..., "why": ..., "remedy": ...}}

Its memory is bounded by RLIMIT_AS (its tools' too, each for itself), its time by RLIMIT_CPU and by the parent, which
kills it with its tools. When memory is short it is the first to go, whatever its parent is spared from.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from memconsole import decoding
from memconsole.backend.handoff import image
from memconsole.backend.handoff.image import KernelImage
from memconsole.errors import BadFile, MemconsoleError
from memconsole.model import Value

MEMORY = 3 * image.LARGEST
"""Bytes of address space: a packed image, its payload, and what that unpacks to."""
CPU_S = 120
DEADLINE_S = 600.0
"""A large kernel is unpacked in two seconds by an idle CPU; a busy or emulated one takes many times as long."""
_REPLY = 1 << 16


class TooSlow(BadFile):
    """It was not unpacked in time: that says as much of this host just now as of the file."""


class _Fault(Value, frozen=True):
    what: str
    why: str = ""
    remedy: str = ""


class _ChildReply(Value, frozen=True):
    image: KernelImage | None = None
    fault: _Fault | None = None


def inspect(path: str, fd: int, *, within: float = DEADLINE_S) -> KernelImage:
    """What the bzImage ``fd`` says of itself; ``path`` is what it is called.

    Raises:
        BadFile: it is no bzImage, truncated, or not unpacked within bounds (``TooSlow``: of time).
        KernelRefused: it cannot be read.
        MemconsoleError: no process can be made.
    """
    # Without the current directory, which may be anybody's, among the places that modules come from.
    words = [sys.executable, "-P", "-m", __name__, path]
    try:
        # In a session of its own, so that its tools are killed with it.
        child = subprocess.Popen(
            words, stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise MemconsoleError(
            f"{path} cannot be inspected", f"no process for it: {error.strerror}", "try again"
        ) from None
    with child:
        try:
            said, _ = child.communicate(timeout=within)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)  # it was not waited for: the number is still its own
            if isinstance(error, subprocess.TimeoutExpired):
                slow = _not_unpacked(path, f"it took longer than {within:g} s")
                raise TooSlow(slow.what, slow.why, "try again when this host is less busy") from None
            raise
    return _read(path, said, child.returncode)


def _read(path: str, said: bytes, status: int) -> KernelImage:
    if status:
        end = f"signal {-status}" if status < 0 else f"status {status}"
        raise _not_unpacked(path, f"the process that unpacks it ended with {end}")
    reply = decoding.json(said, _ChildReply, what=f"the answer of the process that unpacks {path}", limit=_REPLY)
    if reply.fault is not None:
        raise BadFile(reply.fault.what, reply.fault.why, reply.fault.remedy)
    if reply.image is None:
        raise _not_unpacked(path, "the process that unpacks it gave no answer")
    return reply.image


def _not_unpacked(path: str, why: str) -> BadFile:
    bounds = f"it may take {MEMORY >> 20} MiB and {CPU_S} s of a CPU"
    return BadFile(f"{path} cannot be unpacked", f"{why}; {bounds}", "choose another image, or try again")


def _bound() -> None:
    """Be the first to go when memory is short, and take no more than this."""
    with contextlib.suppress(OSError):  # not everybody may, and the limits below hold all the same
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    for limit, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (least, least))


def _main(path: str) -> int:
    _bound()
    try:
        reply = _ChildReply(image=image.inspect(path, sys.stdin.fileno()))
    except MemconsoleError as error:
        reply = _ChildReply(fault=_Fault(error.what, error.why, error.remedy))
    except MemoryError:
        reply = _ChildReply(fault=_Fault(f"{path} cannot be unpacked", f"it takes more than {MEMORY >> 20} MiB"))
    os.write(sys.stdout.fileno(), msgspec.json.encode(reply))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
