"""The playbooks of the collection, by the real ansible-playbook, on hosts that say they are stubs and jump nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.playbooks import Engine, local, recap
from support.stub_host import StubHost, stub_host

NAMES = ("hv1", "hv2", "hv3")
Fleet = tuple[Engine, dict[str, StubHost]]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    sockets = {name: tmp_path / f"{name}.control" for name in NAMES}
    with ExitStack() as stack:
        hosts = {name: stack.enter_context(stub_host(path)) for name, path in sockets.items()}
        yield local(tmp_path, sockets), hosts


def jumps(hosts: dict[str, StubHost]) -> list[int]:
    return [hosts[name].jumps for name in NAMES]


def test_a_roll_ends_where_guests_do_not_come_back_and_goes_on_where_it_was(fleet: Fleet) -> None:
    engine, hosts = fleet
    hosts["hv2"].lands = "torn"
    cut = engine.play("roll", "--diff")
    assert cut.returncode != 0
    assert jumps(hosts) == [1, 1, 0]
    assert engine.states() == ["done", "failed", "waiting"]
    assert "7.3.5" in cut.stdout
    page = (engine.reports / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "0.250 s" in page

    hosts["hv2"].lands = "whole"
    hosts["hv2"].kernels = (hosts["hv2"].kernels[0], "7.3.5 #2 SMP")  # what was wrong was mended in another build
    done = engine.play("roll")
    assert done.returncode == 0, done.stdout
    assert jumps(hosts) == [1, 2, 1]
    assert engine.states() == ["unchanged", "done", "done"]
    assert recap(done.stdout, NAMES)["hv1"]["changed"] == 0


def test_a_controller_that_is_killed_in_a_jump_finds_its_host_again(fleet: Fleet) -> None:
    engine, hosts = fleet
    hosts["hv3"].kernels = ("7.3.5 #1 SMP", "7.3.5 #1 SMP")
    engine.killed("roll", lambda: hosts["hv1"].jumps)
    assert engine.states()[0] == "begun"
    hosts["hv2"].lands = "old"
    went_on = engine.play("roll")
    assert went_on.returncode != 0
    assert jumps(hosts) == [1, 1, 0]
    assert engine.states() == ["unchanged", "failed", "waiting"]
    assert "the host runs 7.3.4 #1 SMP, not 7.3.5 #1 SMP" in json.dumps(engine.report())
