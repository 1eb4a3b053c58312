"""A person at the console over a real service with canaries: keys and mouse on a real pty, from a look to a loss."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.acts import ACTS, Act
from support.person import Person, person
from support.services import Service, services
from support.sitting import guests_of, note_guests


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    if os.geteuid() != 0:
        pytest.skip("not root")
    with services() as running:
        guests_of(running)
        yield running


@pytest.fixture(scope="module")
def at_the_console(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    home = {"XDG_CONFIG_HOME": str(tmp_path_factory.mktemp("config"))}
    with person(service.command(), env=home) as found:
        yield found


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_a_person_at_the_console(act: Act, at_the_console: Person, service: Service) -> None:
    act(at_the_console, service)
    note_guests(service)
