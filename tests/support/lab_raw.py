"""The raw store in a lab whose kernel keeps a range from itself: it shares the boots of a scenario of another store."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import signal
import subprocess
from pathlib import Path

from memconsole import actions as do
from memconsole import paths
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError, Silent
from memconsole.extents import Flag
from memconsole.model import RevokeOutcome, Rung
from support import lab_guest as lab
from support import lab_host as host
from support.firmware import STATUS, counting
from support.waiting import until

M = 1 << 20
WORD = "memmap=32M$1280M"
START = "0x50000000"
SERVE = ("--raw", START)
SIZE = 8 * M
FRAMES = range(0x50200, 0x52000)
NAMES = ("kept", "deep")
_DERIVED = Flag.PRESENT | Flag.FILE | Flag.DERIVED


def unnamed(client: Client) -> None:
    """A service that was not told of the range does not touch it."""
    wanted = (do.Reserve("kept", SIZE, "raw"), do.ArenaCreate("far", raw=True))
    codes = [host.refused(client, each) for each in wanted]
    _, text = host.said("arena", "list", "--json")
    (seen,) = (each for each in json.loads(text) if each["device"] == START)
    lab.say("raw-unnamed", codes == ["NotNamed"] * 2 and not seen["holds"], codes=codes, seen=seen)


def make(client: Client) -> None:
    """An arena, a region and a canary of it: their map is arithmetic, and nothing pins their pages."""
    text = client.apply(do.ArenaCreate("far", raw=True)).text
    code, listed = host.said("arena", "list", "--raw", START)
    lab.say("raw-created", not code and "arena far" in listed and "next kernel" in listed, text=text, listed=listed)
    client.apply(do.Reserve("kept", SIZE, "raw"))
    client.apply(do.GuestStart("deep", memory=SIZE, store="raw"))
    seen = host.beaten(client, "deep")
    maps = {key: _map(client, key) for key in ("region:kept", "region:deep", "guest:deep")}
    derived = all(Flag(row[2]) == _DERIVED and row[0] in FRAMES for rows in maps.values() for row in rows)
    same = maps["guest:deep"] == maps["region:deep"] != maps["region:kept"]
    lab.say("raw-map", not seen.wrong and derived and same, maps=maps)
    place = client.snapshot().regions
    at = next(each.segments[0].start for each in place if each.name == "kept")
    marks = random.Random(17).randbytes(SIZE)
    fd = os.open("/dev/mem", os.O_RDWR)
    with mmap.mmap(fd, SIZE, offset=at) as memory:
        memory[:] = marks
        lab.say("raw-pinned", _pinned(memory) == 14, errno=_pinned(memory))  # EFAULT
    os.close(fd)
    path = Path("/run/raw-copy")
    host.said("copy", "kept", str(path))
    lab.say("raw-place", path.read_bytes() == marks)
    path.unlink()


def taken_back(client: Client) -> None:
    """No process that is no VM gets it; who does not give it back is killed, and the contents stay."""
    with subprocess.Popen(["sleep", "inf"]) as other:
        client.apply(do.GuestAttach("other", other.pid))
        code = host.refused(client, do.Map("kept", "other"))
        client.apply(do.GuestStop("other"))
        other.kill()
    pid = host.guest(client.snapshot(), "deep").pid or 0
    (grant,) = (each.id for each in client.snapshot().grants if each.guest == "deep")
    told = host.plan(client, do.Revoke(grant)).effects[-1].text
    os.kill(pid, signal.SIGSTOP)
    try:
        client.apply(do.Revoke(grant, within=1.0, at_most=Rung.COPY))
        least = ""
    except MemconsoleError as error:
        least = f"{error.code}: {error.remedy}"
    report = client.apply(do.Revoke(grant, within=5.0)).revoke
    killed = report is not None and report.rung is Rung.KILL and report.outcome is RevokeOutcome.CUT
    until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")
    said = code == "NoVm" and "no other rung" in told and least.startswith("StillMapped") and "kill" in least
    lab.say("raw-revoked", killed and said, code=code, told=told, least=least, report=str(report))


def stock(client: Client) -> None:
    """A QEMU as it is runs on such a region, and counts; and goes on where the region goes."""
    words = ("-accel", "tcg", *counting(Path("/run")))  # the lab's KVM is emulated, and a QEMU does not get on by it
    client.apply(do.GuestStart("pc", vmm="qemu", memory=SIZE, store="raw", args=words))
    lab.say("raw-qemu-started")
    at = next(each.segments[0].start for each in client.snapshot().regions if each.name == "pc")
    beats = _counts(os.open("/dev/mem", os.O_RDONLY), at, 1)
    maps = {key: _map(client, key) for key in ("guest:pc", "region:pc")}
    lab.say("raw-qemu-map", maps["guest:pc"] == maps["region:pc"], maps=maps)
    client.apply(do.Move("pc", "memfd", within=host.PATIENCE))
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    _counts(keeper.get("region:pc:0")[0], 0, beats)
    keeper.close()
    client.apply(do.GuestStop("pc"))
    client.apply(do.Release("pc"))


def _counts(fd: int, at: int, least: int) -> int:
    """Wait until the QEMU whose memory begins there has counted further, without a wrong word; how far."""
    with contextlib.closing(os.fdopen(fd, "rb")), mmap.mmap(fd, SIZE, offset=at, prot=mmap.PROT_READ) as memory:

        def said(place: int) -> int:
            return int.from_bytes(memory[place : place + 4], "little")

        until(lambda: said(STATUS) > least, "it counts", host.PATIENCE)
        lab.say("raw-qemu", not said(STATUS + 4), beats=said(STATUS), at=at)
        return said(STATUS)


def remove(client: Client) -> None:
    """What is given up leaves zeros."""
    for name in NAMES:
        client.apply(do.Release(name))
    client.apply(do.ArenaRemove("far"))
    _, text = host.said("arena", "list", "--raw", START, "--json")
    (seen,) = (each for each in json.loads(text) if each["device"] == START)
    lab.say("raw-empty", seen["holds"] == "nothing", seen=seen)


def _map(client: Client, key: str) -> list[tuple[int, int, int]]:
    """A PFN map; of a process whose memory map is locked, which in an emulated lab takes seconds, it is asked again."""
    rows: list[tuple[int, int, int]] = []

    def shown() -> bool:
        with contextlib.suppress(Silent), client.extents(key) as found:
            rows.extend((row.pfn, row.count, row.flags) for row in found)
        return bool(rows)

    until(shown, f"the map of {key} is shown", host.PATIENCE)
    return rows


def _pinned(memory: mmap.mmap) -> int:
    """The errno of an attempt to put a page of it into a pipe; 0 where that works."""
    libc = ctypes.CDLL(None, use_errno=True)
    reading, writing = os.pipe()
    first = ctypes.c_char.from_buffer(memory)
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(first), 4096)
    done = libc.vmsplice(writing, ctypes.byref(vector), ctypes.c_size_t(1), 0)
    del first
    os.close(reading)
    os.close(writing)
    return ctypes.get_errno() if done < 0 else 0
