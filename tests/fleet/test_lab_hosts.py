"""Rolls over lab hosts: VMs with an sshd of their own that really boot the next kernel, their canaries going on in it.

They take long: ``make soak`` runs them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import build_deb
import pytest
from support import lab
from support.lab_fleet import DEBIAN, PATIENCE, lab_fleet
from support.lab_rolls import CANARY, SOAK, engine
from support.playbooks import Engine, recap
from support.remotes import SSHD
from support.waiting import until

pytestmark = pytest.mark.skipif(not SSHD, reason="there is no sshd: apt install openssh-server")
THREE = ("hv1", "hv2", "hv3")
OLDER = """#!/bin/sh
case "$*" in *--yes*) cp /boot/vmlinuz-{old} /boot/vmlinuz-{new} ;; esac
exec memconsole "$@"
"""
"""A memconsole on a host where somebody puts another image in the place of the next kernel's, once it was planned."""
TRIES = 2
"""How often a fleet is begun of which a host went deaf: QEMU's emulation does that (lab_watch.py)."""


def rows(made: Engine) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = made.report()["hosts"]
    return found


@SOAK
def test_a_host_is_rolled_while_its_network_is_cut_in_the_jump(tmp_path: Path) -> None:
    for attempt in range(1, TRIES + 1):
        with lab_fleet(tmp_path / str(attempt), ["hv1"], more=CANARY) as fleet:
            host, made = fleet.hosts["hv1"], engine(tmp_path / str(attempt), fleet)
            with host.cut_in_the_jump():
                done = made.play("roll")
            if done.returncode and host.deaf() and attempt < TRIES:
                lab.repeated.append("hv1: nothing ran in it any more")
                continue
            assert done.returncode == 0, (done.stdout, host.console())
            assert host.releases() == [fleet.old, fleet.new]
            told = made.details("hv1")
            assert (told["state"], told["report"]["to_kernel"]) == ("done", fleet.new)
            assert told["blackouts"]["canary"] > 0
            assert 'src="hosts/hv1.svg"' in (made.reports / "report.html").read_text(encoding="utf-8")
            return


@SOAK
def test_three_hosts_are_held_up_by_one(tmp_path: Path) -> None:
    with lab_fleet(tmp_path, THREE, more=CANARY) as fleet:
        made = engine(tmp_path, fleet)
        fleet.run("hv2", "kill -STOP $(memconsole guests --json | grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*')")
        held = made.play("roll")
        assert held.returncode != 0
        assert made.states() == ["waiting", "refused", "waiting"], held.stdout
        assert "GuestSilent" in rows(made)[1]["why"]
        assert [host.boots() for host in fleet.hosts.values()] == [1, 1, 1]


@SOAK
def test_a_controller_that_dies_in_batch_two_finds_three_hosts_again(tmp_path: Path) -> None:
    with lab_fleet(tmp_path, THREE, more=CANARY) as fleet:
        made, hosts = engine(tmp_path, fleet), fleet.hosts
        made.killed("roll", lambda: hosts["hv3"].boots() == 2, "-e", "memconsole_serial=1", within=3 * PATIENCE)
        assert made.states() == ["done", "done", "begun"]
        until(hosts["hv3"].serves, "hv3 serves", PATIENCE)
        told = made.play("report")
        assert (told.returncode, made.states()) == (0, ["done"] * 3), told.stdout
        assert all((made.reports / row["picture"]).read_text(encoding="utf-8").startswith("<svg") for row in rows(made))

        went_on = made.play("roll")
        assert (went_on.returncode, made.states()) == (0, ["unchanged"] * 3), went_on.stdout
        assert [host.releases() for host in hosts.values()] == [[fleet.old, fleet.new]] * 3


@SOAK
def test_a_host_whose_clock_is_off_is_rolled_and_rolled_back(tmp_path: Path) -> None:
    with lab_fleet(tmp_path, ["hv1"], more=CANARY, options={"hv1": ("-rtc", "base=2031-01-01T00:00:00")}) as fleet:
        made = engine(tmp_path, fleet)
        done = made.play("roll")
        assert (done.returncode, made.states()) == (0, ["done"]), done.stdout
        assert made.details("hv1")["report"]["began_ns"] > time.time_ns()  # its clock, not the controller's
        back = made.play("rollback", "-e", f"memconsole_rollback_from={fleet.new}")
        assert (back.returncode, made.states()) == (0, ["done"]), back.stdout
        assert made.report()["title"] == "Rollback"
        assert fleet.hosts["hv1"].releases() == [fleet.old, fleet.new, fleet.old]


@SOAK
def test_a_kernel_that_panics_is_told_as_a_host_that_booted_anew(tmp_path: Path) -> None:
    with lab_fleet(tmp_path, ["hv1"], more=CANARY) as fleet:
        line = fleet.run("hv1", "cat /proc/cmdline").strip()
        made = engine(tmp_path, fleet, memconsole_append=f"{line} rdinit=/nowhere")
        done = made.play("roll")
        assert done.returncode != 0
        assert made.states() == ["failed"], done.stdout
        assert "booted anew" in rows(made)[0]["why"]
        assert fleet.hosts["hv1"].releases() == [fleet.old, fleet.old]


@SOAK
def test_a_host_that_comes_back_with_the_old_kernel_is_not_done(tmp_path: Path) -> None:
    with lab_fleet(tmp_path, ["hv1"], more=CANARY) as fleet:
        program = fleet.hosts["hv1"].share / "older"
        program.write_text(OLDER.format(old=fleet.old, new=fleet.new), encoding="utf-8")
        program.chmod(0o755)
        made = engine(tmp_path, fleet, memconsole_executable="/run/lab/older")
        done = made.play("roll")
        assert done.returncode != 0
        assert made.states() == ["failed"], done.stdout
        assert f"the host runs {fleet.old}" in rows(made)[0]["why"]
        assert made.details("hv1")["report"]["guests"][0]["back"]


@SOAK
def test_a_host_whose_disk_is_full_rolls_and_says_what_could_not_be_written(tmp_path: Path) -> None:
    with lab_fleet(tmp_path, ["hv1"], more=CANARY) as fleet:
        fleet.run("hv1", "dd if=/dev/zero of=/full bs=64k 2>/dev/null; dd if=/dev/zero of=/more bs=1k 2>/dev/null; :")
        made = engine(tmp_path, fleet)
        done = made.play("roll")
        assert (done.returncode, made.states()) == (0, ["done"]), done.stdout
        told = made.details("hv1")
        assert [(each["name"], each["back"]) for each in told["report"]["guests"]] == [("canary", True)]
        assert (made.reports / "hosts/hv1.svg").read_text(encoding="utf-8").startswith("<svg")
        assert {"audit-behind", "history-stopped"} & set(rows(made)[0]["findings"])
        assert fleet.hosts["hv1"].releases() == [fleet.old, fleet.new]


@SOAK
def test_a_fresh_debian_is_installed_by_the_role_and_rolled(tmp_path: Path) -> None:
    package = build_deb.build(tmp_path / "deb")
    with lab_fleet(tmp_path, ["hv1"], begins=DEBIAN) as fleet:
        made = engine(tmp_path, fleet)
        installed = made.play("install", "-e", f"memconsole_package={package}")
        assert installed.returncode == 0, installed.stdout
        again = made.play("install", "-e", f"memconsole_package={package}")
        assert recap(again.stdout, ["hv1"])["hv1"]["changed"] == 0, again.stdout
        fleet.run("hv1", "memconsole guest start canary --memory 8M")
        done = made.play("roll")
        assert (done.returncode, made.states()) == (0, ["done"]), done.stdout
        assert fleet.hosts["hv1"].releases() == [fleet.old, fleet.new]
