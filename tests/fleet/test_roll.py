"""The playbooks of the collection, by the real ansible-playbook, on hosts that say they are stubs and jump nowhere."""

from __future__ import annotations

import html
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
    assert page.count('src="hosts/hv') == 2
    assert "0.250 s" in page
    assert (engine.reports / "hosts/hv2.svg").read_text(encoding="utf-8").startswith("<svg")

    hosts["hv2"].lands = "whole"
    hosts["hv2"].kernels = (hosts["hv2"].kernels[0], "7.3.5 #2 SMP")  # what was wrong was mended in another build
    done = engine.play("roll")
    assert done.returncode == 0, done.stdout
    assert jumps(hosts) == [1, 2, 1]
    assert engine.states() == ["unchanged", "done", "done"]
    assert recap(done.stdout, NAMES)["hv1"]["changed"] == 0


def test_a_check_tells_the_plans_and_writes_down_nothing(fleet: Fleet) -> None:
    engine, hosts = fleet
    first = engine.play("roll", "--check", "--diff")
    assert first.returncode == 0, first.stdout
    assert first.stdout.count("7.3.5") >= len(NAMES)
    assert not engine.reports.exists()
    assert engine.play("roll").returncode == 0
    written = {path: path.read_bytes() for path in engine.reports.rglob("*") if path.is_file()}
    again = engine.play("roll", "--check")
    assert again.returncode == 0, again.stdout
    assert {path: path.read_bytes() for path in engine.reports.rglob("*") if path.is_file()} == written
    assert jumps(hosts) == [1, 1, 1]


def test_a_host_on_which_no_module_runs_is_held_up_by_what_its_shell_says(fleet: Fleet) -> None:
    engine, hosts = fleet
    held = engine.play("roll", "-e", "ansible_python_interpreter=/nowhere/python3")
    assert held.returncode != 0
    assert engine.states() == ["refused"] * 3
    assert all("/nowhere/python3" in row["why"] for row in engine.report()["hosts"]), engine.report()
    assert jumps(hosts) == [0, 0, 0]


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


GONE = """#!/bin/sh
grep -q begun {record} && exit 255
for last; do :; done
exec /bin/sh -c "$last"
"""
"""An ssh that reaches this machine until it is written down that the host is begun."""


def test_a_canary_that_is_gone_when_it_is_to_jump_ends_the_roll(tmp_path: Path) -> None:
    with stub_host(tmp_path / "hv1.control") as gone, stub_host(tmp_path / "hv2.control") as other:
        engine = local(tmp_path, {name: tmp_path / f"{name}.control" for name in NAMES[:2]})
        ssh = tmp_path / "ssh"
        ssh.write_text(GONE.format(record=engine.reports / "hosts/hv1.json"), encoding="utf-8")
        ssh.chmod(0o755)
        done = engine.play("roll", "-e", f"ansible_connection=ssh ansible_ssh_executable={ssh}")
        assert done.returncode != 0
        assert (gone.jumps, other.jumps, engine.states()) == (0, 0, ["failed", "waiting"])
        assert "cannot be reached" in engine.report()["hosts"][0]["why"]


OLDER = """#!/bin/sh
case "$*" in
*--version*) echo memconsole 0.0.9 ;;
*) echo '{"action": "handoff-run", "cli": "handoff run", "conditions": [], "effects": [], "refusals": []}' ;;
esac
"""


def test_a_host_whose_memconsole_is_older_holds_up_the_roll_and_is_named(tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.write_text(OLDER, encoding="utf-8")
    older.chmod(0o755)
    with stub_host(tmp_path / "hv1.control") as host:
        engine = local(tmp_path, {name: tmp_path / f"{name}.control" for name in NAMES[:2]})
        inventory = json.loads(engine.inventory.read_text(encoding="utf-8"))
        inventory["memconsole"]["hosts"]["hv2"]["memconsole_executable"] = str(older)
        engine.inventory.write_text(json.dumps(inventory), encoding="utf-8")
        assert engine.play("roll").returncode != 0
        assert (host.jumps, engine.states()) == (0, ["waiting", "refused"])
        why = engine.report()["hosts"][1]["why"]
        assert "memconsole 0.0.9 on this host is older than the collection memconsole.fleet" in why
        assert "upgrade it" in why
        assert why in html.unescape((engine.reports / "report.html").read_text(encoding="utf-8"))
