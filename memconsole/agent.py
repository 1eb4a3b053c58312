"""A process's own end of the agents socket: it takes grants, maps them, and gives them back when asked.

For any program that wants memory from memconsole; standard library only::

    with Agent("/run/memconsole/agents") as agent:
        grant = agent.wait("web-1", within=10)
        grant.memory[:5] = b"hello"

The process must have been attached as a guest (``memconsole guest attach NAME --pid PID``); until it is, the agent
keeps knocking. It knocks again after the control process is gone, and what it has mapped stays mapped meanwhile.
Messages: the grammar stands at the top of ``memconsole/backend/exports/agents.py``.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

log = logging.getLogger("memconsole.agent")

MAGIC = 0x4741434D
VERSION = 1
"""Raised when ``AGENT_VERSION`` of ``native/agent.h`` is, by the rule there."""
MAX_MESSAGE = 8192
MAX_GRANTS = 64
MAX_NAME = 63
NO_GPA = (1 << 64) - 1
RETRY = 0.15
WINDOW = 3
"""The access of a grant that is a device's registers, and no RAM."""
_WRITABLE = {2, WINDOW}

HEAD = struct.Struct("<IHHII")
HELLO = struct.Struct("<II")
DONE = struct.Struct("<iI120s")
REPORTED = struct.Struct("<IIQQQQQQQ120s")
SWEPT = struct.Struct("<QQQ")
HANDED = struct.Struct("<IIQ")
GRANT = struct.Struct("<64sQQQII")
NAME = struct.Struct("<64s")


class Type(enum.IntEnum):
    """What a message is."""

    HELLO = 1
    DONE = 2
    REPORTED = 3
    SWEPT = 4
    HANDED = 5
    GRANT = 16
    UNMAP = 17
    PAUSE = 18
    RESUME = 19
    REPORT = 20
    STOP = 21
    SAVE = 22
    SWEEP = 23
    TAKEN = 24


_OF_VMS = {Type.PAUSE, Type.RESUME, Type.REPORT, Type.STOP, Type.SAVE, Type.SWEEP}


class Message(NamedTuple):
    """One packet, its head taken apart; a type that is none of :class:`Type` is a newer peer's."""

    type: Type | int
    id: int
    body: bytes


class BadMessage(Exception):
    """A packet that breaks the grammar."""


def pack(type: Type, id: int, body: bytes = b"") -> bytes:
    """A packet from its parts."""
    return HEAD.pack(MAGIC, VERSION, type, id, HEAD.size + len(body)) + body


def unpack(packet: bytes) -> Message:
    """A packet's parts.

    Raises:
        BadMessage: too short or long, foreign, or of another version.
    """
    if not HEAD.size <= len(packet) <= MAX_MESSAGE:
        raise BadMessage(f"a packet of {len(packet)} bytes")
    magic, version, type, id, length = HEAD.unpack_from(packet)
    if magic != MAGIC or version != VERSION or length != len(packet):
        raise BadMessage("a packet of another protocol")
    known = Type(type) if type in Type.__members__.values() else type
    return Message(known, id, packet[HEAD.size :])


def pack_name(name: str) -> bytes:
    """A name as 64 bytes, the last one NUL.

    Raises:
        ValueError: it is empty, too long, or holds a NUL.
    """
    raw = name.encode()
    if not 0 < len(raw) <= MAX_NAME or b"\0" in raw:
        raise ValueError(f"{name!r} is not a name of 1 to {MAX_NAME} bytes")
    return NAME.pack(raw)


def unpack_name(raw: bytes) -> str:
    """A name from its 64 bytes.

    Raises:
        BadMessage: no NUL at its end, empty, or not UTF-8.
    """
    text, _, rest = raw.partition(b"\0")
    if not text or len(text) == len(raw) or rest.strip(b"\0"):
        raise BadMessage("a name that is none")
    try:
        return text.decode("utf-8", "strict")
    except UnicodeDecodeError:
        raise BadMessage("a name that is no text") from None


@dataclass
class MappedGrant:
    """A granted range as this process has mapped it; ``memory`` is its bytes, read-only for an ``ro`` grant."""

    id: str
    memory: memoryview
    offset: int
    gpa: int | None
    writable: bool
    _map: mmap.mmap = field(repr=False)

    def release(self) -> bool:
        """Unmap; false, and nothing changes, while something in this process still uses the memory."""
        try:
            self.memory.release()
            self._map.close()
        except BufferError:
            # Views of the view keep the mapping in use although the view itself could go.
            with contextlib.suppress(ValueError):
                self.memory.release()
            self.memory = memoryview(self._map)
            return False
        return True


class Agent:
    """The agent of this process: a thread that holds its grants and answers the control process.

    ``on_unmap`` is called in that thread before a grant is unmapped, so that the process can let go of its views; if
    it raises, or views remain, the agent answers that it cannot.
    """

    def __init__(
        self, socket_path: str | os.PathLike[str], *, on_unmap: Callable[[MappedGrant], None] | None = None
    ) -> None:
        self._path = os.fspath(socket_path)
        self._on_unmap = on_unmap
        self._changed = threading.Condition()
        self._grants: dict[str, MappedGrant] = {}
        self._handed: dict[int, MappedGrant] = {}
        """Mapped, by the request; nobody sees them until it is known that the uffd handed over is in custody."""
        self._socket: socket.socket | None = None
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="memconsole-agent", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def grants(self) -> dict[str, MappedGrant]:
        """The grants mapped now, by id."""
        with self._changed:
            return dict(self._grants)

    def wait(self, grant: str, within: float) -> MappedGrant:
        """A grant by its id, once it is mapped.

        Raises:
            TimeoutError: it did not come within so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: grant in self._grants, within):
                raise TimeoutError(f"no grant {grant} within {within:g} s")
            return self._grants[grant]

    def close(self) -> None:
        """End the thread and unmap everything.

        Raises:
            BufferError: a grant is still in use; the others are unmapped.
        """
        if self._thread.is_alive():
            os.write(self._wake, b"x")
            self._thread.join()
            os.close(self._woken)
            os.close(self._wake)
        held = [grant.id for grant in self.grants.values() if not self._drop(grant)]
        if held:
            raise BufferError(f"still in use: {', '.join(held)}")

    def _drop(self, grant: MappedGrant) -> bool:
        with self._changed:
            if grant.release():
                del self._grants[grant.id]
                self._changed.notify_all()
                return True
        return False

    def _run(self) -> None:
        while True:
            if self._socket is None:
                self._connect()
            watched = [self._woken] if self._socket is None else [self._woken, self._socket.fileno()]
            ready, _, _ = select.select(watched, [], [], RETRY if self._socket is None else None)
            if self._woken in ready:
                self._disconnect()
                return
            if ready:
                try:
                    self._serve()
                except (OSError, BadMessage):
                    self._disconnect()
                    time.sleep(RETRY)
                except Exception:
                    # Its process may have much else to do: what is wrong here costs this connection, and is tried anew.
                    log.exception("the agent's connection failed")
                    self._disconnect()
                    time.sleep(RETRY)

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self._path)
            held = list(self.grants)
            connection.send(
                pack(Type.HELLO, 0, HELLO.pack(0, len(held)) + b"".join(pack_name(grant) for grant in held))
            )
        except OSError:
            connection.close()
            return
        self._socket = connection

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        # Whether their uffds arrived nobody knows: they are offered again, and handed over again.
        for grant in self._handed.values():
            grant.release()
        self._handed.clear()

    def _serve(self) -> None:
        assert self._socket is not None  # noqa: S101 - _run's own invariant
        # socket.recv_fds of Python 3.11 does not pass its flags on, and would leave the fd inheritable
        packet, controls, _, _ = self._socket.recvmsg(MAX_MESSAGE + 1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        fds = [fd for _, _, raw in controls for (fd,) in struct.iter_unpack("i", raw[: len(raw) // 4 * 4])]
        try:
            if not packet:
                raise ConnectionResetError
            message = unpack(packet)
            answer = self._do(message, fds)
            rights = [] if answer.uffd < 0 else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", answer.uffd))]
            try:
                self._socket.sendmsg([pack(*answer.packed(message.id))], rights)
            finally:
                if answer.uffd >= 0:
                    os.close(answer.uffd)
        finally:
            for fd in fds:
                os.close(fd)

    def _do(self, message: Message, fds: list[int]) -> _RequestReply:
        if not isinstance(message.type, Type) and message.type > Type.GRANT:
            return _RequestReply(errno.EOPNOTSUPP, "this agent does not know that")
        if message.type is Type.GRANT and len(message.body) >= GRANT.size and len(fds) == 1:
            return self._map(message.id, message.body, fds[0])
        if message.type is Type.TAKEN:
            return self._taken(message.id)
        if message.type is Type.UNMAP and len(message.body) >= NAME.size:
            return self._unmap(unpack_name(message.body[: NAME.size]))
        if message.type in _OF_VMS:
            return _RequestReply(errno.EOPNOTSUPP, "a process has no such thing")
        raise BadMessage(f"a malformed message of type {message.type}")

    def _map(self, request: int, body: bytes, fd: int) -> _RequestReply:
        raw, offset, length, gpa, access, wants = GRANT.unpack_from(body)
        id = unpack_name(raw)
        if id in self.grants:
            return _RequestReply(0)
        self._take_back(id)
        if len(self.grants) + len(self._handed) >= MAX_GRANTS:
            return _RequestReply(errno.ENOSPC, f"it holds {MAX_GRANTS} grants")
        writable = access in _WRITABLE
        try:
            mapping = _mapped(fd, length, offset, mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            return _RequestReply(getattr(error, "errno", None) or errno.EINVAL, str(error))
        answer = _registered(mapping, length, wants) if wants else _RequestReply(0)
        grant = MappedGrant(id, memoryview(mapping), offset, None if gpa == NO_GPA else gpa, writable, mapping)
        if answer.uffd < 0:
            self._publish(grant)
        else:
            self._handed[request] = grant
        return answer

    def _taken(self, request: int) -> _RequestReply:
        grant = self._handed.pop(request, None)
        if grant is None:
            return _RequestReply(errno.ECANCELED, "it was taken back meanwhile")
        self._publish(grant)
        return _RequestReply(0)

    def _publish(self, grant: MappedGrant) -> None:
        with self._changed:
            self._grants[grant.id] = grant
            self._changed.notify_all()

    def _take_back(self, id: str) -> None:
        """Unmap a grant whose uffd was handed over and that nobody has seen yet, if it is one."""
        for request, grant in list(self._handed.items()):
            if grant.id == id:
                self._handed.pop(request).release()

    def _unmap(self, id: str) -> _RequestReply:
        self._take_back(id)
        grant = self.grants.get(id)
        if grant is None:
            return _RequestReply(0)
        if self._on_unmap is not None:
            try:
                self._on_unmap(grant)
            except Exception as error:  # noqa: BLE001 - the process's own code says no; the control process is told
                return _RequestReply(errno.EBUSY, f"it will not: {error}")
        return _RequestReply(0) if self._drop(grant) else _RequestReply(errno.EBUSY, "its memory is in use")


# --- where memory is mapped -------------------------------------------------------------------------------------

_HUGE = 2 << 20
_FIXED_NOREPLACE = 1 << 20
_TRIES = 4


def _mapped(fd: int, length: int, offset: int, access: int) -> mmap.mmap:
    """A mapping at an address at which the kernel can map it by huge pages, where there is room for that.

    Such an address is to 2 MiB what the offset is; the kernel sees to it for some files and settings only. Python's
    mmap takes no address, but the kernel fills a gap from its end: what is mapped there first moves the next one down.

    Raises:
        OSError, ValueError, OverflowError: it cannot be mapped.
    """
    mapping = mmap.mmap(fd, length, offset=offset, access=access)
    with contextlib.ExitStack() as fillings:  # all of them to the end: a gap that is too narrow would be taken again
        for _ in range(_TRIES if length >= _HUGE else 0):  # another thread may map something meanwhile
            start = _address(mapping)
            above = (start - offset) % _HUGE
            if not above:
                break
            mapping.close()
            fillings.enter_context(_filled(start + length - above, above))
            mapping = mmap.mmap(fd, length, offset=offset, access=access)
    with contextlib.suppress(OSError):  # advice: kernels without it do as they please
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


@contextlib.contextmanager
def _filled(address: int, length: int) -> Iterator[None]:
    """While nothing else can be mapped in a range; if something is there already, that does as well."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED_NOREPLACE
    at = libc.mmap(address, length, 0, flags, -1, 0)
    try:
        yield
    finally:
        if at not in {None, ctypes.c_void_p(-1).value}:
            libc.munmap(at, length)


def _address(mapping: mmap.mmap) -> int:
    """Where a mapping stands; also of one that may only be read."""
    import ctypes

    view = (ctypes.c_void_p * 16)()  # a Py_buffer, the address in front
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), view, 0)
    try:
        return view[0] or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(view)


# --- page faults, handed over -----------------------------------------------------------------------------------

WANTS_FAULTS, WANTS_SHIELD = 1, 2
_MISSING, _MINOR, _RWP = 1, 4, 8
_FEATURES = {_MISSING: 1 << 4 | 1 << 5, _MINOR: 1 << 9 | 1 << 10, _RWP: 1 << 17}
"""What a mode of registering wants of the kernel, for shmem and for hugetlb pages (UFFD_FEATURE_*)."""
_USERFAULTFD_IOC_NEW, _UFFDIO_API, _UFFDIO_REGISTER, _UFFD_API = 0xAA00, 0xC018AA3F, 0xC020AA00, 0xAA
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_USER_MODE_ONLY = 1


def userfaultfd() -> tuple[int, bool]:
    """A new userfaultfd, and whether it serves faults of the kernel too (a KVM guest's are such).

    By /dev/userfaultfd, else by userfaultfd(2): for kernels before 6.1, and for users to whom the device is not open.

    Raises:
        OSError: the kernel has none for this process.
    """
    import ctypes
    import fcntl

    flags = os.O_CLOEXEC | os.O_NONBLOCK
    with contextlib.suppress(OSError):
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags), True
        finally:
            os.close(device)
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, "userfaultfd on this processor")
    libc = ctypes.CDLL(None, use_errno=True)
    for mode in (0, _USER_MODE_ONLY):
        fd: int = libc.syscall(ctypes.c_long(number), ctypes.c_int(flags | mode))
        if fd >= 0:
            return fd, mode == 0
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _registered(mapping: mmap.mmap, length: int, wants: int) -> _RequestReply:
    """A mapping registered for what is wanted of it, as far as the kernel can; else why it is not."""
    import fcntl

    try:
        address = _address(mapping)
        probe, _ = userfaultfd()
        try:
            asked = fcntl.ioctl(probe, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, 0, 0))
        finally:
            os.close(probe)
        wanted = (_MISSING | _MINOR if wants & WANTS_FAULTS else 0) | (_RWP if wants & WANTS_SHIELD else 0)
        there = struct.unpack("QQQ", asked)[1]
        modes = sum(mode for mode, needs in _FEATURES.items() if wanted & mode and there & needs == needs)
        if not modes:
            return _RequestReply(0, "this kernel has none of the features")
        uffd, _ = userfaultfd()
        try:
            features = sum(needs for mode, needs in _FEATURES.items() if modes & mode)
            fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, features, 0))
            fcntl.ioctl(uffd, _UFFDIO_REGISTER, struct.pack("QQQQ", address, length, modes, 0))
        except BaseException:
            os.close(uffd)
            raise
    except OSError as error:
        return _RequestReply(0, str(error))
    return _RequestReply(0, "", uffd, modes, address)


class _RequestReply(NamedTuple):
    """What a request is answered; an uffd is handed over first, with how the mapping at ``address`` is registered."""

    status: int
    text: str = ""
    uffd: int = -1
    modes: int = 0
    address: int = 0

    def packed(self, id: int) -> tuple[Type, int, bytes]:
        if self.uffd >= 0:
            return Type.HANDED, id, HANDED.pack(self.modes, 0, self.address)
        return Type.DONE, id, DONE.pack(self.status, 0, self.text.encode()[:119])
