"""One tree of errors and one set of exit codes.

Every error says what happened, why, and what to do about it, and carries a stable ``code`` (its name on the
wire, in ``--json`` and in macros). Where an error is shown, nothing but these three sentences is needed.
"""

from __future__ import annotations

import enum
import errno as _errno
import os
import re
from typing import ClassVar


class ExitCode(enum.IntEnum):
    """What a command's exit status means."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    FINDINGS = 4
    NO_CONTROL = 5
    INTERRUPTED = 130


class MemconsoleError(Exception):
    """The root: ``what`` happened, ``why``, and the ``remedy``; ``code`` names the kind."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED
    default_code: ClassVar[str] = "Failed"

    def __init__(self, what: str, why: str = "", remedy: str = "", *, code: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.remedy = with_rights(remedy)
        self.code = code or self.default_code

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.remedy:
            text += f" ({self.remedy})"
        return text


def with_rights(remedy: str) -> str:
    """A remedy as it is for this user: ``run as root`` tells one who is root nothing."""
    if not remedy.startswith("run as root") or os.geteuid() != 0:
        return remedy
    capability = re.search(r"CAP_[A-Z_]+", remedy)
    wanted = capability[0] if capability else "every capability"
    return f"give the process {wanted}: it is root without it, in a container or under a security policy"


class UsageError(MemconsoleError):
    """An argument that cannot mean anything (a negative size, an unknown field)."""

    exit_code = ExitCode.USAGE
    default_code = "Usage"


class Refused(MemconsoleError):
    """An action the control process will not do; ``code`` names the refusal (``NameTaken``, ``Granted``...)."""

    exit_code = ExitCode.REFUSED
    default_code = "Refused"


class Denied(Refused):
    """The peer's role, or the kernel's permissions, do not allow it."""

    default_code = "Denied"


class NoControl(MemconsoleError):
    """No control process answers on the socket."""

    exit_code = ExitCode.NO_CONTROL
    default_code = "NoControl"


class NotFound(MemconsoleError):
    """A region, guest, grant or table of this name does not exist."""

    default_code = "NotFound"


class Gone(MemconsoleError):
    """A process or guest that existed when the action began and does not any more."""

    default_code = "Gone"


class KernelRefused(MemconsoleError):
    """A system call failed; ``errno`` and ``source`` (the file or ioctl) say which and how."""

    default_code = "Kernel"

    def __init__(self, source: str, errno: int, *, what: str = "", remedy: str = "", code: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(what or f"{source} failed", f"{os.strerror(errno)} ({name})", remedy, code=code)
        self.errno = errno
        self.source = source


class BadFile(MemconsoleError):
    """A file that is truncated, corrupt, foreign, or of a version this memconsole does not know."""

    default_code = "BadFile"


class MacroError(MemconsoleError):
    """A macro that does not parse (usage) or failed in the middle."""

    default_code = "Macro"


class MacroUsage(MacroError):
    """A macro file with an unknown action, a missing parameter or a wrong type."""

    exit_code = ExitCode.USAGE
    default_code = "MacroUsage"


class GuestError(MemconsoleError):
    """A guest did not answer, or answered that it could not."""

    default_code = "Guest"


class Silent(MemconsoleError):
    """A process that is there did not answer in time, or another call still has the connection to it."""

    default_code = "Silent"


class WireError(MemconsoleError):
    """The peer on the control socket broke the protocol."""

    default_code = "Wire"
