"""Files put into custody and got back."""

from __future__ import annotations

import fcntl
import os

from memconsole.backend.custody.holder import Custody


def file_with(text: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, text)
    return fd


def put(custody: Custody, name: str, text: bytes, payload: bytes = b"") -> None:
    fd = file_with(text)
    custody.put(name, fd, payload)
    os.close(fd)


def get(custody: Custody, name: str) -> tuple[bytes, bytes]:
    fd, payload = custody.get(name)
    assert not os.get_inheritable(fd)
    text = os.pread(fd, 1 << 16, 0)
    os.close(fd)
    return text, payload


def fd_store_works() -> bool:
    fd = os.memfd_create("probe")
    try:
        fcntl.fcntl(fd, 1027, fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
