"""What client and server of the control socket share: names, messages, and the one table of errors.

A message is JSON and a NUL, on a unix stream socket (https://varlink.org/Method-Call):

    call   {"method": NAME, "parameters": {...}, "more": bool, "oneway": bool}
    reply  {"parameters": {...}, "continues": bool}    or    {"error": NAME, "parameters": {...}}

File descriptors travel by SCM_RIGHTS beside the first byte of the reply that names them: a parameter ``fd`` is the
index of one among those of its own message, ``fds`` those of several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from memconsole import decoding, errors
from memconsole.errors import KernelRefused, MemconsoleError, NoControl, UsageError, WireError

INTERFACE = "io.memconsole"
SERVICE = "org.varlink.service"
PROTOCOL = 2
"""Raised when a client of the version before could not work with a server of this one, or the other way round.

Not for what is added: a client passes over what it does not know of a reply, and a server refuses by name a method or
parameter that it does not know, so a newer client can do without.
"""

MAX_FDS = 253
"""The most file descriptors beside one message (SCM_MAX_FD)."""

EMPTY = msgspec.Raw(b"{}")


class VarlinkCall(msgspec.Struct, frozen=True):
    """A call; a member that Varlink does not know is ignored, as it asks."""

    method: str
    parameters: msgspec.Raw = EMPTY
    more: bool | None = False
    oneway: bool | None = False
    upgrade: bool | None = False


def given(parameters: msgspec.Raw) -> msgspec.Raw:
    """The parameters of a message; ``null``, as some write it where there are none, stands for none."""
    return EMPTY if bytes(parameters) == b"null" else parameters


class VarlinkReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer, or an error by name."""

    parameters: msgspec.Raw = EMPTY
    error: str | None = None
    continues: bool | None = False


class Fault(msgspec.Struct, frozen=True):
    """The parameters of every error of ``io.memconsole``; ``errno`` and ``source`` where a system call failed."""

    code: str = ""
    what: str = ""
    why: str = ""
    remedy: str = ""
    errno: int | None = None
    source: str | None = None


def _tree(cls: type[MemconsoleError]) -> list[type[MemconsoleError]]:
    return [cls, *(below for sub in cls.__subclasses__() for below in _tree(sub))]


ERRORS: dict[str, type[MemconsoleError]] = {
    cls.__name__: cls for cls in _tree(MemconsoleError) if cls.__module__ == errors.__name__
}
"""The errors of ``io.memconsole`` by name: each is the class of ``memconsole.errors`` of that name."""


def fault_of(error: MemconsoleError) -> tuple[str, Fault]:
    """The name and parameters under which an exception travels; a class from elsewhere goes as its nearest ancestor."""
    known: type[MemconsoleError] = next(cls for cls in type(error).__mro__ if cls in ERRORS.values())
    name = f"{INTERFACE}.{known.__name__}"
    if isinstance(error, KernelRefused):
        return name, Fault(error.code, error.what, error.why, error.remedy, error.errno, error.source)
    return name, Fault(error.code, error.what, error.why, error.remedy)


def error_of(name: str, parameters: msgspec.Raw) -> MemconsoleError:
    """The exception an error reply stands for: the class, code and sentences that the server's own code raised."""
    interface, _, member = name.rpartition(".")
    if interface == SERVICE:
        return _standard_error(member, parameters)
    cls = ERRORS.get(member) if interface == INTERFACE else None
    try:
        fault = decoding.convert(_told(parameters, name), Fault, what=f"the error {name}")
    except decoding.Undecodable as error:
        return WireError(error.what, error.why)
    if cls is None:
        return MemconsoleError(fault.what or name, fault.why, fault.remedy, code=fault.code or member)
    if issubclass(cls, KernelRefused):
        refused = cls(fault.source or "", fault.errno or 0, what=fault.what, remedy=fault.remedy, code=fault.code)
        refused.why = fault.why
        return refused
    return cls(fault.what, fault.why, fault.remedy, code=fault.code)


def _told(parameters: msgspec.Raw, name: str) -> dict[str, Any]:
    """The parameters of an error that say something."""
    found = decoding.json(given(parameters), dict[str, Any], what=f"the error {name}")
    return {member: value for member, value in found.items() if value is not None}


def _standard_error(member: str, parameters: msgspec.Raw) -> MemconsoleError:
    try:
        about = ", ".join(str(value) for value in _told(parameters, member).values())
    except decoding.Undecodable:
        about = ""
    if member == "InvalidParameter":
        return UsageError(
            f"the control process does not take {about or 'these parameters'}",
            "the value is not of its type",
            "see the interface's description",
            code=member,
        )
    return WireError(
        f"the control process does not know {about or 'this call'}",
        "it is of another version",
        "restart the service after an upgrade (memconsole serve)",
        code="ProtocolVersion",
    )


def version_mismatch(server: int, client: int) -> WireError:
    """The error for a client and a server of different protocol versions."""
    return WireError(
        f"client and control process speak different versions: {client} and {server}",
        "the protocol changed between them",
        "upgrade the older of the two, then restart the service",
        code="ProtocolVersion",
    )


def gone(path: str, method: str, *, acting: bool) -> NoControl:
    """The error for a control process that went away between a call and its answer."""
    return NoControl(
        f"the control process at {path} went away during {method}",
        "its end of the connection was closed before the answer",
        "start it again; the action is then wholly done or wholly not, check the events before you repeat it"
        if acting
        else "start it again with memconsole serve",
        code="ControlDied",
    )


def description() -> str:
    """The text of the interface file ``io.memconsole.varlink``."""
    return Path(__file__).with_name(f"{INTERFACE}.varlink").read_text(encoding="utf-8")


SERVICE_DESCRIPTION = """\
# The Varlink service interface: what is here, and in which words
interface org.varlink.service

# Who made this service, and the interfaces it has
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)

# The text of an interface
method GetInterfaceDescription(interface: string) -> (description: string)

# The service has no such interface
error InterfaceNotFound (interface: string)

# The interface has no such method
error MethodNotFound (method: string)

# The method is in the interface and not in this service
error MethodNotImplemented (method: string)

# A parameter is missing, unknown, or not of its type
error InvalidParameter (parameter: string)
"""
