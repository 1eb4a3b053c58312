#!/usr/bin/python
"""See DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: handoff_check
short_description: Check every condition of a handoff
description:
  - Asks memconsole whether this host could boot the next kernel with its guests going on in it, and changes nothing.
  - It is the plan of C(memconsole handoff run), with its conditions.
options:
  rehearse:
    description: Check what a rehearsal depends on, which jumps into no kernel.
    type: bool
    default: false
  must_be_ready:
    description: Fail where a condition refuses the handoff; else RV(ready) says so.
    type: bool
    default: false
extends_documentation_fragment:
  - memconsole.fleet.cli
  - memconsole.fleet.cli.kernel
attributes:
  check_mode:
    description: It changes nothing in either mode.
    support: full
"""

EXAMPLES = r"""
- name: Every condition, of the kernel that the host boots by itself
  memconsole.fleet.handoff_check:
  register: checked

- name: Stop here where guests would be lost
  memconsole.fleet.handoff_check:
    kernel: /boot/vmlinuz-7.3.5
    must_be_ready: true
"""

RETURN = r"""
ready:
  description: Whether nothing refuses the handoff.
  returned: always
  type: bool
running:
  description: Whether the kernel that would be booted is the one that runs, by release and version.
  returned: always
  type: bool
from_kernel:
  description: The kernel that runs, by release and version; empty where it is not known.
  returned: always
  type: str
to_kernel:
  description: The kernel that would be booted, likewise.
  returned: always
  type: str
conditions:
  description: Each condition with C(id), C(severity), C(ok), C(requirement), C(risk), C(observed) and C(remedy).
  returned: always
  type: list
  elements: dict
refused_by:
  description: The ids of conditions that refuse it.
  returned: always
  type: list
  elements: str
warnings_of:
  description: The ids of conditions that warn.
  returned: always
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.memconsole.fleet.plugins.module_utils import cli


def main() -> None:
    """Ask, and say."""
    spec = {
        **cli.OPTIONS,
        **cli.KERNEL,
        **{name: {"type": "bool", "default": False} for name in ("must_be_ready", "rehearse")},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    command = cli.CommandLine(module)
    with command.failing():
        plan = command.plan(
            "handoff", "rehearse" if module.params["rehearse"] else "run", *cli.kernel_words(module.params)
        )
        command.answers()
    failing = [each for each in plan["conditions"] if not each["ok"]]
    found = {
        "ready": not plan["refusals"],
        "running": cli.runs_already(plan),
        "from_kernel": plan["from_kernel"],
        "to_kernel": plan["to_kernel"],
        "conditions": plan["conditions"],
        "refused_by": [each["id"] for each in failing if each["severity"] == "error"],
        "warnings_of": [each["id"] for each in failing if each["severity"] != "error"],
        "msg": cli.refused_by(plan) or "no condition refuses a handoff",
    }
    if module.params["must_be_ready"] and not found["ready"]:
        module.fail_json(**found)
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
