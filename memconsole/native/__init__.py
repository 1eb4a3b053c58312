"""The native core (C, in this directory) as Python sees it: ``lib``, ``ffi``, its errors, and the programs beside it.

C functions return an ``enum mc_code`` and fill a ``struct mc_fail``; :func:`check` is the one table from those to
exceptions. cffi releases the GIL around every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from memconsole.errors import BadFile, Denied, Gone, KernelRefused, MemconsoleError, NotFound, UsageError
from memconsole.native._core import ffi as _ffi
from memconsole.native._core import lib as _lib

__all__ = ["call", "ffi", "lib", "program"]

ffi: Final[Any] = _ffi
lib: Final[Any] = _lib

_BIN = Path(__file__).parent / "bin"


def _kernel(what: str, source: str, errno: int) -> MemconsoleError:
    return KernelRefused(source, errno, what=what)


def _gone(what: str, _source: str, _errno: int) -> MemconsoleError:
    return Gone(what, "the process ended, or has no memory of its own", "list the processes again")


def _denied(what: str, _source: str, _errno: int) -> MemconsoleError:
    why = "the kernel shows frame numbers only to CAP_SYS_ADMIN"
    return Denied(what, why, "run as root, or grant CAP_SYS_ADMIN")


def _range(what: str, source: str, _errno: int) -> MemconsoleError:
    return UsageError(what, source)


def _format(what: str, source: str, _errno: int) -> MemconsoleError:
    return BadFile(what, source, "take the snapshot again")


_ERRORS: Final[dict[int, Callable[[str, str, int], MemconsoleError]]] = {
    lib.MC_KERNEL: _kernel,
    lib.MC_GONE: _gone,
    lib.MC_DENIED: _denied,
    lib.MC_RANGE: _range,
    lib.MC_FORMAT: _format,
    lib.MC_MEMORY: _kernel,
}


def call(what: str, function: Callable[..., int], *arguments: object) -> None:
    """Calls a C function (its last parameter, the ``struct mc_fail``, is added here) and raises what it says.

    ``what`` says what could not be done, for the error.

    Raises:
        KernelRefused: a system call failed, or memory ran out. Gone, Denied, UsageError, BadFile: see core.cdef.
    """
    fail = ffi.new("struct mc_fail *")
    code = function(*arguments, fail)
    if code:
        raise _ERRORS[code](what, ffi.string(fail.source).decode("utf-8", "backslashreplace"), fail.err)


def program(name: str) -> str:
    """The path of a C program built beside the extension (``memconsole-canary``, ``memconsole-keeper``).

    Raises:
        NotFound: it was not built.
    """
    path = _BIN / name
    if not os.access(path, os.X_OK):
        raise NotFound(
            f"the program {name} is missing", f"{path} was not built", "install memconsole again with a C compiler"
        )
    return str(path)
