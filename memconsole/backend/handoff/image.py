"""The kernel that is jumped into: what its image says of itself, and loading it.

    bzImage    setup: 0x1f1 u8 sectors; 0x202 "HdrS"; 0x20e u16 release; 0x230 u32 alignment; 0x248 u32 payload,
               u32 length; 0x260 u32 init_size; then from (sectors + 1) * 512 + payload on the payload: a compressed
               ELF, followed by its u32 size unless it is gzip's own.        Source: Documentation/arch/x86/boot.rst

KHO and LUO compare ABI strings at boot (another ``kho-v4`` and memory is silently lost; another ``luo-v5`` and the
kernel panics), so they are looked for in the image before anything is risked. The parts of an image are placed in
KHO's scratch regions, each in the first that has room for it (kho_locate_mem_hole).

kexec_load(2) would be accepted too, and hand over nothing: only kexec_file_load(2) is used.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import BadFile, Denied, KernelRefused, NotFound
from memconsole.model import Range, Value
from memconsole.units import PAGE, format_size

_LARGEST = 1 << 30
_ABI_WORDS = (b"kho-v", b"luo-v", b"memfd-v")
_ABI = re.compile(rb"(?<![a-z0-9-])[a-z]+-v\d+(?=\0)")
_PARAMETERS = {"vfio_pci": b"\0vfio_pci.ids\0", "iommufd": b"\0iommufd.allow_unsafe_interrupts\0"}
"""Modules that devices need, and a parameter that bears their name where they are built in, and only there."""
_SMALL_PARTS = 1 << 20
"""Bytes for purgatory, boot parameters, command line and the table of scratch regions, which go there too."""
_UNLOAD, _NO_INITRAMFS = 1, 4
_CALL = "kexec_file_load"
_NUMBERS = {"x86_64": 320, "aarch64": 294, "riscv64": 294}
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x5d\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x89LZO": "lzo",
    b"\x7fELF": "none",
}
_REFUSALS = {
    errno.EADDRNOTAVAIL: ("ImageTooLarge", "boot with larger scratch regions (kho_scratch=), or use a smaller initrd"),
    errno.EBUSY: ("Busy", "another image is being loaded: try again"),
    errno.ENOEXEC: ("NotAKernel", "give the path of a kernel image of this machine"),
    errno.EINVAL: ("BadImage", "the image or the command line does not suit this kernel"),
    errno.ENOMEM: ("NoMemory", "free memory"),
    errno.EKEYREJECTED: ("Unsigned", "sign the image with a key of this kernel"),
    errno.ENODATA: ("Unsigned", "sign the image with a key of this kernel"),
}


class Image(Value, frozen=True):
    """A kernel image. ``abis`` are the ABI strings in it, ``modules`` what of ``_PARAMETERS`` is built in.

    Both are None where it cannot be unpacked, and ``why`` says why.
    """

    path: str
    size: int
    release: str
    compression: str
    alignment: int
    init_size: int
    abis: tuple[str, ...] | None
    why: str = ""
    modules: tuple[str, ...] | None = None


def inspect(path: str) -> Image:
    """What a bzImage says of itself.

    Raises:
        BadFile: it is no bzImage, or truncated. NotFound, Denied, KernelRefused: it cannot be read.
    """
    data = tree.read("/", str(Path(path).absolute()), limit=_LARGEST)
    if len(data) < 0x264 or data[0x202:0x206] != b"HdrS":
        raise BadFile(f"{path} is no kernel image", "a bzImage is wanted", "give the path of a vmlinuz")
    (release_at,) = struct.unpack_from("<H", data, 0x20E)
    (alignment,) = struct.unpack_from("<I", data, 0x230)
    at, length = struct.unpack_from("<II", data, 0x248)
    (init_size,) = struct.unpack_from("<I", data, 0x260)
    start = ((data[0x1F1] or 4) + 1) * 512 + at
    payload = data[start : start + length]
    if not length or len(payload) < length:
        raise BadFile(f"{path} is truncated", f"its payload has {len(payload)} of {length} bytes")
    release = tree.text(data[0x200 + release_at :][:256].split(bytes(1))[0]).split(" ")[0]
    compression = next((name for magic, name in _MAGICS.items() if payload.startswith(magic)), "unknown")
    try:
        kernel = _unpacked(compression, payload)
    except (OSError, EOFError, ValueError) as error:
        return Image(path, len(data), release, compression, alignment, init_size, None, str(error))
    modules = tuple(name for name, parameter in _PARAMETERS.items() if parameter in kernel)
    return Image(path, len(data), release, compression, alignment, init_size, _abis(kernel), "", modules)


def _abis(kernel: bytes) -> tuple[str, ...]:
    """The ABI strings in an unpacked kernel; looked for by plain words first, which is much faster than a pattern."""
    found = set()
    for word in _ABI_WORDS:
        at = kernel.find(word)
        while at >= 0:
            match = _ABI.match(kernel, at)
            if match is not None:
                found.add(match[0].decode())
            at = kernel.find(word, at + 1)
    return tuple(sorted(found))


def shortage(image: Image, initrd: int, scratch: Sequence[Range]) -> str:
    """Why an image with an initrd of so many bytes does not fit into the scratch regions; empty where it does."""
    free = [region.end - region.start for region in scratch]
    alignment = max(image.alignment, PAGE)
    parts = (
        ("boot parameters", _SMALL_PARTS),
        ("the kernel", -(-image.init_size // alignment) * alignment + alignment),
        ("the initrd", -(-initrd // PAGE) * PAGE),
    )
    for name, size in parts:
        place = next((row for row, left in enumerate(free) if left >= size), None)
        if place is None:
            return (
                f"{name} wants {format_size(size)}, the largest scratch region has {format_size(max(free, default=0))}"
            )
        free[place] -= size
    return ""


def loaded(root: Root = "/") -> bool:
    """Whether an image is loaded; no file shows by which call (/sys/kernel/kexec_loaded)."""
    try:
        return tree.number(root, "/sys/kernel/kexec_loaded") == 1
    except NotFound:
        # A kernel without kexec has none.
        return False


def load(kernel: str, initrd: str | None, command_line: str) -> None:
    """Load an image for the next jump, in place of one loaded before.

    Raises:
        NotFound, Denied: the files, or the permission (CAP_SYS_BOOT). BadFile: a file cannot be read.
        KernelRefused: ImageTooLarge, NotAKernel, BadImage, Unsigned, NoMemory, Busy.
    """
    fds: list[int] = []
    try:
        fds.append(_opened(kernel))
        fds.append(_opened(initrd) if initrd is not None else -1)
        flags = 0 if initrd is not None else _NO_INITRAMFS
        _file_load(fds[0], fds[1], command_line.encode() + bytes(1), flags, f"{kernel} cannot be loaded")
    finally:
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def unload() -> None:
    """Forget the loaded image, if there is one.

    Raises:
        Denied: no CAP_SYS_BOOT. KernelRefused: Busy.
    """
    _file_load(-1, -1, None, _UNLOAD, "the loaded image cannot be unloaded")


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error


def _file_load(kernel: int, initrd: int, line: bytes | None, flags: int, what: str) -> None:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise NotFound(what, f"{_CALL} is not known for {platform.machine()}", "use another machine")
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_ulong(len(line) if line is not None else 0)
    if libc.syscall(ctypes.c_long(number), kernel, initrd, size, line, ctypes.c_ulong(flags)) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise Denied(what, os.strerror(code), "run as root (CAP_SYS_BOOT), with kexec_load_disabled at 0")
    if code == errno.ENOSYS:
        raise NotFound(what, f"this kernel has no {_CALL}", "boot a kernel with CONFIG_KEXEC_FILE")
    name, remedy = _REFUSALS.get(code, ("", ""))
    raise KernelRefused(_CALL, code, what=what, remedy=remedy, code=name)


def _unpacked(compression: str, payload: bytes) -> bytes:
    """The ELF of a payload; what follows its compressed stream is not looked at.

    Raises:
        ValueError, OSError, EOFError: it cannot be unpacked here.
    """
    if compression == "none":
        return payload
    if compression == "gzip":
        import zlib

        try:
            return zlib.decompressobj(31).decompress(payload, _LARGEST)
        except zlib.error as error:
            raise ValueError(str(error)) from error
    if compression in {"xz", "lzma"}:
        import lzma

        try:
            return lzma.LZMADecompressor().decompress(payload, _LARGEST)
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
    if compression == "bzip2":
        import bz2

        return bz2.BZ2Decompressor().decompress(payload, _LARGEST)
    if compression in {"zstd", "lz4"}:
        import subprocess

        # Its own size stands behind the stream, which the tools would take for a broken second one.
        done = subprocess.run([compression, "-dcq"], input=payload[:-4], capture_output=True, check=False)
        if done.returncode:
            raise ValueError(f"{compression}: {tree.text(done.stderr).strip()}")
        return done.stdout
    raise ValueError(f"{compression} is not known here")
