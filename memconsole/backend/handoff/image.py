"""The kernel that is jumped into: what its image says of itself, and loading it.

    bzImage    setup: 0x1f1 u8 sectors; 0x202 "HdrS"; 0x20e u16 release; 0x230 u32 alignment; 0x248 u32 payload,
               u32 length; 0x260 u32 init_size; then from (sectors + 1) * 512 + payload on the payload: a compressed
               ELF, followed by its u32 size unless it is gzip's own.        Source: Documentation/arch/x86/boot.rst

KHO and LUO compare ABI words at boot (another ``kho-v4`` and memory is silently lost; another ``luo-v5`` and the
kernel panics), so they are looked for in the image before anything is risked. The parts of an image are placed in
KHO's scratch regions, each in the first that has room for it (kho_locate_mem_hole).

kexec_load(2) would be accepted too, and hand over nothing: only kexec_file_load(2) is used.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct
from collections.abc import Sequence

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.handover import abi
from memconsole.backend.kernel.tree import Root
from memconsole.errors import BadFile, Denied, KernelRefused, NotFound
from memconsole.model import Range, Value
from memconsole.units import PAGE, format_size

LARGEST = 512 << 20
"""Bytes of an image, and of a kernel unpacked: more than three times the largest that distributions ship."""
_DICTIONARY = 256 << 20
"""Bytes that unpacking xz may take; kernels are packed with a dictionary of at most 128 MiB."""
_SAID = 1000
"""Bytes of what an unpacking tool says that are repeated."""
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
    errno.EBUSY: ("Busy", "try again: another image is being loaded"),
    errno.ENOEXEC: ("NotAKernel", "give the path of a kernel image of this machine"),
    errno.EINVAL: ("BadImage", "choose another image or command line: this kernel does not take them"),
    errno.ENOMEM: ("NoMemory", "free memory"),
    errno.EKEYREJECTED: ("Unsigned", "sign the image with a key of this kernel"),
    errno.ENODATA: ("Unsigned", "sign the image with a key of this kernel"),
}


class KernelImage(Value, frozen=True):
    """A kernel image. ``abis`` are the ABI words in it (:mod:`.abi`), ``modules`` what of ``_PARAMETERS`` is built in.

    Both are None where it cannot be unpacked, and ``why`` says why. ``version`` is what ``uname -v`` says under it.
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
    version: str = ""


def opened(path: str) -> int:
    """A regular file, for reading, found by one look at the path; nothing waits, and nothing else is ever opened.

    Raises:
        BadFile: it is a pipe, a device, a directory. NotFound, Denied, KernelRefused: it cannot be opened.
    """
    try:
        # Merely to open a device can be an act of its own: what is there is known by a descriptor that opens nothing.
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise BadFile(f"{path} cannot be used", "it is not a regular file", "give the path of a regular file")
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{found}", flags)
        finally:
            os.close(found)
    except OSError as error:
        raise tree.failure(path, error) from error


def inspect(path: str, fd: int) -> KernelImage:
    """What the bzImage ``fd`` says of itself; ``path`` is what it is called.

    Who does not trust a file asks :func:`.apart.inspect`: this unpacks it here.

    Raises:
        BadFile: it is no bzImage, or truncated. KernelRefused: it cannot be read.
    """
    data = _content(path, fd)
    if len(data) < 0x264 or data[0x202:0x206] != b"HdrS":
        raise BadFile(f"{path} is no kernel image", "it is not a bzImage", "give the path of a vmlinuz")
    (release_at,) = struct.unpack_from("<H", data, 0x20E)
    (alignment,) = struct.unpack_from("<I", data, 0x230)
    at, length = struct.unpack_from("<II", data, 0x248)
    (init_size,) = struct.unpack_from("<I", data, 0x260)
    start = ((data[0x1F1] or 4) + 1) * 512 + at
    payload = data[start : start + length]
    if not length or len(payload) < length:
        raise BadFile(
            f"{path} is truncated", f"its payload has {len(payload)} of {length} bytes", "choose another image"
        )
    said = tree.text(data[0x200 + release_at :][:256].split(bytes(1))[0])  # RELEASE (USER@HOST) VERSION
    release, version = said.split(" ")[0], said.partition(") ")[2]
    compression = next((name for magic, name in _MAGICS.items() if payload.startswith(magic)), "unknown")
    try:
        kernel = _unpacked(compression, payload)
    except (OSError, EOFError, ValueError) as error:
        return KernelImage(path, len(data), release, compression, alignment, init_size, None, str(error), None, version)
    modules = tuple(name for name, parameter in _PARAMETERS.items() if parameter in kernel)
    words = abi.words(kernel)
    return KernelImage(path, len(data), release, compression, alignment, init_size, words, "", modules, version)


def _content(path: str, fd: int) -> bytes:
    size = os.fstat(fd).st_size
    if size > LARGEST:
        raise BadFile(f"{path} is too large", f"a kernel image has at most {format_size(LARGEST)}")
    chunks: list[bytes] = []
    at = 0
    try:
        while at < size and (chunk := os.pread(fd, size - at, at)):
            chunks.append(chunk)
            at += len(chunk)
    except OSError as error:
        raise tree.failure(path, error) from error
    return b"".join(chunks)


def shortage(image: KernelImage, initrd: int, scratch: Sequence[Range]) -> str:
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
                f"{name} needs {format_size(size)}, the largest scratch region has {format_size(max(free, default=0))}"
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
        fds.append(opened(kernel))
        fds.append(opened(initrd) if initrd is not None else -1)
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


def _file_load(kernel: int, initrd: int, line: bytes | None, flags: int, what: str) -> None:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise NotFound(what, f"{_CALL} is not known for {platform.machine()}", "use an x86_64 host")
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_ulong(len(line) if line is not None else 0)
    if libc.syscall(ctypes.c_long(number), kernel, initrd, size, line, ctypes.c_ulong(flags)) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM and (level := tree.lockdown()):
        why = f"the kernel is locked down ({level}), and takes only an image that is signed with one of its keys"
        raise Denied(what, why, f"sign the image, or {tree.UNLOCKED}")
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
            unpacker = zlib.decompressobj(31)
            return _bounded(unpacker.decompress(payload, LARGEST + 1))
        except zlib.error as error:
            raise ValueError(str(error)) from error
    if compression in {"xz", "lzma"}:
        import lzma

        try:
            return _bounded(lzma.LZMADecompressor(memlimit=_DICTIONARY).decompress(payload, LARGEST + 1))
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
    if compression == "bzip2":
        import bz2

        return _bounded(bz2.BZ2Decompressor().decompress(payload, LARGEST + 1))
    if compression in {"zstd", "lz4"}:
        return _by_tool(compression, payload)
    raise ValueError(f"{compression} is not known here")


def _by_tool(compression: str, payload: bytes) -> bytes:
    """What ``zstd`` or ``lz4`` make of a payload; they are not read from any more once it is too much."""
    import subprocess

    packed = os.memfd_create("memconsole-payload", os.MFD_CLOEXEC)
    try:
        with open(packed, "wb", closefd=False) as file:
            # The kernel's own size stands behind the stream: the tools would take it for a broken second one.
            file.write(payload[:-4])
        os.lseek(packed, 0, os.SEEK_SET)
        words = [compression, "-dcq"]
        with subprocess.Popen(words, stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tool:
            assert tool.stdout is not None  # noqa: S101 - a pipe was asked for
            assert tool.stderr is not None  # noqa: S101 - likewise
            kernel = tool.stdout.read(LARGEST + 1)
            if len(kernel) > LARGEST:
                tool.kill()
            said = tool.stderr.read(_SAID)
    finally:
        os.close(packed)
    _bounded(kernel)
    if tool.returncode:
        raise ValueError(f"{compression}: {tree.text(said).strip()}")
    return kernel


def _bounded(kernel: bytes) -> bytes:
    if len(kernel) > LARGEST:
        raise ValueError(f"it unpacks to more than {format_size(LARGEST)}")
    return kernel
