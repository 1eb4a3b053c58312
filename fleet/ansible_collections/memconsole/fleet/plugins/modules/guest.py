#!/usr/bin/python
"""See DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: guest
short_description: Start, attach, pause, resume or stop a guest
description:
  - A guest is a VM that memconsole starts, or a process that is attached, which maps memory that it was granted.
  - What a guest is started with is not changed while it is there; the module looks at its name and its state alone.
options:
  name:
    description: The name of the guest.
    type: str
    required: true
  state:
    description:
      - V(present) starts it, or attaches the process O(pid), where it is not there; whatever its state is.
      - V(running) and V(paused) do too, and then resume or pause it.
      - V(absent) stops it; a VM ends, a process goes on without its grants.
    type: str
    choices: [present, running, paused, absent]
    default: present
  vmm:
    description: What it is started with.
    type: str
    choices: [canary, qemu]
  memory:
    description: Its memory, such as V(2G); 64M if left out.
    type: str
  device:
    description: The PCI address of a device that is passed through to it.
    type: str
  agent:
    description: With a channel for QEMU's guest agent.
    type: bool
    default: false
  args:
    description: More words of the VMM's command line.
    type: list
    elements: str
    default: []
  pid:
    description: The process that is attached, in place of a VMM that is started.
    type: int
extends_documentation_fragment:
  - memconsole.fleet.cli
attributes:
  check_mode:
    description: The plan of the action is returned as RV(plan), and nothing is changed.
    support: full
"""

EXAMPLES = r"""
- name: A guest that counts, and checks its memory
  memconsole.fleet.guest:
    name: canary
    vmm: canary
    state: running

- name: A VM
  memconsole.fleet.guest:
    name: vm1
    vmm: qemu
    memory: 2G
    args: [-drive, "file=/var/lib/vms/vm1.img"]
"""

RETURN = r"""
guest:
  description: The guest as it was found, if it was there.
  returned: when it was there
  type: dict
outcome:
  description: What was done last.
  returned: when something was
  type: dict
plan:
  description: What would be done.
  returned: in check mode
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.memconsole.fleet.plugins.module_utils import cli

ENDED = {"stopped", "gone"}
"""States of a guest that is not there any more, though its grants are."""


def started(params: dict[str, Any]) -> list[str]:
    """The command that brings it."""
    if params["pid"] is not None:
        return ["guest", "attach", params["name"], "--pid", str(params["pid"])]
    words = ["guest", "start", params["name"]]
    for option in ("vmm", "memory", "device"):
        words += [f"--{option}", params[option]] if params[option] is not None else []
    words += ["--agent"] if params["agent"] else []
    return [*words, *(["--", *params["args"]] if params["args"] else [])]


def bring(command: cli.CommandLine) -> dict[str, Any]:
    """Do what is not so yet, a step after another; what the last came to.

    Raises:
        cli.Failed: it was refused, or failed.
    """
    params, name = command.module.params, command.module.params["name"]
    guest = next((each for each in command.ask("guests", "--json")[1] if each["name"] == name), None)
    found = {} if guest is None else {"guest": guest}
    state = guest["state"] if guest is not None else "none"
    if params["state"] == "absent":
        return {"changed": False, **found} if guest is None else command.act("guest", "stop", name) | found
    if guest is not None and state in ENDED:
        raise cli.Failed(
            f"guest {name} is {state}: stop it first (state: absent), which ends its grants", cli.FAILED, {}
        )
    done: dict[str, Any] = {"changed": False}
    if guest is None:
        done, state = command.act(*started(params)), "running"
        if command.module.check_mode:  # what is not there yet cannot be planned to be paused
            return done
    if params["state"] == "paused" and state in {"starting", "running"}:
        done = command.act("guest", "pause", name)
    elif params["state"] == "running" and state in {"paused", "suspended"}:
        done = command.act("guest", "resume", name)
    return done | found


def main() -> None:
    """Bring the guest about."""
    spec = {
        **cli.OPTIONS,
        "name": {"type": "str", "required": True},
        "state": {"type": "str", "choices": ["present", "running", "paused", "absent"], "default": "present"},
        "vmm": {"type": "str", "choices": ["canary", "qemu"]},
        "memory": {"type": "str"},
        "device": {"type": "str"},
        "agent": {"type": "bool", "default": False},
        "args": {"type": "list", "elements": "str", "default": []},
        "pid": {"type": "int"},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True, mutually_exclusive=[("pid", "vmm")])
    command = cli.CommandLine(module)
    with command.failing():
        done = bring(command)
    module.exit_json(**done)


if __name__ == "__main__":
    main()
