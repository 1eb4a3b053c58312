"""Errors are the same on both ends; the interface file says what is served, and what the model is."""

from __future__ import annotations

import errno
import re

import msgspec
import pytest
import varlink

from memconsole import errors
from memconsole.backend.wire import protocol, write_interface
from memconsole.backend.wire.server import Service
from memconsole.errors import GuestError, KernelRefused, MemconsoleError, Refused, UsageError, WireError


def over_the_wire(error: MemconsoleError) -> MemconsoleError:
    name, fault = protocol.fault_of(error)
    return protocol.error_of(name, msgspec.Raw(msgspec.json.encode(fault)))


@pytest.mark.parametrize("cls", [protocol.ERRORS[name] for name in sorted(protocol.ERRORS)])
def test_every_error_comes_back_as_it_was_raised(cls: type[MemconsoleError]) -> None:
    if issubclass(cls, KernelRefused):
        raised: MemconsoleError = cls("/proc/1/pagemap", errno.EPERM, what="no", remedy="be root", code="Odd")
        raised.why += "; and could not undo"
    else:
        raised = cls("what", "why", "remedy", code="Special")
    found = over_the_wire(raised)
    assert type(found) is cls
    assert (str(found), found.code, found.exit_code) == (str(raised), raised.code, raised.exit_code)
    assert vars(found) == vars(raised)


def test_every_class_of_the_tree_travels() -> None:
    public = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MemconsoleError)}
    assert set(protocol.ERRORS.values()) == public


def test_a_class_from_elsewhere_comes_back_as_its_ancestor_with_its_code() -> None:
    class Sleepy(GuestError):
        default_code = "Sleepy"

    found = over_the_wire(Sleepy("it sleeps"))
    assert type(found) is GuestError
    assert found.code == "Sleepy"


def test_errors_of_varlink_itself_become_ours() -> None:
    about = msgspec.Raw(b'{"parameter":"key"}')
    assert isinstance(protocol.error_of("org.varlink.service.InvalidParameter", about), UsageError)
    unknown = protocol.error_of("org.varlink.service.MethodNotFound", msgspec.Raw(b'{"method":"io.memconsole.Fly"}'))
    assert isinstance(unknown, WireError)
    assert unknown.code == "ProtocolVersion"
    assert "Fly" in str(unknown)


def test_errors_of_a_newer_service_keep_their_words() -> None:
    found = protocol.error_of("io.memconsole.Tired", msgspec.Raw(b'{"what":"w","why":"y","remedy":"r","mood":1}'))
    assert (type(found), found.code, str(found)) == (MemconsoleError, "Tired", "w: y (r)")
    broken = protocol.error_of("io.memconsole.Refused", msgspec.Raw(b"[1]"))
    assert isinstance(broken, WireError)
    assert not isinstance(broken, Refused)


def test_the_interface_file_is_made_from_the_model() -> None:
    """If this fails, run python -m memconsole.backend.wire.write_interface; and think of the protocol version."""
    _, mark, types = protocol.description().partition(write_interface.TYPES)
    assert mark
    assert mark + types == write_interface.generated()


def test_the_interface_file_lists_every_method_and_error_with_its_documentation() -> None:
    interface = varlink.Interface(protocol.description())
    members = interface.members.values()
    methods = {m.name for m in members if type(m).__name__ == "_Method"}
    served = {name.rpartition(".")[2] for name in Service.METHODS if name.startswith("io.memconsole.")}
    assert methods == served
    assert {m.name for m in members if type(m).__name__ == "_Error"} == set(protocol.ERRORS)
    assert all(m.doc for m in members)
    assert len(members) == len(re.findall("^(type|method|error) ", protocol.description(), re.MULTILINE))


def test_the_service_interface_is_one() -> None:
    assert set(varlink.Interface(protocol.SERVICE_DESCRIPTION).members) >= {"GetInfo", "InvalidParameter"}
