"""LUO's calls on any host: names, and what is said where there is no LUO. The calls themselves run in tests/vm."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole.backend.handoff import luo
from memconsole.errors import Denied, KernelRefused, NotFound, Refused


@given(st.text(st.characters(), max_size=80))
def test_a_name_fits_or_is_refused(guest: str) -> None:
    if "\0" in guest or len(guest.encode("utf-8", "surrogatepass")) > luo.NAME_LIMIT - len(luo.PREFIX):
        with pytest.raises(Refused) as error:
            luo.session_name(guest)
        assert error.value.code == "BadName"
    else:
        assert luo.session_name(guest) == f"memconsole:{guest}"


@pytest.mark.parametrize("name", ["systemd", "systemd-fdstore", "", "x" * 64])
def test_names_that_are_not_ours(name: str) -> None:
    with pytest.raises(Refused) as error:
        luo.LuoSession.create(name)
    assert error.value.code == "BadName"


def test_a_host_without_live_update() -> None:
    if Path(luo.DEVICE).exists():
        pytest.skip("this host has LUO")
    with pytest.raises(NotFound) as error:
        luo.LuoSession.create("memconsole:test")
    assert error.value.code == "NoLuo"
    assert "kho=on liveupdate=on" in error.value.remedy


def test_an_fd_that_is_no_session() -> None:
    fd = os.memfd_create("none", os.MFD_CLOEXEC)
    try:
        with pytest.raises(KernelRefused) as error:
            luo.LuoSession.adopt(fd)
        assert error.value.code == "NotASession"
        os.fstat(fd)
    finally:
        os.close(fd)


@pytest.fixture
def another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there and open to all, and knows none of the calls."""
    path = tmp_path / "liveupdate"
    path.touch()
    monkeypatch.setattr(luo, "DEVICE", str(path))
    return path


def test_a_device_that_does_not_know_the_call_refuses_it_by_its_errno(another_file: Path) -> None:
    with pytest.raises(KernelRefused, match="session memconsole:web cannot be created") as error:
        luo.LuoSession.create("memconsole:web")
    assert error.value.errno == errno.ENOTTY


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOENT, NotFound, "NoLuo"),
        (errno.EACCES, Denied, "Denied"),
        (errno.EBUSY, KernelRefused, "Busy"),
        (errno.EIO, KernelRefused, "Broken"),
        (errno.ENXIO, KernelRefused, "Kernel"),
    ],
)
def test_why_the_device_cannot_be_opened_has_a_name(number: int, kind: type[Exception], code: str) -> None:
    error = luo._not_opened(OSError(number, os.strerror(number)))
    assert isinstance(error, kind)
    assert error.code == code


def test_another_opener_is_waited_for_a_moment_and_then_named(
    another_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def busy(path: str, flags: int) -> int:
        tried.append(flags)
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(luo, "_PATIENCE", 0.03)
    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(KernelRefused) as error:
        luo.LuoSession.create("memconsole:web")
    assert error.value.code == "Busy"
    assert len(tried) > 1


@pytest.mark.parametrize(
    ("call", "number", "code"),
    [(call, number, named.code) for call, known in luo._ERRORS.items() for number, named in known.items()],
)
def test_every_errno_that_the_kernel_gives_has_a_name_a_reason_and_a_remedy(call: int, number: int, code: str) -> None:
    error = luo._refused(call, number, "it cannot be done")
    assert (error.code, error.errno) == (code, number)
    assert os.strerror(number) in error.why
    assert error.remedy
    assert luo._refused(call, errno.ENOSYS, "it cannot be done").code == "Kernel"


@pytest.mark.parametrize(
    "call",
    [
        lambda session: session.preserve(0, 1),
        lambda session: session.finish(),
    ],
)
def test_a_session_whose_file_is_none_says_what_could_not_be_done(call: Callable[[luo.LuoSession], None]) -> None:
    session = luo.LuoSession(os.memfd_create("none", os.MFD_CLOEXEC), "memconsole:web")
    with session, pytest.raises(KernelRefused, match="cannot be"):
        call(session)
    with pytest.raises(ValueError, match="closed"):
        call(session)
    session.close()
