"""Playbooks of the collection in the tree, by the real ansible-playbook, over hosts of a test."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import memconsole
from support.waiting import LONG_S, until

TOP = Path(memconsole.__path__[0]).parent
FLEET = TOP / "fleet"
COLLECTION = FLEET / "ansible_collections/memconsole/fleet"


def environment(directory: Path) -> dict[str, str]:
    """What Ansible finds the collection by, with a home of its own."""
    return os.environ | {
        "ANSIBLE_COLLECTIONS_PATH": str(FLEET),
        "ANSIBLE_CONFIG": str(directory / "none.cfg"),
        "ANSIBLE_HOME": str(directory / "ansible"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(directory / "cp"),  # hosts of two fleets may be called alike
        "ANSIBLE_LOCAL_TEMP": str(directory / "ansible/tmp"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_RETRY_FILES_ENABLED": "0",
        "LC_ALL": "C.UTF-8",
    }


def executable(directory: Path) -> Path:
    """The memconsole of this tree as a command."""
    path = directory / "memconsole"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m memconsole "$@"\n', encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Engine:
    """ansible-playbook over hosts by name, with what its inventory says of each of them and of all."""

    def __init__(
        self, directory: Path, hosts: Mapping[str, Mapping[str, object]], shared: Mapping[str, object]
    ) -> None:
        self.directory = directory
        self.reports = directory / "roll"
        self.inventory = directory / "inventory.json"
        told = {
            "ansible_python_interpreter": sys.executable,
            "ansible_remote_tmp": str(directory / "remote"),
            "memconsole_report_dir": str(self.reports),
            **shared,
        }
        (directory / "none.cfg").touch()
        self.inventory.write_text(json.dumps({"memconsole": {"hosts": hosts, "vars": told}}), encoding="utf-8")

    def command(self, playbook: str, *more: str) -> list[str]:
        """One run of a playbook of the collection."""
        program = str(Path(sys.executable).parent / "ansible-playbook")
        return [program, "-i", str(self.inventory), f"memconsole.fleet.{playbook}", *more]

    def play(self, playbook: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        words, env = self.command(playbook, *more), environment(self.directory)
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)

    def killed(self, playbook: str, when: Any, *more: str, within: float = LONG_S) -> None:
        """Run it until ``when`` says so, and kill the controller with all of its workers."""
        words, env = self.command(playbook, *more), environment(self.directory)
        with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            until(when, within=within)
            os.killpg(process.pid, signal.SIGKILL)

    def report(self) -> dict[str, Any]:
        """The report over all hosts."""
        found: dict[str, Any] = json.loads((self.reports / "report.json").read_text(encoding="utf-8"))
        return found

    def details(self, host: str) -> dict[str, Any]:
        """All that is written down of a host, and its timeline."""
        row = next(each for each in self.report()["hosts"] if each["host"] == host)
        found: dict[str, Any] = json.loads((self.reports / row["details"]).read_text(encoding="utf-8"))
        return found

    def states(self) -> list[str]:
        """Where each host is, in order."""
        return [row["state"] for row in self.report()["hosts"]]


def local(directory: Path, sockets: Mapping[str, Path]) -> Engine:
    """An engine over control processes of this machine, by their sockets."""
    shared = {
        "ansible_connection": "local",
        "memconsole_executable": str(executable(directory)),
        "memconsole_interval": 0.5,
    }
    return Engine(directory, {name: {"memconsole_socket": str(path)} for name, path in sockets.items()}, shared)


def recap(said: str, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """What Ansible counted of each host."""
    return {
        name: {word: int(count) for word, count in re.findall(r"(\w+)=(\d+)", line)}
        for name in names
        for line in re.findall(rf"^{name} +: (.*)$", said, flags=re.MULTILINE)
    }
