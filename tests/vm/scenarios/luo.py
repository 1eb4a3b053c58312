"""LUO for real: memfds with known contents, one written to meanwhile, over a kexec; and every refusal by its name.

With the argument ``frozen`` the jump leads into an image that only halts, so that the host can dump what it was given.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support import lab_guest as lab
from support.luo_incoming import Incoming, covers, retrieve_fd

from memconsole.backend.handoff import image, luo
from memconsole.backend.kernel import handover, kho
from memconsole.backend.kernel.handover.memory import KCORE, Core, DevMem
from memconsole.backend.kernel.handover.values import Preserved
from memconsole.errors import MemconsoleError
from memconsole.extents import ExtentTable, digest_fd

MIB = 1 << 20
SMALL, HUGE, STATE, LOST = 7, 8, 9, 10
SIZES = {SMALL: 64 * MIB, HUGE: 64 * MIB, STATE: 3 * 4096 + 100, LOST: 16 * MIB}
OWNERS = {SMALL: "guest-1", HUGE: "guest-1", STATE: "guest-2", LOST: "guest-3"}
NOTES = lab.SHARE / "notes.json"
FDT = Path("/sys/kernel/debug/kho/out/fdt")


def refused(name: str, expected: str, act: Callable[[], object]) -> None:
    """An act that must be refused, under this code."""
    try:
        act()
    except MemconsoleError as error:
        lab.say(f"refused-{name}", error.code == expected, code=error.code, text=str(error))
    else:
        lab.say(f"refused-{name}", ok=False, text="it was not refused")


def make(token: int) -> int:
    """A memfd with known contents, in small folios, huge ones, or of an odd size; one has a hole."""
    fd = os.memfd_create(f"test:{token}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    size = SIZES[token]
    os.ftruncate(fd, size)
    if token != LOST:
        with mmap.mmap(fd, size) as memory:
            if token == HUGE:
                memory.madvise(mmap.MADV_HUGEPAGE)
            for at in range(0, size, 4096):
                memory[at] = 1
    os.pwrite(fd, random.Random(token).randbytes(min(size, MIB)), 0)
    return fd


def where(fd: int, size: int) -> tuple[str, list[tuple[int, int, int]]]:
    """Where a memfd's pages are: the extents' digest, and index, pfn and count of each run."""
    with ExtentTable.scan_fd(fd, -(-size // 4096) * 4096) as table:
        return table.digest(), [(row.offset, row.pfn, row.count) for row in table]


def preserved() -> Preserved:
    """What this kernel preserved up to now."""
    found = handover.live("out").preserved
    assert found is not None
    return found


def timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return (time.monotonic() - began) * 1000


class Writer:
    """A guest's stand-in: for as long as it runs it counts in the last bytes of its memory."""

    def __init__(self, fd: int, size: int) -> None:
        self.count = 0
        self._ended = threading.Event()
        self._memory = mmap.mmap(fd, size)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.001):
            self.count += 1
            self._memory[-8:] = self.count.to_bytes(8, "little")

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._memory.close()


def refusals() -> None:
    """What cannot be preserved, and a device that another has."""
    with luo.LuoSession.create("memconsole:refusals") as session:
        refused("session-exists", "SessionExists", lambda: luo.LuoSession.create("memconsole:refusals"))
        huge = os.memfd_create("huge", os.MFD_HUGETLB)
        os.ftruncate(huge, 2 * MIB)
        vast = os.memfd_create("vast")
        os.ftruncate(vast, 17 << 40)
        null = os.open("/dev/null", os.O_RDWR)
        refused("hugetlb", "NoHandler", lambda: session.preserve(huge, 1))
        refused("null", "NoHandler", lambda: session.preserve(null, 2))
        refused("vast", "TooLarge", lambda: session.preserve(vast, 3))
        for fd in (huge, vast, null):
            os.close(fd)
    refused("not-a-session", "NotASession", lambda: luo.LuoSession.adopt(sys.stderr.fileno()))
    device = os.open(luo.DEVICE, os.O_RDWR)
    refused("second-opener", "Busy", lambda: luo.LuoSession.create("memconsole:second"))
    os.close(device)
    refused("unknown-session", "NoSession", lambda: Incoming.retrieve("memconsole:nobody"))


def dropped() -> None:
    """A session that is closed preserves nothing any more."""
    fd = os.memfd_create("dropped")
    os.ftruncate(fd, MIB)
    session = luo.LuoSession.create("memconsole:dropped")
    session.preserve(fd, 1)
    _, rows = where(fd, MIB)
    held = all(covers(preserved(), pfn, count) for _, pfn, count in rows)
    try:
        os.ftruncate(fd, 0)
        frozen = False
    except PermissionError:
        frozen = True
    session.close()
    left = preserved()
    gone = not any(covers(left, pfn) for _, pfn, count in rows for pfn in range(pfn, pfn + count))
    os.ftruncate(fd, 0)
    os.close(fd)
    lab.say("dropped", rows and held and frozen and gone, held=held, frozen=frozen, gone=gone, rows=len(rows))


def both_memories(address: int) -> None:
    """/dev/mem and /proc/kcore show the same, and neither shows what is not there."""
    with Core(KCORE) as core, DevMem() as device:
        same = core.read(address, 8192) == device.read(address, 8192)
        lab.say("memories", same and any(core.read(address, 8192)), segments=str(core.segments))
        refused("wild-kcore", "BadFile", lambda: core.read(1 << 51, 8))
        refused("wild-devmem", "BadFile", lambda: device.read(1 << 51, 8))


def first() -> None:
    before = handover.live("out")
    pages_before = preserved().pages
    both_memories(before.blobs[0].address)
    refused("nothing-in", "NotFound", lambda: handover.live("in"))
    lab.say("clean", before.luo is not None and not before.luo.sessions and not before.gaps, blobs=str(before.blobs))
    if "frozen" not in sys.argv:
        refusals()
        dropped()
    Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").write_text("advise")
    fds = {token: make(token) for token in SIZES}
    writer = Writer(fds[SMALL], SIZES[SMALL])
    sessions = {name: luo.LuoSession.create(luo.session_name(name)) for name in sorted(set(OWNERS.values()))}
    times = {token: timed(partial(sessions[OWNERS[token]].preserve, fds[token], token)) for token in SIZES}
    seen = writer.count
    time.sleep(0.2)
    lab.say("writes-go-on", writer.count > seen, seen=seen, later=writer.count)
    one, two = sessions["guest-1"], sessions["guest-2"]
    refused("token-used", "TokenUsed", lambda: one.preserve(fds[STATE], SMALL))
    refused("preserved-twice", "AlreadyPreserved", lambda: two.preserve(fds[SMALL], 99))
    refused("retrieve-outgoing", "WrongSide", lambda: retrieve_fd(one, SMALL))
    refused("finish-outgoing", "WrongSide", one.finish)
    adopted = luo.LuoSession.adopt(os.dup(one.fd))
    lab.say("adopted", adopted.name == "memconsole:guest-1" and not os.get_inheritable(one.fd), found=adopted.name)
    placed = {token: where(fds[token], SIZES[token]) for token in SIZES}
    kept = preserved()
    covered = all(covers(kept, pfn, count) for _, rows in placed.values() for _, pfn, count in rows)
    huge = kept.orders.get(9, 0) >= SIZES[HUGE] // (2 * MIB)
    lab.say("covered", covered and huge, orders=kept.orders, pages=kept.pages, was=pages_before)
    writer.stop()
    NOTES.write_text(
        json.dumps(
            {
                "count": writer.count,
                "sessions": {luo.session_name(name): [t for t in SIZES if OWNERS[t] == name] for name in sessions},
                "sizes": SIZES,
                "digests": {token: digest_fd(fds[token]) for token in SIZES},
                "positions": {token: os.lseek(fds[token], 4242 + token, os.SEEK_SET) for token in SIZES},
                "placed": placed,
                "runs": [list(run) for run in kept.runs],
            }
        )
    )
    lab.say("preserve", times_ms=times, runs={token: len(rows) for token, (_, rows) in placed.items()})
    load()
    os.sync()
    lab.jump()


def load() -> None:
    """The next image; one that has no room in scratch is refused, as foreseen."""
    kernel, initrd = str(lab.SHARE / "bzImage"), str(lab.SHARE / "initrd")
    if "frozen" in sys.argv:
        image.load(str(lab.SHARE / "bzImage.frozen"), initrd, lab.next_command_line())
        return
    found, scratch = image.inspect(kernel, image.opened(kernel)), kho.survival().scratch
    largest = max(region.end - region.start for region in scratch)
    vast = Path("/tmp/vast")
    with vast.open("wb") as file:
        file.truncate(largest)
    lab.say("foreseen", image.shortage(found, largest, scratch), text=image.shortage(found, largest, scratch))
    refused("image-too-large", "ImageTooLarge", lambda: image.load(kernel, str(vast), "x"))
    refused("not-a-kernel", "NotAKernel", lambda: image.load(initrd, None, "x"))
    vast.unlink()
    was = image.loaded()
    image.load(kernel, initrd, lab.next_command_line())
    now = image.loaded()
    image.unload()
    gone = image.loaded()
    image.load(kernel, initrd, lab.next_command_line())
    fits = not image.shortage(found, Path(initrd).stat().st_size, scratch)
    lab.say("loaded", (was, now, gone, fits) == (False, True, False, True), states=(was, now, gone, fits))


IN_A_SMALL_CGROUP = """
import os, sys
from support.luo_incoming import Incoming
session = Incoming.adopt(int(sys.argv[1]))
open("/sys/fs/cgroup/small/cgroup.procs", "w").write(str(os.getpid()))
session.retrieve_fd(10)
"""


def charged() -> None:
    """A retriever whose memory cgroup is too small is killed for it, and the memory is lost for good."""
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    Path("/sys/fs/cgroup/small").mkdir()
    Path("/sys/fs/cgroup/small/memory.max").write_text(str(12 * MIB))
    session = Incoming.retrieve("memconsole:guest-3")
    os.set_inheritable(session.fd, True)
    command = [sys.executable, "-c", IN_A_SMALL_CGROUP, str(session.fd)]
    done = subprocess.run(command, capture_output=True, text=True, close_fds=False, check=False)
    refused("lost", "NoMemory", lambda: session.retrieve_fd(LOST))
    lab.say("charged", done.returncode == -signal.SIGKILL, code=done.returncode, err=done.stderr[-2000:])


def second() -> None:
    notes = json.loads(NOTES.read_text())
    handed = handover.live("in")
    lab.say(
        "handed-in",
        handed.metadata is not None and handed.metadata.kexec_count == 1 and handed.luo is None,
        metadata=str(handed.metadata),
        gaps=str(handed.gaps),
    )
    one = Incoming.retrieve("memconsole:guest-1")
    two = Incoming.retrieve("memconsole:guest-2")
    refused("retrieved-twice", "AlreadyRetrieved", lambda: Incoming.retrieve("memconsole:guest-1"))
    refused("unknown-token", "NoToken", lambda: one.retrieve_fd(12345))
    refused("preserve-incoming", "WrongSide", lambda: one.preserve(sys.stderr.fileno(), 1))
    fds, times = {}, {}
    for token in (SMALL, HUGE, STATE):
        began = time.monotonic()
        fds[token] = (two if token == STATE else one).retrieve_fd(token)
        times[token] = (time.monotonic() - began) * 1000
    for token, fd in fds.items():
        size = SIZES[token]
        same = {
            "position": os.lseek(fd, 0, os.SEEK_CUR) == notes["positions"][str(token)],
            "place": where(fd, size)[0] == notes["placed"][str(token)][0],
            "contents": digest_fd(fd) == notes["digests"][str(token)],
            "size": os.fstat(fd).st_size == size,
            "closed-on-exec": not os.get_inheritable(fd),
        }
        lab.say(f"same-{token}", all(same.values()), **same)
    count = int.from_bytes(os.pread(fds[SMALL], 8, SIZES[SMALL] - 8), "little")
    lab.say("count", count == notes["count"], count=count)
    lab.say("retrieve", times_ms=times, link=Path(f"/proc/self/fd/{fds[SMALL]}").readlink())
    again = one.retrieve_fd(SMALL)
    lab.say("token-again", os.fstat(again).st_ino == os.fstat(fds[SMALL]).st_ino)
    one.finish()
    one.finish()  # the kernel takes a second time for nothing to do
    lab.say("finished-twice")
    two.close()
    charged()
    own = luo.LuoSession.create(luo.session_name("guest-1"))
    own.preserve(fds[HUGE], HUGE)
    out = handover.live("out")
    _, rows = where(fds[HUGE], SIZES[HUGE])
    lab.say(
        "covered-again",
        all(covers(preserved(), pfn, count) for _, pfn, count in rows),
        metadata=str(out.metadata),
        pages=preserved().pages,
    )
    lab.say("end")


first() if lab.stage() == 1 else second()
