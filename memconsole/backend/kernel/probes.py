"""What only a system call can tell: PFNs, PAGEMAP_SCAN, KVM, userfaultfd. Each leaves nothing behind.

A probe returns what it found, and raises what stopped it:

    NotFound        the kernel has no such call or device
    Denied          this user may not
    KernelRefused   it is there and does not work
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct

from memconsole import agent
from memconsole.backend.kernel import tree
from memconsole.errors import KernelRefused, NotFound

_PFN = (1 << 55) - 1
_PRESENT = 1 << 63
_PAGEMAP_SCAN = 0xC0606610
_KVM_GET_API_VERSION, _KVM_CREATE_VM, _KVM_CREATE_VCPU = 0xAE00, 0xAE01, 0xAE41
_KVM_API = 12
_UFFDIO_API, _UFFD_API = 0xC018AA3F, 0xAA

UFFD_FEATURES = {
    "missing-fault shmem": 1 << 5,
    "minor-fault shmem": 1 << 10,
    "minor-fault hugetlb": 1 << 9,
    "write-protect shmem": 1 << 12,
    "poison": 1 << 14,
    "move": 1 << 16,
    "rwp": 1 << 17,
}


def pfns_visible() -> bool:
    """Whether /proc/self/pagemap names the frame of a page that is certainly there.

    Raises:
        NotFound, Denied, KernelRefused: there is no pagemap, or it cannot be read.
    """
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
        entry = _pagemap_entry(_address(page))
    if not entry & _PRESENT:
        raise KernelRefused("/proc/self/pagemap", errno.EIO, what="pagemap does not show a page that was just written")
    return bool(entry & _PFN)


def pagemap_scan() -> None:
    """Ask PAGEMAP_SCAN about one page of our own.

    Raises:
        NotFound: the kernel has none (before 6.7); otherwise as :func:`pfns_visible`.
    """
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
        start = _address(page)
        present = 1 << 3
        argument = struct.pack("=12Q", 96, 0, start, start + mmap.PAGESIZE, 0, 0, 0, 0, 0, present, 0, present)
        _ioctl_of("/proc/self/pagemap", os.O_RDONLY, _PAGEMAP_SCAN, bytearray(argument), "PAGEMAP_SCAN")


def kvm() -> None:
    """Create a VM with one vCPU, and let both go.

    Raises:
        NotFound, Denied, KernelRefused: as the module says.
    """
    device = _open("/dev/kvm", os.O_RDWR)
    fds = [device]
    try:
        version = fcntl.ioctl(device, _KVM_GET_API_VERSION, 0)
        if version != _KVM_API:
            raise KernelRefused("/dev/kvm", errno.ENOTSUP, what=f"KVM speaks API {version}, not {_KVM_API}")
        fds.append(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
        fds.append(fcntl.ioctl(fds[1], _KVM_CREATE_VCPU, 0))
    except OSError as error:
        raise tree.failure("/dev/kvm", error) from error
    finally:
        for fd in reversed(fds):
            os.close(fd)


def userfaultfd() -> tuple[int, bool]:
    """The features of userfaultfd, and whether it also handles faults of the kernel (a KVM guest's are such).

    Raises:
        NotFound, Denied, KernelRefused: as the module says.
    """
    try:
        fd, whole = agent.userfaultfd()
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise NotFound(
                "there is no userfaultfd", os.strerror(errno.ENOSYS), "boot a kernel with CONFIG_USERFAULTFD=y"
            ) from error
        raise tree.failure("userfaultfd", error) from error
    try:
        api = bytearray(struct.pack("=QQQ", _UFFD_API, 0, 0))
        fcntl.ioctl(fd, _UFFDIO_API, api)
    except OSError as error:
        raise tree.failure("UFFDIO_API", error) from error
    finally:
        os.close(fd)
    return struct.unpack("=QQQ", api)[1], whole


def _pagemap_entry(address: int) -> int:
    fd = _open("/proc/self/pagemap", os.O_RDONLY)
    try:
        return int.from_bytes(os.pread(fd, 8, address // mmap.PAGESIZE * 8), "little")
    except OSError as error:
        raise tree.failure("/proc/self/pagemap", error) from error
    finally:
        os.close(fd)


def _ioctl_of(path: str, flags: int, request: int, argument: bytearray, name: str) -> None:
    fd = _open(path, flags)
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise NotFound(f"there is no {name}", os.strerror(errno.ENOTTY)) from error
        raise tree.failure(name, error) from error
    finally:
        os.close(fd)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error


def _address(page: mmap.mmap) -> int:
    import ctypes

    view = ctypes.c_char.from_buffer(page)
    address = ctypes.addressof(view)
    del view
    return address
