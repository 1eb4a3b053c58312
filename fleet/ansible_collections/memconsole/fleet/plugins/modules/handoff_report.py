#!/usr/bin/python
"""See DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: handoff_report
short_description: Read the report of the last handoff
description:
  - Reads what C(memconsole handoff report) says of the last handoff or rehearsal on this host, and its findings.
  - It changes nothing, and may be asked as often as one likes, whoever made the handoff.
options:
  must_be_whole:
    description: Fail where there was no handoff, or where not everything came back from it.
    type: bool
    default: false
  picture:
    description: Return the timeline as SVG too.
    type: bool
    default: false
extends_documentation_fragment:
  - memconsole.fleet.cli
attributes:
  check_mode:
    description: It changes nothing in either mode.
    support: full
"""

EXAMPLES = r"""
- name: Where the time of the last handoff went
  memconsole.fleet.handoff_report:
    picture: true
  register: last
"""

RETURN = r"""
made:
  description: Whether there was a handoff or a rehearsal.
  returned: always
  type: bool
whole:
  description: Whether every guest, region and device came back from it.
  returned: always
  type: bool
report:
  description: The report, as C(memconsole handoff report --json) has it.
  returned: when there is one
  type: dict
blackouts:
  description: Nanoseconds that each guest stood still.
  returned: when there is a report
  type: dict
findings:
  description: What C(memconsole audit) finds, worst first.
  returned: always
  type: list
  elements: dict
picture:
  description: The timeline as an SVG document.
  returned: when O(picture) is true and there is a report
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.memconsole.fleet.plugins.module_utils import cli


def main() -> None:
    """Read, and say."""
    spec = {
        **cli.OPTIONS,
        "must_be_whole": {"type": "bool", "default": False},
        "picture": {"type": "bool", "default": False},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    command = cli.CommandLine(module)
    with command.failing():
        found = command.last_handoff(picture=module.params["picture"])
    if module.params["must_be_whole"] and not found["whole"]:
        what = "not everything came back from the last handoff" if found["made"] else "there was no handoff"
        module.fail_json(msg=f"{what}; memconsole handoff report says what is known", **found)
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
