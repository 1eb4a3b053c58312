"""QEMU's migration stream, without the RAM that is elsewhere (native/migration.c, where the grammar stands).

What x-ignore-shared would do, done to the stream: so it works for any block of RAM, whatever QEMU knows of it, and
any QEMU loads the result without a capability. A *locked* stream has the capability's name all the same: no QEMU takes
it, until the one who has its RAM in place, and has verified it, takes the name out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from memconsole import decoding
from memconsole.errors import BadFile, Refused, UsageError
from memconsole.native import call, ffi, lib

CUT = "CutOff"
"""The code of the error of a stream that ended before its end: whoever wrote it knows more."""
_WHAT = "the migration stream cannot be used"


class Elsewhere(NamedTuple):
    """A block of RAM that the stream need not bring: its name, its bytes, and the file that takes what comes of it.

    ``fd`` -1: its pages are thrown away, for they are where they should be. Else they are written from ``base`` on.
    """

    name: str
    length: int
    fd: int = -1
    base: int = 0


class Block(NamedTuple):
    """A block of RAM as a stream has it: its bytes, and how many records of its pages were kept and left out."""

    name: str
    length: int
    kept: int
    dropped: int


class Filtered(NamedTuple):
    """What a stream was: its machine type, RAM, bytes in, out and behind RAM, and whether it came locked."""

    machine: str
    blocks: tuple[Block, ...]
    read: int
    written: int
    devices: int
    was_locked: bool


def filtered(
    source: int, target: int, elsewhere: Iterable[Elsewhere], *, lock: bool = False, stopper: int = -1
) -> Filtered:
    """Read a stream from where ``source`` stands to its end, and write what is left of it to ``target``.

    Without a target (-1) it is only read, and a block may lack its pages that is not said to be elsewhere.

    It blocks until the stream ends, or ``stopper`` can be read. What a target holds after an error is of no use.

    Raises:
        BadFile: the stream is spoiled, cut off, or not of the RAM that was said. Refused: it has what is not known
        here (another live section, compressed pages, multifd, ...), by its name. Gone: it was stopped.
        KernelRefused: reading or writing failed. UsageError: no such blocks can be elsewhere.
    """
    made = ffi.new("struct mc_stream **")
    call(_WHAT, lib.mc_stream_new, made, target, int(lock))
    stream = ffi.gc(made[0], lib.mc_stream_free)
    for each in elsewhere:
        name = each.name.encode()
        call(f"RAM block {each.name}", lib.mc_stream_elsewhere, stream, name, each.length, each.fd, each.base)
    found = lib.mc_stream_read(stream)
    try:
        call(_WHAT, lib.mc_stream_run, stream, source, stopper)
    except BadFile as error:
        raise BadFile(_WHAT, _about(error.why, found), "save the guest again", code=CUT if found.cut else "") from None
    except UsageError as error:
        remedy = "save the guest without it, or shut it down"
        raise Refused(_WHAT, _about(error.why, found), remedy, code="StreamUnknown") from None
    return _facts(found)


def _about(why: str, found: Any) -> str:
    name = decoding.text(ffi.string(found.what))
    return f"{why}: {name}" if name else why


def _facts(found: Any) -> Filtered:
    blocks = (found.block[index] for index in range(found.blocks))
    return Filtered(
        decoding.text(ffi.string(found.machine)),
        tuple(Block(decoding.text(ffi.string(each.name)), each.length, each.kept, each.dropped) for each in blocks),
        getattr(found, "in"),
        found.out,
        found.devices,
        bool(found.was_locked),
    )
