"""LUO's calls on any host: names, and what is said where there is no LUO. The calls themselves run in tests/vm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole.backend.handoff import luo
from memconsole.errors import KernelRefused, NotFound, Refused


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
        luo.Session.create(name)
    assert error.value.code == "BadName"


def test_a_host_without_live_update() -> None:
    if Path(luo.DEVICE).exists():
        pytest.skip("this host has LUO")
    for act in (luo.Session.create, luo.Session.retrieve):
        with pytest.raises(NotFound) as error:
            act("memconsole:test")
        assert error.value.code == "NoLuo"
        assert "kho=on liveupdate=on" in error.value.remedy


def test_an_fd_that_is_no_session() -> None:
    fd = os.memfd_create("none", os.MFD_CLOEXEC)
    try:
        with pytest.raises(KernelRefused) as error:
            luo.Session.adopt(fd)
        assert error.value.code == "NotASession"
        os.fstat(fd)
    finally:
        os.close(fd)
