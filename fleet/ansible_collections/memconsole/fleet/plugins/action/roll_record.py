"""Where each host of a roll is, in a directory of the controller, and the report over all of them."""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.memconsole.fleet.plugins.module_utils import page

STATES = ("waiting", "refused", "begun", "done", "unchanged", "failed")


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible's is untyped
    """Writes files on the controller; it asks no host."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The result of the task."""
        super().run(tmp, task_vars)
        directory = Path(self._task.args["directory"]).expanduser()
        host = str((task_vars or {})["inventory_hostname"])
        state = self._task.args.get("state")
        if state is not None and state not in STATES:
            return {"failed": True, "msg": f"{state!r} is no state of a host; one of: {', '.join(STATES)}"}
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._recorded(directory, host, state)

    def _recorded(self, directory: Path, host: str, state: str | None) -> dict[str, Any]:
        if state is not None:
            known = {"host": host, "state": state, "at": time.time(), "why": self._task.args.get("why") or ""}
            write(hosts_file(directory, host), json.dumps(known | (self._task.args.get("facts") or {}), indent=1))
        rows = [read(directory, str(name)) for name in self._task.args["hosts"]]
        states = dict(Counter(row["state"] for row in rows))
        title = str(self._task.args.get("title") or "Roll")
        whole = {"title": title, "at": time.time(), "states": states, "hosts": rows}
        write(directory / "report.json", json.dumps(whole, indent=1))
        write(directory / "report.html", page.html(whole))
        return {"changed": False, "states": states, "msg": f"{directory / 'report.html'}"}


def hosts_file(directory: Path, host: str) -> Path:
    """Where a host's state is kept; a name that is a path stays a name."""
    return directory / "hosts" / f"{host.replace('/', '_')}.json"


def read(directory: Path, host: str) -> dict[str, Any]:
    """What is written down of a host."""
    try:
        found: dict[str, Any] = json.loads(hosts_file(directory, host).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"host": host, "state": "waiting", "why": "its turn had not come"}
    return found


def write(path: Path, text: str) -> None:
    """A file that is whole at any moment, whoever is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
