"""What LUO leaves for the next kernel: little-endian, packed, in pages that KHO preserves; addresses are physical.

    luo          char compatible[8]="luo-v5"  u64 number  u64 sessions_pa  u64 flbs_pa
    blocks OF X  u64 next_pa  u64 count  X*             a page each, 0 ends the chain
    sessions     blocks OF (char name[64]  u64 files_pa  u64 count)
    files        blocks OF (char compatible[48]  u64 data  u64 token)
    flbs         u64 pages  u64 count  (char name[48]  u64 data  u64 count)*
    memfd-v2     at data: u64 pos  u64 size  u32 seals  u32 flags  u64 folios  vmalloc OF folio
    folio        u64 pfn:52 flags:12  u64 index         flags 1 dirty, 2 uptodate; in order of index, without gaps
    vmalloc      u64 first_pa  u32 pages  u16 flags  u16 order
    chunk        u64 next_pa  u64 phys[511]             phys ends with a 0; each is 2^order pages

``sessions_pa`` is 0 until reboot(LINUX_REBOOT_CMD_KEXEC) writes the sessions. How large a folio is stands nowhere: it
reaches to the next one's index, the last one to the end of the file.
Sources: include/linux/kho/abi/{luo,block,memfd,kexec_handover}.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from memconsole.backend.kernel.handover import abi
from memconsole.backend.kernel.handover.memory import PhysicalMemory, Walk
from memconsole.backend.kernel.handover.values import File, Flb, FolioRun, Luo, PreservedMemfd, PreservedSession
from memconsole.decoding import text
from memconsole.errors import BadFile
from memconsole.units import PAGE

_LUO = struct.Struct("<8sQQQ")
_BLOCK = struct.Struct("<QQ")
_SESSION = struct.Struct("<64sQQ")
_FILE = struct.Struct("<48sQQ")
_FLB = struct.Struct("<48sQQ")
_MEMFD = struct.Struct("<QQIIQQIHH")
_FOLIO = struct.Struct("<QQ")
_CHUNK = struct.Struct("<512Q")
_PFN_BITS = 52
_PFN_MASK = (1 << _PFN_BITS) - 1
_LARGEST_ORDER = 10
_LARGEST_FILE = 16 << 40
"""Bytes; the kernel itself refuses larger ones (EFBIG)."""


def luo(memory: PhysicalMemory, blob: bytes) -> Luo | None:
    """LUO's state behind its blob; None where it is of an ABI this decoder does not know, or no LUO state at all.

    Raises:
        BadFile: a structure that cannot be; which one, and why.
    """
    known = LUO.get(compatible(blob[: _LUO.size]))
    return known(memory, blob) if known is not None else None


def compatible(raw: bytes) -> str:
    """The ABI a blob names at its beginning, ``opaque`` if it names none."""
    name = raw[:48].split(bytes(1))[0]
    found = text(name)
    return found if name.isascii() and found.isprintable() and abi.parse(found) is not None else "opaque"


def _luo_v5(memory: PhysicalMemory, blob: bytes) -> Luo:
    if len(blob) < _LUO.size:
        raise BadFile("LUO's state is truncated", f"{len(blob)} bytes of {_LUO.size}")
    _, number, sessions_pa, flbs_pa = _LUO.unpack_from(blob)
    pages = Walk(memory)
    return Luo(number, tuple(_sessions(pages, sessions_pa)), tuple(_flbs(pages, flbs_pa)))


def _sessions(pages: Walk, address: int) -> Iterator[PreservedSession]:
    for raw, files_pa, count in _blocks(pages, address, _SESSION, "LUO's list of sessions"):
        name = _text(raw)
        files = tuple(_files(pages, files_pa, name))
        if len(files) != count:
            raise BadFile(f"session {name} is corrupt", f"{len(files)} files, but it should have {count}")
        yield PreservedSession(name, files)


def _files(pages: Walk, address: int, session: str) -> Iterator[File]:
    for raw, data, token in _blocks(pages, address, _FILE, f"session {session}'s list of files"):
        kind = _text(raw)
        handler = FILES.get(kind)
        what = f"file {token} of session {session}"
        yield File(kind, token, data, handler(pages, data, what) if handler is not None else None)


def _flbs(pages: Walk, address: int) -> Iterator[Flb]:
    if not address:
        return
    what = "LUO's list of objects"
    page = pages.page(address, what)
    span, count = _BLOCK.unpack_from(page)
    if count > (PAGE - _BLOCK.size) // _FLB.size or span > 1:
        raise BadFile(f"{what} is corrupt", f"{count} objects in {span} pages")
    for raw, data, users in _FLB.iter_unpack(page[_BLOCK.size : _BLOCK.size + count * _FLB.size]):
        yield Flb(_text(raw), data, users)


def _blocks(pages: Walk, address: int, entry: struct.Struct, what: str) -> Iterator[tuple[bytes, int, int]]:
    """The entries of a chain of blocks."""
    while address:
        page = pages.page(address, what)
        address, count = _BLOCK.unpack_from(page)
        if count > (PAGE - _BLOCK.size) // entry.size:
            raise BadFile(f"{what} is corrupt", f"{count} entries in a page")
        yield from entry.iter_unpack(page[_BLOCK.size : _BLOCK.size + count * entry.size])


def _memfd_v2(pages: Walk, address: int, what: str) -> PreservedMemfd:
    page = pages.page(address, what)
    position, size, seals, flags, folios, first_pa, total, _, order = _MEMFD.unpack_from(page)
    if size > _LARGEST_FILE or folios > -(-size // PAGE) or order > _LARGEST_ORDER:
        raise BadFile(f"{what} is corrupt", f"{folios} folios in a file of {size} bytes, listed in order {order}")
    if folios * _FOLIO.size > total * PAGE:
        raise BadFile(f"{what} is corrupt", f"{folios} folios listed in {total} pages")
    array = _vmalloc(pages, first_pa, total, order, what) if folios else iter(())
    return PreservedMemfd(position, size, seals, flags, folios, _extents(array, folios, -(-size // PAGE), what))


def _vmalloc(pages: Walk, address: int, total: int, order: int, what: str) -> Iterator[bytes]:
    """The memory of a vmalloc array, 2^order pages at a time."""
    what = f"the list of folios of {what}"
    left = total
    while address:
        address, *areas = _CHUNK.unpack(pages.page(address, what))
        for area in areas:
            if not area:
                break
            left -= 1 << order
            if left < 0:
                raise BadFile(f"{what} is corrupt", f"it has more than its {total} pages")
            yield pages.pages(area, 1 << order, what)
    if left:
        raise BadFile(f"{what} is corrupt", f"{left} of its {total} pages are missing")


def _extents(array: Iterator[bytes], folios: int, file_pages: int, what: str) -> tuple[FolioRun, ...]:
    """The folios, those that continue each other joined."""
    found: list[FolioRun] = []
    index, pfn, flags, met = -1, 0, 0, 0
    for part in array:
        for word, following in _FOLIO.iter_unpack(part[: (folios - met) * _FOLIO.size]):
            if following != 0 if index < 0 else following <= index:
                raise BadFile(f"{what} is corrupt", f"folio {met} has index {following}, after {index}")
            if index >= 0:
                _join(found, FolioRun(index, pfn, following - index, flags))
            index, pfn, flags = following, word & _PFN_MASK, word >> _PFN_BITS
            met += 1
    if folios:
        if index >= file_pages:
            raise BadFile(f"{what} is corrupt", f"folio {met - 1} has index {index}, the file {file_pages} pages")
        _join(found, FolioRun(index, pfn, file_pages - index, flags))
    return tuple(found)


def _join(found: list[FolioRun], run: FolioRun) -> None:
    if found:
        last = found[-1]
        if last.pfn + last.count == run.pfn and last.flags == run.flags:
            found[-1] = FolioRun(last.index, last.pfn, last.count + run.count, last.flags)
            return
    found.append(run)


def _text(raw: bytes) -> str:
    return text(raw.split(bytes(1))[0])


LUO: dict[str, Callable[[PhysicalMemory, bytes], Luo]] = {"luo-v5": _luo_v5}
FILES: dict[str, Callable[[Walk, int, str], PreservedMemfd]] = {"memfd-v2": _memfd_v2}
