"""The raw store on a host that keeps no memory from its kernel: refused by name, and /dev/mem is left alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from support.guests import fd_links
from support.services import Service, services

from memconsole import actions as do

NOWHERE = "0x7fff00000000"
"""An address at which no host has memory."""


@pytest.fixture
def service() -> Iterator[Service]:
    with services() as made:
        yield made


def test_a_range_that_is_none_is_refused_and_nothing_is_opened(service: Service) -> None:
    process = service.start("--raw", NOWHERE)
    client = service.client()
    made = client.plan(do.ArenaCreate("far", raw=True)).refusals
    kept = client.plan(do.Reserve("r", 4 << 20, "raw")).refusals
    assert [(each.code, each.why) for each in made] == [
        ("NotOurs", "no memmap=SIZE$START of this kernel's command line begins there")
    ]
    assert [each.code for each in kept] == ["NoArena"]
    assert all("memmap=SIZE$START" in each.remedy or "arena check" in each.remedy for each in (*made, *kept))
    assert "/dev/mem" not in fd_links(process.pid).values()
    client.close()


def test_without_the_word_the_store_has_nothing(service: Service) -> None:
    service.start()
    client = service.client()
    wanted = (do.ArenaCreate("far", raw=True), do.Reserve("r", 4 << 20, "raw"), do.GuestStart("vm", store="raw"))
    assert [[each.code for each in client.plan(action).refusals] for action in wanted] == [["NotNamed"]] * 3
    client.close()


def test_a_range_that_was_named_is_listed_with_why_it_is_not_used(service: Service) -> None:
    words = service.command("arena", "list", "--json", "--raw", NOWHERE)
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    (seen,) = (each for each in json.loads(done.stdout) if each["device"] == NOWHERE)
    assert "begins there" in seen["trouble"]
    wrong = subprocess.run(
        service.command("arena", "list", "--raw", "there"), capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "--raw" in wrong.stderr
