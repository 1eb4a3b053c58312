#!/usr/bin/python
"""See DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: handoff_run
short_description: Boot the next kernel, its guests going on in it
description:
  - Makes a handoff, or rehearses one, and waits until the host is back and says what came of it.
  - A host that runs the kernel that would be booted, by release and version, and whose last handoff brought everything
    back, is left as it is.
  - The handoff is made by the control process on the host. It goes on when the connection is cut or the controller
    ends; the next run of this module waits for one that is under way, and begins none.
  - C(ssh) does not notice by itself that a host has jumped. Give it C(ServerAliveInterval), as the playbooks of this
    collection do.
options:
  rehearse:
    description: Do all of it but the jump. Every VMM is started anew on this kernel, on the same memory.
    type: bool
    default: false
  contents:
    description: Compare contents too, guests paused. The blackout is longer.
    type: bool
    default: false
  finish:
    description: Finish sessions that are left of the handoff before; files that no entry refers to are discarded.
    type: bool
    default: false
  force:
    description: Hand off though the kernel that would be booted runs already.
    type: bool
    default: false
  timeout:
    description:
      - Seconds after which a host that did not come back is given up.
      - If left out it is forecast, as four times what the last handoff on this host took and at least O(least_timeout).
    type: int
  least_timeout:
    description: The shortest forecast, in seconds, and the one where there was no handoff before.
    type: int
    default: 600
  interval:
    description: Seconds between two looks at a host that is not back.
    type: float
    default: 2
  wait:
    description: Wait until it is over. If not, it is begun, and a later task waits for it by O(begun).
    type: bool
    default: true
  begun:
    description:
      - What a task with O(wait=false) returned. Nothing is begun then, and the handoff of that task is waited for,
        whatever O(wait) says.
      - A batch of hosts is begun so before the first one is waited for, however few of them Ansible handles at a time.
    type: dict
  job:
    description: A handoff that was begun, to look how far it is. The module's own part on the controller sets it.
    type: dict
extends_documentation_fragment:
  - memconsole.fleet.cli
  - memconsole.fleet.cli.kernel
attributes:
  check_mode:
    description: The plan is returned as RV(plan), and nothing is changed.
    support: full
  diff_mode:
    description: Shows kernel, guests and regions before and after.
    support: full
"""

EXAMPLES = r"""
- name: The plan, and what would be another
  memconsole.fleet.handoff_run:
  check_mode: true
  diff: true

- name: The kernel that the host boots by itself
  memconsole.fleet.handoff_run:
  register: handed

- name: Begin it, to do something else meanwhile
  memconsole.fleet.handoff_run:
    wait: false
  register: begun

- name: Wait for it
  memconsole.fleet.handoff_run:
    begun: "{{ begun }}"

- name: A named kernel, contents compared
  memconsole.fleet.handoff_run:
    kernel: /boot/vmlinuz-7.3.5
    contents: true
    timeout: 900
"""

RETURN = r"""
plan:
  description: The plan, with its conditions.
  returned: always
  type: dict
report:
  description: The report of the handoff.
  returned: when there is one
  type: dict
blackouts:
  description: Nanoseconds that each guest stood still.
  returned: when there is a report
  type: dict
picture:
  description: The timeline of the handoff as an SVG document.
  returned: when it was made
  type: str
findings:
  description: What C(memconsole audit) finds afterwards.
  returned: when it was made
  type: list
  elements: dict
before:
  description: Kernel, guests and regions before.
  returned: always
  type: dict
after:
  description: Kernel, guests and regions after; in check mode, as they are planned.
  returned: when it was made or planned
  type: dict
deadline_s:
  description: Seconds that the host was given to come back.
  returned: when it was made
  type: float
waited_s:
  description: Seconds that it took, on the controller's clock.
  returned: when it was made
  type: float
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.memconsole.fleet.plugins.module_utils import cli

SCRIPT = '(umask 077; "$@" >"$0/out" 2>"$0/err" </dev/null; echo $? >"$0/code.new"; mv "$0/code.new" "$0/code") &'
"""Runs a command and writes down what came of it, whoever looks."""
SAID = 4096
"""Bytes of what a command said that are repeated."""


def words_of(params: dict[str, Any]) -> list[str]:
    """The command that makes the handoff, or rehearses it."""
    words = ["handoff", "rehearse" if params["rehearse"] else "run", *cli.kernel_words(params)]
    words += ["--contents"] if params["contents"] else []
    return [*words, *(["--finish"] if params["finish"] and not params["rehearse"] else [])]


def begun(command: cli.CommandLine) -> dict[str, Any]:
    """Plan it, and begin it where it is to be made: what it is begun from, and the job by which one looks at it.

    Raises:
        cli.Failed: it is refused, or the host cannot say; or it has the kernel and did not bring everything back.
    """
    module = command.module
    plan, snapshot = command.plan(*words_of(module.params)), command.snapshot()
    command.answers()
    before = cli.shown(snapshot, plan["from_kernel"])
    last = snapshot["handoff"]
    boot_id, began_ns = snapshot["host"]["boot_id"], last["began_ns"] if last is not None else 0
    found = {"plan": plan, "before": before, "report": last, "changed": False}
    if last is not None and last["state"] == "running":
        return {**found, "changed": True, "job": {"path": "", "began_ns": 0, "boot_id": boot_id}}
    if cli.runs_already(plan) and not module.params["force"] and not module.params["rehearse"]:
        return found | {"after": before, **there_already(command, plan["from_kernel"])}
    if plan["refusals"]:
        raise cli.Failed(cli.refused_by(plan), cli.REFUSED, {"code": plan["refusals"][0]["code"]})
    if module.check_mode:
        return found | {"changed": True, "after": planned(before, snapshot, plan), "msg": f"would do: {plan['cli']}"}
    path = tempfile.mkdtemp(prefix="memconsole-handoff-")
    words = command.words(*words_of(module.params), "--yes", "--json")
    subprocess.run(
        ["/bin/sh", "-c", SCRIPT, path, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
    return found | {"changed": True, "job": {"path": path, "began_ns": began_ns, "boot_id": boot_id}}


def there_already(command: cli.CommandLine, kernel: str) -> dict[str, Any]:
    """What a host says that has the kernel, and all that it had before.

    Raises:
        cli.Failed: its last handoff did not bring everything back, or it cannot say.
    """
    last = command.last_handoff(picture=True)
    if last["made"] and not last["whole"]:
        raise cli.Failed(f"{kernel} runs, but not everything came back from the last handoff", cli.FINDINGS, {})
    came = "everything came back from the last handoff" if last["made"] else "there was no handoff"
    return last | {"msg": f"{kernel} runs, and {came}"}


def planned(before: dict[str, Any], snapshot: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """What a host has after it, if it goes as planned: ordinary processes end with the kernel."""
    if plan["action"] == "handoff-rehearse":
        return before
    ending = {guest["name"] for guest in snapshot["guests"] if guest["kind"] == "process"}
    guests = {name: said for name, said in before["guests"].items() if name not in ending}
    return {**before, "kernel": plan["to_kernel"], "guests": guests}


def looked(command: cli.CommandLine, job: dict[str, Any]) -> dict[str, Any]:
    """How far a handoff is that was begun: whether its command ended and how, and what the host says by now."""
    found: dict[str, Any] = {"looked": True, "changed": False}
    where = Path(job["path"] or os.devnull)
    if (where / "code").exists():
        found["ended"] = int((where / "code").read_text(encoding="ascii"))
        found["said"] = (where / "err").read_text(encoding="utf-8", errors="replace")[-SAID:]
    try:
        snapshot = command.snapshot()
        jumped, report = snapshot["host"]["boot_id"] != job["boot_id"], snapshot["handoff"]
        newer = report is not None and report["began_ns"] != job["began_ns"]  # whatever the clock did meanwhile
        over = newer and report["state"] == "done" and (jumped or command.module.params["rehearse"])
        found |= verified(command, snapshot) if over else {}
        if jumped and not newer:
            command.answers()  # what is lost is said by who would have it
    except cli.Failed as failed:
        return found | {"answers": False, "msg": str(failed)}
    if "ended" in found or jumped:
        shutil.rmtree(where, ignore_errors=True)
    return found | {"answers": True, "jumped": jumped, "over": over, "report": report if newer else None}


def verified(command: cli.CommandLine, snapshot: dict[str, Any]) -> dict[str, Any]:
    """What a host says of a handoff that is over: the kernel that runs, what came back, what canaries count.

    Raises:
        cli.Failed: it does not say.
    """
    kernel = command.plan("handoff", "run", *cli.kernel_words(command.module.params))["from_kernel"]
    wrong = {guest["name"]: guest["progress"]["wrong"] for guest in snapshot["guests"] if guest["progress"]}
    last = command.last_handoff(picture=True)
    return {
        **{name: last[name] for name in ("whole", "findings", "blackouts", "picture")},
        "after": cli.shown(snapshot, kernel),
        "wrong": {name: count for name, count in wrong.items() if count},
    }


def main() -> None:
    """Begin, or look."""
    spec = {
        **cli.OPTIONS,
        **cli.KERNEL,
        **{name: {"type": "bool", "default": False} for name in ("rehearse", "contents", "finish", "force")},
        "timeout": {"type": "int"},
        "least_timeout": {"type": "int", "default": 600},
        "interval": {"type": "float", "default": 2},
        "wait": {"type": "bool", "default": True},
        "begun": {"type": "dict"},
        "job": {"type": "dict"},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    command = cli.CommandLine(module)
    job = module.params["job"]
    with command.failing():
        done = begun(command) if job is None else looked(command, job)
    module.exit_json(**done)


if __name__ == "__main__":
    main()
