"""Opening what a table is read from, and checking the numbers that go to the native core."""

from __future__ import annotations

import os

from memconsole.errors import Denied, Gone, KernelRefused, UsageError


def open_source(path: str, what: str) -> int:
    """An fd of a file of /proc; ``what`` begins the error.

    Raises:
        Gone: its process ended. Denied, KernelRefused: it may not, or cannot, be read.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(what, f"{path} does not exist", "list the processes again") from None
    except PermissionError:
        raise Denied(what, f"{path} may not be read by this user", "run as root") from None
    except OSError as error:
        raise KernelRefused(path, error.errno or 0, what=what) from None


def whole(name: str, value: int, what: str) -> int:
    """A number that the native core can have.

    Raises:
        UsageError: it cannot.
    """
    if not 0 <= value < 1 << 63:
        raise UsageError(what, f"{name} {value} is negative or beyond any address space")
    return value
