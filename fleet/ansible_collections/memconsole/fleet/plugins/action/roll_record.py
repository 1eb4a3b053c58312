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
LONG = ("title", "blackouts", "guests", "report", "picture")
"""What stands in a host's own files alone."""


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
        if self._task.check_mode:
            return {"changed": False, "msg": "nothing is written down in check mode: every host stays where it is"}
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._recorded(directory, host, state)

    def _recorded(self, directory: Path, host: str, state: str | None) -> dict[str, Any]:
        title = str(self._task.args.get("title") or "Roll")
        rows = known(directory, title)
        if state is not None:
            why, facts = self._task.args.get("why") or "", self._task.args.get("facts") or {}
            whole = {"host": host, "title": title, "state": state, "at": time.time(), "why": why, **facts}
            write(directory / "hosts" / f"{file_of(host)}.json", json.dumps(whole, indent=1))
            if picture := whole.get("picture"):
                write(directory / "hosts" / f"{file_of(host)}.svg", picture)
            rows[host] = row(whole)
        waiting = {"state": "waiting", "why": "its turn had not come"}
        shown = [rows.get(str(name), {"host": str(name), **waiting}) for name in self._task.args["hosts"]]
        states = dict(Counter(each["state"] for each in shown))
        report = {"title": title, "at": time.time(), "states": states, "hosts": shown}
        write(directory / "report.json", json.dumps(report))
        write(directory / "report.html", page.html(report))
        return {"changed": False, "states": states, "msg": f"{directory / 'report.html'}"}


def known(directory: Path, title: str) -> dict[str, dict[str, Any]]:
    """The rows of the report that stands, by host, as far as they are of a roll of this title."""
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {each["host"]: each for each in report["hosts"]} if report["title"] == title else {}


def row(whole: dict[str, Any]) -> dict[str, Any]:
    """What the report says of a host: where it is long, in which file; a thousand rows are soon written."""
    name = f"hosts/{file_of(whole['host'])}"
    stood = [ns for ns in (whole.get("blackouts") or {}).values() if isinstance(ns, int)]
    short = {key: value for key, value in whole.items() if key not in LONG}
    return {
        **short,
        "guests": len(whole.get("blackouts") or {}),
        "blackout_ns": max(stood, default=None),
        "details": f"{name}.json",
        "picture": f"{name}.svg" if whole.get("picture") else None,
    }


def file_of(host: str) -> str:
    """What the files of a host are called; a name that is a path stays a name."""
    return host.replace("/", "_")


def write(path: Path, text: str) -> None:
    """A file that is whole at any moment, whoever is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
